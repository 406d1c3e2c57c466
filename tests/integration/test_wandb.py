"""W&B, offline and broken: it records beside the run and never stops it."""

import contextlib
import json
import os
import signal
from pathlib import Path

import psutil
import pytest
import wandb
from PIL import Image

from launch.run_config import REPO_ROOT, Run, load_run
from launch.run_log import RunLog
from launch.wandb_run import WandbFailure, log_report


@pytest.fixture(autouse=True)
def without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))


def tiny(mode: str) -> Run:
    return load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json", [f"run.wandb.mode={mode}"])


def open_log(run_dir: Path, mode: str, resumed_step: int = 0) -> RunLog:
    return RunLog(run_dir, tiny(mode), resumed_step=resumed_step, total_steps=10, enabled=True, environment={})


@pytest.mark.parametrize(("forced", "tags"), [(True, ("a", "force_balanced")), (False, ("a",))])
def test_a_run_that_forces_the_load_is_tagged(tmp_path: Path, forced: bool, tags: tuple[str, ...]) -> None:
    settings = ["run.wandb.mode=offline", 'run.wandb.tags=["a"]', f"run.model.moe.force_balanced={str(forced).lower()}"]
    run = load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json", settings)
    log = RunLog(tmp_path / "run", run, resumed_step=0, total_steps=10, enabled=True, environment={})
    assert log.wandb.run.tags == tags
    log.finish("completed", "done", {})


def test_a_run_tells_wandb_its_group_and_its_job_type(tmp_path: Path) -> None:
    settings = ["run.wandb.mode=offline", "run.wandb.group=capacity", "run.wandb.job_type=leg"]
    run = load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json", settings)
    log = RunLog(tmp_path / "run", run, resumed_step=0, total_steps=10, enabled=True, environment={})
    assert (log.wandb.run.group, log.wandb.run.job_type) == ("capacity", "leg")
    log.finish("completed", "done", {})


TABLES = {"legs": (["leg", "tok/s"], [["a", 1.5], ["b", None], ["c", "not reached"]])}


def a_png(folder: Path) -> Path:
    Image.new("RGB", (2, 2)).save(folder / "loss.png")
    return folder / "loss.png"


def test_a_report_is_one_wandb_run_with_its_tables_and_images(tmp_path: Path) -> None:
    where = log_report(TABLES, {"loss": a_png(tmp_path)}, project="moelab", folder=tmp_path, group="capacity")
    assert where.startswith("W&B: offline; send it with `wandb sync")
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media")
    (table,) = media.glob("table/*.json")
    columns, rows = TABLES["legs"]
    assert json.loads(table.read_text()) == {"columns": columns, "data": rows}
    (image,) = media.glob("images/*.png")
    assert image.read_bytes() == (tmp_path / "loss.png").read_bytes()


def test_a_report_follows_wandb_mode_and_disabled_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert log_report(TABLES, {}, project="moelab", folder=tmp_path) == "W&B: disabled; nothing is logged"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["init", "key", "image"])
def test_a_report_that_wandb_does_not_take_fails_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def no_network(**_: object) -> None:
        raise wandb.errors.CommError("Network error\n(ConnectionError)")

    if broken == "init":
        monkeypatch.setattr(wandb, "init", no_network)
    said = {"init": "CommError: Network error .ConnectionError.$", "key": "no API key; set", "image": "no.png"}
    images = {"loss": tmp_path / "no.png"} if broken == "image" else {}
    with pytest.raises(WandbFailure, match=said[broken]):
        log_report(TABLES, images, project="m", folder=tmp_path, mode="online" if broken == "key" else "offline")
    assert wandb.run is None


def wandb_service() -> psutil.Process:
    return next(child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name())


def test_without_a_key_auto_means_offline_a_resumed_run_keeps_its_id_and_a_dead_service_is_said_once(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    first = open_log(run_dir, "auto")
    first.log(1, {"train/loss": 5.0})
    first.finish("stopped", "asked", {})
    second = open_log(run_dir, "auto", resumed_step=1)
    second.log(2, {"train/loss": 4.0})

    wandb_id = json.loads((run_dir / "env.json").read_text())["wandb_id"]
    records = sorted(path.name for path in (run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert records == [f"run-{wandb_id}.wandb"] * 2

    os.kill(wandb_service().pid, signal.SIGKILL)
    for step in range(3, 8):
        second.log(step, {"train/loss": 3.0})
    second.finish("completed", "done", {"peak_mem_mib": 1.0})
    assert (run_dir / "log.txt").read_text().count("W&B is off from here") == 1
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "completed"
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 7
    with contextlib.suppress(ConnectionResetError):  # else wandb's exit handler meets it
        wandb.teardown()


def test_online_without_a_key_says_so_and_the_run_goes_on(tmp_path: Path) -> None:
    log = open_log(tmp_path / "run", "online")
    log.log(1, {"train/loss": 5.0})
    log.finish("completed", "done", {})
    assert (
        "W&B is off from here: AuthenticationError: no API key; set WANDB_API_KEY"
        in (tmp_path / "run" / "log.txt").read_text()
    )


def test_disabled_starts_no_service_and_writes_no_folder(tmp_path: Path) -> None:
    open_log(tmp_path / "run", "disabled").finish("completed", "done", {})
    assert not (tmp_path / "run" / "wandb").exists()
