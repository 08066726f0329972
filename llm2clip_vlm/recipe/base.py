"""Base of all recipes: sections, sources of data, text encoders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from llm2clip_vlm.recipe.reading import did_you_mean, trainer_keys
from llm2clip_vlm.remote.addresses import is_remote


class Section(BaseModel):
    """A part of a recipe: unknown keys refused, no silent conversion between types."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


_NO_SELECTION = {"weight", "prompts", "sampling_strategy", "shuffle_images"}
_NO_SELECTION |= {"index_dir", "cache_dir", "cache_gib"}


class DataSource(Section):
    """Source of rows: files, or a data set of the Hugging Face hub."""

    path: str = ""
    """File with one record a row; `*` and `?` name several (`shards/*.tar`). It may be an address:
    `s3://`, `gs://`, `hf://`, `https://`. Either this or `dataset`."""
    dataset: str = ""
    """Data set of the Hugging Face hub (`lmms-lab/LLaVA-NeXT-Data`), a folder that `save_to_disk`
    wrote, or a folder of Parquet, as `datasets.load_dataset` takes it; no code of it is run."""
    name: str | None = None
    """Configuration of the `dataset`, such as `ai2d` of the Cauldron."""
    split: str = Field(default="train", pattern=r"^[\w.+-]+$")
    """Split of the `dataset`; `train+validation` joins two, a part is taken by `limit`."""
    revision: str | None = None
    """Commit, branch or tag of the `dataset` on the hub. None: its newest."""
    columns: list[str] | dict[str, str] = Field(default_factory=list)
    """Columns to read, empty = all; `{images: photos, texts: dialogue}` reads `photos` and
    `dialogue` and calls them `images` and `texts`."""
    limit: int | None = Field(default=None, ge=1)
    """Take at most this many records, in file order."""
    cache_dir: str | None = None
    """Folder for what is fetched of an address, shared by all runs of a machine. None:
    `llm2clip_vlm` in `XDG_CACHE_HOME`, or in `~/.cache`."""
    cache_gib: float = Field(default=64.0, gt=0)
    """Most that pictures take in `cache_dir`; those not asked for longest go first."""
    index_dir: str | None = None
    """Folder of the table that large sources are read into once. None: `.llm2clip-index` beside
    them."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if bool(self.path) == bool(self.dataset):
            raise ValueError(
                f"path is {self.path!r} and dataset is {self.dataset!r}; expected one of them"
            )
        if self.path and (self.name is not None or self.revision is not None):
            raise ValueError("name and revision belong to a `dataset`, got a `path`")
        return self

    @property
    def title(self) -> str:
        """Name of the source in messages: its path, or data set, configuration and split."""
        split = "" if self.split == "train" else self.split
        return self.path or "/".join(filter(None, (self.dataset, self.name, split)))

    @property
    def selection(self) -> dict[str, Any]:
        """What decides on its records, and none of what is done with them."""
        return self.model_dump(exclude=_NO_SELECTION)


class ImageSource(DataSource):
    """Base of sources of rows with images."""

    image_root: str | None = None
    """Folder that image paths are relative to. None: the file's own folder. No path leaves it."""
    follow_links: bool = False
    """Follow symbolic links below `image_root` that lead out of it, as in the hub's cache."""

    @property
    def folder(self) -> Path:
        """Folder that image names are relative to."""
        return Path(self.image_root or self.dataset or Path(self.path).parent)


class CaptionSource(DataSource):
    """A source of texts: `.jsonl`, `.json`, `.csv` (also `.gz`), `.parquet`, webdataset `.tar`.

    In a shard the fields of the JSON members are columns.
    """

    fields: list[str] = Field(default_factory=lambda: ["captions"])
    """Columns that hold captions of the same image; a list-valued column adds all its items, a
    mapping-valued one all its values."""
    group_by: str | None = None
    """Column whose equal values join rows into one record (COCO: `image_id`). None: a row each."""
    where: dict[str, str | bool | int] = Field(default_factory=dict)
    """Keep only rows whose columns equal these values, such as `{split: train}`; a value
    that no row has is refused, also below."""
    drop_where: dict[str, list[str | bool | int | float]] = Field(default_factory=dict)
    """Drop rows whose column holds one of these values (`{flickr8k_split: [val, test]}`)."""
    weight: float = Field(default=1.0, gt=0)
    """Sampling weight of this source relative to the others."""


