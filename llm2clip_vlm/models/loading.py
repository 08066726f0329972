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

from llm2clip_vlm.hub import require_place
from llm2clip_vlm.models.checkpoint_files import (
    INDEX,
    WEIGHTS,
    check_sizes,
    check_values,
    read_config_file,
    refuse_gguf,
    weights_of_folder,
)

SAFE: dict[str, Any] = {"trust_remote_code": False}
"""Arguments of every `from_pretrained`: no Python file of a checkpoint runs, no one is asked."""
_OLD_BUFFERS = re.compile(r"(^|\.)(position_ids|masked_bias|rotary_emb\.inv_freq)$")
"""Tables that older versions saved and newer ones compute."""
_LARGEST_PICTURE_PX = 4096
_LARGEST_STEP = 300.0
"""Most between black and white that a tower takes: 0 to 255, as old CNNs have it. Pictures of
that range that are divided by a standard deviation below 1 were not rescaled."""


def load_complete(
    model_class: Any,
    path: str | Path,
    *,
    optional: str | None = None,
    error: type[ValueError] = ValueError,
    **arguments: Any,
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
        error: What is raised.
        **arguments: More arguments of `from_pretrained`.

    Returns:
        The model.

    Raises:
        ValueError: (or `error`) The weights cannot be read, are missing, unknown, not finite or
            have another shape; or they are pickled, or of an adapter.
    """
    if "state_dict" not in arguments:
        require_place(path, error)
        local = Path(path).is_dir()
        if local:
            _check_names(model_class, Path(path), optional, error, arguments)
        arguments |= {**SAFE, "use_safetensors": True}
    source = None if "state_dict" in arguments else path
    with boundary(f"{path}: cannot be loaded as {model_class.__name__}", error), _quiet():
        model, found = model_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    _refuse(path, type(model).__name__, found, optional, error)
    check_values(model, path, error)
    forget_paths(model.config)
    model.name_or_path = model.config._name_or_path  # which PEFT writes into an adapter
    if source is not None and not local:
        folder = Path(cached_file(path, "config.json") or "").parent
        if not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
            return model  # the hub's own conversion of pickled weights lies in another revision
        _check_names(model_class, folder, optional, error, arguments)
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
    model_class: Any,
    folder: Path,
    optional: str | None,
    error: type[ValueError],
    arguments: Mapping[str, Any],
) -> None:
    """Compare names and shapes of the weights with what the config describes, on no device."""
    written = read_config_file(folder, error)
    weights = weights_of_folder(folder, written, error)
    check_sizes(written, weights, folder, error)
    if written.get("quantization_config") or is_deepspeed_zero3_enabled():
        return  # names are those of the quantised modules; shapes are shards
    config = arguments.get("config") or read_config(folder, error)

    def compared(kind: Any) -> tuple[Any, dict[str, Any]]:
        if mapping := getattr(kind, "_model_mapping", None):
            if type(config) not in mapping:
                raise error(f"{folder}: {kind.__name__} has no class for {config.model_type!r}")
            kind = _get_model_class(config, mapping)
        own: Any = kind.config_class
        part = not isinstance(config, own)
        with boundary(f"{folder}: cannot be loaded as {kind.__name__}", error), _quiet(bars=False):
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
    _refuse(folder, type(model).__name__, found, optional, error)
    buffers = {name for name, _ in model.named_buffers()}
    extra = {
        name
        for name in found["unexpected_keys"]
        if name not in buffers and not _OLD_BUFFERS.search(name)
    }
    for other in _whole_classes(config, written):
        if extra and other is not type(model):
            unknown = compared(other)[1]["unexpected_keys"]
            extra = {name for name in extra if any(_same(name, key) for key in unknown)}
    if extra:
        raise error(
            f"{folder}: {len(extra)} weights are unknown to {type(model).__name__} as config.json "
            f"describes it (first: {sorted(extra)[:3]}); they would have been left out. Is it the "
            "config of these weights, and is no adapter or layer left over in them?"
        )


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


def _refuse(
    path: str | Path,
    name: str,
    found: Mapping[str, Any],
    optional: str | None,
    error: type[ValueError],
) -> None:
    wrong = [*map(str, found["missing_keys"]), *map(str, found.get("mismatched_keys", ()))]
    wrong = sorted(name for name in wrong if not (optional and name.startswith(optional)))
    if wrong:
        raise error(
            f"{path}: {len(wrong)} weights of {name} are missing or of another shape (first: "
            f"{wrong[:3]}); they would have stayed random. Is the checkpoint complete, and of this "
            "architecture?"
        )


def to_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Give a model's weights another dtype, in place.

    Tables that are computed and not loaded (DINOv3's rotary frequencies) stay in fp32, as
    `from_pretrained` leaves them.

    Args:
        model: Any module.
        dtype: Dtype of its parameters and of the buffers that are saved.
    """
    saved = model.state_dict(keep_vars=True).keys()
    computed = {name: value for name, value in model.named_buffers() if name not in saved}
    model.to(dtype)
    for name, value in computed.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, value)
    return model


