"""One leg: train.py's own run of a run file, with two differences. No checkpoint is written (the seed's model takes
gigabytes and seconds), and summary.json keeps the time of every step.

Arguments are train.py's. Each leg has a process of its own: memory, compilation and the first step are then those of a
run, and a fault of the GPU ends one leg. Imports, once more for every leg, are the price.
"""

from __future__ import annotations

from launch.begin import begin_or_exit
from tools.gpu_check.child import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    START = begin_or_exit()

from typing import Any

import train


class MeasuredTrainer(train.Trainer):
    """A Trainer that keeps times instead of weights."""

    def save(self) -> None:
        pass

    def figures(self, timed: bool = True) -> dict[str, Any]:
        found = super().figures(timed)
        if timed:
            found["step_ms"] = [1000 * seconds for seconds in self.timer.measured()]
        return found


if __name__ == "__main__":
    train.Trainer = MeasuredTrainer  # type: ignore[misc]
    train.end_process(train.main(START))
