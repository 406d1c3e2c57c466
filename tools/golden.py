"""Golden losses: a few short runs whose numbers are committed, so that a change that moves one is seen and explained.

    python -m tools.golden --check           run every case and compare it with tests/golden/NAME.json
    python -m tools.golden --record [NAME]   write those files anew; the commit says why the numbers moved

Exit codes: 0 as recorded (or written), 1 a number moved or a run failed, 2 refused. A case is ds_configs/moe_tiny.json
with the changes in CASES, on one CPU rank with one thread and synthetic data, through train.py's own main().
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.begin import begin_or_exit
from launch.command_line import OneLineParser
from launch.environment import cpu_model, package_versions
from launch.run_config import REPO_ROOT
from launch.run_dir import EXIT_COMPLETED, EXIT_REFUSED, read_json_object, write_text
from model.config import ConfigError

BASE = REPO_ROOT / "ds_configs" / "moe_tiny.json"
GOLDEN_DIR = REPO_ROOT / "tests" / "golden"
METRICS = ("train/loss", "train/aux_loss", "train/grad_norm", "val/loss")
EXIT_MOVED = 1
COMMON = ("run.train.num_steps=8", "run.train.eval_every=4", "run.launch.num_gpus=1")
CASES = {  # changes to BASE, as --set takes them
    "moe": (),
    "moe_bf16": ("bf16.enabled=true",),
    "moe_fp8": ("run.fp8.enabled=true", "run.fp8.dense=true", "run.fp8.lm_head=true"),
    "moe_top1": ("run.model.moe.top_k=1", "run.model.moe.capacity_factor=1.0"),
    "moe_dropless": ("run.model.moe.capacity_factor=0", "run.model.moe.aux_loss_coeff=0.5"),
    "moe_biased": (
        "run.model.moe.num_experts=8",
        "run.model.moe.top_k=4",
        "run.model.moe.num_groups=4",
        "run.model.moe.top_k_groups=2",
        "run.model.moe.num_shared_experts=1",
        "run.model.moe.score_func=sigmoid",
        "run.model.moe.routed_scaling_factor=2.5",
        "run.model.moe.drop_policy=probability",
        "run.model.moe.balance=bias",
        "run.model.moe.bias_update_rate=0.001",
        "run.model.moe.aux_loss_coeff=0.01",
        "run.model.moe.aux_loss_scope=sequence",
        "run.model.moe.z_loss_coeff=0.01",
    ),
    "dense": (
        "run.model.moe=null",
        "run.model.ffn_hidden_size=64",
        "run.model.activation=swiglu",
        "run.model.num_kv_heads=1",
        "run.model.norm_affine=true",
        "run.model.logit_softcap=15",
        "run.model.tie_embeddings=true",
        "run.launch.ep_size=1",
    ),
}

# Relative distance from the record that is still the same number. With the CPU and the packages of the record two runs
# are equal bit for bit, so there it only forgives a reordered sum. Elsewhere vectors of other widths round differently:
# fp32 losses move by 1e-7, until a router score lies so near a tie that a token goes elsewhere; then the gradient norm
# moves by 1e-3 (measured: AVX2 against ATen, oneDNN and MKL held to SSE). That is no fault; a wrong formula moves more.
TOLERANCE_OF_THE_SAME_CPU = 1e-6
TOLERANCE_ELSEWHERE = 1e-2

Steps = list[dict[str, float]]


@dataclass(frozen=True)
class Difference:
    """One number of a golden run. None: it is not there, in the record or in the run."""

    metric: str
    step: int
    recorded: float | None
    now: float | None

    @property
    def relative(self) -> float:
        if self.recorded is None or self.now is None:
            return float("inf")
        return abs(self.now - self.recorded) / max(abs(self.recorded), 1e-30)


class RunFailed(RuntimeError):
    """A golden run did not complete. The message is what it printed."""


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        return record(args.names) if args.record else check(args.names)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except RunFailed as error:
        print(error, file=sys.stderr)
        return EXIT_MOVED


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m tools.golden", description="Compare short runs with committed numbers.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="run and compare; exit code 1 if a number moved")
    action.add_argument("--record", action="store_true", help="run and write the golden files")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases (default: all): {', '.join(CASES)}")
    args = parser.parse_args(argv)
    args.names = args.names or list(CASES)
    for name in args.names:
        if name not in CASES:
            parser.error(f"no golden case is named {name}. Use {', '.join(CASES)}")
    return args


def record(names: list[str]) -> int:
    """Run the cases and write their files."""
    for name in names:
        steps = run_case(CASES[name])
        lines = ",\n  ".join(json.dumps(step) for step in steps)  # a line per step, so that a diff shows which moved
        head = json.dumps({"assignments": CASES[name], "recorded_with": this_machine()}, indent=1).removesuffix("\n}")
        write_text(golden_path(name), f'{head},\n "steps": [\n  {lines}\n ]\n}}\n')
        print(f"{golden_path(name)} written")
    return EXIT_COMPLETED


def check(names: list[str]) -> int:
    """Run the cases, print how far every metric lies from its record, and say what to do if one moved."""
    goldens = {name: read_golden(name) for name in names}  # refused before the first run
    machine, moved = this_machine(), []
    print(f"{'case':14}{'metric':18}{'largest rel. difference':>24}{'at step':>9}")
    for name, golden in goldens.items():
        same = golden["recorded_with"] == machine
        tolerance = TOLERANCE_OF_THE_SAME_CPU if same else TOLERANCE_ELSEWHERE
        differences = list(compare(golden["steps"], run_case(CASES[name])))
        for metric in METRICS:
            if found := [each for each in differences if each.metric == metric]:
                worst = max(found, key=lambda each: each.relative)
                verdict = "" if worst.relative <= tolerance else "MOVED"
                print(f"{name:14}{metric:18}{worst.relative:24.1e}{worst.step:9}  {verdict}".rstrip())
        over = [each for each in differences if not each.relative <= tolerance]
        if over:
            first = over[0]
            moved.append(
                f"{name}: first at step {first.step}, {first.metric}={first.now}, recorded {first.recorded} "
                f"(tolerance {tolerance:.0e}, {'the same' if same else 'another'} CPU and packages)"
            )
    if not moved:
        return EXIT_COMPLETED
    print("\n".join(moved))
    print(
        "Numbers moved. If this change should not move them, it has a fault. If it should: "
        "python -m tools.golden --record, and the commit says why."
    )
    return EXIT_MOVED


def compare(recorded: Steps, now: Steps) -> Iterator[Difference]:
    """Every number of either, in order of steps."""
    old, new = ({int(line["step"]): line for line in steps} for steps in (recorded, now))
    for step in sorted(old.keys() | new.keys()):
        before, after = old.get(step, {}), new.get(step, {})
        for metric in METRICS:
            if metric in before or metric in after:
                yield Difference(metric, step, before.get(metric), after.get(metric))


def golden_path(name: str) -> Path:
    return GOLDEN_DIR / f"{name}.json"


def read_golden(name: str) -> dict[str, Any]:
    """A golden file. Raises ConfigError if it is missing, or was recorded with other settings than CASES has now."""
    golden = read_json_object(golden_path(name))
    if golden is None:
        raise ConfigError(
            f"{golden_path(name)}: no such golden file. Record it: python -m tools.golden --record {name}."
        )
    if golden["assignments"] != list(CASES[name]):
        raise ConfigError(
            f"{golden_path(name)}: recorded with other settings than CASES[{name!r}]. "
            f"Record it anew: python -m tools.golden --record {name}."
        )
    return golden


def run_case(assignments: tuple[str, ...]) -> Steps:
    """The METRICS of every step of one run, in this process. Raises RunFailed."""
    prepare_process()
    import train

    with tempfile.TemporaryDirectory() as folder:
        run_dir, said = Path(folder) / "run", io.StringIO()
        options = ["--config", str(BASE), "--run_dir", str(run_dir), "--set", *COMMON, *assignments]
        with contextlib.redirect_stdout(said):
            code = train.main(begin_or_exit(options))
        if code != EXIT_COMPLETED:
            raise RunFailed(f"{said.getvalue()}The golden run {' '.join(assignments)} ended with exit code {code}.")
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("step", *METRICS) if key in line} for line in lines]


def this_machine() -> dict[str, str]:
    """What the last digits of a golden run depend on besides the code."""
    prepare_process()
    import torch

    versions = package_versions()
    return {
        "torch": versions["torch"],
        "deepspeed": versions["deepspeed"],
        "cpu": cpu_model(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }


def prepare_process() -> None:
    """One thread, since more would add in another order, and the CPU. Before torch is first imported."""
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")


if __name__ == "__main__":
    sys.exit(main())
