"""A rank without torch, for test_rank_watch.py: `python watched_rank.py RANK RANKS RUN_DIR HANG_TIMEOUT COMMAND...`.

Ranks meet through files, then do what the commands say, one after another, and tell it on stdout.
"""

import json
import os
import sys
import time
from pathlib import Path

from launch.ancestors import launchers_above
from launch.rank_watch import RankWatch
from launch.run_dir import write_json

rank, ranks, run_dir = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
meeting = run_dir.parent / "meeting"


def gather(own):
    """What torch's all_gather_object does."""
    (meeting / f".{rank}").write_text(json.dumps(own))
    (meeting / f".{rank}").rename(meeting / f"{rank}")
    while len(list(meeting.glob("[0-9]*"))) < ranks:
        time.sleep(0.01)
    return [json.loads((meeting / str(other)).read_text()) for other in range(ranks)]


def finish(status, reason, figures):
    if rank == 0:
        write_json(run_dir / "summary.json", {"status": status, "reason": reason, **figures})


def tell(word):
    print(word, flush=True)


watch = RankWatch(rank, run_dir, launchers={**launchers_above()}, hang_timeout_s=float(sys.argv[4]) or None).start()
if rank == 0:
    write_json(run_dir / "summary.json", {"status": "running"})
for command in sys.argv[5:]:
    if command == "meet":
        watch.meet(gather, finish, collectives_block=True)
    elif command == "saved":
        watch.state_is_saved(lambda _: True)
    elif command == "never saved":
        watch.state_is_saved(lambda seconds: time.sleep(seconds) or False)
    elif command == "broken save":
        watch.state_is_saved(lambda _: 1 / 0)
    elif command == "failed save":
        watch.state_is_saved(lambda _: False)
        tell("reached failed save")
    elif command == "boundary":  # until the watch knows of a request
        while not watch.is_asked():
            time.sleep(0.01)
        watch.stand_by()
        tell(f"agreed: {watch.asked}")
    elif command == "watch fails":
        watch.launchers["launch.run"] = 0  # type: ignore[assignment]
    elif command == "start slowly":
        time.sleep(1)
    elif command == "wait":
        tell("waiting")
        time.sleep(600)
    elif command == "compute":  # as a compiler: python code that no signal interrupts
        tell("computing")
        while True:
            sum(range(10_000))
    elif command == "await request":
        while watch.asked is None:
            time.sleep(0.01)
    elif command == "end":
        watch.claim_end()
        finish("completed", "done", {})
        tell("ended")
        time.sleep(1)
    elif command == "fault":
        watch.claim_end(fault=True)
        finish("failed", "a fault", {})
        os._exit(4)
    else:
        watch.reached(command)
        tell(f"reached {command}")
os._exit(0)
