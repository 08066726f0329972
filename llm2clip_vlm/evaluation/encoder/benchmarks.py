"""Benchmarks of image-text encoders in their published formats: one table, name to protocol."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llm2clip_vlm.data.image_text.index import ImageTextRecord, read_image_text
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.data.reading.images import ImageError, picture_suffixes, resolve_image, shown
from llm2clip_vlm.data.reading.records import LIST_AS_TEXT, iter_rows
from llm2clip_vlm.files import read_json, read_text
from llm2clip_vlm.metrics.zero_shot import one_label
from llm2clip_vlm.recipe.base import ImageTextSource
from llm2clip_vlm.recipe.evaluation import ClassSource, CompositionalTask, RetrievalTask
from llm2clip_vlm.recipe.reading import did_you_mean

Captions = Iterator[tuple[str, str, str]]
"""Items of image (below the folder of images), kind of caption, caption."""

ALL = "captions"

_NUMBERED = re.compile(r"([^\s#]+)#\S*\s+(.+)")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Benchmark:
    """Reader of a benchmark, and its standard set."""

    read: Callable[[Path, Path], Captions]
    """Reads captions from annotations and a folder of images."""
    images: int
    """Images of the standard set."""
    captions: int | None
    """Its captions over all kinds. None: not pinned."""
    protocol: str
    """Protocol, which every result states."""


def _json(data: Path, images: Path) -> Captions:
    """Karpathy's `dataset_*.json`, COCO's annotations, or rows of `image` and `caption`."""
    for row in iter_rows(data):
        if row.get("split", "test") == "test":
            texts = row["captions"] if "captions" in row else row["caption"]
            yield from ((row["image"], ALL, text) for text in _several(texts))


def _several(value: Any) -> list[Any]:
    """A list of one or many: a text is one, not its letters."""
    return value if isinstance(value, list) else [value]


def _sharegpt4v(data: Path, images: Path) -> Captions:
    """The first 1,000 objects of an array of more than a gigabyte, read no further."""
    for row in islice(iter_rows(data), 1000):
        yield row["image"], ALL, row["conversations"][1]["value"].replace("\n", " ")


def _urban(data: Path, images: Path) -> Captions:
    """`caption/<i>.txt`, first line, with `image/<i>.jpg`: paired by name."""
    for file in sorted((data / "caption").glob("*.txt")):
        yield f"image/{file.stem}.jpg", ALL, read_text(file).split("\n")[0]


def _docci(data: Path, images: Path) -> Captions:
    for row in iter_rows(data):
        if row["split"] == "test":
            yield row["image_file"], ALL, row["description"]


def _xm3600(data: Path, images: Path) -> Captions:
    for row in iter_rows(data):
        for locale, value in row.items():
            if isinstance(value, dict):
                for text in _several(value["caption"]):
                    yield f"{row['image/key']}.jpg", locale, text


def _chinese_clip(data: Path, images: Path) -> Captions:
    """Chinese-CLIP's `*_texts.jsonl`, whose `image_ids` are the numbers that file names end in."""
    files = {file.stem.rpartition("_")[2]: file for file in images.rglob("*.jpg")}
    names = {int(k): f.relative_to(images).as_posix() for k, f in files.items() if k.isdecimal()}
    for row in iter_rows(data):
        for number in _several(row["image_ids"]):
            if number not in names:
                raise ValueError(f"{data}: image_ids: no image of number {number} below {images}")
            yield names[number], ALL, row["text"]


def _numbered(data: Path, images: Path) -> Captions:
    """Lines of `<image>#<any>#<i> <caption>`."""
    for line in read_text(data).split("\n"):
        if found := _NUMBERED.fullmatch(line.strip()):
            yield found[1].removesuffix(".jpg") + ".jpg", ALL, found[2]
        elif line.strip():
            raise ValueError(f"{data}: expected `image#i caption`, got {line[:80]!r}")


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
    """Read images with captions by kind, the protocol, and whether this is the standard set.

    Raises:
        ValueError: An unknown benchmark, or files that are not in its format.
    """
    data = Path(task.data)
    root = Path(task.images) if task.images else data if data.is_dir() else data.parent
    if task.benchmark == "records":
        protocol = f"{data.name}, {', '.join(task.fields)}, where {task.where}; {_EACH}"
        return _rows(task, task.fields, str(root)), protocol, False
    if task.benchmark not in RETRIEVAL:
        hint = did_you_mean(task.benchmark, RETRIEVAL)
        known = ", ".join(["records", *RETRIEVAL])
        raise ValueError(f"no benchmark `{task.benchmark}`{hint} (there are: {known})")
    benchmark = RETRIEVAL[task.benchmark]
    captions: dict[str, dict[str, list[str]]] = {}
    with _in_format(data, task.benchmark):
        for name, kind, text in benchmark.read(data, root):
            if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"{data}: image {shown(name)}: expected a name and a caption, got {text!r:.80}"
                )
            if LIST_AS_TEXT.fullmatch(text.strip()):
                raise ValueError(
                    f"{data}: image {shown(name)}: a list written as text, {text!r:.80}; give one "
                    "row a caption, or JSON or Parquet with lists"
                )
            captions.setdefault(name, {}).setdefault(kind, []).append(text)
    count = sum(len(texts) for kinds in captions.values() for texts in kinds.values())
    if not count:
        raise ValueError(f"{data}: holds no caption of {task.benchmark}")
    records = [
        ImageTextRecord(name, name, kinds, root, data.name, follow_links=task.follow_links)
        for name, kinds in captions.items()
    ]
    standard = len(records) == benchmark.images and benchmark.captions in (count, None)
    return records, benchmark.protocol, standard


