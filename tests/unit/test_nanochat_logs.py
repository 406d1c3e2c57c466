"""Logs of nanochat, in the forms its versions and forks print, and what is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.nanochat_logs import read_nanochat_log
from launch.results import RunResult
from model.config import DataError

TOKENS = 524_288
HEADER = """\
GPU: NVIDIA H800 | Peak FLOPS (BF16): 7.56e+14
Vocab size: 32,768
Estimated FLOPs per token: 7.318000e+08
Calculated number of iterations from target data:param ratio: 4
Tokens / micro-batch / rank: 16 x 1024 = 16,384
Tokens / micro-batch: 131,072
Total batch size 524,288 => gradient accumulation steps: 4
"""
END = "Peak memory usage: 23429.12MiB\nTotal training time: 3.31m\nMinimum validation bpb: 1.2345\n"


def step_line(
    step: int, total: int, dt_ms: float = 487.1, loss: float = 4.5, tokens: int = TOKENS, more: str = ""
) -> str:
    """As nanochat's base_train prints it: tok/sec cut to an integer, dt rounded."""
    return (
        f"step {step:05d}/{total:05d} ({100 * step / total:.2f}%) | loss: {loss:.6f} | lrm: 1.00 | dt: {dt_ms:.2f}ms | "
        f"tok/sec: {int(1000 * tokens / dt_ms):,} | mfu: {13.0732 * 487.1 / dt_ms:.2f} | total time: 0.88m\n"
    )


def read(tmp_path: Path, text: str | bytes) -> RunResult:
    path = tmp_path / "bf16_static.log"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_nanochat_log(path)


# --- lines ----------------------------------------------------------------------------------------------------------


def test_a_line_of_step_n_is_our_step_n_plus_1_and_a_validation_keeps_its_number(tmp_path: Path) -> None:
    log = read(
        tmp_path,
        "Step 00000 | Validation bpb: 3.3013\n"
        + step_line(0, 2, loss=10.4)
        + step_line(1, 2, loss=9.25)
        + "Step 00002 | Validation bpb: 1.2345\n",
    )
    speed = {"train/dt_ms": 487.1, "train/tok_per_sec": 1_076_345.0, "train/mfu": 13.07}
    assert log.steps == [
        {"step": 0, "val/bpb": 3.3013},
        {"step": 1, "train/loss": 10.4, **speed},
        {"step": 2, "train/loss": 9.25, **speed, "val/bpb": 1.2345},
    ]
    assert log.name == "bf16_static"
    assert log.summary["loss_is_smoothed"] is True


@pytest.mark.parametrize(
    "line",
    [
        "step 00119/00360 (33.06%) | loss: 4.712345 | lrm: 1.00 | dt: 487.10ms | tok/sec: 1,076,345 | mfu: 13.02 | "
        "total time: 0.88m",
        "step 00119/00360 (33.06%) | loss: 4.712345 | grad norm: 0.1234 | lrm: 1.00 | dt: 487.10ms | "
        "tok/sec: 1,076,345 | mfu: 13.02 | total time: 0.88m",
        "step 00119/00360 (33.06%) | loss: 4.712345 | lrm: 1.00 | dt: 487.10ms | tok/sec: 1,076,345 | "
        "bf16_mfu: 13.02 | epoch: 1 pq: 0 rg: 12 | total time: 0.88m | eta: 1.9m",
        "step 00119 (33.06%) | loss: 4.712345 | lrm: 1.00 | dt: 487.10ms | tok/sec: 1,076,345 | mfu: 13.02 | epoch: 1",
        "step 00119/00360 | loss: 4.712345 | dt: 487.1ms | tok/sec: 1076345 | mfu: 13.02",
        "\x1b[1;32mstep 00119/00360\x1b[0m (33.06%) | loss: \x1b[33m4.712345\x1b[0m | dt: 487.10 ms | "
        "tok/sec: 1,076,345 | mfu: 13.02%",
        "[default0]:step 00119/00360 (33.06%) | loss: 4.712345 | dt: 487.10ms | tok/sec: 1,076,345 | mfu: 13.02",
        "33%|### | 119/360\rstep 00119/00360 | loss: 4.712345 | dt: 487.10ms | tok/sec: 1,076,345 | mfu: 13.02\r",
    ],
    ids=["first", "grad_norm", "bf16_mfu", "no_total", "sparse", "coloured", "prefixed", "carriage_returns"],
)
def test_every_form_of_a_step_line_is_read(tmp_path: Path, line: str) -> None:
    (step,) = read(tmp_path, line + "\n").steps
    assert step.pop("train/grad_norm", 0.1234) == 0.1234
    assert step == {
        "step": 120,
        "train/loss": 4.712345,
        "train/dt_ms": 487.1,
        "train/tok_per_sec": 1_076_345.0,
        "train/mfu": 13.02,
    }


