"""The launchers that a rank hangs from: processes whose end means that nobody waits for the rank any more.

    launch.run -> deepspeed (runner) -> launch.py -> rank          torchrun -> rank

What deepspeed 0.19.8 leaves behind makes this necessary: SIGTERM or SIGUSR1 to the runner orphans launch.py and all
ranks, SIGKILL of launch.py orphans the ranks. A queue of ablations is no launcher: its runs may outlive it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil

MODULES = ("deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "launch.run")
OWN_LAUNCHER = "MOELAB_LAUNCHER"  # environment variable: the process id of launch.run, for ranks on its machine
SCRIPTS = ("deepspeed", "torchrun")  # what pip installs for the second and the third


def launchers_above(process: psutil.Process | None = None) -> dict[str, psutil.Process]:
    """The unbroken line of launchers above this process, by name, the nearest first.

    A psutil.Process knows when it was created, so a later process with the same id is not taken for it.
    """
    found: dict[str, psutil.Process] = {}
    try:
        parent = (process or psutil.Process()).parent()
        while parent is not None and (name := launcher_name(parent.cmdline())) is not None:
            found[name] = parent
            parent = parent.parent()
    except psutil.Error:  # it ended while we looked, and those above it cannot be found any more
        pass
    return found


def own_launcher(variables: Mapping[str, str]) -> psutil.Process | None:
    """The launch.run that has started this rank, however it was started itself; None if it is gone."""
    try:
        return psutil.Process(int(variables[OWN_LAUNCHER]))
    except psutil.NoSuchProcess:
        return None


def launcher_name(command_line: list[str]) -> str | None:
    """Which launcher this command line starts; None for any other program, a shell with such a line in it included."""
    if not command_line or not Path(command_line[0]).name.startswith("python"):
        return None
    rest = iter(command_line[1:])
    for argument in rest:
        if argument in ("-m", "-c"):
            text = next(rest, "")
            names = (name for name in MODULES if text == name or (argument == "-c" and name in text))
            return next(names, None)
        if argument in ("-W", "-X"):
            next(rest, "")
        elif not argument.startswith("-"):
            return Path(argument).name if Path(argument).name in SCRIPTS else None
    return None


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
