"""Splits that run.data names, alone, blended or by name: what they bring, and which do not fit together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from model import splits
from model.config import DataError, ModelConfig
from model.data import TokenFile, TokenFileWriter
from model.splits import Data, open_data
from tools import prepare_data

MODEL = ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, seq_len=4, vocab_size=300)


def opened(train: Any, val: Any, model: ModelConfig = MODEL) -> Data:
    return open_data(train, val, model, seed=0, micro_batch_size=1, rank=0, world_size=1)


def prepared(folder: Path, words: str, *vocabulary: str) -> Path:
    texts = folder / f"{words} texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"{number} {words} " * 40)
    out = folder / words
    arguments = ["--input", str(texts), "--out", str(out), "--val_frac", "0.3"]
    assert prepare_data.main([*arguments, *(vocabulary or ("--vocab_size", "270"))]) == 0
    return out


def test_a_prepared_dataset_brings_its_tokenizer_and_figures(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "rivers")
    data = opened(f"{folder}/train", f"{folder}/val")
    tokenizer = data.train.text_split.tokenizer
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("rivers")) == "rivers"
    assert data.val is not None
    assert data.val.splits[0].figures["bytes"] > 0


def test_splits_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    first, second = prepared(tmp_path, "rivers"), prepared(tmp_path, "mountains")
    with pytest.raises(
        DataError, match=r"run\.data\.val=.*mountains/val: has another tokenizer than run\.data\.train="
    ):
        opened(f"{first}/train", f"{second}/val")


def test_splits_that_end_documents_with_other_tokens_are_refused(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(prepared(tmp_path, "lakes") / "tokenizer.json"))
    tokenizer.add_special_tokens(["<b>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    given = ("--tokenizer", str(tmp_path / "tokenizer.json"))
    first, second = prepared(tmp_path, "rivers", *given), prepared(tmp_path, "mountains", *given, "--eod_token", "<b>")
    val = opened(f"{second}/train", f"{second}/val").val
    assert val is not None
    assert [split.eod_id for split in val.splits] == [270]
    with pytest.raises(
        DataError, match=r"val=.*mountains/val: ends documents with '<b>', .*rivers/train with '<\|endof"
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
    assert opened(f"{tmp_path}/foreign", None).train.text_split.tokenizer is None
    with pytest.raises(DataError, match=r"holds the id 299, run\.model\.vocab_size is 299\. Raise it to at least 300"):
        opened(f"{tmp_path}/foreign", None, MODEL.model_copy(update={"vocab_size": 299}))


def test_a_foreign_pair_with_a_negative_id_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "SCAN_TOKENS", 4)
    with TokenFileWriter(tmp_path / "foreign", np.int32) as writer:
        writer.add_document(np.array([5, 299, 7, 1, 2, -3, 4, 5, 6]))
    with pytest.raises(DataError, match=r"foreign: holds the id -3, ids count from 0\. Write it anew"):
        opened(f"{tmp_path}/foreign", None)


def test_ids_are_not_looked_for_where_the_dtype_has_none_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = TokenFile(foreign(tmp_path / "foreign", 41))
    assert splits.id_bounds(file, 2**16 - 1) == (0, 40)
    monkeypatch.setattr(TokenFile, "tokens", lambda *_: pytest.fail("the file was read"))
    assert splits.id_bounds(file, 2**16) == (0, 2**16 - 1)


def foreign(prefix: Path, num_tokens: int) -> str:
    with TokenFileWriter(prefix, np.uint16) as writer:
        writer.add_document(np.arange(num_tokens) % 299)
    return str(prefix)


def test_a_blend_reads_all_its_sources_each_from_a_shuffle_of_its_own(tmp_path: Path) -> None:
    a, b = foreign(tmp_path / "a", 41), foreign(tmp_path / "b", 41)
    train = opened([(1.0, a), (3.0, b)], None).train
    assert [split.key for split in train.splits] == ["run.data.train.0", "run.data.train.1"]
    assert [float(share) for share in train.shares] == [0.25, 0.75]
    assert train.epochs(80) == [2.0, 6.0]  # 10 samples an epoch
    numbers = np.arange(10)
    first, second = (samples.read(numbers).tolist() for samples in train.samples)
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_list_of_one_is_that_dataset_alone(tmp_path: Path) -> None:
    a = foreign(tmp_path / "a", 41)
    alone, listed = opened(a, None).train, opened([(0.3, a)], None).train
    assert listed.fingerprint == alone.fingerprint
    for first in range(25):
        assert listed.batches.micro_batch(first)[1].tolist() == alone.batches.micro_batch(first)[1].tolist()


def test_the_fingerprint_of_a_blend_covers_weights_and_sources(tmp_path: Path) -> None:
    a, b, c = (foreign(tmp_path / name, size) for name, size in (("a", 41), ("b", 42), ("c", 43)))
    blends = [[(1.0, a), (3.0, b)], [(1.0, a), (2.0, b)], [(1.0, a), (3.0, c)], [(3.0, b), (1.0, a)]]
    prints = [opened(blend, None).train.fingerprint for blend in blends]
    assert len(set(prints)) == 4
    assert all(len(each) == len("blend-") + 16 for each in prints)
    assert opened([(0.5, a), (1.5, b)], None).train.fingerprint == prints[0], "only shares count"


def test_fingerprints_are_told_for_every_source_by_its_name(tmp_path: Path) -> None:
    a, b = foreign(tmp_path / "a", 41), foreign(tmp_path / "b", 42)
    print_a, print_b = (opened(name, None).train.fingerprint for name in (a, b))
    assert opened(a, None).fingerprints() == {"train": print_a, "val": None, "tokenizer": None}
    several = opened([(1.0, a), (3.0, b)], {"web": b}).fingerprints()
    assert several == {"train": {a: print_a, b: print_b}, "val": {"web": print_b}, "tokenizer": None}


def test_a_source_of_a_blend_that_does_not_fit_is_refused_by_its_key(tmp_path: Path) -> None:
    a, b = foreign(tmp_path / "a", 300), foreign(tmp_path / "b", 4)
    with pytest.raises(DataError, match=r"b has 4 tokens, one sample of seq_len=4 needs 5"):
        opened([(1.0, a), (1.0, b)], None)
    small = MODEL.model_copy(update={"vocab_size": 298})
    with pytest.raises(DataError, match=r"^run\.data\.train\.1=.*a: holds the id 298, run\.model\.vocab_size is 298"):
        opened([(1.0, foreign(tmp_path / "c", 40)), (1.0, a)], None, small)
    with pytest.raises(DataError, match=r"^run\.data\.val\.web=.*a: holds the id 298"):
        opened(foreign(tmp_path / "d", 40), {"web": a}, small)


def test_tokenizers_of_all_sources_must_be_one(tmp_path: Path) -> None:
    first, second, plain = (
        prepared(tmp_path, "rivers"),
        prepared(tmp_path, "mountains"),
        foreign(tmp_path / "plain", 41),
    )
    with pytest.raises(DataError, match=r"^run\.data\.train\.2=.*mountains/train: has another tokenizer than run"):
        opened([(1.0, plain), (1.0, f"{first}/train"), (1.0, f"{second}/train")], None)
    with pytest.raises(DataError, match=r"^run\.data\.val\.b=.*mountains/val: has another .* than run\.data\.val\.a="):
        opened(plain, {"a": f"{first}/val", "b": f"{second}/val"})
    blended = opened([(1.0, plain), (1.0, f"{first}/train")], None)
    assert blended.train.text_split.name == f"{first}/train", "samples are written with the tokenizer that is known"


def test_validation_pools_named_splits_by_token_and_byte_and_tells_each(tmp_path: Path) -> None:
    folder, plain = prepared(tmp_path, "rivers"), foreign(tmp_path / "plain", 41)
    named = {"held-out": f"{folder}/val", "again": f"{folder}/train"}
    val = opened(f"{folder}/train", named).val
    assert val is not None
    size, other = (split.figures["bytes"] for split in val.splits)
    metrics = val.metrics([600.0, 300.0], [200.0, 60.0])
    assert metrics == pytest.approx(
        {
            "val/loss": 900 / 260,
            "val/bpb": 900 / math.log(2) / (size + other),
            "val/held-out/loss": 3.0,
            "val/held-out/bpb": 600 / math.log(2) / size,
            "val/again/loss": 5.0,
            "val/again/bpb": 300 / math.log(2) / other,
        }
    )

    unknown = opened(f"{folder}/train", {"held-out": f"{folder}/val", "plain": plain}).val
    assert unknown is not None
    assert set(unknown.metrics([600.0, 300.0], [200.0, 60.0])) == {
        "val/loss",
        "val/held-out/loss",
        "val/held-out/bpb",
        "val/plain/loss",
    }, "no val/bpb while the bytes of one split are not known"


def test_weighted_validation_is_the_weighted_mean_of_the_splits(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "rivers")
    val = opened(f"{folder}/train", [(3.0, f"{folder}/val"), (1.0, f"{folder}/train")]).val
    assert val is not None
    size, other = (split.figures["bytes"] for split in val.splits)
    assert val.metrics([600.0, 300.0], [200.0, 60.0]) == pytest.approx(
        {
            "val/loss": 0.75 * 3.0 + 0.25 * 5.0,
            "val/bpb": (0.75 * 600 / size + 0.25 * 300 / other) / math.log(2),
        }
    )


def test_a_single_split_is_validated_as_it_is(tmp_path: Path) -> None:
    val = opened(foreign(tmp_path / "a", 41), foreign(tmp_path / "b", 41)).val
    assert val is not None
    assert val.metrics([601.7], [201.0]) == {"val/loss": 601.7 / 201.0}
