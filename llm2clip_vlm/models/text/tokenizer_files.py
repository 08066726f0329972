"""Tokenizers written so that transformers 4 and 5 read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

SENTENCEPIECE = "tokenizer.model"


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
