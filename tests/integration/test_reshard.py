"""tools.reshard: a checkpoint in other files, bit for bit, from which a run continues; a damaged one is refused."""

import json
import shutil
from pathlib import Path

import pytest
from test_train import metrics, train

from model.manifest import MANIFEST, read_manifest
from tools.reshard import main


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with split experts, stopped after three steps."""
    folder = tmp_path_factory.mktemp("reshard") / "run"
    train(2, folder, "--set", "run.train.stop_at_step=3", "run.launch.ep_size=2")
    return folder


def test_a_run_continues_from_a_checkpoint_in_other_files(run_dir: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        shutil.copytree(run_dir, folder)
    checkpoint = parts / "checkpoints" / "step_00000003"
    assert (
        main([str(parts), "--out", str(tmp_path / "new"), "--ranks", "4", "--ep_size", "2", "--zero_stage", "2"]) == 0
    )
    shutil.rmtree(checkpoint)
    shutil.move(tmp_path / "new", checkpoint)
    manifest = read_manifest(checkpoint)
    assert sorted(manifest.files) == [f"rank_{rank:05d}.safetensors" for rank in range(4)]
    assert (manifest.state.world_size, manifest.state.ep_size, manifest.state.zero_stage) == (4, 2, 2)
    sizes = [facts.bytes for facts in manifest.files.values()]
    assert max(sizes) < 1.1 * min(sizes)
    for folder in (whole, parts):
        assert train(1, folder).returncode == 0
    assert metrics(whole) == metrics(parts)


def test_checking_tells_of_a_whole_and_of_a_damaged_checkpoint(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000003"
    assert main([str(tmp_path / "run")]) == 0
    assert f"{checkpoint}: whole; step 3, 18 tensors" in capsys.readouterr().out

    path = checkpoint / "rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for arguments in ([str(checkpoint)], [str(checkpoint), "--out", str(tmp_path / "new"), "--ranks", "1"]):
        assert main(arguments) == 2
        assert f"DamagedCheckpoint: {path}: is damaged (SHA-256" in capsys.readouterr().err
    assert not list(tmp_path.glob("*new*"))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--ranks", "3", "--ep_size", "2"], "--ep_size 2 does not divide --ranks 3"),
        (["--ranks", "8", "--ep_size", "8"], "--ep_size 8 does not divide the 4 experts of blocks"),
        (["--ranks", "0"], "--ranks 0"),
    ],
)
def test_a_topology_that_cannot_be_is_refused_and_nothing_is_written(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    assert main([str(run_dir), "--out", str(tmp_path / "new"), *arguments]) == 2
    assert why in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_checkpoint_is_refused(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for source, why in (
        (tmp_path / "nowhere", "there is no such folder"),
        (tmp_path / "run", "names no checkpoint"),
        (tmp_path, f"there is no {MANIFEST}"),
    ):
        assert main([str(source)]) == 2
        assert why in capsys.readouterr().err
    assert main([str(run_dir), "--out", str(tmp_path), "--ranks", "1"]) == 2
    assert "exists. Name a new folder." in capsys.readouterr().err
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "stopped"
