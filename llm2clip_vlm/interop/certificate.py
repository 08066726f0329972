"""Writing models as transformers has them, reading them back, and the parity certificate.

The certificate says what was compared, how far it was apart, and with which versions.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from llm2clip_vlm.files import read_json, write_atomically, written_whole
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.weights import CERTIFICATE_NAME
from llm2clip_vlm.models.equal import vlm_outputs
from llm2clip_vlm.models.loading import load_complete, read_tokenizer
from llm2clip_vlm.models.text.tokenizer_files import save_tokenizer
from llm2clip_vlm.models.vlm.building import save_vlm
from llm2clip_vlm.runs.card import CARD_NAME, is_unchanged, write_card
from llm2clip_vlm.runs.hashes import fingerprint_file
from llm2clip_vlm.runs.manifest import read_manifest, versions
from llm2clip_vlm.training.export import export_vision_tower, vision_tower_of

TOLERANCE = 1e-5
"""Largest difference that is let through, as a share of the largest value (at least of 1)."""


@dataclass(frozen=True)
class Evidence:
    """What a certificate is made of."""

    opened_with: str
    """The program that gave `got`, or that `expected` was taken from."""
    expected: Mapping[str, Tensor]
    """Name to values of the model that it was made from, on fixed inputs."""
    got: Mapping[str, Tensor]
    """The same of what lies in the folder."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Anything else worth keeping."""


@contextmanager
def new_folder(out: str | Path, replace: bool | None = None) -> Iterator[Path]:
    """A folder that is there at the end, or nothing if anything was raised.

    Args:
        out: Where; must not exist.
        replace: Unless it holds what :func:`certify` left there, unchanged and nothing else.
            None: the command has no such option.

    Yields:
        The folder to write into, which exists.
    """
    earlier = Path(out)
    ours = earlier.exists() and replace is not None and _as_left(earlier)
    if earlier.exists() and not (replace and ours):
        found = ", with other files than an export has left there" if replace else ""
        way = "give `--replace`" if ours else "delete it"
        raise ModelError(f"{out} exists already{found}; name a new folder, or {way}")
    with written_whole(out) as folder:
        folder.mkdir()
        yield folder
        if earlier.exists():
            shutil.rmtree(earlier)


def _as_left(folder: Path) -> bool:
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*")}
    if CERTIFICATE_NAME not in files:
        return False
    listed = read_json(files.pop(CERTIFICATE_NAME)).get("files")
    if CARD_NAME in files and is_unchanged(files[CARD_NAME]):
        del files[CARD_NAME]
    return listed == {name: fingerprint_file(f) for name, f in files.items() if f.is_file()}


