"""Tiny models built from the same Hugging Face classes as the real ones.

Importable as `tests.tiny` from any test, and runnable where a test starts another process:
`python -m tests.tiny {clip,llm} DIRECTORY [SEED]` (from the root of the repository).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import (
        CLIPConfig,
        CLIPModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

IMAGE_SIZE_PX = 32
PATCH_SIZE_PX = 8
HIDDEN_SIZE = 32
NUM_VISION_LAYERS = 3
CLIP_WINDOW_TOKENS = 16

WORDS = (
    "a an the of and or with in on at to is are was there it its this that one two three four "
    "five left right above below behind next top bottom corner middle image picture photo scene "
    "shows what which where how many color colour shape size texture pattern object objects "
    "side answer question using single word phrase yes no not only describe briefly please look "
    "between red green blue yellow purple orange white black gray brown pink cyan circle square "
    "triangle star cross heart diamond ring hexagon small large big tiny huge striped dotted "
    "plain solid background dog cat man woman child horse ball beach running . , ? ! : ; ' - ( "
    ") 0 1 2 3 4 5 6 7 8 9"
).split()

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def word_tokenizer(
    words: tuple[str, ...] | list[str] = tuple(WORDS),
    *,
    specials: tuple[str, ...] = ("<pad>", "<unk>", "<s>", "</s>"),
    model_max_length_tokens: int = 512,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that puts bos and eos around a text.

    Args:
        words: Vocabulary after the special tokens.
        specials: Pad, unk, bos, eos, then any other special tokens, in the order of their ids.
        model_max_length_tokens: Window that truncation goes to.
        chat_template: Jinja template, or none.

    Returns:
        The tokenizer; ids are 0 pad, 1 unk, 2 bos, 3 eos (CLIP gives eos id 2 a legacy meaning).
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pad, unk, bos, eos = specials[:4]
    vocab = {word: index for index, word in enumerate([*specials, *dict.fromkeys(words)])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=unk))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    # A chat template writes bos itself, so callers of it pass add_special_tokens=False.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, vocab[bos]), (eos, vocab[eos])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        additional_special_tokens=list(specials[4:]),
        model_max_length=model_max_length_tokens,
        padding_side="right",
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def clip_config(vocab_size: int, *, pad: int = 0, bos: int = 2, eos: int = 3) -> CLIPConfig:
    """The config of the tiny CLIP: 32 px, patch 8 (16 patches), hidden 32, 3 vision layers."""
    from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_WINDOW_TOKENS,
        projection_dim=HIDDEN_SIZE,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=NUM_VISION_LAYERS,
        num_attention_heads=4,
        image_size=IMAGE_SIZE_PX,
        patch_size=PATCH_SIZE_PX,
        projection_dim=HIDDEN_SIZE,
    )
    return CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=HIDDEN_SIZE
    )


def build_clip(directory: str | Path, seed: int = 0) -> Path:
    """Save a tiny `CLIPModel`, its image processor and its tokenizer.

    Args:
        directory: Where to save; made if absent.
        seed: Seed of the weights.

    Returns:
        The directory.
    """
    import torch
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = word_tokenizer(model_max_length_tokens=CLIP_WINDOW_TOKENS)
    torch.manual_seed(seed)
    model: CLIPModel = CLIPModel(clip_config(len(tokenizer))).eval()
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE_PX},
        crop_size={"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX},
    )
    for part in (model, processor, tokenizer):
        part.save_pretrained(str(directory))
    return Path(directory)


def llama_config(
    vocab_size: int, *, pad: int = 0, bos: int = 2, eos: int = 3, hidden_size: int = HIDDEN_SIZE
) -> LlamaConfig:
    """The config of the tiny language model: 2 layers, 4 heads, 2 key-value heads.

    Args:
        hidden_size: A multiple of 64 where four-bit weights are to be run on a CPU.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
        tie_word_embeddings=False,
    )


def llm_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny language model's tokenizer: role tokens, and a chat template that marks answers."""
    specials = (
        "<pad>",
        "<unk>",
        "<s>",
        "</s>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<image>",
    )
    return word_tokenizer(specials=specials, chat_template=CHAT_TEMPLATE)


def build_llm(directory: str | Path, seed: int = 0) -> Path:
    """Save a tiny `LlamaForCausalLM` with its tokenizer and chat template.

    Args:
        directory: Where to save; made if absent.
        seed: Seed of the weights.

    Returns:
        The directory.
    """
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = llm_tokenizer()
    torch.manual_seed(seed)
    model: LlamaForCausalLM = LlamaForCausalLM(llama_config(len(tokenizer))).eval()
    for part in (model, tokenizer):
        part.save_pretrained(str(directory))
    return Path(directory)


BUILDERS = {"clip": build_clip, "llm": build_llm}


def write_image(path: str | Path, seed: int = 0, size_px: int = IMAGE_SIZE_PX) -> Path:
    """Save a square RGB image of random pixels (PNG, so that it reads back exactly)."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return Path(path)


if __name__ == "__main__":
    print(BUILDERS[sys.argv[1]](sys.argv[2], *(int(seed) for seed in sys.argv[3:])))
