"""Makes what `recipes/real_mini` needs of a folder of real photographs and texts.

Purpose: the stages read the folder's own files where they can; here the rest is written. Splits
    are by photograph: nothing that retrieval or a question is measured on is trained on.
Needs: a folder with `flickr8k_1k`, `coco_mini`, `easy_vqa`, `llava_pretrain_2k`, `stories260k`,
    `text` (the recipe's `data`, else $LLM2CLIP_SHARED_DATA, else ../shared/data).
Writes: `<output_dir>/source` (a link to that folder), `photos_{train,held_out}.jsonl` (captions),
    `{easy_vqa,photo_vqa}_train.json` (LLaVA), `{easy_vqa,photo_vqa}_test.jsonl` with the pictures
    that they name, `vision_tower/` (random weights: no tower of this size was ever pre-trained on
    photographs), and last `prepared.json`.

    python stages/prepare_real_mini.py recipes/real_mini/prepare.yaml [key=value ...]
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llm2clip_vlm.cli import guard
from llm2clip_vlm.config import Section
from llm2clip_vlm.data.images import resolve_image
from llm2clip_vlm.data.records import Row, iter_rows
from llm2clip_vlm.files import write_atomically
from llm2clip_vlm.ownership import Hold
from llm2clip_vlm.recipe import load_recipe, to_plain

HELD_OUT = ("val", "test")
FOLDERS = ("coco_mini", "easy_vqa", "flickr8k_1k", "llava_pretrain_2k", "stories260k", "text")


class PrepareRecipe(Section):
    """What is made of the data folder."""

    notes: str = ""
    """What a reader should know."""
    output_dir: str
    """Where it goes."""
    data: str | None = None
    """The data folder; none = $LLM2CLIP_SHARED_DATA, else `../shared/data`."""
    seed: int = 0
    """Order of the questions, and the tower's weights."""
    turns_per_conversation: int = Field(default=4, ge=1)
    """Questions about one picture that share a training sample: few, because an earlier answer
    gives later ones away without a look at the picture."""
    easy_vqa_test_images: int | None = Field(default=None, ge=1)
    """First pictures of easy-VQA's test split that are asked about; none = all 1,000."""
    vision_tower: dict[str, Any]
    """`CLIPVisionConfig` arguments."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program: RECIPE [key=value ...]."""
    path, *overrides = sys.argv[1:] if argv is None else argv
    recipe = load_recipe(path, PrepareRecipe, overrides)
    out = Path(recipe.output_dir)
    older = ["source", "prepared.json"] if (out / "prepared.json").is_file() else ()
    hold = Hold(out, "prepare_real_mini", ["source", "prepared.json"], alone=True, older=older)
    data = out / "source"  # leads to the folder, so that recipes can name its files
    data.unlink(missing_ok=True)
    data.symlink_to(find_data(recipe.data).resolve(), target_is_directory=True)

    counts = write_photos(data, out)
    counts |= write_easy_vqa(data / "easy_vqa", out, recipe)
    counts |= write_photo_vqa(data / "coco_mini", out, recipe)
    write_tower(recipe, out / "vision_tower")
    write_json(out / "prepared.json", {"counts": counts, "recipe": to_plain(recipe)})
    hold.release()
    print(f"{out}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


def find_data(given: str | None) -> Path:
    """The data folder.

    Raises:
        ValueError: It is not there, or lacks a folder.
    """
    folder = Path(given or os.environ.get("LLM2CLIP_SHARED_DATA") or "../shared/data")
    lost = [name for name in FOLDERS if not (folder / name).is_dir()]
    if lost:
        raise ValueError(
            f"data: expected {', '.join(FOLDERS)} in {folder.absolute()}, found no "
            f"{', '.join(lost)}; set `data` or LLM2CLIP_SHARED_DATA to where they lie"
        )
    return folder


def write_photos(data: Path, out: Path) -> dict[str, int]:
    """Captioned photographs of both sets, by split; rows of no split are left out."""
    parts: dict[str, list[Row]] = {"train": [], "held_out": []}
    for name in ("flickr8k_1k", "coco_mini"):
        for row in iter_rows(data / name / "index.jsonl"):
            part = "held_out" if row["split"] in HELD_OUT else row["split"]
            if part in parts and row["captions"]:
                placed = {key: f"{name}/{row[key]}" for key in ("id", "image")}
                parts[part].append(placed | {"captions": row["captions"]})
    for part, rows in parts.items():
        write_jsonl(out / f"photos_{part}.jsonl", rows)
    return {f"photos_{part}": len(rows) for part, rows in parts.items()}


def write_easy_vqa(source: Path, out: Path, recipe: PrepareRecipe) -> dict[str, int]:
    """easy-VQA: pictures unpacked, training questions as conversations, test questions as rows."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in iter_rows(source / "index.jsonl.gz"):
        rows[row["split"]].append({**row, "image": f"easy_vqa/{row['image']}"})
    images = list(dict.fromkeys(row["image"] for row in rows["test"]))
    kept = set(images[: recipe.easy_vqa_test_images])
    test = [row for row in rows["test"] if row["image"] in kept]
    names = {row["image"].removeprefix("easy_vqa/") for row in [*rows["train"], *test]}
    extract(source / "images.tar.gz", out / "easy_vqa", names)
    conversations = to_conversations(rows["train"], recipe)
    write_json(out / "easy_vqa_train.json", conversations)
    write_jsonl(out / "easy_vqa_test.jsonl", test)
    return {"easy_vqa_train": len(conversations), "easy_vqa_test": len(test)}


def write_photo_vqa(source: Path, out: Path, recipe: PrepareRecipe) -> dict[str, int]:
    """Questions about COCO photographs: templated ones, and VQAv2's.

    The photograph's split in `index.jsonl` decides. VQAv2's own `split` column is another one (27
    of its training rows ask about held-out photographs); its `valid` and `test` rows are only
    asked where the photograph is held out, too.
    """
    split = {row["image"]: row["split"] for row in iter_rows(source / "index.jsonl")}
    train, test = [], []
    for name, kind in (("templated_presence_count", None), ("vqav2_human", "human")):
        for row in iter_rows(source / f"{name}.jsonl"):
            kept = {key: row[key] for key in ("image", "question", "answer")}
            kept |= {"type": kind or row["type"]}
            if split[row["image"]] in HELD_OUT:
                test.append({**kept, "image": f"photos/{row['image']}"})
            elif split[row["image"]] == row["split"] == "train":
                train.append({**kept, "image": f"coco_mini/{row['image']}"})
    for name in {row["image"] for row in test}:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(resolve_image(source, name.removeprefix("photos/")), out / name)
    conversations = to_conversations(train, recipe)
    write_json(out / "photo_vqa_train.json", conversations)
    write_jsonl(out / "photo_vqa_test.jsonl", test)
    return {"photo_vqa_train": len(conversations), "photo_vqa_test": len(test)}


def to_conversations(rows: Iterable[Row], recipe: PrepareRecipe) -> list[Row]:
    """LLaVA records: the questions of each picture in random order, some to a conversation."""
    by_image: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_image[row["image"]].append(row)
    order, size = random.Random(recipe.seed), recipe.turns_per_conversation
    records = []
    for image, asked in by_image.items():
        order.shuffle(asked)
        for start in range(0, len(asked), size):
            turns = [
                {"from": who, "value": str(row[key])}
                for row in asked[start : start + size]
                for who, key in (("human", "question"), ("gpt", "answer"))
            ]
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            records.append({"id": f"{image}:{start}", "image": image, "conversations": turns})
    return records


def extract(archive: Path, folder: Path, names: set[str]) -> None:
    """Unpack the named regular files of a tar archive that stay in the folder, and nothing else.

    Raises:
        ValueError: One of them is not there.
    """
    left = set(names)
    with tarfile.open(archive) as tar:
        for member in tar:
            target = (folder / member.name).resolve()
            handle = tar.extractfile(member) if member.isfile() and member.name in left else None
            if handle is not None and target.is_relative_to(folder.resolve()):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(handle.read())
                left.discard(member.name)
    if left:
        raise ValueError(f"{archive}: {len(left)} pictures are missing, such as {min(left)}")


def write_tower(recipe: PrepareRecipe, folder: Path) -> None:
    """A `CLIPVisionModel` directory with random weights, and its image processor."""
    torch.manual_seed(recipe.seed)
    config = CLIPVisionConfig(**recipe.vision_tower)
    CLIPVisionModel(config).save_pretrained(str(folder))
    side = int(recipe.vision_tower["image_size"])
    crop = {"height": side, "width": side}
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop).save_pretrained(folder)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, atomically."""
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write a row a line, atomically."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    sys.exit(guard(main))
