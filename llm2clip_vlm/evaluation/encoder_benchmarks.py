"""Benchmarks of image-text encoders in their published formats: one table, name to protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llm2clip_vlm.config import ImageTextSource
from llm2clip_vlm.config_encoder import ClassSource, CompositionalTask, RetrievalTask
from llm2clip_vlm.data.bad_records import BadRecords
from llm2clip_vlm.data.image_text_index import ImageTextRecord, read_image_text
from llm2clip_vlm.data.images import ImageError, resolve_image, shown
from llm2clip_vlm.data.records import iter_rows
from llm2clip_vlm.recipe import did_you_mean

Captions = Iterator[tuple[str, str, str]]
"""Image below the folder of images, kind of caption, caption."""

ALL = "captions"

_NUMBERED = re.compile(r"([^\s#]+)#\S*\s+(.+)")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read, and what the standard set is."""

    read: Callable[[Path, Path], Captions]
    """Annotations and folder of images to captions."""
    images: int
    """Images of the standard set."""
    captions: int | None
    """Its captions over all kinds; none = not pinned."""
    protocol: str
    """What is judged; in every result."""


def _json(data: Path, images: Path) -> Captions:
    """Karpathy's `dataset_*.json`, COCO's annotations, or rows of `image` and `caption`."""
    for row in iter_rows(data):
        if row.get("split", "test") == "test":
            texts = row["captions"] if "captions" in row else row["caption"]
            yield from ((row["image"], ALL, text) for text in _several(texts))


def _several(value: Any) -> list[Any]:
    """What stands for one or many: a text is one, not its letters."""
    return value if isinstance(value, list) else [value]


def _sharegpt4v(data: Path, images: Path) -> Captions:
    """The first 1,000 objects of an array of more than a gigabyte, read no further."""
    for row in islice(_objects(data), 1000):
        yield row["image"], ALL, row["conversations"][1]["value"].replace("\n", " ")


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    decoder, text = json.JSONDecoder(), ""
    with path.open(encoding="utf-8") as handle:
        while more := handle.read(2**20):
            text = (text + more).lstrip("[, \r\n\t")
            while text.startswith("{"):
                try:
                    value, end = decoder.raw_decode(text)
                except ValueError:  # it goes on in what is not read yet
                    break
                yield value
                text = text[end:].lstrip(", \r\n\t")


def _urban(data: Path, images: Path) -> Captions:
    """`caption/<i>.txt`, first line, with `image/<i>.jpg`: paired by name."""
    for file in sorted((data / "caption").glob("*.txt")):
        yield f"image/{file.stem}.jpg", ALL, file.read_text(encoding="utf-8").split("\n")[0]


def _docci(data: Path, images: Path) -> Captions:
    for row in _lines(data):
        if row["split"] == "test":
            yield row["image_file"], ALL, row["description"]


def _xm3600(data: Path, images: Path) -> Captions:
    for row in _lines(data):
        for locale, value in row.items():
            if isinstance(value, dict):
                for text in _several(value["caption"]):
                    yield f"{row['image/key']}.jpg", locale, text


def _chinese_clip(data: Path, images: Path) -> Captions:
    """Chinese-CLIP's `*_texts.jsonl`, whose `image_ids` are the numbers that file names end in."""
    files = {file.stem.rpartition("_")[2]: file for file in images.rglob("*.jpg")}
    names = {int(k): f.relative_to(images).as_posix() for k, f in files.items() if k.isdecimal()}
    for row in _lines(data):
        for number in _several(row["image_ids"]):
            if number not in names:
                raise ValueError(f"{data}: image_ids: no image of number {number} below {images}")
            yield names[number], ALL, row["text"]


