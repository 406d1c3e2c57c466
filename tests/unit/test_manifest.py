"""The manifest of a checkpoint covers every element once, and a changed one is told from the one that was written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.config import CheckpointError
from model.manifest import (
    FORMAT,
    MANIFEST,
    DamagedCheckpoint,
    Manifest,
    RankFacts,
    TrainingState,
    hash_of_json,
    joined,
    read_manifest,
    verify_file,
    write_manifest,
)
from model.tensor_files import bytes_of, hash_of_file, open_tensors, write_tensors

STATE = TrainingState(
    step=3, samples=24, world_size=2, ep_size=1, zero_stage=1, config_hash="a", data_fingerprint="b", guard={"n": [1.5]}
)


def rank(number: int, *pieces: tuple[int, int], shape: tuple[int, ...] = (2, 5), steps: float = 3.0) -> RankFacts:
    """What a rank has saved of the tensor "w": pieces (start, numel)."""
    file = f"rank_{number:05d}.safetensors"
    stored = {"dtype": "F32", "pieces": [{"file": file, "start": start, "numel": numel} for start, numel in pieces]}
    return RankFacts.model_validate(
        {
            "file": file,
            "bytes": 7,
            "sha256": "0",
            "tensors": {"w": {"shape": list(shape), "kinds": {"weight": stored}}},
            "optimizer_steps": [steps],
        }
    )


def test_the_pieces_of_all_ranks_make_the_tensor_in_their_order() -> None:
    manifest = joined([rank(0, (6, 4)), rank(1, (0, 2), (2, 4))], STATE, "now")
    assert [(piece.file[9], piece.start) for piece in manifest.tensors["w"].kinds["weight"].pieces] == [
        ("1", 0),
        ("1", 2),
        ("0", 6),
    ]
    assert manifest.optimizer_steps == 3.0


@pytest.mark.parametrize(
    ("ranks", "why"),
    [
        ([rank(0, (0, 4)), rank(1, (5, 5))], r"w \(weight\) at element 4 of 10"),
        ([rank(0, (0, 6)), rank(1, (5, 5))], r"w \(weight\) at element 6 of 10"),
        ([rank(0, (0, 5))], r"w \(weight\) at element 5 of 10"),
        ([rank(0, (0, 10)), rank(1, (10, 1))], r"w \(weight\) at element 11 of 10"),
        ([rank(0, (0, 5)), rank(1, (5, 5), steps=2.0)], r"different numbers of updates: \[2.0, 3.0\]"),
    ],
)
def test_what_is_not_saved_exactly_once_is_no_checkpoint(ranks: list[RankFacts], why: str) -> None:
    with pytest.raises(RuntimeError, match=why):
        joined(ranks, STATE, "now")


def written(folder: Path) -> Manifest:
    manifest = joined([rank(0, (0, 10))], STATE, "now")
    write_manifest(folder, manifest)
    return manifest


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_a_manifest_with_any_character_changed_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / MANIFEST
    whole = path.read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        if _same_json(whole, bytes(changed)):
            continue  # white space
        with pytest.raises(CheckpointError, match=MANIFEST):
            read_manifest(tmp_path)


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "there is no manifest.json"),
        ("", "Expecting value"),
        ("[]", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ({"format": FORMAT}, "not as this version writes it"),
        (
            {"format": "moelab checkpoint 9"},
            "'moelab checkpoint 9', this version reads 'moelab checkpoint 1'",
        ),
    ],
    ids=["none", "empty", "a list", "deep", "another content", "a later version"],
)
def test_what_is_no_manifest_is_refused_by_name(tmp_path: Path, content: Any, why: str) -> None:
    if isinstance(content, dict):
        content = json.dumps({"sha256": hash_of_json(content), **content})
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=why):
        read_manifest(tmp_path)


def test_a_file_that_is_not_the_one_that_was_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.safetensors"
    size, sha256 = write_tensors(path, {"w": torch.arange(10.0)})
    facts = rank(0, (0, 10)).model_copy(update={"bytes": size, "sha256": sha256})
    verify_file(tmp_path, path.name, facts)
    whole = path.read_bytes()
    for changed, why in (
        (whole[:-1], rf"{size - 1} bytes instead of {size}"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "SHA-256"),
    ):
        path.write_bytes(changed)
        with pytest.raises(DamagedCheckpoint, match=why):
            verify_file(tmp_path, path.name, facts)
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match="No such file"):
        verify_file(tmp_path, path.name, facts)


def test_tensors_are_written_as_the_safetensors_package_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "tensors"
    tensors = {
        "bf16": torch.randn(3).bfloat16(),
        "fp64": torch.randn(2, 3, dtype=torch.float64),
        "transposed": torch.randn(4, 3).t(),
        "scalar": torch.tensor(2.0),
        "none": torch.empty(0, 4),
        "counts": torch.arange(5),
        "fp32": torch.randn(5),
    }
    size, sha256 = write_tensors(path, tensors)
    assert (size, sha256) == (path.stat().st_size, hash_of_file(path))
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor), name
        assert read[name].dtype == tensor.dtype
    with open_tensors(path) as file:
        assert torch.equal(file.get_slice("fp32")[1:3], tensors["fp32"][1:3])
    assert len(bytes_of(tensors["bf16"])) == 6


def test_a_file_of_another_kind_is_no_file_of_tensors(tmp_path: Path) -> None:
    (tmp_path / "pickle").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(CheckpointError, match="pickle: cannot be read"), open_tensors(tmp_path / "pickle"):
        pass
