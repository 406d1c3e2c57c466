"""Splits that do not fit the model or each other are refused, by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from model.config import DataError, ModelConfig
from model.data import TokenFileWriter
from model.splits import Data, open_data
from tools import prepare_data

MODEL = ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, seq_len=4, vocab_size=300)


def opened(train: str, val: str | None, model: ModelConfig = MODEL) -> Data:
    return open_data(train, val, model, seed=0, micro_batch_size=1, rank=0, world_size=1)


def prepared(folder: Path, words: str) -> Path:
    texts = folder / f"{words} texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"{number} {words} " * 40)
    out = folder / words
    arguments = ["--input", str(texts), "--out", str(out), "--vocab_size", "270", "--val_frac", "0.3"]
    assert prepare_data.main(arguments) == 0
    return out


def test_a_prepared_dataset_brings_its_tokenizer_and_figures(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "rivers")
    data = opened(f"{folder}/train", f"{folder}/val")
    assert data.train.tokenizer is not None
    assert data.train.tokenizer.decode(data.train.tokenizer.encode("rivers")) == "rivers"
    assert data.val is not None
    assert data.val.figures["bytes"] > 0


def test_splits_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    first, second = prepared(tmp_path, "rivers"), prepared(tmp_path, "mountains")
    with pytest.raises(
        DataError, match=r"run\.data\.val=.*mountains/val: has another tokenizer than run\.data\.train="
    ):
        opened(f"{first}/train", f"{second}/val")


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "rivers")
    with pytest.raises(DataError, match=r"its tokenizer has 270 tokens, run\.model\.vocab_size is 260"):
        opened(f"{folder}/train", None, MODEL.model_copy(update={"vocab_size": 260}))


def test_a_manifest_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "rivers")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["tokenizer"]["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json: does not describe its tokenizer"):
        opened(f"{folder}/train", None)


def test_a_foreign_pair_is_read_and_its_ids_are_checked(tmp_path: Path) -> None:
    with TokenFileWriter(tmp_path / "foreign", np.uint16) as writer:
        writer.add_document(np.array([5, 299, 7, 1, 2, 3, 4, 5, 6]))
    assert opened(f"{tmp_path}/foreign", None).train.tokenizer is None
    with pytest.raises(DataError, match=r"holds the id 299, run\.model\.vocab_size is 299\. Raise it to at least 300"):
        opened(f"{tmp_path}/foreign", None, MODEL.model_copy(update={"vocab_size": 299}))
