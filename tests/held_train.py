"""train.py with a rank that is held at a phase, as a compiler would hold it: HOLD="RANK|PHASE|NTH|SECONDS".

The NTH time that RANK reaches PHASE it makes the file held<RANK> in the folder HOLD_NOTES, and sleeps. Once it is
there, nobody is held any more.
"""

import os
import time
from pathlib import Path

from launch.begin import begin_or_exit

if __name__ == "__main__":
    START = begin_or_exit()

import train
from model.phases import listeners

held_rank, held_phase, nth, seconds = os.environ["HOLD"].split("|")
reached = 0


def hold(phase: str) -> None:
    global reached
    reached += phase == held_phase
    note = Path(os.environ["HOLD_NOTES"]) / f"held{held_rank}"
    if phase == held_phase and reached == int(nth) and START.rank == int(held_rank) and not note.exists():
        note.touch()
        time.sleep(float(seconds))


if __name__ == "__main__":
    listeners.append(hold)
    train.end_process(train.main(START))
