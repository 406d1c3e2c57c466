"""What goes to Weights & Biases, from rank 0: the run beside its metrics.jsonl. The only file that writes there."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch.run_config import Run

FINISH_SECONDS = 20.0  # deepspeed 0.19.8 kills rank 0 thirty seconds after another rank has ended with an error
INIT_SECONDS = 30.0
# What wandb 0.31 raises and does not derive from its own Error: its service has died, or did not answer.
WANDB_FAILURES = (
    ("wandb.errors", "Error"),
    ("wandb.sdk.lib.service.service_token", "WandbServiceConnectionError"),
    ("wandb.sdk.lib.service.service_connection", "WandbApiFailedError"),
    ("wandb.sdk.mailbox.mailbox_handle", "HandleAbandonedError"),
    ("wandb.sdk.mailbox.mailbox_handle", "ServerResponseError"),
    ("wandb.sdk.mailbox.mailbox", "MailboxClosedError"),
)


class WandbRun:
    """The run's W&B side. A failure is said once, with its reason; from then on it is off, and the run goes on."""

    def __init__(self, run_dir: Path, run: Run, wandb_id: str, say: Callable[[str], None]) -> None:
        self.run: Any = None
        self.say = say
        self.failures: tuple[type[BaseException], ...] = (OSError, ValueError)
        mode = os.environ.get("WANDB_MODE", "auto") if run.wandb.mode == "auto" else run.wandb.mode
        if mode != "disabled":
            with self._off_after_failure():
                self._start(run_dir, run, wandb_id, mode)

    def _start(self, run_dir: Path, run: Run, wandb_id: str, mode: Any) -> None:
        import wandb  # half a second, and not needed by a run without it

        self.failures += tuple(getattr(importlib.import_module(module), name) for module, name in WANDB_FAILURES)
        wandb.setup(wandb.Settings(silent=True))
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        elif mode == "online" and not wandb.login(prompt=False, verify=False):
            raise wandb.errors.AuthenticationError("no API key; set WANDB_API_KEY, or run `wandb login`")
        forced = run.model.moe is not None and run.model.moe.force_balanced
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
        )
        self.run = wandb.init(
            mode=mode,
            id=wandb_id,
            resume="allow" if mode == "online" else None,
            dir=run_dir,
            project=run.wandb.project,
            entity=run.wandb.entity,
            group=run.wandb.group,
            job_type=run.wandb.job_type,
            name=run.wandb.name or run_dir.name,
            tags=list(dict.fromkeys([*run.wandb.tags, *(["force_balanced"] if forced else [])])),
            config=run.resolved,
            settings=settings,
        )
        self.say(
            f"W&B: {self.run.url}"
            if mode == "online"
            else f"W&B: offline; send it with `wandb sync {self.run.settings.sync_dir}`"
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        with self._off_after_failure():
            if self.run is not None:
                self.run.log(metrics, step=step)

    def finish(self, exit_code: int, figures: dict[str, Any]) -> None:
        with self._off_after_failure():
            if self.run is not None:
                self.run.summary.update(figures)
                self.run.finish(exit_code=exit_code)

    @contextlib.contextmanager
    def _off_after_failure(self) -> Iterator[None]:
        try:
            yield
        except self.failures as error:
            self.run = None
            self.say(f"W&B is off from here: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
