"""Loading weights completely and strictly, or not at all; nothing of a checkpoint is run."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForPreTraining,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from llm2clip_vlm.hub import ModelError, require_place
from llm2clip_vlm.models import checkpoint_files
from llm2clip_vlm.models.text.tokenizer_files import SENTENCEPIECE, as_in_files

SAFE: dict[str, Any] = {"trust_remote_code": False}
"""Arguments of every `from_pretrained`: no Python file of a checkpoint runs, no one is asked."""
_OLD_BUFFERS = re.compile(r"(^|\.)(position_ids|masked_bias|rotary_emb\.inv_freq)$")
"""Tables that older versions saved and newer ones compute."""
_LARGEST_PICTURE_PX = 4096
_LARGEST_STEP = 300.0
"""Most between black and white that a tower takes: 0 to 255, as old CNNs have it. Pictures of
that range that are divided by a standard deviation below 1 were not rescaled."""


def load_complete(
    model_class: Any, path: str | Path, *, optional: str | None = None, **arguments: Any
) -> Any:
    """Load a model; refuse what transformers only warns of: missing and unknown weights.

    Names and shapes are compared without content first, so that a config of wrong sizes costs
    nothing. A weight is known if the loaded class has it, or the architecture that the config names
    (the text tower of a CLIP of which the vision tower is loaded), or its pretraining class.

    Args:
        model_class: A transformers class.
        path: Directory or hub id. With `state_dict` among the arguments nothing is read from it:
            it is for messages only.
        optional: Weights below this prefix may be missing.
        **arguments: More arguments of `from_pretrained`.

    Returns:
        The model.

    Raises:
        ModelError: The weights cannot be read, are missing, unknown, not finite or have another
            shape; or they are pickled, or of an adapter.
    """
    if "state_dict" not in arguments:
        require_place(path)
        if local := Path(path).is_dir():
            _check_names(model_class, Path(path), optional, arguments)
        arguments |= {**SAFE, "use_safetensors": True}
    source = None if "state_dict" in arguments else path
    with boundary(f"{path}: cannot be loaded as {model_class.__name__}"), _quiet():
        model, found = model_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack weights in the first evaluation, and pass no gradients then.
            module.support_avx512bf16_for_cpu = False
    _refuse_missing(path, model, found, optional)
    if source is None:
        _refuse_unknown(path, model, _unknown(model, found))
    checkpoint_files.check_values(model, path)
    forget_paths(model.config)
    model.name_or_path = model.config._name_or_path  # which PEFT writes into an adapter
    if source is not None and not local:
        folder = Path(cached_file(path, "config.json") or "").parent
        if not checkpoint_files.weight_files(folder, checkpoint_files.WEIGHTS):
            return model  # the hub's own conversion of pickled weights lies in another revision
        _check_names(model_class, folder, optional, arguments)
    return model


def forget_paths(config: Any) -> None:
    """Take the folders of this machine out of a config and the configs in it, which are saved.

    Args:
        config: Config of a model that was loaded; hub ids stay.
    """
    if Path(config._name_or_path or "").exists():
        config._name_or_path = ""
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            forget_paths(part)


def _check_names(
    model_class: Any, folder: Path, optional: str | None, arguments: Mapping[str, Any]
) -> None:
    """Compare names and shapes of the weights with what the config describes, on no device."""
    written = checkpoint_files.read_config_file(folder)
    weights = checkpoint_files.weights_of_folder(folder, written)
    checkpoint_files.check_sizes(written, weights, folder)
    if written.get("quantization_config") or is_deepspeed_zero3_enabled():
        return  # names are those of the quantised modules; shapes are shards
    config = arguments.get("config") or read_config(folder)

    def compared(kind: Any) -> tuple[Any, dict[str, Any]]:
        if mapping := getattr(kind, "_model_mapping", None):
            if type(config) not in mapping:
                raise ModelError(
                    f"{folder}: model_type {config.model_type!r}, expected one that "
                    f"{kind.__name__} opens"
                )
            kind = _get_model_class(config, mapping)
        own: Any = kind.config_class
        part = not isinstance(config, own)
        with boundary(f"{folder}: cannot be loaded as {kind.__name__}"), _quiet(bars=False):
            made: tuple[Any, dict[str, Any]] = kind.from_pretrained(
                None,
                config=own.from_pretrained(folder) if part else config,
                state_dict=dict(weights),
                device_map="meta",
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **SAFE,
            )
        return made

    model, found = compared(model_class)
    _refuse_missing(folder, model, found, optional)
    extra = _unknown(model, found)
    for other in _whole_classes(config, written):
        if extra and other is not type(model):
            unknown = compared(other)[1]["unexpected_keys"]
            extra = {name for name in extra if any(_same(name, key) for key in unknown)}
    _refuse_unknown(folder, model, extra)


def _unknown(model: Any, found: Mapping[str, Any]) -> set[str]:
    """Weights that a model has no use for, without tables that older versions saved."""
    names = set(found["unexpected_keys"]) - {name for name, _ in model.named_buffers()}
    return {name for name in names if not _OLD_BUFFERS.search(name)}


def _same(name: str, other: str) -> bool:
    """Whether two names mean one weight, seen from a part and from the whole."""
    return f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}")


def _whole_classes(config: Any, written: Mapping[str, Any]) -> Iterator[Any]:
    """Classes that may have written weights which the loaded class has no use for."""
    for name in written.get("architectures") or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            yield found
    for auto in (AutoModelForPreTraining, AutoModel):
        if type(config) in auto._model_mapping:
            yield auto


def _refuse_missing(
    path: str | Path, model: Any, found: Mapping[str, Any], optional: str | None
) -> None:
    wrong = [*map(str, found["missing_keys"]), *map(str, found.get("mismatched_keys", ()))]
    wrong = sorted(name for name in wrong if not (optional and name.startswith(optional)))
    if wrong:
        raise ModelError(
            f"{path}: {len(wrong)} weights of {type(model).__name__} are missing or of another "
            f"shape (first: {wrong[:3]}); they would have stayed random. Is the checkpoint "
            "complete, and of this architecture?"
        )


def _refuse_unknown(path: str | Path, model: Any, unknown: set[str]) -> None:
    if unknown:
        raise ModelError(
            f"{path}: {len(unknown)} weights are unknown to {type(model).__name__} as config.json "
            f"describes it (first: {sorted(unknown)[:3]}); they would have been left out. Is it "
            "the config of these weights, and is no adapter or layer left over in them?"
        )


def to_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Give a model's weights another dtype, in place.

    Tables that are computed and not loaded (DINOv3's rotary frequencies) stay in fp32, as
    `from_pretrained` leaves them.

    Args:
        model: Any module.
        dtype: Dtype of its parameters and of the buffers that are saved.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


@contextmanager
def boundary(what: str, remedy: str = "") -> Iterator[None]:
    """Name the checkpoint in whatever a library raises about its files.

    Args:
        what: The file, and what is wrong with it.
        remedy: The end of the message.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as failure:  # around one checkpoint, whose every field may be wrong
        why = " ".join(str(failure).split())[:2000]
        raise ModelError(f"{what} ({type(failure).__name__}: {why}){remedy}") from failure


