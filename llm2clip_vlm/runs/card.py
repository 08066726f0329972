"""Model cards: what a model is, what made it, how well it did, how it is used.

A stage writes one into every model directory that it leaves, an export or conversion into its
folder: `README.md` with the metadata block that the Hugging Face Hub reads.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from llm2clip_vlm.files import read_json, write_atomically

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
"""File name of the card on the hub."""

_KINDS = {
    "text encoder": ("text encoder made of a language model", "feature-extraction"),
    "sentence-transformers": ("sentence embedder", "sentence-similarity"),
    "llm2clip": (
        "vision tower and text adaptor, aligned with a language model's caption embeddings",
        "zero-shot-image-classification",
    ),
    "clip": ("vision tower with a text encoder of its own", "zero-shot-image-classification"),
    "llava": ("vision-language model (LLaVA)", "image-text-to-text"),
    "llava_next": ("vision-language model (LLaVA-NeXT)", "image-text-to-text"),
    "tower": ("vision tower", "image-feature-extraction"),
}
"""Kind of model to what it is and the hub's `pipeline_tag`."""

_FOREIGN = ("llava", "open_clip", "timm", "vllm")
"""Formats of exports whose lines of use are not those of their kind."""

_TEMPLATE = Path(__file__).parent / "templates" / "card.md.jinja"

_SCORES = frozenset("r1 r5 r10 top1 after raw_causal raw_bidirectional".split())
"""The results that a card shows, all in %."""

_OURS = "llm2clip-vlm"
"""Tag of a card of this package; with a hash of all before it also its last line."""

_EVALUATION = re.compile(r"## Evaluation\n.*?(?=## )", re.DOTALL)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def kind_of(folder: Path) -> str | None:
    """Kind of model in a directory, as a key of the card's table. None: it is no such model."""
    if (folder / "text_encoder.json").is_file():
        return "text encoder"
    if (folder / "modules.json").is_file():
        return "sentence-transformers"
    if not (folder / "config.json").is_file():
        return None
    found = read_json(folder / "config.json")
    if (kind := str(found.get("model_type"))) == "vision-text-dual-encoder":
        return "clip"
    return kind if kind in _KINDS else "tower" if "image_size" in found else None


def write_card(
    folder: Path,
    made: str,
    *,
    parents: Mapping[str, str],
    versions: Mapping[str, str],
    recipe: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    parity: Mapping[str, Any] | None = None,
) -> Path | None:
    """Write the model card of a directory.

    Args:
        folder: The model's directory.
        made: The stage or command that made it.
        parents: What it was made from: name to path or hub id. The last two parts of a local path
            are shown; licence and base models of its card are carried over.
        versions: Package names and versions that made it.
        recipe: The stage's recipe, in plain form.
        results: What the stage measured, in %.
        parity: The certificate of an export or conversion.

    Returns:
        The card's path. None: the directory holds no model, or a card that was not written here, or
        edited since.
    """
    import torch
    from huggingface_hub import ModelCard, ModelCardData

    card, foreign = folder / CARD_NAME, made.removeprefix("export --to ")
    kind = kind_of(folder) or ("tower" if foreign in _FOREIGN else None)
    if kind is None:
        return None
    if card.exists() and not is_unchanged(card):
        logger.warning("%s was edited or comes from elsewhere: it stays; delete it for a new", card)
        return None
    what, pipeline_tag = _KINDS[kind]
    scores = _scores(results or {})
    known = list(filter(None, map(_card_of, parents.values())))
    licences = sorted({str(data.license) for data in known if data.license})
    hub = [path for path in parents.values() if not Path(path).exists() and _HUB_ID.fullmatch(path)]
    name = folder.resolve().parent.name + "-" + folder.name
    found = [_row(kind, "the recipe's held-out data", *score) for score in scores]
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=[_OURS],
        license=licences[0] if len(licences) == 1 else None,
        base_model=sorted({*hub, *(base for data in known for base in _bases(data))}) or None,
        eval_results=found or None,
    )
    text = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        what=what,
        made=made,
        kind=kind,
        opened=foreign,
        parents={title: _shown(path) for title, path in parents.items()},
        licences=licences,
        recipe=yaml.safe_dump(_masked(recipe), sort_keys=False).strip() if recipe else "",
        table=_table(found),
        parity=parity,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU",
        versions=", ".join(f"{package} {version}" for package, version in versions.items()),
    )
    _write(card, str(text))
    return card


