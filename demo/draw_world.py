"""Draws the demo's world of a seed: pictures, captions, questions, LLaVA JSON.

Needs: nothing. Writes: `<dir>/seed-<seed>/`, with `-base` or `-dense` behind it for these parts.

    python demo/draw_world.py [seed=0] [dir=runs/world] [part=road]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import get_args, get_type_hints

from world.files import WorldConfig, ensure_world

from llm2clip_vlm.cli import guard
from llm2clip_vlm.recipe.yaml_files import parse_value


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program: [key=value ...] of :class:`WorldConfig`."""
    kinds = get_type_hints(WorldConfig)
    values = {}
    for word in sys.argv[1:] if argv is None else argv:
        key, equals, text = word.partition("=")
        if not equals or key not in kinds:
            raise ValueError(f"expected key=value with a key of {list(kinds)}, got {word!r}")
        value = parse_value(text, key)
        allowed = get_args(kinds[key])
        if value not in allowed if allowed else not isinstance(value, kinds[key]):
            raise ValueError(f"{key}: expected {allowed or kinds[key].__name__}, got {value!r}")
        values[key] = value
    print(f"world: {ensure_world(WorldConfig(**values))}")


if __name__ == "__main__":
    sys.exit(guard(main))
