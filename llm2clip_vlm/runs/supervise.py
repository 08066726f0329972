"""Runs a command that ends when the process that asked for it ends, whatever ends that.

`python supervise.py COMMAND ...` with a pipe as standard input, whose other end the asking process
holds and never writes to. When that is closed (by intent, or by the kernel after any signal), the
command and all that it has started, in whichever session, get SIGTERM, and SIGKILL 10 seconds
later. It imports nothing of the package, so it costs a few milliseconds.

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

PATIENCE_S = 10.0
"""Seconds between SIGTERM and SIGKILL."""

_PR_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> int:
    """Run a command; its exit code is returned, its signal repeated."""
    with contextlib.suppress(OSError, AttributeError):  # Linux: this process inherits orphans below
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _pass)  # not for the command: a handler ends with exec
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while process.poll() is None:
        if select.select([sys.stdin], [], [], 0.1)[0]:
            _end(process)
            break
    code = process.wait()
    if cost := os.environ.get("LLM2CLIP_VLM_COST"):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        unit = 1 if sys.platform == "darwin" else 1024
        found = {
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
            "peak_memory_gb": round(used.ru_maxrss * unit / 1e9, 2),  # of the largest process
        }
        Path(cost).write_text(json.dumps(found) + "\n")
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _pass(number: int, frame: object) -> None:
    """Ignore the signal: closing the pipe ends the command."""


def _end(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    _signal_all(signal.SIGTERM)
    while _descendants() and time.monotonic() < deadline:
        process.poll()
        time.sleep(0.05)
    while _descendants():
        _signal_all(signal.SIGKILL)
        process.poll()
        time.sleep(0.05)
    if not Path("/proc/self/stat").exists():
        os.killpg(0, signal.SIGKILL)


def _signal_all(number: int) -> None:
    if not Path("/proc/self/stat").exists():
        os.killpg(0, number)
    for process in _descendants():
        with contextlib.suppress(OSError):
            os.kill(process, number)


def _descendants() -> list[int]:
    """List the processes below this one that still run."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(entry.parent.name)] = int(parent)
    found, below = [], {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
        found += sorted(more)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