def test_a_grad_norm_is_read(tmp_path: Path) -> None:
    (step,) = read(tmp_path, "step 00000/00360 (0.00%) | loss: 10.4 | grad norm: 0.1234 | dt: 487.10ms\n").steps
    assert step == {"step": 1, "train/loss": 10.4, "train/grad_norm": 0.1234, "train/dt_ms": 487.1}


def test_bytes_that_are_no_utf_8_do_no_harm(tmp_path: Path) -> None:
    text = b"The capital of France is \xff\xfe\x80 | Paris\n" + step_line(0, 2).encode()
    assert [step["step"] for step in read(tmp_path, text).steps] == [1]


def test_a_last_line_without_its_end_is_left_out(tmp_path: Path) -> None:
    whole, cut = step_line(0, 9), step_line(1, 9)[:60]
    assert [step["step"] for step in read(tmp_path, whole + cut).steps] == [1]


def test_a_loss_that_is_not_finite_is_none_as_in_metrics_jsonl(tmp_path: Path) -> None:
    log = read(tmp_path, step_line(0, 9) + step_line(1, 9, loss=float("nan")))
    assert [step["train/loss"] for step in log.steps] == [4.5, None]
    assert log.figure("train/loss") is None


# --- restarts, and what is refused ----------------------------------------------------------------------------------


def test_a_restart_replaces_the_steps_that_it_takes_again(tmp_path: Path) -> None:
    first = "".join(step_line(step, 9, loss=9.0) for step in range(6)) + END
    again = "Step 00003 | Validation bpb: 1.5\n" + step_line(3, 9, loss=8.0)
    log = read(tmp_path, first + again)
    assert [(step["step"], step["train/loss"]) for step in log.steps] == [(1, 9.0), (2, 9.0), (3, 9.0), (4, 8.0)]
    assert log.steps[2]["val/bpb"] == 1.5
    assert log.figure("peak_mem_mib") is None, "it is of the attempt that was given up"


def test_runs_of_different_length_in_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refusal:
        read(tmp_path, step_line(0, 360) + step_line(0, 280))
    assert str(refusal.value) == (
        f"{tmp_path}/bf16_static.log:2 is of a run of 280 steps, the lines above of one of 360. "
        "Give each run a file of its own."
    )


@pytest.mark.parametrize(
    "text", ["", HEADER, "Step 00000 | Validation bpb: 3.3013\n", "step 00001/00360 (0.28%) done\n"]
)
def test_a_file_without_a_step_line_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError) as refusal:
        read(tmp_path, text)
    assert str(refusal.value) == (
        f"{tmp_path}/bf16_static.log has no step line such as 'step 00119/00360 (33.06%) | loss: 4.712345 | "
        "dt: 487.10ms | ...'. Name the folder of a run, or what nanochat's base_train printed."
    )


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("step 1/9 | loss: 4.5step 2/9 | dt: 1.00ms\n", "loss is '4.5step 2/9', not a number"),
        ("step 1/9 | loss: | dt: 1.00ms\n", "loss is '', not a number"),
        ("step 1/9 | loss: 4.5 | dt: 0.49s\n", "dt is '0.49s', not a number of ms"),
    ],
)
def test_a_number_that_cannot_be_read_is_refused_with_its_line(tmp_path: Path, line: str, complaint: str) -> None:
    with pytest.raises(DataError) as refusal:
        read(tmp_path, step_line(0, 9) + line)
    assert str(refusal.value) == f"{tmp_path}/bf16_static.log:2: {complaint}. Mend the line, or leave it out."


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.log is no file"):
        read_nanochat_log(tmp_path / "none.log")


# --- summary --------------------------------------------------------------------------------------------------------


def test_the_tail_is_tokens_over_the_time_of_the_last_50_lines(tmp_path: Path) -> None:
    times = [9000.0] * 20 + [400.0 + 7.25 * i for i in range(50)]
    log = read(tmp_path, "".join(step_line(step, 70, dt_ms) for step, dt_ms in enumerate(times)))
    tail = times[-50:]
    assert log.summary["tail50_step_ms"] == tail
    assert log.summary["tail_steps"] == 50
    assert log.figure("tail50_dt_ms") == pytest.approx(sum(tail) / 50)
    # tokens from the lines: both roundings leave them within a few of 524,288
    assert log.figure("tokens_per_step") == pytest.approx(TOKENS, rel=2e-5)
    assert log.figure("tail50_tok_per_sec") == pytest.approx(50_000 * TOKENS / sum(tail), rel=2e-5)
    mean_of_rates = sum(1000 * TOKENS / dt_ms for dt_ms in tail) / 50
    assert log.figure("tail50_tok_per_sec") != pytest.approx(mean_of_rates, rel=0.01)
    # every mfu is of a step's time; over the tail it is that of the mean time. Printed with two digits of about 10
    assert log.figure("tail50_mfu") == pytest.approx(13.0732 * 487.1 * 50 / sum(tail), rel=1e-3)


