"""Config and headers of a checkpoint's files, read before anything is built; values, after it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from llm2clip_vlm.files import read_json, require_regular
from llm2clip_vlm.hub import ModelError

WEIGHTS = "model.safetensors"

_SIZES = re.compile(
    r"n_(embd|head|heads|layer|layers|inner|ctx|positions)|d_model|d_ff|depth|head_dim"
    r"|(hidden|intermediate|vocab|patch|image|embedding|ffn_hidden)_size|(text_)?embed_dim"
    r"|(projection|ffn|mlp|attention)_dim|max_position_embeddings|num_channels"
    r"|num_(hidden_layers|layers|attention_heads|key_value_heads|heads)"
)
"""Keys of a config that are sizes of what is built; a list has one for each layer."""
_COUNTS = re.compile(r"(.*_)?(num|n)_(.*_)?(layers?|blocks?)|n_layer|depths?")
"""Keys that say how many modules there are: each has its own tensor."""
_EPS = re.compile(r"(layer|rms)_norm_eps(ilon)?")
_LIMITS = (
    (_EPS, 1),
    (re.compile(r"(image|patch)_size"), 1 << 14),
    (re.compile(r"num_labels|(.*_)?experts"), 1 << 16),
    (re.compile(rf"{_SIZES.pattern}|{_COUNTS.pattern}"), 1 << 24),
)
"""Largest sizes: anything above would fill the memory before it is compared with the weights."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MAY_BE_ZERO = {"head_dim", "projection_dim"}


