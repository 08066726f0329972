"""Tokenizers read as their files say, and written so that transformers 4 and 5 read them."""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.checkpoint_files import file_of

SENTENCEPIECE = "tokenizer.model"

_PLAIN = "Is there a dog (no. 12, at 3:45) in the image? Yes, it's red and small."
_ODD = (
    "TWO  spaces\n\tand caf\u00e9, cafe\u0301, \ufb01 \uff21 \u72ac, then don't WALK 1,234 steps."
)

logger = logging.getLogger(__name__)


def as_in_files(tokenizer: Any, path: str | Path) -> Any:
    """The tokenizer of these files that reads texts as they say.

    Transformers 5 builds some tokenizers in the way of a class (Llama's, Qwen2's, T5's, or none of
    them), whatever normaliser, pre-tokenizer and model `tokenizer.json` holds (version 4 took that
    file as it is), and whatever SentencePiece does with `tokenizer.model`.

    Args:
        tokenizer: What transformers made of the files.
        path: Directory or hub id.

    Returns:
        The tokenizer, or that of another class.

    Raises:
        ModelError: It makes no token of a text, or no class reads the file as it is meant.
    """
    if not _ids(tokenizer, _PLAIN):
        raise ModelError(
            f"{path}: its tokenizer ({type(tokenizer).__name__}) makes no token of {_PLAIN!r}; is "
            f"tokenizer.json, or {SENTENCEPIECE}, missing or empty?"
        )
    others: list[Any]
    if file := file_of(path, "tokenizer.json"):
        whole = Tokenizer.from_file(str(file))
        whole.no_padding()
        whole.no_truncation()
        meant = [whole.encode(text, add_special_tokens=False).ids for text in (_PLAIN, _ODD)]
        others = [partial(PreTrainedTokenizerFast.from_pretrained, str(path))]
    elif (file := file_of(path, SENTENCEPIECE)) and file.read_bytes()[:1] == b"\n":
        # tiktoken's file of this name begins otherwise
        meant = [list(SentencePieceProcessor(model_file=str(file)).encode(_PLAIN))]
        bos: dict[str, Any] = (
            {} if "add_bos_token" in tokenizer.init_kwargs else {"add_bos_token": True}
        )
        llama = partial(LlamaTokenizer.from_pretrained, str(path), **bos)
        if bos and isinstance(tokenizer, LlamaTokenizer):
            tokenizer = llama()  # as its docstring says, and as transformers 4 has it
        others = [llama, partial(llama, add_prefix_space=False)]
    else:
        return tokenizer
    # A blank before the first word is the choice of tokenizer_config.json, where that has one.
    last = 12 if tokenizer.init_kwargs.get("add_prefix_space") is not None else 0
    for make in (lambda: tokenizer, *others):
        made = make()
        texts = [_PLAIN, _ODD][: len(meant)]
        if [_ids(made, text)[-last:] for text in texts] == [ids[-last:] for ids in meant]:
            if made is not tokenizer:
                right = "PreTrainedTokenizerFast" if "json" in file.name else "LlamaTokenizer"
                told = (
                    "%s: AutoTokenizer makes a %s, which reads texts otherwise than %s; that file "
                )
                told += "is followed here, and elsewhere by %s.from_pretrained"
                logger.warning(told, path, type(tokenizer).__name__, file.name, right)
            return made
    raise ModelError(
        f"{path}: of {_PLAIN!r} {file.name} makes {meant[0][:9]}..., "
        f"{type(tokenizer).__name__} of transformers {_ids(tokenizer, _PLAIN)[:9]}...; put a "
        "tokenizer.json that reads texts as it does beside it"
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def save_tokenizer(holder: Any, directory: str | Path) -> None:
    """Writes a tokenizer, or a processor with its tokenizer, as transformers 4 and 5 read it.

    Transformers 5 writes a class and a list-valued `extra_special_tokens` that version 4 does not
    know. A SentencePiece file that the tokenizer was made from is carried along.

    Args:
        holder: A tokenizer or a processor.
        directory: Where to write.
    """
    holder.save_pretrained(str(directory))
    tokenizer: PreTrainedTokenizerBase = getattr(holder, "tokenizer", holder)
    file = Path(directory) / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if tokenizer.is_fast:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.pop("extra_special_tokens", None)
    if isinstance(extra, dict):
        config["extra_special_tokens"] = extra
    elif extra:
        config["additional_special_tokens"] = extra
    config["model_input_names"] = ["input_ids", "attention_mask"]
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    source = Path(tokenizer.name_or_path or "") / SENTENCEPIECE
    if source.is_file() and not (Path(directory) / SENTENCEPIECE).exists():
        shutil.copyfile(source, Path(directory) / SENTENCEPIECE)
