"""The learning rate as a pure function of the step: a factor on the peak, so that a resumed run needs no state for it.

wsd        warm up, stay at 1, decay over the last decay_frac of the run: linearly, as half a cosine, or as 1-sqrt
           (Haegele et al., arXiv 2405.18392); linear without a warm-up is nanochat's "warmdown"
cosine     warm up, then half a cosine over all other steps
linear     warm up, then a straight line over all other steps
constant   warm up, then 1
"""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "wsd", "cosine", "linear"]
DecayShape = Literal["linear", "cosine", "1-sqrt"]


def lr_factor(
    step: int,
    *,
    num_steps: int,
    schedule: Schedule,
    warmup_steps: int,
    decay_frac: float,
    decay_shape: DecayShape = "linear",
    final_lr_frac: float = 0.0,
) -> float:
    """Factor on the peak learning rate for the update of `step` (from 0), in (0, 1].

    The decay would reach final_lr_frac at step num_steps, one after the last, so that every update moves. Where warm-up
    and decay overlap, as in a run cut short for a test, their factors multiply and the peak is not reached.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if schedule == "constant":
        return warmup
    if schedule == "wsd":
        decay_steps = decay_steps_of(num_steps, decay_frac)
        left = min(1.0, (num_steps - step) / decay_steps)
    else:
        decay_shape = "cosine" if schedule == "cosine" else "linear"
        left = min(1.0, (num_steps - step) / max(1, num_steps - warmup_steps))
    return warmup * (final_lr_frac + (1 - final_lr_frac) * decayed(left, decay_shape))


def decay_steps_of(num_steps: int, decay_frac: float) -> int:
    """Steps that a wsd schedule decays over."""
    return max(1, round(decay_frac * num_steps))


def decayed(left: float, shape: DecayShape) -> float:
    """From 1 to 0 while the part of the decay that is left goes from 1 to 0."""
    if shape == "linear":
        return left
    if shape == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    assert shape == "1-sqrt", shape
    return 1 - math.sqrt(1 - left)
