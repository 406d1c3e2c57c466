"""What was measured, in memory and on disk: gpu_check.json and the table that is made from it alone."""

from __future__ import annotations

import os
import platform
import shlex
import time
from pathlib import Path
from typing import Any

from launch.environment import cpu_model, describe_checkout, package_versions, utc_now
from launch.run_config import REPO_ROOT
from launch.run_dir import write_json, write_text
from tools.gpu_check.parts import Part
from tools.gpu_check.tables import markdown
from tools.gpu_check.targets import judge
from tools.gpu_check.watch import Cases

SCHEMA = 1
JSON_NAME, TABLE_NAME = "gpu_check.json", "gpu_check.md"
SAVE_EVERY_S = 2.0
VARIABLES = ("CUDA_", "CUBLAS_", "NVIDIA_TF32", "PYTORCH_", "TORCH", "TRITON_", "OMP_")  # of those without a path


class Results:
    """The content of gpu_check.json, saved whenever something new is known."""

    def __init__(self, out: Path, arguments: list[str], minutes: float, dry_run: bool, commit: str | None) -> None:
        self.out, self.dry_run, self.saved_at = out, dry_run, 0.0
        shown = [each for each in arguments if each != str(out)]
        if "--out" in shown:
            shown.insert(shown.index("--out") + 1, "DIR")
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "tool": "gpu_check",
            "status": "running",
            "dry_run": dry_run,
            "env": {
                "command": shlex.join(["python", "-m", "tools.gpu_check", *shown]),
                "date": utc_now(),
                **({"commit": commit, "commit_stated": True} if commit else describe_checkout(REPO_ROOT)),
                "packages": package_versions(),
                "python": platform.python_version(),
                "cpu": cpu_model(),
                "cores": len(os.sched_getaffinity(0)),
                "load_before": os.getloadavg()[0],
                "variables": {
                    name: value
                    for name, value in sorted(os.environ.items())
                    if name.startswith(VARIABLES) and "/" not in value
                },
            },
            "minutes": minutes,
            "parts": {},
            "targets": [],
        }
        out.mkdir(parents=True, exist_ok=True)

    def plan(self, part: Part) -> None:
        """Before anything runs, all is not reached."""
        entry = {"status": "not reached", "why": "the check ended before it", "seconds": None, "begun_at": None}
        cases: Cases = {name: {**entry, "rows": []} for name in part.cases}
        self.content["parts"][part.name] = {"title": part.title, "status": "not reached", "cases": cases}

    def cases(self, part: Part) -> Cases:
        return self.content["parts"][part.name]["cases"]

    def begin(self, part: Part, seconds: float) -> None:
        self.content["parts"][part.name] |= {"status": "running", "limit_s": round(max(0.0, seconds), 1)}

    def end(self, part: Part, seconds: float) -> None:
        entry = self.content["parts"][part.name]
        for case in entry["cases"].values():
            if case["status"] == "running":  # interrupted
                case |= {"status": "not reached", "why": "the check was interrupted during it"}
        entry |= {"status": status_of(entry["cases"]), "seconds": round(seconds, 1)}
        if part.name == "environment":
            for row in entry["cases"]["gpu"]["rows"]:
                self.content["env"] |= {name: value for name, value in row.items() if name not in ("what", "note")}
        self.save()

    def gpus_visible(self) -> int | None:
        """None if that could not be found out."""
        return self.content["env"].get("gpus_visible")

    def finish(self, status: str) -> None:
        self.content["status"] = status
        self.content["ended"] = utc_now()
        self.save()

    def save_if_due(self) -> bool:
        """Whether it was: not for every row of many that come at once."""
        due = time.monotonic() - self.saved_at > SAVE_EVERY_S
        if due:
            self.save()
        return due

    def save(self) -> None:
        self.saved_at = time.monotonic()
        self.content["targets"] = judge(self.content)
        presented = presentable(self.content)
        write_json(self.out / JSON_NAME, presented)
        write_text(self.out / TABLE_NAME, markdown(presented))

    def is_complete(self) -> bool:
        """Whether every case came to its end. What this GPU, torch or checkout does not have, rows say."""
        cases = [case for part in self.content["parts"].values() for case in part["cases"].values()]
        return all(case["status"] == "measured" for case in cases)

    def lines(self, part: Part) -> list[str]:
        """For the screen."""
        cases = self.content["parts"][part.name]["cases"]
        return [": ".join(filter(None, (name, case["status"], case["why"]))) for name, case in cases.items()]

    def summary(self) -> str:
        statuses = [case["status"] for part in self.content["parts"].values() for case in part["cases"].values()]
        counted = [f"{statuses.count(status)} {status}" for status in ("measured", "failed", "not reached")]
        return f"{', '.join(counted)}{' (dry run, no measurement)' if self.dry_run else ''}"


def status_of(cases: Cases) -> str:
    statuses = [case["status"] for case in cases.values()]
    kinds = dict.fromkeys(statuses)
    return statuses[0] if len(kinds) == 1 else ", ".join(f"{statuses.count(kind)} {kind}" for kind in kinds)


def presentable(content: dict[str, Any]) -> dict[str, Any]:
    """Without the clock of this process, and with seconds that a person reads."""
    parts = {}
    for name, part in content["parts"].items():
        cases = {}
        for case, entry in part["cases"].items():
            kept = {key: value for key, value in entry.items() if key != "begun_at" and value is not None}
            if "seconds" in kept:
                kept["seconds"] = round(kept["seconds"], 1)
            if not kept["why"]:
                del kept["why"]
            cases[case] = kept
        parts[name] = {**part, "cases": cases}
    return {**content, "parts": parts}
