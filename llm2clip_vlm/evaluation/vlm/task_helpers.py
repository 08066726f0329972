"""Helpers of tasks for lmms-eval: prompt, picture, exact match.

lmms-eval calls these with a document and the task's `lmms_eval_specific_kwargs`. The runner puts
the data file's folder there as `image_root`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip_vlm.data.reading.images import open_image

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def doc_to_visual(doc: Mapping[str, Any], kwargs: Mapping[str, Any]) -> list[Image.Image]:
    """The document's picture; its path may not leave `image_root`."""
    return [open_image(Path(kwargs["image_root"]), doc["image"])]


def no_visual(doc: Mapping[str, Any], kwargs: Mapping[str, Any]) -> list[Image.Image]:
    """Give no picture: the question is what the words alone reveal."""
    return []


def doc_to_text(doc: Mapping[str, Any], kwargs: Mapping[str, Any]) -> str:
    """The document's question between the task's `pre_prompt` and `post_prompt`."""
    return f"{kwargs.get('pre_prompt', '')}{doc['question'].strip()}{kwargs.get('post_prompt', '')}"


def pixel_hash(images: Iterable[Image.Image]) -> str:
    """Hash of pictures' pixels, whatever file, row or column they came from."""
    digest = hashlib.sha256()
    for image in images:
        pixels = image.convert("RGB")
        digest.update(f"{pixels.size}".encode() + pixels.tobytes())
    return digest.hexdigest()[:32]


def strip_control(text: str) -> str:
    """Remove C0 control characters except tab and newline.

    One of them in an answer makes the spreadsheet export of several lmms-eval tasks fail.
    """
    return _CONTROL.sub("", text.replace("\r\n", "\n"))


def normalise(answer: str) -> str:
    """Make lower case, remove outer white space, shorten inner white space to one space."""
    return " ".join(answer.lower().split())


def exact_match(doc: Mapping[str, Any], results: list[str]) -> float:
    """1.0 where the answer equals the document's `answer` after :func:`normalise`."""
    return float(normalise(results[0]) == normalise(doc["answer"]))


def exact_match_result(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """The `process_results` of a task whose `accuracy` is :func:`exact_match`."""
    return {"accuracy": exact_match(doc, results)}
