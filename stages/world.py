"""Writes the embedded world of a seed, for looking at it; stages write it themselves when absent.

Needs: nothing. Writes: `<dir>/seed-<seed>/` (pictures, captions, questions, LLaVA JSON).

    python stages/world.py seed=0 dir=runs/world
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llm2clip_vlm.cli import guard
from llm2clip_vlm.config import WorldConfig
from llm2clip_vlm.data.world_files import ensure_world
from llm2clip_vlm.yaml_files import parse_value


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program: [key=value ...] of :class:`~llm2clip_vlm.config.WorldConfig`."""
    words = list(sys.argv[1:] if argv is None else argv)
    values = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"expected key=value, got {word!r}; keys: seed, dir, part")
        values[key] = parse_value(value, key)
    print(f"world: {ensure_world(WorldConfig(**values))}")


if __name__ == "__main__":
    sys.exit(guard(main))