@contextmanager
def boundary(what: str, error: type[ValueError] = ValueError, remedy: str = "") -> Iterator[None]:
    """Name the checkpoint in whatever a library raises about its files.

    Args:
        what: The file, and what is wrong with it.
        error: What is raised.
        remedy: The end of the message.
    """
    try:
        yield
    except Exception as failure:  # around one checkpoint, whose every field may be wrong
        why = " ".join(str(failure).split())[:2000]
        raise error(f"{what} ({type(failure).__name__}: {why}){remedy}") from failure


def read_config(path: str | Path, error: type[ValueError] = ValueError) -> Any:
    """The config of a model directory or a hub id.

    Raises:
        ValueError: (or `error`) It is missing, or unknown to transformers and this package, or no
            model can have its numbers.
    """
    refuse_gguf(Path(path), error)
    require_place(path, error)
    if Path(path).is_dir() and (Path(path) / "config.json").exists():
        read_config_file(Path(path), error)
    remedy = (
        "; expected a model directory or a hub id. A directory that a stage writes is there once "
        "that stage has run"
    )
    with boundary(f"{path}: no readable config.json", error, remedy):
        return AutoConfig.from_pretrained(path, **SAFE)


def read_tokenizer(path: str | Path, error: type[ValueError] = ValueError) -> Any:
    """The tokenizer of a model directory or a hub id.

    Raises:
        ValueError: (or `error`) There is none, or it is damaged.
    """
    require_place(path, error)
    with boundary(f"{path}: no tokenizer beside the weights", error):
        try:
            return AutoTokenizer.from_pretrained(path, **SAFE)
        except (ImportError, ValueError) as failure:
            if isinstance(failure, ImportError) or "tiktoken" in str(failure):  # tried last
                raise ImportError(
                    "its tokenizer is a SentencePiece file, which transformers opens with two "
                    "packages: pip install protobuf sentencepiece"
                ) from failure
            raise


def read_processor(path: str | Path, error: type[ValueError] = ValueError) -> Any:
    """The processor of a VLM's directory or hub id, its image processor tried.

    Raises:
        ValueError: (or `error`) There is none, or it is damaged.
    """
    require_place(path, error)
    with boundary(f"{path}: no processor beside the weights", error):
        processor = AutoProcessor.from_pretrained(path, **SAFE)
        if not hasattr(processor, "image_processor"):
            raise ValueError(f"{type(processor).__name__} has no image processor")
    if processor.image_processor is not None:
        check_image_processor(processor.image_processor, path, error)
    return processor


def read_image_processor(path: str | Path, error: type[ValueError] = ValueError) -> Any:
    """The image processor of a model directory or a hub id, tried on two pictures.

    Raises:
        ValueError: (or `error`) There is none, or it is damaged.
    """
    remedy = (
        ". Copy the preprocessor_config.json of the checkpoint that the tower comes from into it."
    )
    require_place(path, error)
    with boundary(f"{path}: no image processor", error, remedy):
        processor = AutoImageProcessor.from_pretrained(path, **SAFE)
    check_image_processor(processor, path, error)
    return processor


def check_image_processor(
    processor: Any, path: str | Path, error: type[ValueError] = ValueError
) -> None:
    """Refuse an image processor that does not keep black apart from white.

    Args:
        processor: A transformers image processor.
        path: Where it is from, for the message.
        error: What is raised.

    Raises:
        ValueError: (or `error`) It raises, its pictures are not finite or beyond reason in size,
            or white is not brighter than black (`image_std` or `rescale_factor` of 0 or below), or
            brighter than any tower takes (no `do_rescale`).
    """
    where = f"{path}: its image processor (preprocessor_config.json)"
    for name in ("size", "crop_size", "pad_size"):
        size: Any = getattr(processor, name, None) or {}
        sides = [size.get(key) for key in ("height", "width", "shortest_edge", "longest_edge")]
        for side in (side for side in sides if side is not None):
            if not (isinstance(side, int) and 1 <= side <= _LARGEST_PICTURE_PX):
                raise error(
                    f"{where}: {name}: expected sides of 1 to {_LARGEST_PICTURE_PX} px, got {side}"
                )
    made = []
    with boundary(f"{where}: cannot be used", error):
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
        raise error(
            f"{where}: white pictures do not come out brighter than black ones as a tower takes "
            f"them ({black.min():.3g} to {white.max():.3g}); correct image_mean, image_std, "
            "do_rescale and rescale_factor"
        )


def four_bits(
    device: Any = None, error: type[ValueError] = ValueError, *, skip: list[str] | None = None
) -> dict[str, Any]:
    """Arguments of `from_pretrained` for NF4 weights, as QLoRA has them (arXiv 2305.14314).

    Args:
        device: Where the weights go. None: the CPU.
        error: What is raised.
        skip: Modules that keep their precision, by name. None: the head.

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