def read_config(path: str | Path) -> Any:
    """The config of a model directory or a hub id.

    Raises:
        ModelError: It is missing, or unknown to transformers and this package, or no
            model can have its numbers.
    """
    checkpoint_files.refuse_gguf(Path(path))
    if Path(path).is_dir() and (Path(path) / "config.json").exists():
        checkpoint_files.read_config_file(Path(path))
    remedy = (
        "; expected a model directory or a hub id. A directory that a stage writes is there once "
        "that stage has run"
    )
    return _read(AutoConfig, path, "no readable config.json", remedy)


def read_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model directory or a hub id.

    Raises:
        ModelError: There is none, or it is damaged.
    """
    remedy = f"; are tokenizer.json or {SENTENCEPIECE} whole, and no pointers of Git LFS?"
    tokenizer = _read(AutoTokenizer, path, "no tokenizer beside the weights", remedy)
    with boundary(f"{path}: its tokenizer cannot be used"):
        if (window := tokenizer.model_max_length) < 1 or window != int(window):
            raise ValueError(f"model_max_length: expected 1 or more, got {window}")
        return as_in_files(tokenizer, path)


def read_processor(path: str | Path) -> Any:
    """The processor of a VLM's directory or hub id, its image processor tried.

    Raises:
        ModelError: There is none, or it is damaged.
    """
    processor = _read(AutoProcessor, path, "no processor beside the weights")
    if getattr(processor, "tokenizer", None) is not None:
        with boundary(f"{path}: its tokenizer cannot be used"):
            processor.tokenizer = as_in_files(processor.tokenizer, path)
    if not hasattr(processor, "image_processor"):
        raise ModelError(
            f"{path}: no processor beside the weights ({type(processor).__name__} has no image "
            "processor)"
        )
    if processor.image_processor is not None:
        check_image_processor(processor.image_processor, path)
    return processor


def read_image_processor(path: str | Path) -> Any:
    """The image processor of a model directory or a hub id, tried on two pictures.

    Raises:
        ModelError: There is none, or it is damaged.
    """
    remedy = ". Copy the preprocessor_config.json of the checkpoint that the tower is from into it."
    processor = _read(AutoImageProcessor, path, "no image processor", remedy)
    check_image_processor(processor, path)
    return processor


def _read(kind: Any, path: str | Path, lacking: str, remedy: str = "") -> Any:
    require_place(path)
    with boundary(f"{path}: {lacking}", remedy):
        return kind.from_pretrained(path, **SAFE)


def check_image_processor(processor: Any, path: str | Path) -> None:
    """Refuse an image processor that does not keep black apart from white.

    Args:
        processor: A transformers image processor.
        path: Where it is from, for the message.

    Raises:
        ModelError: It raises, its pictures are not finite or beyond reason in size, or white is
            not brighter than black (`image_std` or `rescale_factor` of 0 or below), or brighter
            than any tower takes (no `do_rescale`).
    """
    where = f"{path}: its image processor (preprocessor_config.json)"
    for name in ("size", "crop_size", "pad_size"):
        size: Any = getattr(processor, name, None) or {}
        sides = [size.get(key) for key in ("height", "width", "shortest_edge", "longest_edge")]
        for side in (side for side in sides if side is not None):
            if not (isinstance(side, int) and 1 <= side <= _LARGEST_PICTURE_PX):
                raise ModelError(
                    f"{where}: {name}: expected sides of 1 to {_LARGEST_PICTURE_PX} px, got {side}"
                )
    for name in ("image_mean", "image_std"):
        value = getattr(processor, name, None)
        if value is not None and not isinstance(value, list | tuple):
            raise ModelError(f"{where}: {name}: expected a list of numbers, got {value!r}")
    filters, chosen = [*map(int, Image.Resampling)], getattr(processor, "resample", None)
    if chosen is not None and (isinstance(chosen, bool) or chosen not in filters):
        raise ModelError(f"{where}: resample: expected one of {filters}, got {chosen!r}")
    made = []
    with boundary(f"{where}: cannot be used"):
        for grey in (0, 255):
            picture = Image.new("RGB", (64, 64), (grey, grey, grey))
            with np.errstate(all="ignore"):
                pixels = processor(images=picture, return_tensors="np")["pixel_values"]
            made.append(np.asarray(pixels, np.float32))
        black, white = made
        step = white - black
        # Padding (of AnyRes' crops, of NaFlex' patches) is the same in both.
        changed = step if step.ndim == 4 else step[step != 0]
        good = bool(
            np.isfinite(made).all() and changed.min() > 1e-3 and changed.max() < _LARGEST_STEP
        )
    if not good:
        raise ModelError(
            f"{where}: white pictures do not come out brighter than black ones as a tower takes "
            f"them ({black.min():.3g} to {white.max():.3g}); correct image_mean, image_std, "
            "do_rescale and rescale_factor"
        )


def four_bits(device: Any = None, *, skip: list[str] | None = None) -> dict[str, Any]:
    """Arguments of `from_pretrained` for NF4 weights, as QLoRA has them (arXiv 2305.14314).

    Args:
        device: Where the weights go. None: the CPU.
        skip: Modules that keep their precision, by name. None: the head.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
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
def _quiet(*, bars: bool = True) -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    drawn = transformers_logging.is_progress_bar_enabled() and not bars
    transformers_logging.set_verbosity_error()
    if drawn:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if drawn:
            transformers_logging.enable_progress_bar()
