"""Settings by which hidden states become one vector: given, saved, or of an embedder.

An embedder is a directory in the format of sentence-transformers, read without that package: it can
take stage 1's place, with its pooling and lengths from the files that sentence-transformers itself
reads (`modules.json` and one folder a module).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llm2clip_vlm.files import read_json, write_atomically
from llm2clip_vlm.hub import ModelError, fetched, require_place
from llm2clip_vlm.models.checkpoint_files import file_of
from llm2clip_vlm.models.text.caption_tokens import CaptionTokenizer

SETTINGS_NAME = "text_encoder.json"
"""File beside the weights that says how they make a vector."""
DEFAULT_MAX_LENGTH_TOKENS = 512
"""Paper v6 C.1; less where the model has fewer positions."""

MODULES_NAME = "modules.json"
"""File whose presence makes a directory an embedder."""


_SCHEMA = 1
_POOLING = {"mean": "mean", "lasttoken": "last", "cls": "cls"}
_POOLING |= {"mean_tokens": "mean", "cls_token": "cls"}  # as flags are called
_FLAG = "pooling_mode_"
_LATER = ("chat", "embedder")  # written only where set: files and caches from before stay valid

Pooling = Literal["mean", "last", "eos", "cls"]


@dataclass(frozen=True)
class TextEncoderSettings:
    """Settings by which hidden states become one vector; saved with the weights."""

    pooling: Pooling = "mean"
    """Mean over the pooled tokens, the last of them, an eos (appended where the tokenizer adds
    none), or the first (some embedders)."""
    max_length_tokens: int = DEFAULT_MAX_LENGTH_TOKENS
    """Tokens of a text at most, special tokens and instruction included."""
    instruction: str = ""
    """Text before every caption, attended to but not pooled."""
    bidirectional: bool | Literal["partial"] = True
    """False = causal attention; `partial` = only some of the layers can be bidirectional."""
    chat: bool = False
    """Whether each text is wrapped in a user turn of the tokenizer's chat template."""
    embedder: bool = False
    """Made by sentence-transformers: every token is pooled, the instruction too."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved, and as they are in a fingerprint."""
        return {k: v for k, v in asdict(self).items() if v or k not in _LATER}

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> CaptionTokenizer:
        """The tokenizer of this encoder's captions."""
        return CaptionTokenizer(
            tokenizer,
            self.max_length_tokens,
            self.instruction,
            chat=self.chat,
            pooling=self.pooling,
            joined=self.embedder,
        )


def with_its_settings(path: str | Path) -> str | Path:
    """Fetch a text encoder or an embedder of the hub, whose settings lie beside its weights.

    Args:
        path: Directory or hub id.

    Returns:
        The folder that it was fetched to; a directory, and the id of a raw LLM, as they are.
    """
    require_place(path)
    if not Path(path).exists() and any(file_of(path, n) for n in (SETTINGS_NAME, MODULES_NAME)):
        return fetched(str(path))
    return path


def save_settings(directory: Path, settings: TextEncoderSettings, tokenizer_hash: str) -> None:
    """Writes :data:`SETTINGS_NAME`."""
    content = {"schema": _SCHEMA, **settings.to_dict(), "text_tokenizer": tokenizer_hash}
    write_atomically(directory / SETTINGS_NAME, json.dumps(content, indent=2) + "\n")


def resolve_settings(
    path: str | Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    chosen: Mapping[str, Any],
    embedder: Embedder | None,
) -> tuple[TextEncoderSettings, str | None]:
    """Settings of an encoder, and the hash of its tokenizer where one was saved.

    Args:
        path: Directory or hub id.
        config: Config of the model.
        tokenizer: Tokenizer of the model.
        chosen: What the caller asks for, by name.
        embedder: What the directory says. None: it is no embedder.

    Raises:
        ModelError: What is saved differs from what was asked for; or the model has no
            `hidden_size` or too few positions.
    """
    if not isinstance(getattr(config, "hidden_size", None), int) or config.is_encoder_decoder:
        raise ModelError(
            f"{path}: model_type {config.model_type!r} is no plain decoder (it has no hidden_size, "
            "or an encoder); give a Llama, Qwen2/3, Mistral or Gemma text model"
        )
    positions = getattr(config, "max_position_embeddings", None) or 2**31
    own: dict[str, Any] = {"max_length_tokens": min(DEFAULT_MAX_LENGTH_TOKENS, positions)}
    fixed: dict[str, Any] = {}
    tokenizer_hash: str | None = None
    saved = Path(path) / SETTINGS_NAME
    if saved.is_file():
        fixed = read_json(saved)
        if fixed.pop("schema", None) != _SCHEMA:
            raise ModelError(f"{saved}: unknown schema, expected {_SCHEMA}; save it anew")
        tokenizer_hash = fixed.pop("text_tokenizer")
        fixed = {"chat": False, **fixed}
    elif embedder is not None:
        fixed = {"pooling": embedder.pooling, "chat": False, "embedder": True}
        window = embedder.max_length_tokens or tokenizer.model_max_length
        own = {"max_length_tokens": min(window, positions), "instruction": embedder.prompt}
    for name, value in chosen.items():
        if fixed.get(name, value) != value:
            raise ModelError(
                f"{path}: {name} is {fixed[name]!r} in {SETTINGS_NAME if tokenizer_hash else 'it'},"
                f" but {value!r} was asked for; a trained encoder keeps it: leave {name} out"
            )
    settings = TextEncoderSettings(**{**own, **chosen, **fixed})
    if settings.max_length_tokens > positions:
        raise ModelError(
            f"max_length_tokens is {settings.max_length_tokens}, but {path} has {positions} "
            "positions (max_position_embeddings); lower it"
        )
    if settings.pooling not in get_args(Pooling):
        raise ModelError(
            f"pooling is {settings.pooling!r}, expected one of {', '.join(get_args(Pooling))}"
        )
    return settings, tokenizer_hash


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
    # called by the architecture when it was written: `sentence_roberta_config.json`, ...
    files = sorted(found[0][1].glob("sentence_*_config.json"))
    transformer = read_json(files[0], object) if files else {}
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
    flags = [name for name, value in config.items() if name.startswith(_FLAG) and value]
    mode = config.get("pooling_mode") or [name.removeprefix(_FLAG) for name in flags]
    modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise ModelError(f"{where}: pooling is {modes}, expected one of {', '.join(_POOLING)}")
    return _POOLING[modes[0]]
