"""Cores and OpenMP threads that a program may use."""

import os


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine's in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allowed_threads(otherwise: int) -> int:
    """OpenMP threads that `OMP_NUM_THREADS` allows (its first level); `otherwise` without it."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(given) if given.isdecimal() and int(given) else otherwise
