"""Helpers of the tasks under `eval/tasks/`: prompt, picture, exact match, other tasks' schemas.

lmms-eval calls these with a document and the task's `lmms_eval_specific_kwargs`. The runner puts
the data file's folder there as `image_root`. Existence questions may be rewritten in the schemas of
the built-in `pope` and `mme` tasks, whose prompts and scorers then run on other data: the result is
the *pope scorer on world data*, never a POPE score.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip_vlm.data.reading.images import open_image, resolve_image

logger = logging.getLogger(__name__)

MME_CATEGORY = "existence"
"""Category of MME that these questions belong to."""

MME_SUFFIX = " Please answer yes or no."
"""Ends every question of MME; the task replaces it by its own prompt."""


def doc_to_visual(doc: Mapping[str, Any], kwargs: Mapping[str, Any]) -> list[Image.Image]:
    """The document's picture; its path may not leave `image_root`."""
    return [open_image(Path(kwargs["image_root"]), doc["image"])]


def no_visual(doc: Mapping[str, Any], kwargs: Mapping[str, Any]) -> list[Image.Image]:
    """Give no picture: the question is what the words alone reveal."""
    return []


def doc_to_text(doc: Mapping[str, Any], kwargs: Mapping[str, Any]) -> str:
    """The document's question between the task's `pre_prompt` and `post_prompt`."""
    question = doc["question"].strip()
    return f"{kwargs.get('pre_prompt', '')}{question}{kwargs.get('post_prompt', '')}"


def pixel_hash(images: Iterable[Image.Image]) -> str:
    """Hash of pictures' pixels, whatever file, row or column they came from."""
    digest = hashlib.sha256()
    for image in images:
        pixels = image.convert("RGB")
        digest.update(f"{pixels.size}".encode() + pixels.tobytes())
    return digest.hexdigest()[:32]


def normalise(answer: str) -> str:
    """Make lower case, remove outer white space, shorten inner white space to one space."""
    return " ".join(answer.lower().split())


def exact_match(doc: Mapping[str, Any], results: list[str]) -> float:
    """1.0 where the answer equals the document's `answer` after :func:`normalise`."""
    return float(normalise(results[0]) == normalise(doc["answer"]))


def to_pope_rows(records: Iterable[Mapping[str, Any]], root: Path) -> list[dict[str, Any]]:
    """Rows as `lmms-lab/POPE` has them.

    Args:
        records: `{"id", "image", "image_id", "question", "answer", "category"}`.
        root: Folder that image paths are relative to.

    Returns:
        `{"id", "question_id", "question", "answer", "image_source", "image", "category"}`, the
        image as `{"bytes", "path"}`.

    Raises:
        ValueError: An answer other than yes and no, or an image that is not there.
    """
    return [
        {
            "id": str(record["id"]),
            "question_id": str(number),
            "question": str(record["question"]),
            "answer": _yes_or_no(record),
            "image_source": str(record["image_id"]),
            "image": _image(root, record["image"]),
            "category": str(record["category"]),
        }
        for number, record in enumerate(records)
    ]


def to_mme_rows(records: Iterable[Mapping[str, Any]], root: Path) -> list[dict[str, Any]]:
    """Rows as `lmms-lab/MME` has them: pairs of a yes and a no question about one image.

    Args:
        records: See :func:`to_pope_rows`.
        root: Folder that image paths are relative to.

    Returns:
        `{"question_id", "image", "question", "answer", "category"}`, two rows for each
        `question_id`, and an added `image_id` for intervals by image. A question without a
        partner on its image is left out and counted in the log.

    Raises:
        ValueError: An answer other than yes and no, no pair at all, or a missing image.
    """
    by_image: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    total = 0
    for record in records:
        sides = by_image.setdefault(str(record["image_id"]), {"yes": [], "no": []})
        sides[_yes_or_no(record)].append(record)
        total += 1
    rows = []
    for image_id, sides in by_image.items():
        for number, pair in enumerate(zip(sides["yes"], sides["no"], strict=False)):
            for record in pair:
                rows.append(
                    {
                        "question_id": f"{MME_CATEGORY}/{image_id}-{number}.png",
                        "image": _image(root, record["image"]),
                        "question": str(record["question"]) + MME_SUFFIX,
                        "answer": _yes_or_no(record).capitalize(),
                        "category": MME_CATEGORY,
                        "image_id": image_id,
                    }
                )
    if not rows:
        raise ValueError("mme rows: expected a yes and a no question for some image, got none")
    if len(rows) < total:
        logger.warning("%d questions have no partner and are left out", total - len(rows))
    return rows


CONVERTERS = {"pope": to_pope_rows, "mme": to_mme_rows}
"""Converters by the value of a suite's `convert`."""


def write_parquet(source: Path, kind: str, target: Path) -> None:
    """Convert an existence file.

    Args:
        source: The world's `exist_test.jsonl`; images are relative to its folder.
        kind: A key of :data:`CONVERTERS`.
        target: Parquet file to write, images embedded.
    """
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    from llm2clip_vlm.data.reading.records import iter_rows

    rows = CONVERTERS[kind](iter_rows(source), source.parent)
    features = {name: Value("string") for name in rows[0]} | {"image": ImageFeature()}
    target.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(features)).to_parquet(str(target))


def _image(root: Path, name: str) -> dict[str, Any]:
    return {"bytes": resolve_image(root, name).read_bytes(), "path": name}


def _yes_or_no(record: Mapping[str, Any]) -> str:
    answer = str(record["answer"]).strip().lower()
    if answer not in ("yes", "no"):
        raise ValueError(f"record {record['id']}: expected the answer yes or no, got {answer!r}")
    return answer
