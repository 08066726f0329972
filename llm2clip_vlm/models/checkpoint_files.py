"""Config and headers of a checkpoint's files, read before anything is built; values, after it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm2clip_vlm.files import read_json, require_regular

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

_SIZES = re.compile(
    r"n_(embd|head|heads|layer|layers|inner|ctx|positions)|d_model|d_ff|depth|head_dim"
    r"|(hidden|intermediate|vocab|patch|image|embedding|ffn_hidden)_size|(text_)?embed_dim"
    r"|(projection|ffn|mlp|attention)_dim|max_position_embeddings|num_channels"
    r"|num_(hidden_layers|layers|attention_heads|key_value_heads|heads)"
)
"""Keys of a config that are sizes of what is built; a list has one for each layer."""
_COUNTS = re.compile(r"(.*_)?(num|n)_(.*_)?(layers?|blocks?)|n_layer|depths?")
"""Keys that say how many modules there are: each has its own tensor."""
_LIMITS = (
    (re.compile(r"(image|patch)_size"), 1 << 14),
    (re.compile(r"num_labels|(.*_)?experts"), 1 << 16),
    (re.compile(rf"{_SIZES.pattern}|{_COUNTS.pattern}"), 1 << 24),
)
"""Largest sizes: anything above would fill the memory before it is compared with the weights."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MAY_BE_ZERO = {"head_dim", "projection_dim"}


def read_config_file(folder: Path, error: type[ValueError]) -> dict[str, Any]:
    """The `config.json` of a local checkpoint, its numbers checked.

    Raises:
        ValueError: (as `error`) No JSON object; NaN; a size below 1 or beyond reason; a list of
            labels or modules that would fill the memory.
    """
    path = folder / "config.json"
    config: dict[str, Any] = read_json(path, dict, error)
    if "transformers_weights" in config:
        raise error(f"{path}: transformers_weights: expected weights under their usual names")
    for key, value in _numbers(config):
        name = key.rpartition(".")[2]
        if isinstance(value, float) and not math.isfinite(value):
            if math.isnan(value) or not name.endswith("limit"):
                raise error(f"{path}: {key}: expected a number, got {value}")
            continue
        if _SIZES.fullmatch(name) and value < (name not in _MAY_BE_ZERO):
            raise error(f"{path}: {key}: expected a size of 1 or more, got {value}")
        limit = next((limit for rule, limit in _LIMITS if rule.fullmatch(name)), math.inf)
        if value > limit:
            raise error(f"{path}: {key}: expected a size of at most {limit:,}, got {value}")
    return config


def check_sizes(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path, error: type[ValueError]
) -> None:
    """Refuse a config of more modules than the weights have tensors, before it is built."""
    for key, value in _numbers(config):
        if _COUNTS.fullmatch(key.rpartition(".")[2]) and value > max(len(weights), 1):
            raise error(
                f"{path / 'config.json'}: {key}: {value:,} of them cannot be filled from the "
                f"{len(weights):,} tensors of the weights; is it the config of these weights?"
            )


def check_values(model: Any, path: str | Path, error: type[ValueError]) -> None:
    """Refuse weights that are not finite; let the config say where a head is not tied after all.

    transformers ties no head that lies in the file with other values than the embeddings, but does
    once those are resized: the head would be lost.
    """
    for name, weight in model.named_parameters():
        if weight.dtype in _FLOATS and not weight.is_meta and not weight.isfinite().all():
            raise error(f"{path}: {name} holds NaN or infinity; is the checkpoint damaged?")
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


def shards_of(index: Path, error: type[ValueError]) -> list[Path]:
    """The files that an index names; all must be there, inside of its folder."""
    weight_map = read_json(index, dict, error).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise error(f"{index}: weight_map: expected names of weights and files, got none")
    shards = set(map(str, weight_map.values()))
    for shard in sorted(shards):
        if Path(shard).name != shard or not (index.parent / shard).exists():
            raise error(f"{index}: there is no file {shard!r} beside it; fetch it again")
    return sorted(index.parent / shard for shard in shards)


def refuse_gguf(path: Path, error: type[ValueError]) -> None:
    """Refuse a GGUF file, or a folder with nothing else, where a model directory is needed.

    Raises:
        ValueError: (as `error`) Names the command that makes a directory of it.
    """
    inside = sorted(path.glob("*.gguf")) if path.is_dir() else []
    file = path if path.suffix == ".gguf" else next(iter(inside), None)
    if file is not None and not (path / "config.json").exists():
        raise error(
            f"{file}: a GGUF file; make an ordinary directory of it first: "
            f"llm2clip-vlm convert {file} NEW"
        )


def weights_of_folder(
    folder: Path, config: Mapping[str, Any], error: type[ValueError]
) -> dict[str, Tensor]:
    """Names, shapes and dtypes of a local checkpoint's weights, as tensors without content.

    Args:
        folder: Folder with `model.safetensors`, whole or in shards.
        config: Config of the checkpoint.
        error: What is raised.

    Raises:
        ValueError: (as `error`) There are no weights, they are pickled or of an adapter, a file is
            damaged, or integers stand for weights and nothing says how.
    """
    if (folder / "adapter_config.json").exists():
        raise error(
            f"{folder}: adapter_config.json: this is an adapter (or has one beside its weights), "
            "and its base would be loaded from elsewhere; merge it, or take the file away"
        )
    if (folder / WEIGHTS).exists() or (folder / WEIGHTS).is_symlink():
        files: Iterable[Path] = [folder / WEIGHTS]
    elif (folder / INDEX).exists():
        files = shards_of(folder / INDEX, error)
    else:
        pickled = next((file.name for file in sorted(folder.glob("pytorch_model*.bin"))), None)
        raise error(
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
        for name, tensor in _header(file, error):
            if name in weights:
                raise error(f"{file}: {name!r} is in two shards; fetch them again")
            weights[name] = tensor
    whole = [
        name
        for name, tensor in weights.items()
        if re.search(r"(^|[._])weight$", name)
        and not (tensor.is_floating_point() and tensor.element_size() > 1)
    ]
    if whole and not config.get("quantization_config"):
        raise error(
            f"{folder}: {len(whole)} weights are {weights[whole[0]].dtype} (first: {whole[:3]}), "
            "and config.json has no quantization_config that says how; save them in a float type"
        )
    return weights


def _header(file: Path, error: type[ValueError]) -> Iterator[tuple[str, Tensor]]:
    require_regular(file, error)
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype(), torch.uint8)
                yield name, torch.empty(part.get_shape(), dtype=dtype, device="meta")
    except (SafetensorError, OSError, RuntimeError) as failure:
        raise error(f"{file}: damaged or cut off ({failure}); fetch it again") from failure


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Names of dtypes in safetensors; others hold whole bytes."""
