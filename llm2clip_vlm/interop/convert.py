"""`llm2clip-vlm convert`: a checkpoint of another project, known by what is in it."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, SiglipVisionConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from llm2clip_vlm.files import read_json
from llm2clip_vlm.hub import ModelError, fetched
from llm2clip_vlm.interop import certificate, libraries
from llm2clip_vlm.interop.certificate import Evidence, features_of
from llm2clip_vlm.interop.gguf_file import convert_gguf, is_gguf
from llm2clip_vlm.interop.keys import KeyReport, load_translated, translate
from llm2clip_vlm.interop.layouts import official
from llm2clip_vlm.interop.layouts.tables import image_processor, recognise, tower_config
from llm2clip_vlm.interop.layouts.timm_cnn import convert_cnn, is_cnn
from llm2clip_vlm.interop.layouts.vits import TANH_GELU
from llm2clip_vlm.interop.llava import convert_llava
from llm2clip_vlm.interop.weights import read_weights, verify_hashes, weight_files
from llm2clip_vlm.models.checkpoint_files import read_config_file, refuse_gguf
from llm2clip_vlm.models.equal import fixed_pixels
from llm2clip_vlm.models.llm2clip import LLM2CLIPConfig, LLM2CLIPModel, register
from llm2clip_vlm.models.loading import load_complete, read_config, read_tokenizer, to_dtype
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.models.vlm.building import load_vlm
from llm2clip_vlm.runs.hashes import fingerprint_file

FIELDS = ("hidden_act", "num_attention_heads", "layer_norm_eps", "rope_theta", "rope_grid")
"""Fields of a tower's config that its weights do not tell."""
LLM = "ForCausalLM"
"""How transformers' names of language models end."""