def _numbered(data: Path, images: Path) -> Captions:
    """Lines of `<image>#<any>#<i> <caption>`."""
    for line in data.read_text(encoding="utf-8").split("\n"):
        if found := _NUMBERED.fullmatch(line.strip()):
            yield found[1].removesuffix(".jpg") + ".jpg", ALL, found[2]
        elif line.strip():
            raise ValueError(f"{data}: expected `image#i caption`, got {line[:80]!r}")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file; cut at line feeds alone, since captions hold other line breaks."""
    with path.open(encoding="utf-8", newline="\n") as handle:
        yield from (json.loads(line) for line in handle if line.strip())


_EACH = "hit@k, every caption a query and every caption in the gallery"
_SHAREGPT4V = (
    "first 1,000 of share-captioner_coco_lcs_sam_1246k_1107.json, line feeds become blanks "
    "(Long-CLIP)"
)
RETRIEVAL: dict[str, Benchmark] = {
    "flickr30k": Benchmark(_json, 1000, 5000, f"Flickr30k, Karpathy's test split; {_EACH}"),
    "coco": Benchmark(_json, 5000, 25010, f"COCO, Karpathy's test split, ragged; {_EACH}"),
    "sharegpt4v": Benchmark(_sharegpt4v, 1000, 1000, _SHAREGPT4V),
    "urban1k": Benchmark(_urban, 1000, 1000, "Urban1k, first line, paired by name (Long-CLIP)"),
    "docci": Benchmark(_docci, 5000, 5000, "DOCCI, split test, whole descriptions"),
    "xm3600": Benchmark(
        _xm3600, 3600, 261_375, f"Crossmodal-3600, 36 languages, each for itself; {_EACH}"
    ),
    "flickr30k_cn": Benchmark(
        _chinese_clip, 1000, 5000, f"Flickr30k-CN, translated captions (Chinese-CLIP); {_EACH}"
    ),
    "flickr30k_cna": Benchmark(
        _numbered, 1000, 5000, f"Flickr30k-CNA, captions annotated anew; {_EACH}"
    ),
    "coco_cn": Benchmark(
        _chinese_clip, 1000, None, f"COCO-CN, captions written by people (Chinese-CLIP); {_EACH}"
    ),
    "coco_cn_translated": Benchmark(
        _numbered, 1000, 5000, f"COCO-CN, five captions translated by people; {_EACH}"
    ),
}
"""Every retrieval benchmark: reader and protocol."""


def read_retrieval(task: RetrievalTask) -> tuple[list[ImageTextRecord], str, bool]:
    """Images with captions by kind, the protocol, and whether this is the standard set.

    Raises:
        ValueError: An unknown benchmark, or files that are not in its format.
    """
    data = Path(task.data)
    root = Path(task.images) if task.images else data if data.is_dir() else data.parent
    if task.benchmark == "records":
        source = ImageTextSource(
            path=task.data, fields=task.fields, where=task.where, image_root=str(root)
        )
        protocol = f"{data.name}, {', '.join(task.fields)}, where {task.where}; {_EACH}"
        return list(read_image_text(source, BadRecords())), protocol, False
    if task.benchmark not in RETRIEVAL:
        hint = did_you_mean(task.benchmark, RETRIEVAL)
        known = ", ".join(["records", *RETRIEVAL])
        raise ValueError(f"no benchmark `{task.benchmark}`{hint} (there are: {known})")
    benchmark = RETRIEVAL[task.benchmark]
    captions: dict[str, dict[str, list[str]]] = {}
    try:
        for name, kind, text in benchmark.read(data, root):
            if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"{data}: image {shown(name)}: expected a name and a caption, got {text!r:.80}"
                )
            captions.setdefault(name, {}).setdefault(kind, []).append(text)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{data}: not in the format of {task.benchmark}: {error!r}") from error
    count = sum(len(texts) for kinds in captions.values() for texts in kinds.values())
    if not count:
        raise ValueError(f"{data}: holds no caption of {task.benchmark}")
    records = [
        ImageTextRecord(name, name, kinds, root, data.name) for name, kinds in captions.items()
    ]
    standard = len(records) == benchmark.images and benchmark.captions in (count, None)
    return records, benchmark.protocol, standard


def read_compositional(task: CompositionalTask) -> list[tuple[str, list[str], list[str]]]:
    """Category, images and captions of each item, the right ones at equal positions."""
    data = Path(task.data)
    if task.benchmark == "winoground":
        return [
            (
                row.get("collapsed_tag") or "all",
                [f"{row[f'image_{i}']}.png" for i in (0, 1)],
                [row[f"caption_{i}"] for i in (0, 1)],
            )
            for row in _lines(data)
        ]
    rows = [
        (file.stem, row)
        for file in sorted(data.glob("*.json"))
        for row in json.loads(file.read_text(encoding="utf-8")).values()
    ]
    if not data.is_dir():
        rows = [(row["task"], row | {"filename": row["image"]}) for row in _lines(data)]
    return [
        (kind, [row["filename"]], [row["caption"], row["negative_caption"]]) for kind, row in rows
    ]


def read_classified(source: ClassSource) -> tuple[list[ImageTextRecord], list[str]]:
    """Images and the class of each: folder names, or a column."""
    data = Path(source.data)
    if not data.is_dir():
        rows = ImageTextSource(
            path=source.data,
            fields=[source.label_field],
            where=source.where,
            image_root=source.images,
        )
        records = list(read_image_text(rows, BadRecords()))
        return records, [record.captions[source.label_field][0] for record in records]
    files = [file for file in sorted(data.glob("*/*")) if file.suffix.lower() in _IMAGES]
    if not files:
        raise ValueError(f"{data}: expected a folder of images for each class, got none")
    return [plain_image(data, f"{f.parent.name}/{f.name}") for f in files], [
        file.parent.name for file in files
    ]


def plain_image(root: Path, name: str) -> ImageTextRecord:
    """An image without captions; `name` may lack its ending."""
    if not Path(name).suffix:
        found = [name + suffix for suffix in _IMAGES if (root / (name + suffix)).is_file()]
        if not found:
            raise ImageError(f"image {name!r}: none of {_IMAGES} below {root}")
        name = found[0]
    resolve_image(root, name)
    return ImageTextRecord(name, name, {}, root)


def read_classes(path: str) -> dict[str, str]:
    """Class to name, in order: lines, a JSON list, or a JSON mapping."""
    text = Path(path).read_text(encoding="utf-8")
    lines = [line.strip() for line in text.strip().split("\n")]
    names = json.loads(text) if path.endswith(".json") else lines
    if isinstance(names, list):
        names = {name: name for name in names if isinstance(name, str)}
    classes = names if isinstance(names, dict) else {}
    if not classes or not all(isinstance(name, str) and name for name in classes.values()):
        raise ValueError(f"{path}: expected names of classes, one a line or as JSON")
    return classes
