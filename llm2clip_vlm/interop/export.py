"""`llm2clip-vlm export`: a checkpoint as another tool opens it, with proof that it does."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionModel

from llm2clip_vlm.files import read_json
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop import certificate, libraries, llava
from llm2clip_vlm.interop.certificate import Evidence, features_of, logits_of
from llm2clip_vlm.interop.layouts.vits import TANH_GELU
from llm2clip_vlm.interop.weights import verify_hashes, weight_files
from llm2clip_vlm.models.checkpoint_files import WEIGHTS, refuse_gguf
from llm2clip_vlm.models.equal import fixed_pixels
from llm2clip_vlm.models.llm2clip import register
from llm2clip_vlm.models.loading import load_complete, to_dtype
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.models.text.text_encoder_settings import SETTINGS_NAME
from llm2clip_vlm.models.text.tokenizer_files import SENTENCEPIECE, save_tokenizer
from llm2clip_vlm.models.vision.timm_vision import RESAMPLE
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.models.vlm.building import load_vlm
from llm2clip_vlm.training.export import export_vision_tower, vision_tower_of
from llm2clip_vlm.training.text.embedder_export import export_sentence_transformers

_SERVED = ("clip_vision_model", "siglip_vision_model", "pixtral")
"""Towers that vLLM's and SGLang's LLaVA build (`vllm/model_executor/models/llava.py`)."""

TANH = "gelu_pytorch_tanh"
_SERVED_NAMES = ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.")


def export(
    checkpoint: str | Path, to: str, out: str | Path, dtype: str | None = None, renew: bool = False
) -> dict[str, Any]:
    """Write a checkpoint for another tool, open it there, and compare.

    Args:
        checkpoint: A model directory, or a stage's output with `model/` or `text_encoder/` in it.
        to: One of :data:`FORMATS`.
        out: Folder to write; must not exist.
        dtype: `float32`, `bfloat16` or `float16`: what a VLM's weights are rounded to; the
            certificate then also says how far that moves the logits. None: as they are.
        renew: An earlier export that nobody has changed goes.

    Returns:
        The certificate, which also lies in the folder.

    Raises:
        ValueError: The checkpoint was changed after it was written, the format cannot hold it (the
            message says what would be lost), or what was written does not compute the same.
    """
    if to not in FORMATS:
        raise ModelError(f"--to {to!r}: expected one of {', '.join(FORMATS)}")
    write, kinds = FORMATS[to]
    path = Path(checkpoint)
    places = [path, path / "model", path / "text_encoder"]
    source = next((place for place in places if (place / "config.json").is_file()), None)
    if source is None:
        refuse_gguf(path)
        raise ModelError(f"{path}: no config.json there, in its model/ or in its text_encoder/")
    with certificate.new_folder(out, renew) as folder:  # before minutes of loading
        verify_hashes(source)
        kind, model, processor = _load(source)
        if kind not in kinds:
            known = " or ".join(name for name, (_, takes) in FORMATS.items() if kind in takes)
            raise ModelError(
                f"{source}: --to {to} takes a {' or '.join(kinds)}, this is a {kind}: --to {known}"
            )
        more: dict[str, Any] = {}
        if dtype is not None:
            if not hasattr(model, "lm_head"):
                raise ModelError(f"--dtype {dtype}: only a VLM is rounded, this is a {kind}")
            before = logits_of(model)["logits"]
            to_dtype(model, getattr(torch, dtype))
            after = logits_of(model)["logits"]
            more["rounding"] = {
                "to": dtype,
                "max_difference": float((after - before).abs().max()),
                "largest_value": float(before.abs().max()),
                "same_first_token": float((after.argmax(-1) == before.argmax(-1)).float().mean()),
            }
        evidence = write(source, model, processor, folder)
        evidence = replace(evidence, more={**evidence.more, **more})
        return certificate.certify(folder, f"export --to {to}", source, evidence)


def _load(path: Path) -> tuple[str, Any, Any]:
    """Kind, model (in fp32 but for a VLM) and processor."""
    register()
    if (path / SETTINGS_NAME).is_file():
        return "text encoder", TextEncoder.from_pretrained(path), None
    kind = read_json(path / "config.json", dict, ModelError).get("model_type")
    if kind in ("llava", "llava_next"):
        return "VLM" if kind == "llava" else "AnyRes VLM", *load_vlm(path)
    tower = load_vision_tower(path, dtype=torch.float32)
    if kind != "llm2clip":
        return "tower", tower.model, tower.image_processor
    model: Any = load_complete(AutoModel, path, dtype=torch.float32)
    return "stage 2b model", model.eval(), tower.image_processor


def _transformers(source: Path, model: Any, processor: Any, folder: Path) -> Evidence:
    """A directory for `from_pretrained`."""
    if hasattr(model, "lm_head"):
        return certificate.save_llava(model, processor, folder)
    pixels = fixed_pixels(vision_tower_of(model).config.image_size)
    again = certificate.save_encoder(model, processor, folder)
    opened = f"AutoModel ({type(again).__name__}) of transformers"
    expected, got = features_of(model, pixels), features_of(again, pixels)
    return Evidence(opened, expected, got, {"needs": certificate.needs(model)})


def _vllm(source: Path, model: Any, processor: Any, folder: Path) -> Evidence:
    """A LLaVA under the names that vLLM and SGLang map; refused where they have no such tower."""
    if (kind := model.config.vision_config.model_type) not in _SERVED:
        raise ModelError(
            f"{source}: vLLM and SGLang build a LLaVA's tower from {', '.join(_SERVED)} alone; "
            f"with {kind} serving is lost, and only transformers after llm2clip_vlm.register() "
            "opens this VLM. Train on a CLIP or SigLIP tower to be served"
        )
    evidence = certificate.save_llava(model, processor, folder)
    files = [safe_open(file, "pt") for file in weight_files(folder)]
    names = [name for file in files for name in file.keys()]  # noqa: SIM118
    if foreign := [name for name in names if not name.startswith(_SERVED_NAMES)]:
        raise ModelError(f"{foreign[0]} is no name that vLLM maps: expected {_SERVED_NAMES}")
    return evidence


def _llava(source: Path, model: Any, processor: Any, folder: Path) -> Evidence:
    """Write what unmodified LLaVA reads: a CLIP, and a VLM's decoder and projector beside it."""
    tower = vision_tower_of(model)
    if tower.config.model_type != "clip_vision_model":
        raise ModelError(
            f"{source}: LLaVA makes every tower a CLIPVisionModel, so a "
            f"{tower.config.model_type} would be random there; `--to transformers` keeps it"
        )
    if not hasattr(model, "lm_head"):
        pixels = fixed_pixels(tower.config.image_size)
        export_vision_tower(tower, processor, folder)
        again: Any = load_complete(CLIPVisionModel, folder, dtype=torch.float32)
        opened = "CLIPVisionModel of transformers, as LLaVA does"
        return Evidence(opened, features_of(tower, pixels), features_of(again.eval(), pixels))
    export_vision_tower(tower, processor.image_processor, folder / "vision_tower")
    weights = llava.llava_weights(model)
    projector = {name: tensor for name, tensor in weights.items() if "mm_projector" in name}
    torch.save(projector, folder / llava.PROJECTOR)
    _write(folder, "config.json", llava.llava_config(model, processor, "vision_tower"), weights)
    save_tokenizer(processor.tokenizer, folder)
    if (folder / SENTENCEPIECE).is_file():  # LLaVA asks for the slow tokenizer, which reads this
        file = folder / "tokenizer_config.json"
        named = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "LlamaTokenizer"}
        file.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
    again, _, _ = llava.convert_llava(folder, weights, None, None, partial=False)
    opened = "`convert`, which reads LLaVA's format back"
    return Evidence(opened, logits_of(model), logits_of(again))


