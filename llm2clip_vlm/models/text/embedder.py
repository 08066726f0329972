"""Directories in the format of sentence-transformers, read without that package.

Such an embedder can take stage 1's place: its pooling and lengths come from the files that
sentence-transformers itself reads (`modules.json` and one folder a module).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip_vlm.files import read_json
from llm2clip_vlm.hub import ModelError

MODULES_NAME = "modules.json"
"""File whose presence makes a directory an embedder."""

_POOLING = {"mean": "mean", "lasttoken": "last", "cls": "cls"}


@dataclass(frozen=True)
class Embedder:
    """Settings in an embedder's files."""

    model_dir: Path
    """Directory of weights, config and tokenizer."""
    pooling: str
    """Pooling as in `TextEncoderSettings`."""
    max_length_tokens: int | None
    """Tokens of a text at most. None: what the tokenizer and the model allow."""
    prompt: str
    """Text that is put before every text, and pooled."""
    lower_case: bool
    """Texts are lower-cased first."""
    attn_implementation: str | None = None
    """See transformers. None: its default."""


def read_embedder(directory: str | Path) -> Embedder | None:
    """Reads the files of an embedder.

    Args:
        directory: What `SentenceTransformer(directory)` takes.

    Returns:
        What the files say. None: there is no `modules.json`.

    Raises:
        ModelError: It has a module, a pooling or a prompt that is not known here.
    """
    root = Path(directory)
    if not (root / MODULES_NAME).is_file():
        return None
    found = [(entry["type"].rsplit(".", 1)[-1], root / entry["path"]) for entry in _read(root)]
    kinds = [kind for kind, _ in found]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ModelError(
            f"{root / MODULES_NAME}: modules are {kinds}, expected Transformer, Pooling and at "
            "most Normalize; what this package trained is read from its `text_encoder` directory"
        )
    if escaped := [path for _, path in found if not path.resolve().is_relative_to(root.resolve())]:
        raise ModelError(f"{root / MODULES_NAME}: {escaped[0]} is outside of the directory")
    transformer = _read(found[0][1], "sentence_bert_config.json")
    general = _read(root, "config_sentence_transformers.json")
    pooling = _read(found[1][1], "config.json")
    prompt = general.get("prompts", {}).get(general.get("default_prompt_name"), "")
    if prompt and not pooling.get("include_prompt", True):
        raise ModelError(
            f"{root}: a default prompt that is not pooled (include_prompt: false) is not known here"
        )
    return Embedder(
        model_dir=found[0][1],
        pooling=_pooling_mode(pooling, found[1][1]),
        max_length_tokens=transformer.get("max_seq_length"),
        prompt=prompt,
        lower_case=bool(transformer.get("do_lower_case")),
        attn_implementation=(
            transformer.get("model_args") or transformer.get("model_kwargs") or {}
        ).get("attn_implementation"),
    )


def _read(folder: Path, name: str = MODULES_NAME) -> Any:
    file = folder / name
    return read_json(file, object) if file.is_file() else {}


def _pooling_mode(config: dict[str, Any], where: Path) -> str:
    """The one mode of either form of `config.json`: a name, or a flag for each."""
    mode = config.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else list(mode or ())
    if mode is None:
        flags = [
            name for name, value in config.items() if name.startswith("pooling_mode_") and value
        ]
        short = [name.removeprefix("pooling_mode_").removesuffix("_token") for name in flags]
        modes = ["mean" if name == "mean_tokens" else name for name in short]
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise ModelError(f"{where}: pooling is {modes}, expected one of {', '.join(_POOLING)}")
    return _POOLING[modes[0]]