class CaptionPairSource(CaptionSource):
    """A file that stage 1 draws pairs of texts from."""

    directed: bool = False
    """False draws two different captions of a record. True takes `fields` for
    `[anchor, positive]` or `[anchor, positive, negative]`, in this order: the anchor is the query,
    the negative (may be null) a hard one."""
    prompts: dict[str, str] = Field(default_factory=dict)
    """Text before the query alone, by direction: `query column->positive column`, or `*` for any
    other direction (`{short->long: "Retrieve a detailed caption. "}`). Not pooled."""

    @model_validator(mode="after")
    def _directed_has_its_columns(self) -> Self:
        if self.directed and len(self.fields) not in (2, 3):
            raise ValueError(
                f"fields is {self.fields} and directed is true; expected [anchor, positive] or "
                "[anchor, positive, negative]"
            )
        if wrong := [name for name in self.prompts if name != "*" and "->" not in name]:
            raise ValueError(f"prompts: {wrong[0]!r}: expected `query->positive` or `*`")
        return self


class AugmentationSection(Section):
    """Random changes of training pictures, drawn anew each epoch from seed and record key."""

    crop_scale_min: float = Field(default=1.0, gt=0, le=1)
    """Random crop of at least this share of the picture's area, sides 3:4 to 4:3, resized to the
    tower's square (released code: 0.9); 1 = no random crop."""


class ImageTextSource(CaptionSource, ImageSource):
    """Images with captions, beside them or inside the file.

    Annotations of COCO and Karpathy (`.json`), `.parquet` and `.arrow` with image bytes, and
    webdataset shards (`.tar`) in img2dataset's layout are read, too.
    """

    image_field: str = "image"
    """Column with the image path."""
    id_field: str = "id"
    """Column with the record's key, unique in the file (`.tar`: the sample's key)."""


class ZeroShotSource(ImageTextSource):
    """Labelled images; the classes are the different texts in the column of labels."""

    fields: list[str] = Field(default_factory=lambda: ["label"], min_length=1, max_length=1)
    """Column of the labels."""
    templates: list[str] = Field(default_factory=lambda: ["a photo of a {}."], min_length=1)
    """Each `{}` becomes a class's name; a class is the mean of its prompts' embeddings."""


def _folder(value: str) -> str:
    """Check a folder to write to: no empty text, no file; `~` is the home."""
    if not value.strip() or "\x00" in value:
        raise ValueError(f"expected a folder to write to, got {value!r}")
    if is_remote(value):
        raise ValueError(f"expected a folder of this machine to write to, got the address {value}")
    try:
        path = Path(value).expanduser()
        for above in (path, *path.parents):
            if above.exists() and not above.is_dir():
                raise ValueError(f"expected a folder to write to, but {above} is no folder")
    except (OSError, RuntimeError) as error:  # too long; `~` of nobody
        raise ValueError(f"expected a folder to write to, got {value:.99}: {error!s:.99}") from None
    return str(path) if value.startswith("~") else value


OutputDir = Annotated[str, AfterValidator(_folder)]
"""A folder that a run writes to."""


_OWNED = {
    "output_dir": "`output_dir` of the recipe",
    "seed": "`seed` of the recipe",
    "gradient_accumulation_steps": "`global_batch_size` of the recipe (accumulation follows)",
    "accelerator_config": "`global_batch_size` of the recipe (it would train on another one)",
    "resume_from_checkpoint": "nothing (the same command goes on from its last checkpoint)",
    **dict.fromkeys(
        ("fsdp", "fsdp_config", "parallelism_config"), "`--accelerate zero3`, or zero2"
    ),
}
_ABOVE_ZERO = frozenset(
    "max_steps num_train_epochs save_steps logging_steps eval_steps per_device_eval_batch_size "
    "dataloader_prefetch_factor".split()
)
"""Keys that transformers takes at 0, for something else than nothing, or for nothing."""
_PLAIN: dict[str, tuple[type, ...]] = {
    **{kind.__name__: (kind,) for kind in (bool, int, str, dict, list)},
    "float": (float, int),
    "None": (type(None),),
}


def _checked(trainer: dict[str, Any]) -> dict[str, Any]:
    """Check keys and values here, where all recipes of a pipeline are read before its first step.

    Raises:
        ValidationError: A key that `TrainingArguments` lacks (with the nearest one it has), one
            that the recipe sets elsewhere, or a value of the wrong type or sign.
    """
    known = trainer_keys()
    problems: list[InitErrorDetails] = []
    for name, value in trainer.items():
        kinds = re.sub(r"\[[^]]*\]", "", known.get(name, "")).split(" | ")
        if name in _OWNED:
            told = f"set {_OWNED[name]} instead"
        elif name not in known:
            hint = did_you_mean(name, known) or "; see transformers.TrainingArguments"
            told = f"unknown key{hint}"
        elif _PLAIN.keys() >= {*kinds} and not any(type(value) in _PLAIN[k] for k in kinds):
            told = f"expected {' or '.join(kinds).replace('None', 'null')}, got {value!r}"
        elif not isinstance(value, int | float) or (name, value) == ("max_steps", -1):
            continue
        elif value < 0 or (value == 0 and name in _ABOVE_ZERO):
            least = "more than 0" if name in _ABOVE_ZERO else "0 or more"
            told = f"expected {least}, got {value!r} (left out: its default)"
        else:
            continue
        error = PydanticCustomError("value_error", "{told}", {"told": told})
        problems.append({"type": error, "loc": (name,), "input": value})
    if problems:
        raise ValidationError.from_exception_data("trainer", problems)
    return trainer