def file_of(path: str | Path, name: str) -> Path | None:
    """A file of a checkpoint: a directory, or a hub id. None: it has no such file."""
    found = cached_file(
        str(path),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def read_config_file(folder: Path) -> dict[str, Any]:
    """The `config.json` of a local checkpoint, its numbers checked.

    Raises:
        ModelError: No JSON object; NaN; a size below 1 or beyond reason; a list of
            labels or modules that would fill the memory.
    """
    path = folder / "config.json"
    config: dict[str, Any] = read_json(path, dict, ModelError)
    if "transformers_weights" in config:
        raise ModelError(f"{path}: transformers_weights: expected weights under their usual names")
    if not isinstance(named := config.get("architectures") or [], list):
        raise ModelError(f"{path}: architectures: expected a list of classes, got {named!r:.80}")
    for key, value in _numbers(config):
        name = key.rpartition(".")[2]
        if isinstance(value, float) and not math.isfinite(value):
            if math.isnan(value) or not name.endswith("limit"):
                raise ModelError(f"{path}: {key}: expected a number, got {value}")
            continue
        if _SIZES.fullmatch(name) and value < (name not in _MAY_BE_ZERO):
            raise ModelError(f"{path}: {key}: expected a size of 1 or more, got {value}")
        if name == "rope_theta" and value <= 0:
            raise ModelError(f"{path}: {key}: expected more than 0, got {value}")
        limit = next((limit for rule, limit in _LIMITS if rule.fullmatch(name)), math.inf)
        if value > limit:
            raise ModelError(f"{path}: {key}: expected a size of at most {limit:,}, got {value}")
    return config


def check_sizes(config: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a config of more modules than the weights have tensors, before it is built."""
    for key, value in _numbers(config):
        if _COUNTS.fullmatch(key.rpartition(".")[2]) and value > max(len(weights), 1):
            raise ModelError(
                f"{path / 'config.json'}: {key}: {value:,} of them cannot be filled from the "
                f"{len(weights):,} tensors of the weights; is it the config of these weights?"
            )


def check_values(model: Any, path: str | Path) -> None:
    """Refuse weights that are not finite; let the config say where a head is not tied after all.

    transformers ties no head that lies in the file with other values than the embeddings, but does
    once those are resized: the head would be lost.
    """
    for name, weight in model.named_parameters():
        if weight.dtype in _FLOATS and not weight.is_meta and not weight.isfinite().all():
            raise ModelError(f"{path}: {name} holds NaN or infinity; is the checkpoint damaged?")
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of a config with its dotted key; items of a list have the list's key."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value
    elif value is None and _EPS.fullmatch(key.rpartition(".")[2]):
        yield key, math.nan  # no layer norm computes with null


def _shards_of(index: Path) -> list[Path]:
    """The files that an index names; all must be there, inside of its folder."""
    weight_map = read_json(index, dict, ModelError).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise ModelError(f"{index}: weight_map: expected names of weights and files, got none")
    shards = set(map(str, weight_map.values()))
    for shard in sorted(shards):
        if Path(shard).name != shard or not (index.parent / shard).exists():
            raise ModelError(f"{index}: there is no file {shard!r} beside it; fetch it again")
    return sorted(index.parent / shard for shard in shards)


def weight_files(folder: Path, name: str) -> list[Path]:
    """The files of weights under a name, whole or in shards; empty if there are none."""
    if (folder / name).exists() or (folder / name).is_symlink():
        return [folder / name]
    index = folder / f"{name}.index.json"
    return _shards_of(index) if index.exists() else []


def refuse_gguf(path: Path) -> None:
    """Refuse a GGUF file, or a folder with nothing else, where a model directory is needed.

    Raises:
        ModelError: Names the command that makes a directory of it.
    """
    inside = sorted(path.glob("*.gguf")) if path.is_dir() else []
    file = path if path.suffix == ".gguf" else next(iter(inside), None)
    if file is not None and not (path / "config.json").exists():
        raise ModelError(
            f"{file}: a GGUF file; make an ordinary directory of it first: "
            f"llm2clip-vlm convert {file} NEW"
        )


def require_vlm(folder: str | Path) -> None:
    """Refuse a model directory whose config names no class that answers questions.

    Args:
        folder: It has a config.json.

    Raises:
        ModelError: It is an encoder, such as a vision tower; or its config is damaged.
    """
    written = read_json(Path(folder) / "config.json", error=ModelError).get("architectures")
    if (kind := " ".join(written or [])) and not re.search(
        r"For(ConditionalGeneration|CausalLM)\b", kind
    ):
        raise ModelError(
            f"{folder}: expected a vision-language model, such as stage 4's model/, got {kind}; "
            f"`llm2clip-vlm eval RECIPE model={folder}` judges an encoder"
        )


def weights_of_folder(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names, shapes and dtypes of a local checkpoint's weights, as tensors without content.

    Args:
        folder: Folder with `model.safetensors`, whole or in shards.
        config: Config of the checkpoint.

    Raises:
        ModelError: There are no weights, they are pickled or of an adapter, a file is
            damaged, or integers stand for weights and nothing says how.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder}: adapter_config.json: this is an adapter (or has one beside its weights), "
            "and its base would be loaded from elsewhere; merge it, or take the file away"
        )
    if not (files := weight_files(folder, WEIGHTS)):
        pickled = next((file.name for file in sorted(folder.glob("pytorch_model*.bin"))), None)
        raise ModelError(
            f"{folder}: there is no {WEIGHTS}"
            + (
                f"; {pickled} is a pickle and not opened. `llm2clip-vlm convert {folder} NEW` "
                "reads nothing but tensors from it and writes safetensors"
                if pickled
                else ", whole or in shards; is the download complete?"
            )
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        require_regular(file, ModelError)
        try:
            part = load_state_dict(file, map_location="meta")
        except (SafetensorError, OSError, RuntimeError, ValueError) as failure:
            raise ModelError(f"{file}: damaged or cut off ({failure}); fetch it again") from failure
        if twice := sorted(weights.keys() & part.keys()):
            raise ModelError(f"{file}: {twice[0]!r} is in two shards; fetch them again")
        weights |= part
    whole = [
        name
        for name, tensor in weights.items()
        if re.search(r"(^|[._])weight$", name)
        and not (tensor.is_floating_point() and tensor.element_size() > 1)
    ]
    if whole and not config.get("quantization_config"):
        raise ModelError(
            f"{folder}: {len(whole)} weights are {weights[whole[0]].dtype} (first: {whole[:3]}), "
            "and config.json has no quantization_config that says how; save them in a float type"
        )
    return weights
