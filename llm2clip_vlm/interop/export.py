"""`llm2clip-vlm export`: a checkpoint of ours as another tool opens it, with proof that it does."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModel, LlavaForConditionalGeneration

from llm2clip_vlm.files import written_whole
from llm2clip_vlm.interop.certificate import certify, features_of, fixed_pixels, logits_of
from llm2clip_vlm.interop.keys import KeyMapError
from llm2clip_vlm.interop.libraries import (
    library_features,
    open_clip_config,
    open_clip_weights,
    timm_arguments,
    timm_weights,
)
from llm2clip_vlm.interop.llava import (
    PROJECTOR,
    convert_llava,
    llava_config,
    llava_projector,
    llava_weights,
)
from llm2clip_vlm.interop.weights import read_weights, verify_hashes
from llm2clip_vlm.models.llm2clip import register
from llm2clip_vlm.models.text_encoder import TextEncoder
from llm2clip_vlm.models.text_encoder_settings import SETTINGS_NAME
from llm2clip_vlm.models.towers import load_vision_tower
from llm2clip_vlm.models.vlm import load_vlm, save_vlm
from llm2clip_vlm.training.embedder_export import export_sentence_transformers
from llm2clip_vlm.training.export import export_vision_tower, vision_tower_of

_SERVED = ("clip_vision_model", "siglip_vision_model", "pixtral")
"""Towers that vLLM's and SGLang's LLaVA build (`vllm/model_executor/models/llava.py`)."""


@dataclass(frozen=True)
class Checkpoint:
    """What is exported."""

    path: Path
    """Its folder."""
    model: Any
    """A tower, an `LLM2CLIPModel`, a `LlavaForConditionalGeneration` or a `TextEncoder`, fp32 but
    for the LLaVA, which keeps its dtype."""
    processor: Any = None
    """Its image processor, or a LLaVA's processor."""

    @property
    def kind(self) -> str:
        """`llava`, `llm2clip`, `text_encoder` or `tower`."""
        if isinstance(self.model, TextEncoder):
            return "text_encoder"
        name: str = self.model.config.model_type
        return name if name in ("llava", "llm2clip") else "tower"


def export(checkpoint: str | Path, to: str, out: str | Path) -> dict[str, Any]:
    """Write a checkpoint for another tool, open it there, and compare.

    Args:
        checkpoint: A model directory, or a stage's output with `model/` or `text_encoder/` in it.
        to: One of :data:`FORMATS`.
        out: Folder to write; must not exist.

    Returns:
        The certificate, which also lies in the folder.

    Raises:
        ValueError: The checkpoint was changed after it was written, the format cannot hold it (the
            message says what would be lost), or what was written does not compute the same.
    """
    if to not in FORMATS:
        raise KeyMapError(f"--to {to!r}: expected one of {', '.join(FORMATS)}")
    source = _folder(Path(checkpoint))
    verify_hashes(source)
    with written_whole(out) as folder:
        folder.mkdir()
        return FORMATS[to](_load(source), folder)


def _folder(path: Path) -> Path:
    places = [path, path / "model", path / "text_encoder"]
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None:
        raise KeyMapError(f"{path}: no config.json there or in model/; expected a checkpoint")
    return found


def _load(path: Path) -> Checkpoint:
    register()
    if (path / SETTINGS_NAME).is_file():
        return Checkpoint(path, TextEncoder.from_pretrained(path))
    kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind == "llava":
        return Checkpoint(path, *load_vlm(path))
    tower = load_vision_tower(path, dtype=torch.float32)
    model = AutoModel.from_pretrained(path, dtype=torch.float32) if kind == "llm2clip" else None
    return Checkpoint(path, tower.model if model is None else model.eval(), tower.image_processor)


def _image_side(given: Checkpoint, to: str) -> tuple[Any, Any]:
    """The tower, and the head where there is one."""
    if given.kind not in ("tower", "llm2clip"):
        raise KeyMapError(f"{given.path}: `--to {to}` takes a tower or stage 2b's model/")
    return vision_tower_of(given.model), getattr(given.model, "visual_projection", None)


