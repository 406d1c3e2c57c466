"""A part of tools/gpu_check whose cases do what parts do at their worst. Its process imports no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from tools.gpu_check.child import Context

FOREVER_S = 600


def run(case: str, context: Context) -> None:
    context.add({"what": case, "pid": os.getpid()})
    match case.split()[0]:
        case "raises":
            raise RuntimeError("this case raises")
        case "loses":  # the GPU, as after an illegal address
            vars(sys.modules["__main__"])["device_answers"] = lambda: False
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        case "leaves":
            sys.exit("this case leaves")  # no fault that a part would keep
        case "killed":
            print("the last that it said", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hangs":
            other = subprocess.Popen(["sleep", str(FOREVER_S)], start_new_session=True)
            context.add({"what": "another process", "pid": other.pid})
            time.sleep(FOREVER_S)
        case "orphans":
            other = subprocess.Popen(["sleep", str(FOREVER_S)])
            context.add({"what": "another process", "pid": other.pid})
            os.kill(os.getpid(), signal.SIGKILL)
        case "wrong":
            context.add({"what": "a row", "error": "it is wrong"})
        case "elsewhere":
            context.add({"what": "a row", "absent": "it is elsewhere"})


def no_gpu(case: str, context: Context) -> None:
    context.add({"what": "environment", "gpus_visible": 0})