def add_scores(folder: Path, scores: Mapping[str, tuple[str, float]]) -> None:
    """Put the scores of benchmarks into a card that is as it was written here; others stay.

    Args:
        folder: The model's directory.
        scores: Title of the benchmark to its metric, and that times 100; earlier ones go.
    """
    from huggingface_hub import ModelCard

    file, kind = folder / CARD_NAME, kind_of(folder) if scores else None
    if kind is None or not (file.is_file() and is_unchanged(file) and os.access(folder, os.W_OK)):
        return
    card = ModelCard.load(file, ignore_metadata_errors=True)
    rows = {row.metric_name: row for row in card.data.eval_results or []}
    for title, (metric, score) in scores.items():
        rows[title] = _row(kind, title, title, score, metric)
    card.data.eval_results = [*rows.values()]
    table = f"## Evaluation\n\n{_table(card.data.eval_results)}\n\n"
    card.text = _EVALUATION.sub(lambda _: table, card.text.partition(f"<!-- {_OURS} ")[0])
    _write(file, str(card))


def metric_and_score(result: Mapping[str, Any]) -> tuple[str, float]:
    """Name and score of an evaluation: of MME the share that is right, not the sum of points."""
    name, score = result["primary_metric"], result["score"]
    same = any(math.isclose(score, n * result["metrics"][name], abs_tol=0.05) for n in (1, 100))
    return (name if same else "accuracy"), score


def _row(kind: str, data: str, title: str, score: float, metric: str = "accuracy") -> Any:
    """A line of the hub's `model-index`."""
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type=_KINDS[kind][1],
        dataset_type="held-out",
        dataset_name=data,
        metric_type=metric,
        metric_name=title,
        metric_value=round(score, 2),
    )


def _table(rows: Sequence[Any]) -> str:
    lines = [f"| {row.metric_name} | {row.metric_value:.1f} |" for row in rows]
    table = "\n".join(["| measured | % |", "|---|---|", *lines])
    return table if rows else "None is recorded in this directory."


def _write(card: Path, text: str) -> None:
    text = f"{text.rstrip()}\n\n"
    write_atomically(card, text + _signature(text.encode()).decode())


def _signature(text: bytes) -> bytes:
    return f"<!-- {_OURS} {sha256(text).hexdigest()} -->\n".encode()


def is_unchanged(card: Path) -> bool:
    """Whether a card is as :func:`write_card` wrote it."""
    text, mark, end = card.read_bytes().rpartition(b"<!-- ")
    return mark + end == _signature(text)


def _scores(found: Mapping[str, Any], *names: str) -> Iterator[tuple[str, float]]:
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield from _scores(value, *names, key)
        elif key in _SCORES and isinstance(value, int | float):
            yield " ".join([*names, key]), float(value)


def _card_of(path: str) -> Any:
    """Read the metadata of a local parent's card."""
    from huggingface_hub import ModelCard

    card = Path(path) / CARD_NAME
    if not card.is_file():
        return None
    return ModelCard(card.read_text(encoding="utf-8", errors="replace"), True).data


def _bases(card: Any) -> list[str]:
    found = card.base_model or []
    return [found] if isinstance(found, str) else list(found)


def _shown(path: str) -> str:
    """A path without its place on this machine."""
    is_local = "\n" not in path and path.startswith(("/", "~", "..", "./"))
    return "/".join(Path(path).parts[-2:]) if is_local else path


def _masked(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _masked(part) for key, part in value.items() if part not in (None, [], {}, "")}
    if isinstance(value, list):
        return [_masked(part) for part in value]
    return _shown(value) if isinstance(value, str) else value