@torch.no_grad()
def features_of(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """What an encoder is compared on.

    Args:
        model: A tower, or an `LLM2CLIPModel` (with its head, and text features of seed 1).
        pixels: `[b, 3, s, s]`.

    Returns:
        `image_features`, and for an `LLM2CLIPModel` `image_embeds` and `text_embeds`.
    """
    if not hasattr(model, "text_adaptor"):
        return {"image_features": model(pixels).pooler_output}
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(4, model.config.text_embed_dim, generator=generator)
    features = model.visual_projection(model.vision_tower(pixels).pooler_output)
    return {
        "image_features": features,
        "image_embeds": F.normalize(features, dim=-1),
        "text_embeds": model.get_text_features(vectors),
    }


def logits_of(model: Any) -> dict[str, Tensor]:
    """What a VLM is compared on: logits of a fixed picture and fixed words.

    Args:
        model: A LLaVA, in its own dtype.
    """
    return {"logits": vlm_outputs(model).float()}


def save_encoder(model: Any, processor: Any, folder: Path) -> Any:
    """Write a tower, or an `LLM2CLIPModel` with the plain tower in `vision_tower/`.

    Args:
        model: Either.
        processor: Its image processor.
        folder: Where to.

    Returns:
        The same, read back in fp32.
    """
    if vision_tower_of(model) is model:
        export_vision_tower(model, processor, folder)
    else:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        export_vision_tower(model, processor, folder / "vision_tower")
    return load_complete(AutoModel, folder, dtype=torch.float32).eval()


def needs(model: Any) -> str:
    """Say what has to run before `AutoModel` opens a model."""
    config = getattr(model.config, "vision_config", model.config)
    own = {type(part).__module__.split(".")[0] for part in (config, model)} != {"transformers"}
    return "llm2clip_vlm.register() first" if own else "transformers alone"


@torch.no_grad()
def save_llm(
    model: Any, tokenizer: Any, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write a language model with its tokenizer.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        folder: Where to.

    Returns:
        Logits of the model, and of what opens there.

    Raises:
        ModelError: The tokenizer that opens there gives other ids.
    """
    model.eval().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    again = load_complete(AutoModelForCausalLM, folder, dtype="auto").eval()
    text = "Two dogs play in the snow.\nA photo"
    if read_tokenizer(folder)(text)["input_ids"] != tokenizer(text)["input_ids"]:
        raise ModelError(f"{folder}: the saved tokenizer gives other ids than the original")
    ids = torch.arange(min(16, model.config.vocab_size))[None]
    return {"logits": model(ids).logits.float()}, {"logits": again(ids).logits.float()}


def save_llava(model: Any, processor: Any, folder: Path) -> Evidence:
    """Write a VLM as transformers has it, and compare it with what opens there.

    Args:
        model: The VLM.
        processor: Its processor.
        folder: Where to.
    """
    save_vlm(model, processor, folder)
    again = load_complete(type(model), folder, dtype=model.dtype)
    opened = f"{type(model).__name__} of transformers"
    return Evidence(opened, logits_of(model), logits_of(again), {"needs": needs(model)})


def certify(folder: Path, made: str, source: Path, evidence: Evidence) -> dict[str, Any]:
    """Compare, and write `parity.json` beside what was compared.

    Args:
        folder: What was exported or converted.
        made: How, such as `export --to open_clip`.
        source: What it was made from; its files' hashes are kept, never its place.
        evidence: What to compare.

    Returns:
        The certificate.

    Raises:
        ModelError: A difference is larger than the tolerance, or a value is not finite.
    """
    checks = {}
    for name, want in evidence.expected.items():
        largest = float(want.double().abs().max())
        difference = float((evidence.got[name].double() - want.double()).abs().max())
        checks[name] = {"max_difference": difference, "largest_value": largest}
        if not (math.isfinite(difference) and difference <= TOLERANCE * max(largest, 1.0)):
            raise ModelError(
                f"{made}: {name} opened with {evidence.opened_with} differ by {difference:.3g} "
                f"(largest value {largest:.3g}, tolerance {TOLERANCE:g} of it): nothing was left "
                "behind"
            )
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sources = [source] if source.is_file() else sorted(f for f in source.iterdir() if f.is_file())
    certificate = {
        "made": made,
        "opened_with": evidence.opened_with,
        "inputs": "normal noise, torch seeds 0 (images) and 1 (caption embeddings)",
        "tolerance": TOLERANCE,
        "checks": checks,
        "versions": versions("timm", "open_clip_torch", "sentence-transformers"),
        "source": {file.name: fingerprint_file(file) for file in sources},
        "files": {file.relative_to(folder).as_posix(): fingerprint_file(file) for file in files},
        **evidence.more,
    }
    write_atomically(folder / CERTIFICATE_NAME, json.dumps(certificate, indent=2) + "\n")
    # what stands beside a model that no stage left there may be of another one
    stage = read_manifest(source.parent) or {}
    left = source.is_dir() and source.name in stage.get("outputs", {})
    measured = source.parent / "results.json"
    results = read_json(measured) if left and measured.is_file() else None
    parents, used = {"checkpoint": str(source)}, certificate["versions"]
    write_card(folder, made, parents=parents, versions=used, results=results, parity=certificate)
    return certificate