def _open_clip(source: Path, model: Any, processor: Any, folder: Path) -> Evidence:
    """`model.visual` of open_clip: weights that load strictly, and its config."""
    tower, head = vision_tower_of(model), getattr(model, "visual_projection", None)
    weights = libraries.open_clip_weights(tower, head)
    shown, scaled, squash = _shown(processor)
    config = {
        "model_cfg": libraries.open_clip_config(tower.config, head),
        "preprocess_cfg": shown | {"resize_mode": "squash" if squash else "shortest"},
    }
    named = {f"visual.{name}": tensor for name, tensor in weights.items()}
    _write(folder, "open_clip_config.json", config, named, "open_clip_model.safetensors")
    lost = []
    tanh = getattr(tower.config, "hidden_act", "") == TANH
    if tanh and not TANH_GELU.match(libraries.timm_arguments(tower.config)[0]):
        lost.append("open_clip builds this tower with exact GELU; it was trained with tanh's")
    if scaled != (side := tower.config.image_size):
        lost.append(f"open_clip resizes to {side} px; its pictures were cropped from {scaled} px")
    more = {"lost": "; ".join(lost)} if lost else {}
    return replace(_checked("open_clip", model, weights, folder), more=more)


def _timm(source: Path, model: Any, processor: Any, folder: Path) -> Evidence:
    """A directory in timm's hub layout, without classifier or projection."""
    tower = vision_tower_of(model)
    weights = libraries.timm_weights(tower)
    architecture, values = libraries.timm_arguments(tower.config)
    side = tower.config.image_size
    shown, scaled, squash = _shown(processor)
    crop_pct = side / scaled
    if math.floor(side / crop_pct) < scaled:  # which is how timm reads it
        crop_pct = math.nextafter(crop_pct, 0)
    shown |= {
        "input_size": [3, side, side],
        "num_classes": 0,
        "crop_mode": "squash" if squash else "center",
        "crop_pct": crop_pct,
    }
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": tower.config.hidden_size,
        "model_args": values,
        "pretrained_cfg": shown,
    }
    _write(folder, "config.json", config, weights)
    return _checked("timm", tower, weights, folder)


