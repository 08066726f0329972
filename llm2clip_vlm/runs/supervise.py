"""Runs a command that ends when the process that asked for it ends, whatever ends that.

`python supervise.py GRACE_S COMMAND ...` with a pipe as standard input, whose other end the asking
process holds and never writes to. When that is closed (by intent, or by the kernel after any
signal), the command and all that it has started, in whichever session, get SIGTERM, and SIGKILL
GRACE_S seconds later. It imports nothing of the package, so it costs a few milliseconds.

What the command has cost is written, as JSON, to the file that LLM2CLIP_VLM_COST names.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def main(grace_s: float, command: list[str]) -> int:
    """Run a command; its exit code is returned, its signal repeated."""
    with contextlib.suppress(OSError, AttributeError):  # Linux: this process inherits orphans below
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _pass)  # not for the command: a handler ends with exec
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while process.poll() is None:
        if select.select([sys.stdin], [], [], 0.1)[0]:
            _end(process, time.monotonic() + grace_s)
    code = process.returncode
    if cost := os.environ.get("LLM2CLIP_VLM_COST"):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        unit = 1 if sys.platform == "darwin" else 1024
        found = {
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
            "peak_memory_gb": round(used.ru_maxrss * unit / 1e9, 2),  # of the largest process
        }
        try:
            Path(cost).write_text(json.dumps(found) + "\n")
        except OSError:  # such as a full disk: the command's own words stay the last in its log
            code = code or 1
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _pass(number: int, frame: object) -> None:
    """Ignore the signal: closing the pipe ends the command."""


def _end(process: subprocess.Popen[bytes], deadline: float) -> None:
    alive = _signal_all(signal.SIGTERM)
    while alive:
        time.sleep(0.05)
        process.poll()
        alive = _signal_all(0 if time.monotonic() < deadline else signal.SIGKILL)


def _signal_all(number: int) -> bool:
    """Signal all processes below this one (0: none); return whether there are any."""
    import psutil

    alive = False
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive = True
                process.send_signal(number)
    return alive


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
