"""Join GQA's questions with its pictures into the one file that `eval/suites/llava15.yaml` reads.

Purpose: lmms-eval's task loads the pictures from the hub a second time and keeps all of them in
    memory; a joined file needs neither.
Needs: the `testdev_balanced_instructions` and `testdev_balanced_images` parquet files of the data
    set (`hf download --repo-type dataset lmms-lab-encoder/GQA --include "testdev_balanced*"`).
Writes: one parquet file with `question`, `answer`, `imageId`, `image` and the other columns.
Launch: python eval/join_gqa.py FOLDER data/gqa_testdev_balanced.parquet
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset

from llm2clip_vlm.cli import guard
from llm2clip_vlm.files import written_whole


def main(argv: list[str] | None = None) -> None:
    """Run the program.

    Raises:
        ValueError: A folder without the files, or a question whose picture is missing.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the parquet files lie")
    parser.add_argument("out", type=Path, help="file to write")
    given = parser.parse_args(argv)
    questions, images = (
        _read(given.folder, f"testdev_balanced_{part}") for part in ("instructions", "images")
    )
    place = {key: row for row, key in enumerate(images["id"])}
    wanted = list(questions["imageId"])
    if missing := sorted({key for key in wanted if key not in place}):
        raise ValueError(
            f"{given.folder}: expected a picture for every question, none for {len(missing)} ids, "
            f"the first is {missing[0]!r}; download the images again"
        )
    pictures = images.select([place[key] for key in wanted]).select_columns(["image"])
    with written_whole(given.out) as partial:
        concatenate_datasets([questions, pictures], axis=1).to_parquet(str(partial))
    print(f"{len(wanted)} questions about {len(set(wanted))} pictures: {given.out}")


def _read(folder: Path, part: str) -> Dataset:
    files = sorted(map(str, folder.rglob(f"{part}*/*.parquet")))
    if not files:
        raise ValueError(f"{folder}: expected {part}/*.parquet, found none")
    table = load_dataset("parquet", data_files=files, split="train")
    if len({*table["id"]}) < len(table):
        raise ValueError(f"{folder}: ids of {part} come twice; does it hold two downloads?")
    return table


if __name__ == "__main__":
    sys.exit(guard(main))