def _shown(processor: Any) -> tuple[dict[str, Any], int, bool]:
    """How images are made ready, in both libraries' words; resized to what, and if squashed."""
    usual = processor.do_rescale and processor.do_normalize
    if not usual or abs(processor.rescale_factor - 1 / 255) > 1e-6:
        raise ModelError(
            "expected an image processor that divides by 255 and then normalises, as both "
            f"libraries do, got do_rescale {processor.do_rescale}, rescale_factor "
            f"{processor.rescale_factor}, do_normalize {processor.do_normalize}"
        )
    names = {number: name for name, number in RESAMPLE.items()}
    mean, std = list(processor.image_mean), list(processor.image_std)
    shown = {"mean": mean, "std": std, "interpolation": names[int(processor.resample)]}
    short = processor.size.get("shortest_edge")
    return shown, int(short or processor.size["height"]), not short


def _write(
    folder: Path, name: str, config: dict[str, Any], weights: dict[str, Tensor], file: str = WEIGHTS
) -> None:
    (folder / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    whole = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(whole, folder / file, metadata={"format": "pt"})


def _checked(library: str, model: nn.Module, weights: dict[str, Tensor], folder: Path) -> Evidence:
    """Compare with the library; where it is not installed, with what `convert` makes of it."""
    from llm2clip_vlm.interop.convert import convert

    tower = vision_tower_of(model)
    pixels = fixed_pixels(tower.config.image_size)
    if (opened := libraries.library_features(library, weights, tower.config, pixels)) is None:
        model = tower
        with tempfile.TemporaryDirectory() as place:
            # What a name may stand for, or is told as lost; all else is read from what was written.
            config, kept = tower.config.to_dict(), {"num_attention_heads", "rope_grid"}
            kept |= {"hidden_act"} if config.get("hidden_act") == TANH else set()
            named = {key: config[key] for key in kept & config.keys()}
            convert(folder, Path(place) / "back", settings=named)
            again = load_vision_tower(Path(place) / "back", dtype=torch.float32).model
            got = features_of(again, pixels)["image_features"]
        opened = f"`convert`: {library} cannot be imported", got
    expected = {"image_features": features_of(model, pixels)["image_features"]}
    return Evidence(opened[0], expected, {"image_features": opened[1]})


def _sentence_transformers(source: Path, model: Any, processor: Any, folder: Path) -> Evidence:
    """A directory for `SentenceTransformer(...)`."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        told = "pip install sentence-transformers: the export is opened with it"
        raise ModelError(told) from error
    if export_sentence_transformers(model, source, folder) is None:
        raise ModelError(f"{source}: sentence-transformers cannot make its vectors (see above)")
    texts = ["A photo of two dogs.", "Rain on a window, seen from inside."]
    again = SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
    expected, got = {"text_embeds": model.encode(texts)}, {"text_embeds": again.float()}
    return Evidence("SentenceTransformer of sentence-transformers", expected, got)


_IMAGES = ("tower", "stage 2b model")
_Writer = Callable[[Path, Any, Any, Path], Evidence]
FORMATS: dict[str, tuple[_Writer, tuple[str, ...]]] = {
    "transformers": (_transformers, (*_IMAGES, "VLM", "AnyRes VLM")),
    "llava": (_llava, (*_IMAGES, "VLM")),
    "open_clip": (_open_clip, _IMAGES),
    "timm": (_timm, _IMAGES),
    "sentence-transformers": (_sentence_transformers, ("text encoder",)),
    "vllm": (_vllm, ("VLM",)),
}
"""What `--to` takes: who writes it, and from what."""
