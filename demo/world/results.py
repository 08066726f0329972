"""What the comparisons write beside their numbers, and how many digits these have."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def git_state(output: Path) -> dict[str, Any]:
    """Commit of the checkout, and whether tracked files other than the output differ from it.

    Args:
        output: The result and, beside it, its chart.

    Returns:
        `{"commit", "dirty"}`, both None outside a checkout or before the first commit.
    """
    root = Path(__file__).resolve().parents[2]
    state = ["status", "--porcelain", "--untracked-files=no", "--", "."]
    if not output.is_absolute():
        state += [f":(exclude){output.with_suffix(end).as_posix()}" for end in (".json", ".svg")]
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], state)
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}


def rounded(value: Any, places: int = 6) -> Any:
    """A JSON value with its numbers cut to this many places."""
    if isinstance(value, float):
        return round(value, places)
    if isinstance(value, Mapping):
        return {key: rounded(item, places) for key, item in value.items()}
    return [rounded(item, places) for item in value] if isinstance(value, list) else value