def convert(
    path: str | Path,
    out: str | Path,
    *,
    vision_tower: str | None = None,
    language_model: str | None = None,
    settings: Mapping[str, Any] | None = None,
    partial: bool = False,
    sha256: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Make a checkpoint of this package from one of another project.

    What it is is read off its weights' names and its config, never off its path. A file with an
    adaptor becomes an `LLM2CLIPModel` with the plain tower in `vision_tower/`, a tower a tower,
    LLaVA a model of transformers, a Llama without head a text encoder, a GGUF file the directory of
    its language model.

    Args:
        path: File or folder, or a hub id (`ORG/NAME`, `ORG/NAME/FILE`), which is fetched.
        out: Folder to write; must not exist.
        vision_tower: Tower of a LLaVA that keeps it apart.
        language_model: Language model of an `mm_projector.bin`.
        settings: Fields of the tower's config that the file does not say, such as `hidden_act`.
        partial: Let missing and unexpected weights pass.
        sha256: Hash that the file must have.
        trust_remote_code: Run the Python files beside the weights, to compare with what they
            compute. Nothing else here does.

    Returns:
        The certificate, which also lies in the folder.

    Raises:
        ValueError: The checkpoint is unsafe, damaged, not known or incomplete, or what was made of
            it does not compute the same.
    """
    source, given = Path(path), dict(settings or {})
    if not source.exists():
        source = fetched(str(path), code=trust_remote_code)
    if source.is_file() and tarfile.is_tarfile(source):
        raise ModelError(
            f"{source}: a tar holds no weights; if it holds embeddings of captions, encode those "
            "again (stage 2a: `llm2clip-vlm embed build`)"
        )
    if source.is_dir():
        refuse_gguf(source)
    config = _config(source if source.is_dir() else source.parent)
    llm = "mm_vision_tower" not in config and _architecture(config).endswith(LLM)
    llm = llm and source.is_dir() and not list(source.glob("*.gguf"))
    if llm and weight_files(source)[0].suffix == ".safetensors":
        raise ModelError(
            f"{source}: a language model of transformers already ({_architecture(config)}), which "
            "needs no conversion: name it as it is (`language_model`)"
        )
    verify_hashes(source, sha256)
    with certificate.new_folder(out) as folder:
        if is_gguf(source):
            evidence = convert_gguf(source, folder, given)
        elif llm:
            evidence = _language_model(source, folder)
        elif source.is_dir() and _is_text_encoder(config):
            evidence = _text_encoder(source, folder)
        else:
            weights = read_weights(source)
            if any("multi_modal_projector." in name for name in weights):
                evidence = _vlm(folder, *load_vlm(source), KeyReport(len(weights)))
            elif any("mm_projector." in name for name in weights):
                made = convert_llava(source, weights, vision_tower, language_model, partial)
                evidence = _vlm(folder, *made)
            elif is_cnn(weights, given):
                evidence = convert_cnn(source, folder, weights, config, given)
            else:
                options = (given, partial, trust_remote_code)
                evidence = _encoder(source, folder, weights, config, *options)
        return certificate.certify(folder, "convert", source, evidence)


def _language_model(source: Path, folder: Path) -> Evidence:
    """A language model of transformers with pickled weights, of which tensors alone are read."""
    config = read_config(source)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    weights = read_weights(source)
    model = load_complete(kind, source, config=config, state_dict=weights, dtype="auto")
    expected, got = certificate.save_llm(model, read_tokenizer(source), folder)
    return Evidence("transformers", expected, got, {"format": "language model"})


def _config(folder: Path) -> dict[str, Any]:
    """What the files beside the weights say, in whichever form."""
    found = read_config_file(folder) if (folder / "config.json").is_file() else {}
    if (other := folder / "open_clip_config.json").is_file():
        found |= read_json(other, dict, ModelError)
    return found


def _is_text_encoder(config: Mapping[str, Any]) -> bool:
    other = _architecture(config).endswith((LLM, "ForConditionalGeneration"))
    return "vocab_size" in config and not (other or "mm_vision_tower" in config)


def _architecture(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or [""])[0])


def _text_encoder(source: Path, folder: Path) -> Evidence:
    """A caption-contrastive Llama; LLM2CLIP's were trained in a user turn, averaged, 512 tokens."""
    encoder = TextEncoder.from_pretrained(
        source, pooling="mean", max_length_tokens=512, chat=True, bidirectional=True
    )
    encoder.save_pretrained(folder)
    texts = ["A photo of two dogs.", "Rain on a window."]
    again = TextEncoder.from_pretrained(folder).encode(texts)
    expected, got = {"text_embeds": encoder.encode(texts)}, {"text_embeds": again}
    return Evidence("TextEncoder.from_pretrained", expected, got, {"format": "text encoder"})


def _vlm(folder: Path, model: Any, processor: Any, report: KeyReport) -> Evidence:
    more = {"format": "llava", "keys": report.to_dict()}
    return replace(certificate.save_llava(model, processor, folder), more=more)


def _encoder(
    source: Path,
    folder: Path,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    given: dict[str, Any],
    partial: bool,
    trust_remote_code: bool,
) -> Evidence:
    """A tower, with an adaptor beside it or not."""
    register()
    beside = source if source.is_dir() else source.parent
    weights = official.canonical(weights)
    name, layout = recognise(set(weights), str(source))
    prefix = official.adaptor_prefix(weights)
    if trust_remote_code and prefix is None:
        raise ModelError(f"{source}: --trust-remote-code compares an adaptor, which is not here")
    table, sizes = layout.table, {}
    if prefix is not None:
        sizes = official.adaptor_sizes(weights, prefix, str(source))
        table = (*official.adaptor_table(prefix, sizes["adaptor_num_blocks"]), *table)
    found, unexpected = translate(weights, table)
    quick = {"hidden_act": "quick_gelu"} if name == "openai_clip" and prefix is not None else {}
    known = {k: v for k, v in _from_config(config).items() if hasattr(layout.config(), k)}
    vision_config = tower_config(layout, found, quick | known | given, str(source))
    if prefix is None:
        holder: Any = nn.Module()
        holder.vision_tower = model = AutoModel.from_config(vision_config)
    else:
        if layout.config is SiglipVisionConfig:  # trained without a projection
            identity = torch.eye(sizes["projection_dim"]).to(found["vision_tower.head.probe"])
            found.setdefault("visual_projection.weight", identity)
        sizes["projection_bias"] = "visual_projection.bias" in found
        sizes["logit_bias_init_value"] = 0.0 if "logit_bias" in found else None
        own = LLM2CLIPConfig(vision_config=vision_config.to_dict(), **sizes)
        holder = model = LLM2CLIPModel(own)
    left_out = official.LEFT_OUT_OF_A_TOWER if prefix is None else official.LEFT_OUT
    report = load_translated(
        holder, found, unexpected, left_out=left_out, where=source, partial=partial
    )
    pixels = fixed_pixels(vision_config.image_size)
    expected = features_of(model.eval(), pixels)
    opened = "llm2clip_vlm itself: the library it comes from cannot be imported"
    head = getattr(model, "visual_projection", None)
    visual = libraries.open_clip_weights(holder.vision_tower, head)
    if reference := libraries.library_features("open_clip", visual, vision_config, pixels):
        opened, expected["image_features"] = reference
    if trust_remote_code:
        opened, expected["image_embeds"] = _remote_embeds(beside, config, pixels)
    dtypes = {found[name].dtype for name in holder.state_dict().keys() & found.keys()}
    to_dtype(model, dtypes.pop() if len(dtypes) == 1 else torch.float32)
    processor = image_processor(vision_config, beside, config)
    again = certificate.save_encoder(model, processor, folder)
    more = {"format": name, "keys": report.to_dict()}
    if "num_attention_heads" not in known | given:  # no shape tells, so parity cannot
        heads = vision_config.num_attention_heads
        more["guessed"] = f"num_attention_heads={heads}, from the width (--set says another)"
    return Evidence(opened, expected, features_of(again, pixels), more)


def _from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers', open_clip's or timm's config says of a tower beyond its shapes."""
    if "model_cfg" in config:
        vision = config["model_cfg"]["vision_cfg"]
        name, act = vision.get("timm_model_name", ""), None
        quick = config["model_cfg"].get("quick_gelu", False)
        heads = vision["width"] // vision.get("head_width", 64) if "width" in vision else None
    elif "architecture" in config:
        given = config.get("model_args") or {}
        name, act, heads = config["architecture"], given.get("act_layer"), given.get("num_heads")
        quick = "quickgelu" in name
    else:
        vision = config.get("vision_config", config)
        kind = str(vision.get("model_type", config.get("model_type", "")))
        defaults = {"hidden_act": "quick_gelu"} if kind.startswith("clip") else {}
        return defaults | {field: vision[field] for field in FIELDS if field in vision}
    tanh = act == "gelu_tanh" or (act is None and TANH_GELU.match(name))
    found = {"hidden_act": "quick_gelu" if quick else "gelu_pytorch_tanh" if tanh else "gelu"}
    return found | ({"num_attention_heads": heads} if heads else {})


@torch.no_grad()
def _remote_embeds(folder: Path, config: Mapping[str, Any], pixels: Tensor) -> tuple[str, Tensor]:
    """What the Python files beside the weights compute, for `--trust-remote-code` alone."""
    named = map(str, config.get("auto_map", {}).values())
    if elsewhere := [name for name in named if "--" in name]:
        raise ModelError(
            f"{folder}: auto_map names code of another repository, {elsewhere[0]!r}, which could "
            "not be shown before it runs; put its files into the folder and name them there"
        )
    files = sorted(folder.glob("*.py"))
    for file in files:
        print(f"runs remote code: {file} (sha256 {fingerprint_file(file)})", flush=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    opened = f"{', '.join(file.name for file in files)} beside the weights"
    return opened, nn.functional.normalize(model.get_image_features(pixels), dim=-1)
