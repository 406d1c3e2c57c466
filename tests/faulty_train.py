"""train.py for tests: the real program as a launcher runs it, that meets the faults of a plan (tests/faults.py)."""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # as for train.py: not the folder of this file
    from tests import faults

    faults.install(int(os.environ.get("RANK", "0")))
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
