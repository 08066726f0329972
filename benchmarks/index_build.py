"""The first reading of a large JSONL file: stage 2b's table against `datasets.load_dataset`.

Both read a million records of two captions and leave an Arrow file that all later starts map. The
peer parses and converts; ours also looks at each record: whether the line is UTF-8 and an object,
the image's name stays below its folder, each caption is text that somebody may have meant, ids
occur once, the recipe's columns exist; it counts what it refuses, hashes each caption for the
embedding cache, and the file for the next start. `equal`: both hold the same ids, images and
captions at 1000 places. `limit_ratio` is our time over that of `json.loads` on each line.

The peer's `streaming=False` default is its fastest here; its own check of split sizes stays on.

    python benchmarks/index_build.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from arms import finish, ratio, take_turns
from datasets import disable_progress_bars, load_dataset

from llm2clip_vlm.data.image_text.index import ImageTextRecords, read_image_text
from llm2clip_vlm.data.reading import table
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.recipe.base import ImageTextSource


def write(path: Path, count: int) -> None:
    """Records such as stage 2b reads: 340 bytes each, every tenth with words beyond ASCII."""
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            end = "un café près de l'eau" if n % 10 == 0 else "a house by the water"
            long = (
                f"Picture {n} shows a red star and two blue rings beside a small cross; " * 3 + end
            )
            captions = {"short": [f"a photo of thing {n} on a table"], "long": [long]}
            row = {"id": f"id-{n}", "image": f"images/{n // 1000}/{n}.jpg", "captions": captions}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    """Print medians, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100,000 records, 3 rounds")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    records, rounds = options.records, options.rounds
    if options.quick:
        records, rounds = 100_000, 3
    torch.set_num_threads(1)
    disable_progress_bars()
    table.TABLE_FILE_FROM_BYTES = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "pairs.jsonl"
        write(path, records)
        made: dict[str, Any] = {}

        def ours() -> None:
            shutil.rmtree(folder / "index", ignore_errors=True)
            source = ImageTextSource(path=str(path), index_dir=str(folder / "index"))
            made["ours"] = read_image_text(source, BadRecords())

        def peer() -> None:
            shutil.rmtree(folder / "peer", ignore_errors=True)
            files, cache = str(path), str(folder / "peer")
            made["peer"] = load_dataset("json", data_files=files, split="train", cache_dir=cache)

        def parse() -> None:
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    json.loads(line)

        seconds = take_turns({"ours": ours, "peer": peer, "parse": parse}, rounds)
        found: ImageTextRecords = made["ours"]
        equal = len(found) == len(made["peer"]) == records
        for n in range(0, records, max(1, records // 1000)):
            record, row = found[n], made["peer"][n]
            mine = {"id": record.key, "image": record.image, "captions": record.captions}
            equal &= mine == row
    value, spread = ratio(seconds, "peer", "ours")
    for arm, taken in seconds.items():
        print(f"{arm:<6} {statistics.median(taken['cpu']) * 1e6 / records:7.2f} us a record (CPU)")
    finish(
        "index_build",
        ours=round(statistics.median(seconds["ours"]["cpu"]), 3),
        baseline=round(statistics.median(seconds["peer"]["cpu"]), 3),
        ratio=value,
        spread=spread,
        equal=equal,
        limit_ratio=ratio(seconds, "ours", "parse")[0],
        settings={
            "unit": "CPU seconds",
            "records": records,
            "rounds": rounds,
            "limit": "json.loads of each line",
        },
    )


if __name__ == "__main__":
    main()
