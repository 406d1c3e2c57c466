"""A run that trains on a blend and validates on several splits: what it records, and that it resumes exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from launch.run_config import REPO_ROOT
from ranks import RankPool, train_on_this_rank
from tools import prepare_data

TINY = REPO_ROOT / "ds_configs" / "moe_tiny.json"
NOT_A_RESULT = ("dt_ms", "tok_per_sec", "peak_mem", "time/")  # what may differ between equal runs


def prepared(folder: Path, words: str, *options: str) -> Path:
    texts = folder / f"{words} texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"{number} {words} " * (60 + number))
    arguments = ["--input", str(texts), "--out", str(folder / words), "--val_frac", "0.3", *options]
    assert prepare_data.main(arguments) == 0
    return folder / words


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if not any(word in key for word in NOT_A_RESULT)} for line in lines]


def test_a_blend_is_resumed_exactly_and_every_split_is_told_of_by_name(tmp_path: Path, two_ranks: RankPool) -> None:
    rivers = prepared(tmp_path, "rivers", "--vocab_size", "280")
    hills = prepared(tmp_path, "hills", "--tokenizer", str(rivers / "tokenizer.json"))
    blend = [[3, f"{rivers}/train"], [1, f"{hills}/train"]]
    options = [f"run.data.train={json.dumps(blend)}", "run.train.num_steps=4", "run.train.sample_tokens=4"]
    named = [*options, f"run.data.val.rivers={rivers}/val", f"run.data.val.hills={hills}/val", "run.train.eval_every=2"]
    whole, halves, mean = tmp_path / "whole", tmp_path / "halves", tmp_path / "mean"
    weighted = [*options, f"run.data.val={json.dumps([[3, f'{rivers}/val'], [1, f'{hills}/val']])}"]
    for run_dir, changes, code in (
        (whole, named, 0),
        (halves, [*named, "run.train.stop_at_step=2"], 3),
        (halves, named, 0),
        (mean, [*weighted, "run.train.stop_at_step=1"], 3),
    ):
        assert two_ranks.run(train_on_this_rank, TINY, run_dir, changes) == [code, code]

    lines = metrics(whole)
    assert metrics(halves) == lines
    assert lines[4]["val/loss"] < lines[0]["val/loss"]

    figures = [json.loads((folder / "manifest.json").read_text())["splits"]["val"] for folder in (rivers, hills)]
    tokens, num_bytes = ([each[unit] for each in figures] for unit in ("tokens", "bytes"))
    for line in (lines[0], lines[2], lines[4]):
        each = [line[f"val/{name}/loss"] for name in ("rivers", "hills")]
        nats = [loss * count for loss, count in zip(each, tokens, strict=True)]
        assert line["val/loss"] == pytest.approx(sum(nats) / sum(tokens))
        assert line["val/bpb"] == pytest.approx(sum(nats) / math.log(2) / sum(num_bytes))
        assert line["val/hills/bpb"] == pytest.approx(nats[1] / math.log(2) / num_bytes[1])
    assert metrics(mean)[0]["val/loss"] == pytest.approx(
        0.75 * lines[0]["val/rivers/loss"] + 0.25 * lines[0]["val/hills/loss"]
    )

    prints = json.loads((whole / "env.json").read_text())["data"]
    assert list(prints["train"]) == [f"{rivers}/train", f"{hills}/train"]
    assert list(prints["val"]) == ["rivers", "hills"]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["data"] == [[3.0, f"{rivers}/train"], [1.0, f"{hills}/train"]]
    assert "val/unigram_bpb" not in summary, "it belongs to one split"
    assert f"data: {hills}/train, 25.0% of the samples, " in (whole / "log.txt").read_text()
    assert "sample after step 4: 'The state of the Union" in (whole / "log.txt").read_text()
