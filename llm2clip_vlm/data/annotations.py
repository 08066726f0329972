"""COCO's and Karpathy's annotation files as rows: one image, its captions, its split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

Refuse = Callable[[str, str], None]
"""Takes `(where, why)` of a part that cannot be used."""


def annotation_rows(
    document: Mapping[str, Any], name: str, refuse: Refuse
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of an annotation file.

    Args:
        document: COCO's `{images, annotations}` or Karpathy's `{images: [{sentences}]}`.
        name: The file's, for messages.
        refuse: Takes images and captions that are not what they should be.

    Yields:
        `images[i]`, and `id`, `image`, `captions` beside the image's own fields (`split`, ...).
        All captions are kept, however many an image has. Without a `filepath` or `file_name` an
        image has no path, and is refused where paths are needed.
    """
    captions = _captions_by_image(document, name, refuse)
    for number, image in enumerate(document["images"]):
        where = f"images[{number}]"
        if not isinstance(image, Mapping):
            refuse(f"{name}:{where}", f"{type(image).__name__}, expected an object")
            continue
        row = dict(image)
        sentences = row.pop("sentences", None)
        if isinstance(sentences, list):  # Karpathy
            row["captions"] = [s.get("raw") for s in sentences if isinstance(s, Mapping)]
            file = str(row.get("filename") or "")
            folder = str(row.get("filepath") or "")
            row["image"] = str(PurePosixPath(folder, file)) if file else None
            row["id"] = row.get("cocoid", row.get("imgid", file))
        else:
            key = image.get("id")
            row["captions"] = captions.pop(key, []) if isinstance(key, int | str) else []
            row["image"] = image.get("file_name")
        yield where, row
    for image_id, texts in captions.items():
        refuse(
            f"{name}:image_id {image_id}", f"{len(texts)} caption(s) of an image not in `images`"
        )


def _captions_by_image(
    document: Mapping[str, Any], name: str, refuse: Refuse
) -> dict[Any, list[Any]]:
    captions: dict[Any, list[Any]] = {}
    for number, annotation in enumerate(document.get("annotations") or []):
        if isinstance(annotation, Mapping) and isinstance(annotation.get("image_id"), int | str):
            captions.setdefault(annotation["image_id"], []).append(annotation.get("caption"))
        else:
            refuse(f"{name}:annotations[{number}]", "no object with an image_id")
    return captions
