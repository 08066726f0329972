"""Loading weights completely, or not at all."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging


def load_complete(
    model_class: Any,
    path: str | Path,
    *,
    optional: str | None = None,
    error: type[ValueError] = ValueError,
    **arguments: Any,
) -> Any:
    """`from_pretrained` that refuses missing weights, where transformers only warns.

    Args:
        model_class: A transformers class.
        path: Directory or hub id. Where `state_dict` is among the arguments nothing is read from
            it: it is for messages only.
        optional: Weights below this prefix may be missing.
        error: What is raised.
        **arguments: Of `from_pretrained`.

    Returns:
        The model. Weights that it has no use for are not mentioned.

    Raises:
        ValueError: (or `error`) The weights cannot be read, are missing, or have another shape.
    """
    source = None if "state_dict" in arguments else path
    try:
        with _no_load_report():
            model, found = model_class.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as failure:
        raise error(f"{path}: cannot be loaded as {model_class.__name__} ({failure})") from failure
    wrong = [*map(str, found["missing_keys"]), *map(str, found.get("mismatched_keys", ()))]
    wrong = sorted(name for name in wrong if not (optional and name.startswith(optional)))
    if wrong:
        raise error(
            f"{path}: {len(wrong)} weights of {type(model).__name__} are missing or of another "
            f"shape (first: {wrong[:3]}); they would have stayed random. Is the checkpoint "
            "complete, and of this architecture?"
        )
    return model


def to_dtype(model: Any, dtype: torch.dtype) -> Any:
    """A model whose weights have another dtype, in place.

    Tables that are computed and not loaded (DINOv3's rotary frequencies) stay in fp32, as
    `from_pretrained` leaves them.

    Args:
        model: Any module.
        dtype: Of its parameters and of the buffers that are saved.
    """
    saved = model.state_dict(keep_vars=True).keys()
    computed = {name: value for name, value in model.named_buffers() if name not in saved}
    model.to(dtype)
    for name, value in computed.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, value)
    return model


def read_config(path: str, error: type[ValueError] = ValueError) -> Any:
    """The config of a model directory or a hub id.

    Raises:
        ValueError: (or `error`) There is none that transformers or this package knows.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as failure:
        raise error(
            f"{path}: no readable config.json ({failure}); expected a model directory or a hub id"
        ) from failure


def four_bits(
    device: Any = None, error: type[ValueError] = ValueError, *, skip: list[str] | None = None
) -> dict[str, Any]:
    """Arguments of `from_pretrained` for NF4 weights, as QLoRA has them (arXiv 2305.14314).

    Args:
        device: Where to; none = the CPU.
        error: What is raised.
        skip: Modules that keep their precision, by name; none = the head.

    Raises:
        ValueError: (or `error`) bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise error(
            "load_in_4bit is true, but bitsandbytes is not installed; pip install bitsandbytes, or "
            "leave load_in_4bit out"
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )
    return {"quantization_config": config, "device_map": {"": device or "cpu"}}


@contextmanager
def _no_load_report() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
