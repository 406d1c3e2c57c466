"""What this process is doing: it says so at every phase of its work, and whoever has to know listens.

The listeners are what watches a rank for hangs, and in the tests what makes it fail at a phase of their choice.
"""

from __future__ import annotations

from collections.abc import Callable

listeners: list[Callable[[str], None]] = []


def reached(phase: str) -> None:
    """Tell the listeners, in the calling thread, that `phase` begins: "forward", "save: rename", ..."""
    for listener in listeners:
        listener(phase)
