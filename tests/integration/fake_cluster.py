"""Stand-ins for pdsh, ssh, srun and scontrol: two "nodes" that are sessions of their own on this machine.

As on real nodes, what runs there is no child of what started it, and what pdsh starts has a bare environment. Put on
PATH as scripts that call `python fake_cluster.py TOOL ARGUMENTS`. FAKE_CLUSTER names a folder: one file a session,
named by its id, that holds the exit code of what ran there once that has ended.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

FOLDER = Path(os.environ.get("FAKE_CLUSTER", "."))
OF_NODES = ("HOME", "FAKE_CLUSTER", "FAKE_END", "FAKE_NOTES")


def install(folder: Path) -> None:
    """Write the tools into `folder`, for PATH."""
    folder.mkdir()
    for tool in ("pdsh", "ssh", "srun", "scontrol"):
        script = folder / tool
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {tool} "$@"\n')
        script.chmod(0o755)


def start(command: list[str], environment: dict[str, str]) -> int:
    """Run a command in a session of its own, as nobody's child; return the session's id."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.setsid()
        session = os.getpid()
        (FOLDER / str(session)).touch()
        os.write(writing, str(session).encode())
        if os.fork() == 0:
            code = subprocess.call(command, env=environment)
            (FOLDER / str(session)).write_text(str(code % 256))
        os._exit(0)
    os.close(writing)
    session = int(os.read(reading, 100))
    os.waitpid(child, 0)
    return session


def members(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return found


def code_of(session: int) -> int | None:
    """Its exit code; 137 if it was killed whole; None while it runs."""
    ended = not members(session)  # before the file is read: a session writes it and then ends
    text = (FOLDER / str(session)).read_text()
    return int(text) if text else 137 if ended else None


def kill(session: int, pattern: str = "") -> None:
    for process in members(session):
        try:
            if re.search(pattern, " ".join(process.cmdline())):
                process.kill()
        except psutil.NoSuchProcess:
            continue


def pdsh(arguments: list[str]) -> int:
    hosts = arguments[arguments.index("-w") + 1].split(",")
    while arguments[0].startswith("-"):
        del arguments[: 1 if arguments[0] == "-S" else 2]
    command = " ".join(arguments)
    if killing := re.fullmatch(r"pkill -KILL -f '(.*)' \|\| true", command):
        for file in FOLDER.iterdir():
            kill(int(file.name), killing[1])
        return 0
    bare = {name: value for name, value in os.environ.items() if name in OF_NODES} | {"PATH": os.defpath}
    sessions = []
    for rank, host in enumerate(hosts):
        named = {"%n": str(rank), "%h": host, "%%": "%"}
        there = re.sub("%[nh%]", lambda found, named=named: named[found[0]], command)
        sessions.append(start(["sh", "-c", there], bare))
    while None in (codes := [code_of(session) for session in sessions]):
        time.sleep(0.2)
    return max(code for code in codes if code is not None)


def ssh(arguments: list[str]) -> int:
    print("127.0.0.1" if arguments[-1] == "-I" else "node")
    return 0


def scontrol(arguments: list[str]) -> int:
    assert arguments == ["show", "hostnames", "node[1-2]"]
    print("localhost\nnode2")
    return 0


def srun(arguments: list[str]) -> int:
    options = {}
    while arguments[0].startswith("--"):
        name, _, value = arguments.pop(0).removeprefix("--").partition("=")
        options[name] = value
    tasks, nodes = int(options["ntasks"]), int(options["nodes"])
    sessions = []
    signal.signal(signal.SIGTERM, lambda *_: [kill(session) for session in sessions])
    for task in range(tasks):
        step = {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_NUM_NODES": nodes}
        own = {"SLURM_PROCID": task, "SLURM_LOCALID": task % (tasks // nodes)}
        sessions.append(start(arguments, {**os.environ, **{name: str(value) for name, value in (step | own).items()}}))
    while None in (codes := [code_of(session) for session in sessions]):
        if any(codes) and options["kill-on-bad-exit"] == "1":
            time.sleep(1)  # Slurm asks with SIGTERM first
            for session in sessions:
                kill(session)
        time.sleep(0.2)
    return max(code for code in codes if code is not None)


if __name__ == "__main__":
    tool, *rest = sys.argv[1:]
    sys.exit({"pdsh": pdsh, "ssh": ssh, "srun": srun, "scontrol": scontrol}[tool](rest))