def _transformers(given: Checkpoint, folder: Path) -> dict[str, Any]:
    """A directory for `from_pretrained`."""
    if given.kind == "text_encoder":
        raise KeyMapError(f"{given.path}: use `--to sentence-transformers` for a text encoder")
    if given.kind == "llava":
        return _llava_hf(given, folder, "transformers")
    pixels = fixed_pixels(given.model.config.image_size if given.kind == "tower"
                          else given.model.config.vision_config.image_size)  # fmt: skip
    expected = features_of(given.model, pixels)
    if given.kind == "llm2clip":
        given.model.save_pretrained(folder)
        given.processor.save_pretrained(folder)
        export_vision_tower(given.model, given.processor, folder / "vision_tower")
    else:
        export_vision_tower(given.model, given.processor, folder)
    again = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return certify(
        folder,
        made="export --to transformers",
        source=given.path,
        expected=expected,
        got=features_of(again, pixels),
        opened_with=f"AutoModel ({type(again).__name__}) of transformers",
        more={"needs": _needs(vision_tower_of(given.model).config, given.kind)},
    )


def _needs(config: Any, kind: str = "tower") -> str:
    own = kind == "llm2clip" or not type(config).__module__.startswith("transformers.")
    return "llm2clip_vlm.register() first" if own else "transformers alone"


def _llava_hf(given: Checkpoint, folder: Path, to: str) -> dict[str, Any]:
    save_vlm(given.model, given.processor, folder)
    expected = logits_of(given.model)
    again = LlavaForConditionalGeneration.from_pretrained(folder, dtype=given.model.dtype)
    return certify(
        folder,
        made=f"export --to {to}",
        source=given.path,
        expected=expected,
        got=logits_of(again),
        opened_with="LlavaForConditionalGeneration of transformers",
        more={"needs": _needs(given.model.config.vision_config)},
    )


def _vllm(given: Checkpoint, folder: Path) -> dict[str, Any]:
    """A LLaVA under the names that vLLM and SGLang map; refused where they have no such tower."""
    if given.kind != "llava":
        raise KeyMapError(f"{given.path}: `--to vllm` takes stage 3's or 4's model/")
    kind = given.model.config.vision_config.model_type
    if kind not in _SERVED:
        raise KeyMapError(
            f"{given.path}: vLLM and SGLang build a LLaVA's tower from {', '.join(_SERVED)} alone; "
            f"with {kind} serving is lost, and only transformers after llm2clip_vlm.register() "
            "opens this VLM. Train on a CLIP or SigLIP tower to be served"
        )
    certificate = _llava_hf(given, folder, "vllm")
    prefixes = ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.")
    if foreign := [name for name in read_weights(folder) if not name.startswith(prefixes)]:
        raise KeyMapError(f"{foreign[0]} is no name that vLLM maps: expected {prefixes}")
    return certificate


def _llava(given: Checkpoint, folder: Path) -> dict[str, Any]:
    """For unmodified LLaVA: a CLIP directory, and a VLM's decoder and projector beside it."""
    if given.kind == "text_encoder":
        raise KeyMapError(f"{given.path}: `--to llava` takes a tower, stage 2b's model/ or a VLM")
    tower = vision_tower_of(given.model)
    if tower.config.model_type != "clip_vision_model":
        raise KeyMapError(
            f"{given.path}: LLaVA makes every tower a CLIPVisionModel, so a "
            f"{tower.config.model_type} would be random there; `--to transformers` keeps it"
        )
    if given.kind != "llava":
        pixels = fixed_pixels(tower.config.image_size)
        export_vision_tower(tower, given.processor, folder)
        again = transformers.CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
        return certify(
            folder,
            made="export --to llava",
            source=given.path,
            expected=features_of(tower, pixels),
            got=features_of(again, pixels),
            opened_with="CLIPVisionModel of transformers, as LLaVA does",
        )
    export_vision_tower(tower, given.processor.image_processor, folder / "vision_tower")
    torch.save(llava_projector(given.model), folder / PROJECTOR)
    config = llava_config(given.model, given.processor, "vision_tower")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: tensor.contiguous() for name, tensor in llava_weights(given.model).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    given.processor.tokenizer.save_pretrained(folder)
    again, _, _ = convert_llava(folder, weights, None, None, partial=False)
    return certify(
        folder,
        made="export --to llava",
        source=given.path,
        expected=logits_of(given.model),
        got=logits_of(again),
        opened_with="`convert`, which reads LLaVA's format back",
    )


