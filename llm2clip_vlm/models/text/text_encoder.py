"""A decoder LLM as a text encoder: bidirectional attention, one vector a text.

Any decoder of transformers that builds its mask through `create_causal_mask` serves (Llama,
Qwen2, Qwen3, Mistral, Gemma, ...): `config.is_causal = False` makes its attention bidirectional.
That this holds in every layer is checked by a forward pass at load, because a version or a model
that ignores it would give causal embeddings without a word.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as NormalizerSequence
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.equal import difference
from llm2clip_vlm.models.loading import four_bits, load_complete, read_config, read_tokenizer
from llm2clip_vlm.models.text import open_layers
from llm2clip_vlm.models.text.caption_tokens import length_groups, pad_tokens
from llm2clip_vlm.models.text.text_encoder_settings import (
    SETTINGS_NAME,
    Pooling,
    TextEncoderSettings,
    read_embedder,
    resolve_settings,
    save_settings,
    with_its_settings,
)
from llm2clip_vlm.models.text.tokenizer_files import save_tokenizer
from llm2clip_vlm.recipe.base import TextEncoderSection
from llm2clip_vlm.runs.hashes import hash_json

logger = logging.getLogger(__name__)

_NO_FACTS = {"_name_or_path", "architectures", "dtype", "is_causal", "transformers_version"}
_NO_FACTS |= {"use_cache"}

PROBE_TEXTS = ("a", "A dog runs on the beach.", "Two people, 3 red cats: a photo")
"""Texts of different lengths, by which encoders are compared that should be the same."""


def pool(
    hidden: Float[Tensor, "b t d"], pool_mask: Bool[Tensor, "b t"], pooling: Pooling
) -> Float[Tensor, "b d"]:
    """Make one float32 vector a text from the hidden states of its pooled tokens.

    Args:
        hidden: Last hidden states.
        pool_mask: True at tokens that count, at least one a row.
        pooling: `mean`, `last` (which an appended eos is too) or `cls`.

    Paper: LLM2CLIP v6 section 4.1 (mean); table 6 compares with the last token.
    """
    if pooling != "mean":
        positions = torch.arange(pool_mask.shape[1], device=pool_mask.device)
        chosen = pool_mask.int() if pooling == "cls" else pool_mask * positions
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, chosen.argmax(dim=1)].float()
    weights = rearrange(pool_mask, "b t -> b t 1").float()
    return (hidden.float() * weights).sum(1) / weights.sum(1)


class TextEncoder(nn.Module):
    """Turns texts into vectors.

    :class:`CaptionTokenizer` says which tokens a vector is made of.

    Use :meth:`from_pretrained` or :meth:`from_section`.

    Args:
        backbone: A decoder without head, whose config says `is_causal`.
        tokenizer: Its tokenizer.
        settings: Settings by which a vector is made.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: TextEncoderSettings,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        """The decoder; stage 1 puts a LoRA model in its place while it trains."""
        self.tokenizer = tokenizer
        """Adds special tokens as its own configuration says."""
        self.settings = settings
        """Settings by which hidden states become a vector."""
        self.tokens = settings.tokens(tokenizer)
        """Turns texts into token ids."""
        rows = cast("nn.Embedding", backbone.get_input_embeddings()).num_embeddings
        if (tokenizer.pad_token_id or 0) >= rows:
            tokenizer.pad_token = None  # never attended to: any other id serves
        words = {
            index for index, token in tokenizer.added_tokens_decoder.items() if not token.special
        }
        if (most := max({*words, *self.tokens.front, *self.tokens.behind, 0})) >= rows:
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokenizer writes the token {most} "
                f"({tokenizer.convert_ids_to_tokens(most)!r}), the model has {rows} embeddings; "
                "take a tokenizer of this model, or resize the embeddings and train them"
            )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        load_in_4bit: bool = False,
        **chosen: Any,
    ) -> Self:
        """Loads a raw LLM, what :meth:`save_pretrained` wrote, or a sentence-transformers embedder.

        Args:
            path: Directory or hub id; an embedder keeps its own pooling, prompt and attention.
            dtype: Dtype of the weights; `auto` keeps that of the checkpoint.
            device: Where the weights go. None: CPU.
            attn_implementation: See transformers. None: its default.
            load_in_4bit: Quantise linear weights to NF4 (needs bitsandbytes).
            **chosen: Fields of :class:`TextEncoderSettings`. None: their defaults.

        Raises:
            ModelError: A saved encoder has another value than the one given here; the model
                has no single hidden size, too few positions or missing weights; its attention is
                not what `bidirectional` says; or bitsandbytes is absent.
        """
        chosen = {name: value for name, value in chosen.items() if value is not None}
        path = with_its_settings(path)
        embedder = None if (Path(path) / SETTINGS_NAME).is_file() else read_embedder(path)
        source = embedder.model_dir if embedder else path
        # A copy, because transformers may hand out one config object twice.
        config = copy.deepcopy(read_config(source))
        tokenizer = read_tokenizer(source)
        if embedder and embedder.lower_case:
            steps = [Lowercase(), tokenizer.backend_tokenizer.normalizer]
            tokenizer.backend_tokenizer.normalizer = NormalizerSequence(
                [step for step in steps if step is not None]
            )
        settings, tokenizer_hash = resolve_settings(path, config, tokenizer, chosen, embedder)
        if not settings.embedder:
            config.is_causal = not settings.bidirectional
        backbone = load_complete(
            AutoModel,
            source,
            optional="pooler.",  # of BERT; no vector is made of it
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation or (embedder and embedder.attn_implementation),
            **(four_bits(device) if load_in_4bit else {}),
        )
        if not settings.embedder:
            open_layers.set_causal(backbone, config.is_causal)
        backbone.config.use_cache = False
        if device is not None and not load_in_4bit:
            backbone.to(device)
        encoder = cls(backbone.eval(), tokenizer, settings)
        if embedder and "bidirectional" not in chosen:
            # its config decides on its attention
            kind = open_layers.attention_kind(open_layers.layers_see_behind(backbone))
            encoder.settings = replace(settings, bidirectional=True if kind is None else kind)
        encoder.check_attention()
        if tokenizer_hash is not None:
            encoder.tokens.require(tokenizer_hash, path)
        return encoder.eval()

    @classmethod
    def from_section(
        cls,
        section: TextEncoderSection,
        device: str | torch.device | None = None,
        load_in_4bit: bool = False,
    ) -> Self:
        """Loads what a recipe's `text_encoder` names; what it leaves out has its default."""
        given = {name: getattr(section, name) for name in section.model_fields_set}
        path = given.pop("language_model")
        return cls.from_pretrained(path, device=device, load_in_4bit=load_in_4bit, **given)

    @property
    def hidden_size(self) -> int:
        """Width of an embedding."""
        return int(self.backbone.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.backbone.parameters()).device

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Identity of this encoder: equal fields, equal vectors.

        Computed at first use and kept; read it after the weights have their final values.
        """
        return {
            "text_weights": hash_state(self.backbone.state_dict()),
            "text_config": hash_json(
                [config_facts(self.backbone.config), self.tokenizer.eos_token_id]
            ),
            "text_tokenizer": self.tokens.fingerprint(),
            **{name: str(value) for name, value in self.settings.to_dict().items()},
            **({"chat": repr(self.tokens.turn)} if self.settings.chat else {}),
            "hidden_size": str(self.hidden_size),
        }

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"],
        pool_mask: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "b d"]:
        """Embeddings, float32, not normalised.

        Args:
            input_ids: Right-padded tokens.
            attention_mask: 1 at tokens, 0 at padding.
            pool_mask: True at tokens that are pooled.
        """
        hidden = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return pool(hidden, pool_mask, self.settings.pooling)

    def by_length(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"],
        pool_mask: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "b d"]:
        """Embeddings in four groups of like length, so that short texts are hardly padded."""
        inputs, parts = (input_ids, attention_mask, pool_mask), []
        order = attention_mask.sum(1).argsort(descending=True)
        for rows in order.chunk(4):
            width = int(attention_mask[rows[0]].sum())
            parts.append(self(*(values[rows, :width] for values in inputs)))
        return torch.cat(parts)[order.argsort()]

    @torch.no_grad()
    def encode(
        self,
        texts: Sequence[str],
        batch_tokens: int = 16384,
        show_progress: bool | tqdm[Any] = False,
        normalize: bool = True,
    ) -> Float[Tensor, "n d"]:
        """Embeds texts.

        Texts of like length share a batch: padding costs a few per cent instead of a multiple.

        Args:
            texts: Texts in any order.
            batch_tokens: Tokens of a batch at most, padding counted; a single longer text goes
                alone. On a CPU 2,048 at most, which its caches hold.
            show_progress: Draw a progress bar, or advance the one given.
            normalize: Scale to unit norm.

        Returns:
            float32 on the CPU, in the order of `texts`.

        Raises:
            ModelError: A text has no token.
        """
        before = self.tokens.num_truncated
        tokens = self.tokens(texts)
        if cut := self.tokens.num_truncated - before:
            counts = cut, len(texts), self.settings.max_length_tokens
            logger.warning("%d of %d texts cut at max_length_tokens=%d", *counts)
        if self.device.type == "cpu":
            batch_tokens = min(batch_tokens, 2048)
        embeds = torch.empty(len(texts), self.hidden_size)
        was_training = self.backbone.training
        self.backbone.eval()
        try:
            given = nullcontext(show_progress) if isinstance(show_progress, tqdm) else None
            with given or tqdm(total=len(texts), unit="text", disable=not show_progress) as bar:
                for rows in length_groups([len(ids) for ids in tokens], batch_tokens):
                    some = [tokens[row] for row in rows]
                    embeds[rows] = self._vectors(some, self.tokens.num_front_tokens).cpu()
                    bar.update(len(rows))
        finally:
            self.backbone.train(was_training)
        return F.normalize(embeds, dim=-1) if normalize else embeds

    def check_attention(self) -> None:
        """Refuses layers that are not what `bidirectional` says, and vectors that padding changes.

        Raises:
            ModelError: A layer is causal although `bidirectional` is true, or open although
                it is false; or a text has another vector beside a longer one.
        """
        open_layers.require_attention(self.backbone, self.settings.bidirectional)
        self._check_padding()

    @torch.no_grad()
    def _check_padding(self) -> None:
        """Compares vectors of texts alone with those of the same texts in a padded batch."""
        vocabulary = cast("nn.Embedding", self.backbone.get_input_embeddings()).num_embeddings
        lengths = (1, 2, 5, min(32, self.settings.max_length_tokens))
        texts = [[(11 + 5 * at) % vocabulary for at in range(length)] for length in lengths]
        with_padding, alone = (
            torch.cat([self._vectors(part) for part in parts])
            for parts in ([texts], [[text] for text in texts])
        )
        require_equal(
            f"a text alone and beside longer ones, in {type(self.backbone).__name__}",
            alone,
            with_padding,
            "its vectors would depend on their neighbours in the batch; lower max_length_tokens, "
            "or use another attn_implementation or language model",
            self.backbone.dtype,
        )

    def _vectors(self, tokens: Sequence[Sequence[int]], num_front_tokens: int = 0) -> Tensor:
        batch = pad_tokens(tokens, self.tokens.pad_token_id, num_front_tokens)
        return self(**{name: value.to(self.device) for name, value in batch.items()})

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes model, tokenizer and settings; :meth:`from_pretrained` restores all of it.

        The saved config says `is_causal: false` (if bidirectional), so that the directory is not
        taken for a decoder: stage 3 refuses it.
        """
        directory = Path(directory)
        self.backbone.save_pretrained(directory)
        save_tokenizer(self.tokenizer, directory)
        save_settings(directory, self.settings, self.tokens.fingerprint())


def require_equal(
    what: str, before: Tensor, after: Tensor, remedy: str, dtype: torch.dtype = torch.float32
) -> None:
    """Refuses vectors that should be the same and are not.

    Args:
        what: Name of the vectors, for the message.
        before: `[n, d]`.
        after: `[n, d]`.
        remedy: Consequence, and what to do.
        dtype: Dtype of the weights; 16 bits get a wider tolerance.

    Raises:
        ModelError: A vector differs by more than rounding explains.
    """
    tolerance = 0.014 if dtype == torch.float32 else 0.2  # cosines of 0.9999 and 0.98
    if wrong := difference(before, after.to(before), tolerance):
        raise ModelError(f"{what}: expected equal vectors, but {wrong}: {remedy}")


def config_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config says of the computation, and its class does not: no names, no dtype."""
    said = config.to_diff_dict()
    return {name: said[name] for name in said.keys() - _NO_FACTS}


def hash_state(state: Mapping[str, Tensor]) -> str:
    """sha256 of a model's weights: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