def test_what_the_header_states_is_used(tmp_path: Path) -> None:
    log = read(tmp_path, HEADER + "".join(step_line(step, 4, 500.0 + step) for step in range(4)) + END)
    assert log.figure("tokens_per_step") == TOKENS
    assert log.figure("world_size") == 8
    assert log.figure("tail50_tok_per_sec_per_gpu") == pytest.approx(4000 * TOKENS / 2006 / 8, rel=1e-12)
    assert log.summary["device"] == "NVIDIA H800"
    assert (log.figure("peak_flops"), log.figure("flops_per_token")) == (756e12, 731.8e6)
    assert "MFU is against the peak, and by the FLOPs per token, that nanochat assumed" in log.summary["notes"]


def test_totals_are_read(tmp_path: Path) -> None:
    summary = read(tmp_path, step_line(0, 1) + END).summary
    assert (summary["peak_mem_mib"], summary["total_time_min"], summary["min_val_bpb"]) == (23429.12, 3.31, 1.2345)


def test_the_first_version_printed_the_rate_of_a_micro_step_and_that_is_set_right(tmp_path: Path) -> None:
    log = read(tmp_path, HEADER + "".join(step_line(step, 4, tokens=131_072) for step in range(4)))
    assert log.figure("tail50_tok_per_sec") == pytest.approx(1000 * TOKENS / 487.1)
    assert log.series("train/tok_per_sec")[1] == pytest.approx([1000 * TOKENS / 487.1] * 4)
    assert any("tok/s is that of the total batch size stated" in note for note in log.summary["notes"])


def test_rates_cut_to_an_integer_are_those_of_one_number_of_tokens(tmp_path: Path) -> None:
    log = read(tmp_path, "".join(step_line(step, 9, dt) for step, dt in enumerate([48920.81, 51250.2, 54317.11])))
    assert log.figure("tokens_per_step") == pytest.approx(TOKENS, rel=1e-4)
    slow = [(48920.81, 334), (51250.2, 319), (54317.11, 301)]  # of 16,384 tokens, where the cut is a third of a percent
    text = "".join(f"step {i} | loss: 9 | dt: {dt:.2f}ms | tok/sec: {rate}\n" for i, (dt, rate) in enumerate(slow))
    assert read(tmp_path, text).figure("tokens_per_step") == pytest.approx(16_384, rel=2e-3)


def test_steps_of_different_tokens_have_no_tail_throughput(tmp_path: Path) -> None:
    log = read(tmp_path, step_line(0, 4, tokens=TOKENS) + step_line(1, 4, tokens=TOKENS + 1024))
    assert log.figure("tail50_tok_per_sec") is None
    assert log.figure("tail50_dt_ms") == pytest.approx(487.1)
    assert any("differs from step to step" in note for note in log.summary["notes"])


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (step_line(0, 2) + step_line(1, 2) + END, "completed"),
        (step_line(0, 2) + step_line(1, 2), "unknown"),
        (step_line(0, 360) + step_line(1, 360) + END, "unknown"),
        ("".join(step_line(step, 1000) for step in range(0, 1000, 100)) + END, "completed"),
        ("step 00001 (50.00%) | loss: 4.5\n" + END, "unknown"),
    ],
    ids=["whole", "no_total_time", "last_step_not_reached", "every_hundredth_line", "length_not_stated"],
)
def test_a_run_is_completed_only_if_the_log_says_so(tmp_path: Path, text: str, status: str) -> None:
    assert read(tmp_path, text).status == status


def test_what_a_log_lacks_is_absent(tmp_path: Path) -> None:
    summary = read(tmp_path, "step 00001/00360 (0.28%) | loss: 4.5\n").summary
    assert summary == {
        "status": "unknown",
        "loss_is_smoothed": True,
        "num_steps": 360,
        "step": 2,
        "train/loss": 4.5,
        "notes": ["a log of nanochat, whose loss is a moving average over about ten steps"],
    }


def test_what_nanochat_prints_as_0_without_measuring_it_is_absent(tmp_path: Path) -> None:
    """On a CPU it divides by an infinite peak and has no peak memory; its total time starts after eleven steps."""
    line = "step 00000/00001 (0.00%) | loss: 10.4 | dt: 1152.62ms | tok/sec: 14,214 | mfu: 0.00 | total time: 0.00m\n"
    log = read(tmp_path, line + "Peak memory usage: 0.00MiB\nTotal training time: 0.00m\n")
    assert "train/mfu" not in log.steps[0]
    assert not {"tail50_mfu", "peak_mem_mib", "total_time_min"} & log.summary.keys()


def test_a_tail_with_the_first_steps_or_with_gaps_says_so(tmp_path: Path) -> None:
    early, apart = "the steps of its tail figures include the first", "its lines are more than one step apart"

    def notes(steps: range) -> str:
        return "; ".join(read(tmp_path, "".join(step_line(step, 9000) for step in steps)).summary["notes"])

    assert early in notes(range(30))
    assert apart not in notes(range(30))
    assert early not in notes(range(70))
    assert apart in notes(range(0, 9000, 100))