class RecipeFile(Section):
    """Keys of every recipe."""

    base: str | None = None
    """One parent recipe (path relative to this file) whose values this file overrides."""
    notes: str = ""
    """Purpose of this recipe: what it shows or reproduces, on which hardware, in how many hours,
    with which numbers, and what these may be compared with."""
    variables: dict[str, str | int | float | bool | list[str | int]] = Field(default_factory=dict)
    """Values for `${variables.<name>}` in this file; they compute nothing by themselves."""


class RunRecipe(RecipeFile):
    """Base of the recipes of all stages."""

    contrastive: ClassVar[bool] = False
    """Whether the loss compares the samples of a step, so that accumulating one is no choice."""
    deviations: dict[str, str] = Field(default_factory=dict)
    """Where and why this recipe differs from what it reproduces."""
    output_dir: OutputDir
    """Folder of checkpoints, manifest and results of this stage."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of initialisation, shuffling and dropout."""
    global_batch_size: int = Field(default=256, ge=1)
    """Samples per optimizer step over all processes. Accumulation follows from the number of
    processes and `trainer.per_device_train_batch_size` (unset: 8; in a contrastive stage the
    process's share of the step)."""
    max_bad_records: int = Field(default=0, ge=0)
    """Bad records (image, caption) skipped, counted and named before the run stops."""
    max_bad_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Share of bad records at which the run stops, where that is more than `max_bad_records`."""
    hang_timeout_s: float | None = Field(default=1800.0, gt=0)
    """Seconds without a new step (stages 3 and 4: micro-step) after which a process names its rank
    and those that are gone, shows where it stands, and ends. None: wait without end."""
    trainer: Annotated[dict[str, Any], AfterValidator(_checked)] = Field(default_factory=dict)
    """Passed to `transformers.TrainingArguments`; each key is checked against its fields."""

    @model_validator(mode="after")
    def _parts_have_their_rates(self) -> Self:
        own = {"learning_rates", "trainable"} & type(self).model_fields.keys()
        if own and "learning_rate" in self.trainer:
            raise ValueError(f"trainer.learning_rate: each part has its own, set {own.pop()}")
        return self


class LoraSection(Section):
    """A LoRA adapter (PEFT)."""

    r: int = Field(default=16, ge=1)
    """Rank. Paper v6 C.1: 16."""
    alpha: int = Field(default=32, ge=1)
    """Scaling numerator. Paper v6 C.1: 32."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the adapter's input (released code: 0.05)."""
    target_modules: str | list[str] = "all-linear"
    """Modules to adapt, as PEFT takes them."""
    use_dora: bool = False
    """DoRA: magnitude and direction of each weight are adapted apart (arXiv 2402.09353)."""


class TextEncoderSection(Section):
    """A decoder LLM used as a bidirectional text encoder."""

    language_model: str
    """Path or hub id of the decoder LLM (Llama, Qwen2/3, Mistral, Gemma)."""
    pooling: Literal["mean", "last", "eos"] = "mean"
    """Mean over caption tokens, the last token, or an eos after the text, added where the
    tokenizer adds no eos (paper v6 table 6)."""
    max_length_tokens: int = Field(default=512, ge=2)
    """Longer captions are cut and counted. Paper v6 C.1: 512."""
    instruction: str = ""
    """Text before every caption; its tokens are left out of the mean (released code)."""
    chat: bool = False
    """Wrap each text in a user turn of the tokenizer's chat template; what stands before the
    text is not pooled (released code: Llama 3's user header)."""
    bidirectional: bool | Literal["partial"] = True
    """True opens every layer; false keeps causal attention (paper v6 table 6). `partial` takes a
    model some of whose layers stay causal (hybrids with linear attention or recurrence)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the saved weights; `auto` keeps it as it is (float16 becomes float32 where it
    trains). What trains without DeepSpeed is held in float32 meanwhile."""
    attn_implementation: str | None = None
    """`sdpa`, `eager` or `flash_attention_2`, as in transformers. None: its default."""

    @model_serializer(mode="wrap")
    def _as_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what was not given: a trained encoder, or an embedder, brings its own value."""
        given = self.model_fields_set
        return {name: value for name, value in handler(self).items() if name in given}
