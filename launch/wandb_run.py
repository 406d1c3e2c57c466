"""What goes to Weights & Biases: a run, from rank 0 and beside its metrics.jsonl; a report, as tables and images."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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


# Of env.json: what decides whether the figures of two runs may be compared.
FACTS = ("commit", "dirty_hash", "devices", "cpu", "world_size", "packages", "data")


class WandbRun:
    """The run's W&B side. A failure is said once, with its reason; from then on it is off, and the run goes on.

    W&B's config is the resolved file and, as "env", the FACTS of the environment.
    """

    def __init__(
        self, run_dir: Path, run: Run, wandb_id: str, environment: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self.run: Any = None
        self.say = say
        self.failures: tuple[type[BaseException], ...] = (OSError, ValueError)
        if (mode := asked_mode(run.wandb.mode)) != "disabled":
            with self._off_after_failure():
                self._start(run_dir, run, wandb_id, environment, mode)

    def _start(self, run_dir: Path, run: Run, wandb_id: str, environment: dict[str, Any], mode: str) -> None:
        self.failures = wandb_failures()
        mode = mode_with_key(mode)
        forced = run.model.moe is not None and run.model.moe.force_balanced
        self.run = init(
            mode,
            run_dir,
            id=wandb_id,
            resume="allow" if mode == "online" else None,
            project=run.wandb.project,
            entity=run.wandb.entity,
            group=run.wandb.group,
            job_type=run.wandb.job_type,
            name=run.wandb.name or run_dir.name,
            tags=list(dict.fromkeys([*run.wandb.tags, *(["force_balanced"] if forced else [])])),
            config={**run.resolved, "env": {name: environment[name] for name in FACTS if name in environment}},
        )
        self.say(whereabouts(self.run, mode))

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
            self.say(f"W&B is off from here: {reason(error)}")


def log_report(
    tables: Mapping[str, tuple[list[str], list[list[Any]]]],
    images: Mapping[str, Path],
    *,
    project: str,
    folder: Path,
    entity: str | None = None,
    group: str | None = None,
    name: str | None = None,
    job_type: str = "report",
    tags: Sequence[str] = (),
    mode: str = "auto",
) -> str:
    """Log tables (columns, rows; None is an empty cell) and PNG files as one W&B run; returns a line that says where.

    `mode` is that of run.wandb; offline, the run is written to folder/wandb. Raises WandbFailure, whatever W&B raises.
    """
    mode = asked_mode(mode)
    if mode == "disabled":
        return "W&B: disabled; nothing is logged"
    failures = wandb_failures()
    try:
        import wandb

        content: dict[str, Any] = {
            title: wandb.Table(columns=[*columns], data=rows, allow_mixed_types=True)
            for title, (columns, rows) in tables.items()
        }
        content |= {title: wandb.Image(str(path)) for title, path in images.items()}
        mode = mode_with_key(mode)
        options = {"project": project, "entity": entity, "group": group, "name": name}
        run = init(mode, folder, **options, job_type=job_type, tags=list(tags))
        run.log(content)
        where = whereabouts(run, mode)
        run.finish()
    except failures as error:
        raise WandbFailure(reason(error)) from None
    return where


# --- what both need ---------------------------------------------------------------------------------------------------


class WandbFailure(RuntimeError):
    """W&B did not take what it was given; the message is one line."""


def wandb_failures() -> tuple[type[BaseException], ...]:
    """What wandb raises when it, its service or the network fails. Imports wandb."""
    found = (getattr(importlib.import_module(module), name) for module, name in WANDB_FAILURES)
    return (OSError, ValueError, *found)


def asked_mode(mode: str) -> str:
    """WANDB_MODE decides where the run file says auto."""
    return os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode


def mode_with_key(mode: str) -> str:
    """auto: online with a key, offline without. Raises wandb's AuthenticationError for online without a key."""
    import wandb  # half a second, and not needed by a run without it

    wandb.setup(wandb.Settings(silent=True))
    if mode == "auto":
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise wandb.errors.AuthenticationError("no API key; set WANDB_API_KEY, or run `wandb login`")
    return mode


def init(mode: str, folder: Path, **options: Any) -> Any:
    """wandb.init, quiet and with an end to its patience."""
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        save_code=False,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
    )
    return wandb.init(mode=mode, dir=folder, settings=settings, **options)  # type: ignore[arg-type]


def whereabouts(run: Any, mode: str) -> str:
    if mode == "online":
        return f"W&B: {run.url}"
    return f"W&B: offline; send it with `wandb sync {run.settings.sync_dir}`"


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