def _open_clip(given: Checkpoint, folder: Path) -> dict[str, Any]:
    """`model.visual` of open_clip: weights that load strictly, and its config."""
    tower, head = _image_side(given, "open_clip")
    weights = open_clip_weights(tower, head)
    config = {"model_cfg": open_clip_config(tower, head), "preprocess_cfg": _preprocess(given)}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    named = {f"visual.{name}": tensor for name, tensor in weights.items()}
    save_file(named, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    return _checked(given, folder, "open_clip", weights)


def _timm(given: Checkpoint, folder: Path) -> dict[str, Any]:
    """A directory in timm's hub layout, without classifier or projection."""
    tower, _ = _image_side(given, "timm")
    weights = timm_weights(tower)
    architecture, values = timm_arguments(tower.config)
    side = tower.config.image_size
    pretrained = {"input_size": [3, side, side], **_preprocess(given), "num_classes": 0}
    pretrained |= {"crop_pct": 1.0, "crop_mode": "center"}
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": tower.config.hidden_size,
        "model_args": values,
        "pretrained_cfg": pretrained,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return _checked(Checkpoint(given.path, tower, given.processor), folder, "timm", weights)


def _preprocess(given: Checkpoint) -> dict[str, Any]:
    processor = given.processor
    mean, std = list(processor.image_mean), list(processor.image_std)
    return {"mean": mean, "std": std, "interpolation": "bicubic"}


def _checked(
    given: Checkpoint, folder: Path, library: str, weights: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Compare with the library; where it is not installed, with what `convert` makes of it."""
    from llm2clip_vlm.interop.convert import FIELDS, convert

    tower = vision_tower_of(given.model)
    pixels = fixed_pixels(tower.config.image_size)
    expected = {"image_features": features_of(given.model, pixels)["image_features"]}
    more = {}
    if library == "open_clip" and getattr(tower.config, "hidden_act", "") == "gelu_pytorch_tanh":
        more = {"lost": "open_clip builds this tower with exact GELU; it was trained with tanh's"}
    opened = library_features(library, weights, tower.config, pixels)
    if opened is None:
        expected = features_of(tower, pixels)
        with tempfile.TemporaryDirectory() as place:
            named = {k: getattr(tower.config, k) for k in FIELDS if hasattr(tower.config, k)}
            convert(folder, Path(place) / "back", settings=named)
            again = load_vision_tower(Path(place) / "back", dtype=torch.float32).model
        opened = f"`convert`: {library} is not installed", again(pixels).pooler_output.detach()
    return certify(
        folder,
        made=f"export --to {library}",
        source=given.path,
        expected=expected,
        got={"image_features": opened[1]},
        opened_with=opened[0],
        more=more,
    )


def _sentence_transformers(given: Checkpoint, folder: Path) -> dict[str, Any]:
    """A directory for `SentenceTransformer(...)`."""
    if given.kind != "text_encoder":
        raise KeyMapError(
            f"{given.path}: `--to sentence-transformers` takes stage 1's text_encoder/"
        )
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise KeyMapError(
            "pip install sentence-transformers: the export is opened with it"
        ) from error
    if export_sentence_transformers(given.model, given.path, folder) is None:
        raise KeyMapError(
            f"{given.path}: sentence-transformers cannot make its vectors (see above)"
        )
    texts = ["A photo of two dogs.", "Rain on a window, seen from inside."]
    again = SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
    return certify(
        folder,
        made="export --to sentence-transformers",
        source=given.path,
        expected={"text_embeds": given.model.encode(texts)},
        got={"text_embeds": again.float()},
        opened_with="SentenceTransformer of sentence-transformers",
    )


FORMATS: dict[str, Callable[[Checkpoint, Path], dict[str, Any]]] = {
    "transformers": _transformers,
    "llava": _llava,
    "open_clip": _open_clip,
    "timm": _timm,
    "sentence-transformers": _sentence_transformers,
    "vllm": _vllm,
}
"""What `--to` takes."""
