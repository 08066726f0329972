"""Photographs with the captions that two towers rank first, as one picture that may be shown.

Purpose: the first photographs of a folder whose licence is CC BY, beside them what each tower finds
    among the captions of all photographs there. Picked by order, not by taste.
Needs: towers of stage 2b and `clip_baseline.py`, stage 2a's cache with the captions, a folder with
    `index.jsonl` (`image`, `captions`, `license`, `flickr_url`) such as `runs/real/data/gallery`.
Writes: `<output>` (JPEG) and `<output>.md`, which names each photograph's source and licence.
Launch: python demo/gallery.py --tower NAME=DIR ... --cache DIR --data DIR --output FILE
"""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2clip_vlm.cli import guard
from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.image_text.index import read_image_text
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.data.reading.records import iter_rows
from llm2clip_vlm.evaluation.report.examples import Example, retrieved_captions
from llm2clip_vlm.files import write_atomically
from llm2clip_vlm.recipe.base import ImageTextSource

LICENCE = "Attribution License"
"""COCO's name of CC BY, which asks for the source alone."""
INCHES = 1.75
"""Side of a photograph."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tower", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--cache", help="stage 2a's directory, for a tower of stage 2b")
    parser.add_argument("--data", required=True, type=Path, help="folder with index.jsonl")
    parser.add_argument("--output", required=True, type=Path, help="JPEG to write")
    parser.add_argument("--photographs", type=int, default=4, help="how many")
    given = parser.parse_args(argv)
    index = given.data / "index.jsonl"
    rows = list(iter_rows(index))
    free = [number for number, row in enumerate(rows) if row.get("license") == LICENCE]
    if len(free) < given.photographs:
        raise ValueError(f"{index}: {len(free)} photographs are under CC BY, expected at least "
                         f"{given.photographs}; lower --photographs")  # fmt: skip
    chosen = free[: given.photographs]
    found = retrieved_captions(
        {
            name: Path(folder) / "model"
            for name, _, folder in (t.partition("=") for t in given.tower)
        },
        read_image_text(ImageTextSource(path=str(index)), BadRecords(0)),
        "captions",
        chosen[-1] + 1,
        EmbeddingCache.open(given.cache) if given.cache else None,
    )
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_bytes(drawn([found[number] for number in chosen]))
    write_atomically(given.output.with_suffix(".md"), credits([rows[n] for n in chosen], len(rows)))
    print(f"{given.output} and {given.output.with_suffix('.md')}")
    return 0


def drawn(examples: Sequence[Example]) -> bytes:
    """The picture: a row a photograph, a tower's caption green where it is the photograph's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, INCHES * len(examples)), dpi=110, facecolor="white")
    places: Any = figure.subplots(len(examples), 2, width_ratios=[1, 3.2], squeeze=False)
    for (left, right), example in zip(places, examples, strict=True):
        left.imshow(example.picture)
        left.axis("off")
        right.axis("off")
        lines = [("human", example.expected, "#444444")]
        for name, (text, is_right) in example.found.items():
            lines.append((name, text, "#0b6b2e" if is_right else "#9a2a1f"))
        for place, (name, text, colour) in enumerate(lines):
            y = 0.95 - place * 0.34
            right.text(0, y, name, weight="bold", fontsize=11, va="top", color="#444444")
            shown = textwrap.fill(text.strip(), 62)
            right.text(0.24, y, shown, fontsize=11, va="top", color=colour)
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.98, wspace=0.04, hspace=0.08)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpg", pil_kwargs={"quality": 82})
    return buffer.getvalue()


def credits(rows: Sequence[dict[str, Any]], gallery: int) -> str:
    """Where each photograph is from."""
    lines = [
        f"- {row['image'].rpartition('/')[2]} (COCO): {row['flickr_url']}, CC BY 2.0"
        for row in rows
    ]
    return (
        f"# Photographs\n\nFrom top to bottom, shrunk; found among the captions of {gallery} "
        "photographs that nothing was trained on. Captions: COCO (CC BY 4.0).\n\n"
    ) + "\n".join(lines) + "\n"  # fmt: skip


if __name__ == "__main__":
    sys.exit(guard(main))
