"""A stand-in for train.py that needs no torch: ranks that end in the way that FAKE_END names, and note who they are."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from launch.begin import begin_or_exit, say_refusal
from launch.run_dir import EXIT_CODES, EXIT_REFUSED
from launch.run_log import RunLog
from model.config import DataError


def main() -> int:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    start, end = begin_or_exit(), os.environ["FAKE_END"]
    notes, me = Path(os.environ["FAKE_NOTES"]), psutil.Process()
    family = [process.pid for process in (me, *me.parents()[:2]) if os.getsid(process.pid) == os.getsid(me.pid)]
    (notes / f"rank{start.rank}").write_text(" ".join(map(str, family)))
    while len(list(notes.glob("rank*"))) < start.topology.ranks:  # as train.py's ranks meet, before one of them fills
        time.sleep(0.05)  # the run folder, which the others have looked at by then
    if end == "refuse":
        say_refusal(DataError("run.data.train=nowhere: no token files."), start.rank, start.args)
        return EXIT_REFUSED

    log = RunLog(start.args.run_dir, start.run, resumed_step=0, total_steps=10, enabled=start.rank == 0, environment={})
    if end == "complete" and start.rank == 1:  # a worker that forgets to end, in a session of its own
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        (notes / "worker").write_text(str(worker.pid))
    for step in range(1, 600):
        log.log(step, {"train/loss": 1.0})
        time.sleep(0.25)
        if end == "crash" and step == 4:
            os._exit(7)
        if end == "complete" and step >= 8 and (notes / "worker").exists():
            log.finish("completed", "all steps done", {})
            os._exit(6)  # as when gloo aborts at exit, after the work is done
        if asked and end == "never":
            (notes / f"asked{start.rank}").touch()
        if end == "never" and start.rank == 0 and start.args.stop_file is not None and start.args.stop_file.exists():
            for rank in range(start.topology.ranks):
                (notes / f"asked{rank}").touch()
        if end == "one crashes" and start.rank == 1 and step >= 4 and (start.args.run_dir / "metrics.jsonl").exists():
            (start.args.run_dir / "rank1.err").write_text("Traceback")
            os._exit(7)
        if len(list(notes.glob("asked*"))) == 2:  # as train.py, whose ranks agree to stop
            time.sleep(1.5 * start.rank)  # rank 1 takes longer to save
            log.finish("stopped", "asked by a signal", {"step": step})
            return EXIT_CODES["stopped"]
    raise AssertionError("nobody ended this run")


if __name__ == "__main__":
    sys.exit(main())
