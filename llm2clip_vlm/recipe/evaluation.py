"""The recipe of the encoder's benchmarks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from llm2clip_vlm.recipe.base import OutputDir, RecipeFile, Section, TextEncoderSection


class ImageFolder(Section):
    """A folder of images."""

    follow_links: bool = False
    """Follow symbolic links below the folder of images that lead out of it."""


class EncoderTask(Section):
    """Base of all tasks."""

    name: str | None = None
    """Name of the result's file. None: that of the benchmark, else of the task."""


class RetrievalTask(EncoderTask, ImageFolder):
    """Image to text and text to image, hit@1, 5 and 10."""

    task: Literal["retrieval"]
    """Which task this is."""
    benchmark: str
    """A key of `evaluation/encoder/benchmarks.py`, or `records`: any file of stage 2's kinds."""
    data: str
    """The benchmark's annotation file or folder."""
    images: str | None = None
    """Folder of its images. None: the folder of `data`."""
    fields: list[str] = Field(default_factory=lambda: ["captions"])
    """Columns with captions of `records`, each kind judged apart."""
    where: dict[str, str | bool | int] = Field(default_factory=dict)
    """Take only rows of `records` whose columns equal these values."""


class CraTask(RetrievalTask):
    """Caption retrieval accuracy of the text encoder alone (`metrics/separability.py`)."""

    task: Literal["cra"]  # type: ignore[assignment]
    """Which task this is."""


class CompositionalTask(EncoderTask, ImageFolder):
    """Test of whether the right caption, or image, scores above its hard negative."""

    task: Literal["compositional"]
    """Which task this is."""
    benchmark: Literal["sugarcrepe", "winoground"]
    """Format and protocol."""
    data: str
    """SugarCrepe: folder of its JSON files, or one `.jsonl`. Winoground: `examples.jsonl`."""
    images: str
    """Folder of the images."""


class ClassSource(ImageFolder):
    """Images with a class."""

    data: str
    """Folder with a folder of images for each class (ImageNet's layout), or a file of rows."""
    images: str | None = None
    """Folder that the paths in a file are relative to. None: the folder of the file."""
    label_field: str = "label"
    """Column of a file with the class."""
    where: dict[str, str | bool | int] = Field(default_factory=dict)
    """Take only rows of a file whose columns equal these values."""


class ZeroShotTask(EncoderTask, ClassSource):
    """Classification by the texts of the classes' names."""

    task: Literal["zero_shot"]
    """Which task this is."""
    classes: str
    """File of names: lines (`.txt`), or JSON, `[name]` or `{class: name}`."""
    templates: list[str] = Field(default_factory=lambda: ["a photo of a {}."], min_length=1)
    """Texts with `{}` for the name; a class is the mean of their embeddings."""


class LinearProbeTask(EncoderTask):
    """Logistic regression on the tower's frozen pooled features (CLIP, appendix A.3)."""

    task: Literal["linear_probe"]
    """Which task this is."""
    train: ClassSource
    """Images to learn from."""
    test: ClassSource
    """Images to judge by."""
    validation: float = Field(default=0.2, gt=0, lt=1)
    """Share of `train` by which the regularisation is chosen."""
    shots: list[int] = Field(default_factory=list)
    """Numbers of images a class for few-shot probes beside the full one."""
    draws: int = Field(default=3, ge=1)
    """Random draws of the few images; the mean is reported."""


class SegmentationSource(ImageFolder):
    """Pictures with masks."""

    layout: Literal["voc", "ade20k"] = "voc"
    """`voc`: `JPEGImages`, `SegmentationClass`, `ImageSets/Segmentation/<split>.txt`; `ade20k`:
    `images/<split>`, `annotations/<split>`."""
    data: str
    """Folder of the data set."""
    classes: str
    """File of names, in the masks' order, as in `zero_shot`."""
    skip_zero: bool = True
    """Mask value 0 is no class and not judged, 1 is the first (ADE20K, VOC20); false judges it
    (VOC21, whose first class is the background). 255 is never judged."""
    short_side_px: int | None = Field(default=None, ge=1)
    """Shorter side that images are resized to. None: twice the tower's side."""
    stride: float = Field(default=0.5, gt=0, le=1)
    """Step of the sliding window over its side, which is that of the tower."""


class ZeroShotSegmentationTask(EncoderTask, SegmentationSource):
    """Patches against the texts of the classes."""

    task: Literal["zero_shot_segmentation"]
    """Which task this is."""
    split: str
    """Split to judge by."""
    templates: list[str] = Field(default_factory=lambda: ["a photo of a {}."], min_length=1)
    """See `zero_shot`."""
    last_attention: Literal["value", "full"] = "value"
    """`value`: the last block's attention gives each patch its own value (MaskCLIP, 2112.01071)."""


class SegmentationTask(EncoderTask, SegmentationSource):
    """A linear head on frozen patch features."""

    task: Literal["segmentation"]
    """Which task this is."""
    train_split: str
    """Split to learn from."""
    split: str
    """Split to judge by."""
    steps: int = Field(default=2000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=16, ge=1)
    """Random windows a step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of AdamW, falling to 0 along a cosine."""


class BoxSource(ImageFolder):
    """Pictures with boxes."""

    annotations: str
    """COCO's `instances_*.json`."""
    images: str
    """Folder of the images."""


class DetectionTask(EncoderTask):
    """Deformable DETR (transformers) on the tower as its backbone, judged by pycocotools."""

    task: Literal["detection"]
    """Which task this is."""
    train: BoxSource
    """Images to learn from."""
    test: BoxSource
    """Images to judge by."""
    image_size_px: int | None = Field(default=None, ge=1)
    """Side of the square that images are resized to. None: that of the tower."""
    freeze_tower: bool = False
    """Train the detector alone."""
    detector: dict[str, Any] = Field(default_factory=dict)
    """Fields of `DeformableDetrConfig` other than its backbone and classes."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Passed to `transformers.TrainingArguments`."""


class EncoderEvalRecipe(RecipeFile):
    """Recipe of `eval/run_encoder.py`: what is evaluated, and how."""

    stage: Literal["run_encoder"]
    """Which program reads this file (`llm2clip-vlm eval RECIPE` looks at it)."""
    output_dir: OutputDir
    """Folder of `<name>.json` of each task and of `results.json`."""
    data_dir: str = "."
    """Folder that tasks may name as `${data_dir}`."""
    model: str
    """Path or hub id: an `LLM2CLIPModel`, CLIP or SigLIP; for tasks without text any tower."""
    text_encoder: str | TextEncoderSection | None = None
    """Text encoder of an `LLM2CLIPModel`: stage 1's `text_encoder/`, or a raw LLM."""
    device: str | None = None
    """Device to run on. None: `cuda` if there is one, else `cpu`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the encoder; scores are always computed in float32."""
    batch_size: int = Field(default=64, ge=1)
    """Images a forward pass."""
    bootstrap: int = Field(default=1000, ge=0)
    """Resamples of the images for the 95 % intervals; 0 = none."""
    seed: int = 0
    """Seed of resamples, draws and heads."""
    tasks: list[
        Annotated[
            RetrievalTask
            | CraTask
            | CompositionalTask
            | ZeroShotTask
            | LinearProbeTask
            | ZeroShotSegmentationTask
            | SegmentationTask
            | DetectionTask,
            Field(discriminator="task"),
        ]
    ] = Field(min_length=1)
    """Tasks, run in this order; a task whose result is there is not run again."""
