"""Test of which layers of a model let a token see the tokens after it.

One open layer is enough for the last hidden states to see everything, so what leaves the model says
nothing about its other layers: each one is tested apart, in the same forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from einops import repeat
from torch import nn
from transformers import __version__

from llm2clip_vlm.files import listed
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.trainable import block_list

logger = logging.getLogger(__name__)

_TOKENS = 6
_ROWS = 3


@torch.no_grad()
def layers_see_behind(model: Any) -> dict[str, set[bool]]:
    """Tests every layer, without padding and with it.

    Three times the same text goes through the model. In front of each layer the second row is made
    the first but for its last token, the third but for its first. A layer is open if another token
    of the second row differs after it. The modules of open layers are tested in the
    same way: one that moves the third row, but not the second, is causal (the Mamba half of
    Falcon-H1's layers). The model may be on any device, in any dtype, quantised or sharded.

    Args:
        model: A decoder or encoder without head, in evaluation mode.

    Returns:
        Name of each layer, and of each causal module of an open one, to the answers that it gave:
        `{True}` is open, `{False}` causal, both means that it depends on the padding, none that
        its input cannot be recognised.
    """
    stack, _ = block_list(model)
    layers = model.get_submodule(stack)
    kinds = getattr(model.config, "layer_types", None) or [type(layer).__name__ for layer in layers]
    named = [
        (f"{stack}.{number} ({kind})", layer)
        for number, (layer, kind) in enumerate(zip(layers, kinds, strict=False))
    ]
    answers: dict[str, set[bool]] = {name: set() for name, _ in named}
    for padding in (0, 2):
        for name, probe in _run(model, named, padding).items():
            answers[name] |= probe.backward
    # apart from the layers: a norm after the attention would be given the first row again
    parts = [
        (f"{name.partition(' ')[0]}.{part} ({type(module).__name__})", module)
        for name, layer in named
        if answers[name] == {True}
        for part, module in layer.named_children()
    ]
    for name, probe in _run(model, parts, 0).items():
        if True in probe.forward and True not in probe.backward:
            answers[name] = {False}
    return answers


def _run(model: Any, modules: list[tuple[str, nn.Module]], padding: int) -> dict[str, _Probe]:
    vocabulary = model.get_input_embeddings().num_embeddings
    device = next(model.parameters()).device
    ids = torch.arange(7, 7 + 3 * (_TOKENS + padding), 3, device=device) % vocabulary
    mask = torch.ones_like(ids)
    mask[_TOKENS:] = 0
    probes = {name: _Probe(module, len(ids)) for name, module in modules}
    try:
        model(
            input_ids=repeat(ids, "n -> rows n", rows=_ROWS),
            attention_mask=repeat(mask, "n -> rows n", rows=_ROWS),
            use_cache=False,
        )
    finally:
        for probe in probes.values():
            probe.remove()
    return probes


def set_causal(model: nn.Module, is_causal: bool) -> None:
    """Sets the layers to what the config says, in place.

    Their flag counts where no mask is built (flash attention; sdpa without padding).

    Args:
        model: Loaded with `config.is_causal`.
        is_causal: The value of `config.is_causal`.
    """
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "is_causal", None), bool):
            module.is_causal = is_causal


@contextmanager
def turned(model: Any, bidirectional: bool) -> Iterator[None]:
    """Give a decoder the other attention, in place and for a while.

    Args:
        model: Loaded with `config.is_causal`.
        bidirectional: Its attention meanwhile.

    Raises:
        ModelError: It cannot be that.
    """
    before = model.config.is_causal
    try:
        model.config.is_causal = not bidirectional
        set_causal(model, not bidirectional)
        require_attention(model, bidirectional)
        yield
    finally:
        model.config.is_causal = before
        set_causal(model, before)


def attention_kind(answers: Mapping[str, set[bool]]) -> bool | Literal["partial"] | None:
    """The attention of all layers together.

    Args:
        answers: Result of :func:`layers_see_behind`.

    Returns:
        True (every layer is open), False (every one is causal), or `partial` (some are). None:
        a layer's answer depends on the padding, or it gave none.
    """
    found = set().union(*answers.values())
    if not found or any(len(answer) != 1 for answer in answers.values()):
        return None
    return "partial" if len(found) == 2 else found.pop()


def require_attention(model: Any, wanted: bool | Literal["partial"] | None) -> None:
    """Refuses a model whose layers are not what `bidirectional` says.

    Args:
        model: See :func:`layers_see_behind`.
        wanted: What it should be; `partial` has the layers that stay causal logged.

    Raises:
        ModelError: Names the layers.
    """
    text = f"bidirectional is {wanted}, but "
    try:
        answers = layers_see_behind(model)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{text}{type(model).__name__} cannot be run so in transformers {__version__} "
            f"({error}); choose another language model"
        ) from error
    causal = [name for name, found in answers.items() if found == {False}]
    odd = [name for name, found in answers.items() if len(found) != 1]
    kind = attention_kind(answers)
    if wanted is not None and wanted == kind:
        if kind == "partial":
            logger.warning("bidirectional: partial: these layers stay causal: %s", listed(causal))
        return
    name = f"{type(model).__name__} ({model.config._attn_implementation})"
    if kind is None:
        raise ModelError(
            f"{text}in {name} {listed(odd)} cannot be found to be "
            "bidirectional or causal (another answer with padding than without); use another "
            "attn_implementation or language model"
        )
    if kind == "partial":
        raise ModelError(
            f"{text}{len(causal)} of {len(answers)} layers of {name} are causal "
            f"({listed(causal)}) and the others are not; set bidirectional: partial to take it "
            "as it is, or choose a language model that has attention in every layer"
        )
    raise ModelError(
        f"{text}the attention of {name} in transformers {__version__} is "
        f"{'bidirectional' if kind else 'causal'} whatever config.is_causal says; try "
        "attn_implementation: sdpa or eager, or transformers >= 5.2"
    )


class _Probe:
    """Two hooks of a module, and the directions in which tokens moved each other in it."""

    def __init__(self, module: nn.Module, length: int) -> None:
        self.module, self.length = module, length
        self.backward: set[bool] = set()
        self.forward: set[bool] = set()
        self._hooks = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._behind),
        ]

    def remove(self) -> None:
        """Leaves the module as it was."""
        for hook in self._hooks:
            hook.remove()

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden: Any = args[0] if args else kwargs.get("hidden_states")
        if (at := self._text_axis(hidden)) is None:
            return None
        rows = hidden.clone().movedim(at, 0)
        rows[1:] = rows[:1]
        for row, token in ((1, _TOKENS - 1), (2, 0)):
            changed = rows[row].select(at, token)
            changed.copy_(changed.flip(-1) - changed.roll(1, -1))
        hidden = rows.movedim(0, at)
        return (
            ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        )

    def _behind(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if (at := self._text_axis(hidden)) is None:
            return
        rows = hidden.movedim(at, 0).float()
        for found, row, start in ((self.backward, 1, 0), (self.forward, 2, 1)):
            first, other = rows[[0, row]].narrow(at + 1, start, _TOKENS - 1)
            # The rows went through the same kernels, but experts see their tokens in another order:
            # what is left is the order of sums, and single flips where 16 bits are rounded.
            moved = (first - other).abs() > 1e-5 * first.abs().median()
            found.add(moved.float().mean().item() > 0.01)

    def _text_axis(self, hidden: Any) -> int | None:
        """Axis of the texts in `[..., texts, tokens, ..., width]`. None: there are no such axes."""
        shape = tuple(hidden.shape[:-1]) if torch.is_tensor(hidden) else ()
        for at in range(len(shape) - 1):
            if shape[at : at + 2] == (_ROWS, self.length):
                return at
        return None
