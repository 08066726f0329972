"""Comparisons across a hand-over: equal inputs give equal outputs, or what differs is named.

Two right parts can be joined wrongly in silence. A few fixed words through both sides cost nothing
beside a run and notice it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llm2clip_vlm.models.vision.image_mode import one_picture

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest difference of a token's vector, in parts of its length, that rounding explains."""

HALF_TOLERANCE = 5e-2
"""Largest such difference for bf16 and fp16."""


def fixed_ids(vocab_size: int, length: int, first: int = 0) -> Int[Tensor, "1 t"]:
    """Choose different words from the whole vocabulary, always the same ones.

    Args:
        vocab_size: Words to choose from.
        length: Number of words.
        first: Another number gives other words.
    """
    step = max(vocab_size // (length + 1), 1)
    return ((torch.arange(1, length + 1) * step + first) % vocab_size)[None]


def logits_of(model: Any, ids: Int[Tensor, "1 t"], **inputs: Any) -> Float[Tensor, "1 t v"]:
    """Logits as in evaluation, without a cache; under ZeRO-3 call it on all processes.

    Args:
        model: A causal language model or a VLM, not wrapped by DeepSpeed yet.
        ids: Text.
        **inputs: More of the forward pass.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    if is_deepspeed_zero3_enabled() and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())  # where weights are gathered
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with torch.no_grad(), _blocks_gathered(model):
        logits: Tensor = model(input_ids=ids.to(device), use_cache=False, **inputs).logits
    model.train(training)
    return logits.cpu()


def fixed_pixels(image_size_px: int, count: int = 2) -> Float[Tensor, "n 3 s s"]:
    """The images that models are compared on: normal noise, seed 0.

    Args:
        image_size_px: Side of an image.
        count: Number of images.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, image_size_px, image_size_px, generator=generator)


def vlm_outputs(model: Any) -> Float[Tensor, "1 t v"]:
    """Logits of a fixed picture and fixed words, by which a VLM is compared before and after.

    Those of some visual tokens and of every word, each of which depends on all tokens before it.

    Args:
        model: A LLaVA; not under ZeRO-3.
    """
    config, training = model.config, model.training
    crops, given = one_picture(config)
    like = next(model.model.vision_tower.parameters())
    given["pixel_values"] = fixed_pixels(config.vision_config.image_size, crops).to(like)
    with torch.no_grad(), _no_tf32():
        visual = len(model.eval().model.get_image_features(**given).pooler_output[0])
        words = fixed_ids(config.get_text_config().vocab_size, 11)[0]
        words = words[words != config.image_token_id]
        ids = torch.cat([torch.full((visual,), config.image_token_id), words])[None]
        some = torch.linspace(0, visual - 1, 16).long()  # all would take gigabytes with AnyRes
        given["logits_to_keep"] = torch.cat([some, torch.arange(visual, ids.shape[1])])
        logits = logits_of(model, ids, **given)
    model.train(training)
    return logits


def vlm_difference(want: Float[Tensor, "1 t v"], model: Any) -> str | None:
    """How a VLM's outputs differ from what they should be. None: they do not.

    Where 16 bits explain less than the difference, the model computes once more in fp32 and in the
    16 bits, which may change more in this one (in a mixture of experts they may choose another
    expert, in a convolutional tower small numbers may be differences of large ones).

    Args:
        want: Result of :func:`vlm_outputs`.
        model: May end in another dtype.
    """
    got = vlm_outputs(model)
    wrong = difference(want, got)
    half = {want.dtype, got.dtype} & {torch.bfloat16, torch.float16}
    if wrong and half:
        exact = vlm_outputs(model.float())
        rounded = vlm_outputs(model.to(half.pop()))
        wrong = difference(want, exact, max(HALF_TOLERANCE, 4 * _distance(exact, rounded)))
    return wrong


def difference(
    want: Float[Tensor, "... d"], got: Float[Tensor, "... d"], tolerance: float | None = None
) -> str | None:
    """How vectors differ from what they should be. None: they do not.

    Args:
        want: What they should be.
        got: What they are.
        tolerance: Largest difference of one vector, in parts of its length. None: what the
            coarser of both dtypes explains.

    Returns:
        The end of a sentence such as "they differ by 0.31 of their length".
    """
    if want.shape != got.shape:
        return f"expected the shape {list(want.shape)}, got {list(got.shape)}"
    if tolerance is None:
        tolerance = max(TOLERANCE.get(t.dtype, HALF_TOLERANCE) for t in (want, got))
    if not got.isfinite().all():
        return "not all of them are finite numbers"
    if (worst := _distance(want, got)) <= tolerance:
        return None
    return f"they differ by {worst:.2g} of their length (rounding explains {tolerance:g})"


def _distance(want: Float[Tensor, "... d"], got: Float[Tensor, "... d"]) -> float:
    """Largest difference of a vector, in parts of its length."""
    want, got = want.double(), got.double()
    return ((got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-12)).max().item()


def constant_ratio(want: Float[Tensor, "... d"], got: Float[Tensor, "... d"]) -> float | None:
    """The number by which `got` must be multiplied to be `want`. None: there is no such number.

    A simple fraction where one is as good, so that the number is the same on every machine.
    """
    a, b = (rearrange(vectors.double(), "... -> (...)") for vectors in (want, got))
    ratio = (a @ b / (b @ b)).item()
    if not 0 < ratio < float("inf") or difference(want, (got.double() * ratio).to(got.dtype)):
        return None
    simple = float(Fraction(ratio).limit_denominator(1024))
    return simple if abs(simple / ratio - 1) < 1e-5 else float(f"{ratio:.5g}")


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Let a GPU compute fp32 as exactly as the CPU below this."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@contextmanager
def _blocks_gathered(model: nn.Module) -> Iterator[None]:
    """Gather each block's weights while it runs: under ZeRO-3, before DeepSpeed's hooks exist."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    language_model = model.get_submodule("model.language_model")
    parts = [*language_model.children(), model.get_submodule("lm_head")]
    whole: dict[nn.Module, Any] = {}

    def gather(module: nn.Module, args: Any) -> None:
        whole[module] = deepspeed.zero.GatheredParameters(list(module.parameters()))
        whole[module].__enter__()

    def let_go(module: nn.Module, args: Any, output: Any) -> None:
        whole.pop(module).__exit__(None, None, None)

    def let_all_go() -> None:  # a forward pass may have been refused halfway
        for gathered in whole.values():
            gathered.__exit__(None, None, None)

    with ExitStack() as hooks:
        hooks.callback(let_all_go)
        for part in parts:
            for block in part if isinstance(part, nn.ModuleList) else [part]:
                for hook in (
                    block.register_forward_pre_hook(gather),
                    block.register_forward_hook(let_go),
                ):
                    hooks.callback(hook.remove)
        yield
