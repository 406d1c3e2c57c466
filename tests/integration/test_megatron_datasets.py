"""Datasets of megatron-core open here, and ours open there, with the same tokens and documents; theirs train a model.

An array that megatron-core returns looks into a memory map that ends with its dataset (reading it later crashes the
process), so every array is copied while the dataset is alive.
"""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.run_config import REPO_ROOT
from model.config import DataError
from model.data import TokenFile, TokenFileWriter
from ranks import RankPool, train_on_this_rank

TINY = REPO_ROOT / "ds_configs" / "moe_tiny.json"
DTYPES = [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64]  # all integers that megatron-core has a code for

Documents = list[list[list[int]]]  # sequences of tokens, by document
DOCUMENTS: Documents = [[], [[5, 6, 7, 0]], [[8], [9, 10], [0]], [], [[]], [[11, 0]], []]


@pytest.fixture(scope="module")
def megatron() -> Any:
    """megatron.core.datasets.indexed_dataset, imported here and not at collection: it takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformer Engine and Apex are not installed
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def write_theirs(megatron: Any, prefix: Path, documents: Documents, dtype: Any, **settings: Any) -> Path:
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, **settings)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_ours(prefix: Path, documents: list[list[int]], dtype: Any) -> Path:
    with TokenFileWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
    return prefix


def read_by_megatron(megatron: Any, prefix: Path) -> tuple[np.dtype, Documents]:
    dataset = megatron.IndexedDataset(str(prefix))
    sequences = [dataset[number].tolist() for number in range(len(dataset))]
    ends, dtype = dataset.document_indices.tolist(), np.dtype(dataset.index.dtype)
    return dtype, [sequences[first:last] for first, last in itertools.pairwise(ends)]


def flat(documents: Documents) -> list[int]:
    return [token for document in documents for sequence in document for token in sequence]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_megatron_writes_is_read_with_the_same_tokens_and_documents(
    megatron: Any, tmp_path: Path, dtype: Any
) -> None:
    documents = [*DOCUMENTS, [[int(np.iinfo(dtype).max)]]]
    theirs = TokenFile(write_theirs(megatron, tmp_path / "theirs", documents, dtype))
    assert theirs.dtype == np.dtype(dtype)
    assert (theirs.num_documents, theirs.num_tokens) == (len(documents), len(flat(documents)))
    assert theirs.tokens(0, theirs.num_tokens).tolist() == flat(documents)


def test_a_dataset_of_one_token_is_read_by_both(megatron: Any, tmp_path: Path) -> None:
    theirs = TokenFile(write_theirs(megatron, tmp_path / "theirs", [[[3]]], np.uint16))
    assert (theirs.num_documents, theirs.num_tokens, theirs.tokens(0, 1).tolist()) == (1, 1, [3])
    assert read_by_megatron(megatron, write_ours(tmp_path / "ours", [[3]], np.uint16))[1] == [[[3]]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_we_write_is_read_by_megatron_with_the_same_tokens_and_documents(
    megatron: Any, tmp_path: Path, dtype: Any
) -> None:
    documents = [[], [5, 6, 7, 0], [], [8, 0], [int(np.iinfo(dtype).max)]]
    found = read_by_megatron(megatron, write_ours(tmp_path / "ours", documents, dtype))
    assert found == (np.dtype(dtype), [[document] for document in documents])


def test_megatron_writes_the_same_bytes_as_we_do(megatron: Any, tmp_path: Path) -> None:
    documents = [[5, 6, 7, 0], [], [8, 0]]
    ours = write_ours(tmp_path / "ours", documents, np.uint16)
    theirs = write_theirs(megatron, tmp_path / "theirs", [[document] for document in documents], np.uint16)
    for suffix in (".bin", ".idx"):
        assert ours.with_suffix(suffix).read_bytes() == theirs.with_suffix(suffix).read_bytes()


def test_megatron_merges_its_datasets_with_ours(megatron: Any, tmp_path: Path) -> None:
    ours = write_ours(tmp_path / "ours", [[20, 0], [], [21, 22, 0]], np.uint16)
    theirs = write_theirs(megatron, tmp_path / "theirs", DOCUMENTS, np.uint16)
    builder = megatron.IndexedDatasetBuilder(f"{tmp_path}/both.bin", dtype=np.uint16)
    builder.add_index(str(theirs))
    builder.add_index(str(ours))
    builder.finalize(f"{tmp_path}/both.idx")
    both = TokenFile(tmp_path / "both")
    assert both.num_documents == len(DOCUMENTS) + 3
    assert both.tokens(0, both.num_tokens).tolist() == [*flat(DOCUMENTS), 20, 0, 21, 22, 0]


def test_what_is_not_a_stream_of_tokens_is_refused(megatron: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"floats\.idx has dtype code 7 \(float32\), tokens are one of 1 uint8"):
        TokenFile(write_theirs(megatron, tmp_path / "floats", DOCUMENTS, np.float32))
    with pytest.raises(DataError, match=r"modes\.idx holds \d+ bytes, its header says \d+ "):  # a byte a sequence more
        TokenFile(write_theirs(megatron, tmp_path / "modes", DOCUMENTS, np.uint16, multimodal=True))


def test_datasets_of_megatron_are_trained_on_alone_and_blended(
    megatron: Any, tmp_path: Path, two_ranks: RankPool
) -> None:
    counting: Documents = [[[(first + step) % 500 for step in range(40)], [0]] for first in range(0, 2000, 7)]
    a = write_theirs(megatron, tmp_path / "a", counting, np.uint16)
    b = write_theirs(megatron, tmp_path / "b", counting[::-1], np.int32)
    short = ["run.train.num_steps=3", f"run.data.val={b}"]
    runs = {
        "alone": [f"run.data.train={a}", *short],
        "blended": [f"run.data.train={json.dumps([[3, str(a)], [1, str(b)]])}", *short],
    }
    losses = {}
    for name, changes in runs.items():
        assert two_ranks.run(train_on_this_rank, TINY, tmp_path / name, changes) == [0, 0]
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["train/loss"] for line in lines[1:]]
        assert lines[3]["val/loss"] < lines[0]["val/loss"]
        assert "val/bpb" not in lines[3], "nobody told how many bytes the text had"
    assert losses["alone"] != losses["blended"]