def _rows(
    task: RetrievalTask | ClassSource, fields: list[str], images: str | None
) -> list[ImageTextRecord]:
    """Read the file of a task in one of stage 2's formats."""
    given: dict[str, Any] = {"where": task.where, "follow_links": task.follow_links}
    source = ImageTextSource(path=task.data, fields=fields, image_root=images, **given)
    return list(read_image_text(source, BadRecords()))


@contextmanager
def _in_format(data: Path, benchmark: str) -> Iterator[None]:
    """The boundary around an annotation file."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{data}: not in the format of {benchmark}: {error!r}") from error


def read_compositional(task: CompositionalTask) -> list[tuple[str, list[str], list[str]]]:
    """Read category, images and captions of each item, right ones at equal positions."""
    with _in_format(Path(task.data), task.benchmark):
        items = list(_compositional(Path(task.data), task.benchmark))
        for _, names, texts in items:
            if not all(isinstance(text, str) and text.strip() for text in (*names, *texts)):
                raise TypeError(f"expected names and captions, got {names} and {texts}")
    return items


def _compositional(data: Path, benchmark: str) -> Iterator[tuple[str, list[str], list[str]]]:
    if benchmark == "winoground":
        for row in iter_rows(data):
            images, texts = ([row[f"{kind}_{i}"] for i in (0, 1)] for kind in ("image", "caption"))
            yield row.get("collapsed_tag") or "all", [f"{image}.png" for image in images], texts
    elif data.is_dir():
        for file in sorted(data.glob("*.json")):
            for row in read_json(file).values():
                yield file.stem, [row["filename"]], [row["caption"], row["negative_caption"]]
    else:
        for row in iter_rows(data):
            yield row["task"], [row["image"]], [row["caption"], row["negative_caption"]]


def read_classified(source: ClassSource) -> tuple[list[ImageTextRecord], list[str]]:
    """Read images and the class of each: folder names, or a column.

    Raises:
        ValueError: An image without one label, no class, or something else than images in a class.
    """
    data = Path(source.data)
    if not data.is_dir():
        records = _rows(source, [source.label_field], source.images)
        return records, [one_label(record.captions, record.where) for record in records]
    files = [f for f in sorted(data.glob("*/*")) if "." not in (f.name[0], f.parent.name[0])]
    if odd := [file for file in files if file.suffix.lower() not in picture_suffixes()]:
        raise ValueError(f"{odd[0]}: expected pictures alone in the folder of a class")
    if not files:
        raise ValueError(f"{data}: expected a folder of images for each class, got none")
    names = [f"{file.parent.name}/{file.name}" for file in files]
    records = [plain_image(data, name, follow_links=source.follow_links) for name in names]
    return records, [file.parent.name for file in files]


def plain_image(root: Path, name: str, *, follow_links: bool = False) -> ImageTextRecord:
    """Find an image without captions; `name` may lack its ending."""
    # "frame_1.left" has no ending either
    if Path(name).suffix.lower() not in picture_suffixes() and not (root / name).is_file():
        found = [name + suffix for suffix in _IMAGES if (root / (name + suffix)).is_file()]
        if not found:
            raise ImageError(f"image {name!r}: none of {_IMAGES} below {root}")
        name = found[0]
    resolve_image(root, name, follow_links=follow_links)
    return ImageTextRecord(name, name, {}, root, follow_links=follow_links)


def read_classes(path: str) -> dict[str, str]:
    """Read classes and their names, in order: lines, a JSON list, or a JSON mapping.

    Raises:
        ValueError: Something else, or a class that is listed twice: those after it would move up.
    """
    listed = path.endswith(".json")
    names = read_json(path, object) if listed else read_text(path).strip().split("\n")
    pairs = list(names.items()) if isinstance(names, dict) else []
    if isinstance(names, list):
        pairs = [(name, name) for name in (n.strip() if isinstance(n, str) else n for n in names)]
    if not pairs or not all(isinstance(name, str) and name for _, name in pairs):
        raise ValueError(f"{path}: expected names of classes, one a line or as JSON")
    classes = dict(pairs)
    if len(classes) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{path}: {twice!r} is listed twice; keep them apart ({{class: name}})")
    return classes
