"""Lines for whoever looks on. That nobody does any more, since a terminal was closed or a pipe has no reader, ends no
run: its files say the same.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TextIO

NOBODY = (errno.EIO, errno.EPIPE)


def show(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once, on stdout unless told."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError as fault:
        if fault.errno not in NOBODY:
            raise
        turn_away(stream)


def turn_away(stream: TextIO) -> None:
    """From here on, and with what it still holds back, what is written to the stream goes nowhere."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
