"""Trainer of contrastive image-text models."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from llm2clip_vlm.data.image_text.dataset import ImageTextDataset, TextInputs, collate
from llm2clip_vlm.data.text.captions import EpochSampler
from llm2clip_vlm.distributed import await_files, is_initialized, is_main, say
from llm2clip_vlm.losses.contrastive import contrastive_loss, sigmoid_loss
from llm2clip_vlm.models.flops import flop_counter
from llm2clip_vlm.models.trainable import freeze_unused, running_statistics
from llm2clip_vlm.training.callbacks import EachEpoch, Throughput, WeightAverage
from llm2clip_vlm.training.encoder.distillation import TowerTeacher
from llm2clip_vlm.training.grad_cache import Embeds, cached_loss
from llm2clip_vlm.training.gradient_audit import GradientAudit
from llm2clip_vlm.training.param_groups import build_param_groups
from llm2clip_vlm.training.strict_resume import StrictResumeMixin

MAX_LOGIT_SCALE = math.log(100.0)
"""Upper bound of the stored `logit_scale` (released code: `[0, ln 100]` after each step)."""

Measure = Callable[[], Mapping[str, float]]


class _ClampLogitScale(TrainerCallback):
    """Keeps the stored `logit_scale` in `[0, ln 100]` after each optimizer step."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.parameter.requires_grad:
            return
        self.parameter.clamp_(0.0, MAX_LOGIT_SCALE)
        if hasattr(self.parameter, "_hp_mapping"):  # DeepSpeed's optimizer has its own copy
            from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

            master = safe_get_full_fp32_param(self.parameter).clamp(0.0, MAX_LOGIT_SCALE)
            safe_set_full_fp32_param(self.parameter, master)


class ContrastiveTrainer(StrictResumeMixin, Trainer):
    """Base of the trainers of stages 1 and 2: whole batches, measuring, throughput.

    Args:
        model: The model.
        args: Training arguments; incomplete batches must be dropped. What `measure` returns is
            logged as `eval_<name>` on the schedule of their `eval_strategy`.
        train_dataset: Pairs.
        unit: What throughput counts.
        parts: See :class:`GradientAudit`.
        measure: Called on all ranks; leaves the random numbers of training alone.
        callbacks: More callbacks.
        **more: More arguments of `transformers.Trainer`.

    Raises:
        ValueError: Fewer pairs than one batch.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: Any,
        *,
        unit: str,
        parts: Collection[str] | None = None,
        measure: Measure | None,
        callbacks: Sequence[TrainerCallback] | None,
        **more: Any,
    ) -> None:
        batch = args.per_device_train_batch_size * args.world_size
        if len(train_dataset) < batch:
            raise ValueError(
                f"an epoch has {len(train_dataset)} pairs, fewer than one global batch of {batch}; "
                "lower global_batch_size and trainer.per_device_train_batch_size"
            )
        if args.data_seed is not None:
            train_dataset.order_seed = args.data_seed
        self.measure = measure
        self.throughput = Throughput(unit)
        self.audit = GradientAudit(model, parts, say)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=None if measure is None else train_dataset,  # asked for, never read
            callbacks=[self.throughput, *(callbacks or [])],
            **more,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return EpochSampler(self.train_dataset)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure and log; the Trainer calls it on its schedule."""
        found = self.measure() if self.measure is not None else {}
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class EncoderTrainer(ContrastiveTrainer):
    """`transformers.Trainer` for two towers and a contrastive loss over the global batch.

    The model's output needs `image_embeds` and `text_embeds` (unit norm), and the model a
    `logit_scale` (stored logarithm): `LLM2CLIPModel` and `transformers.CLIPModel` have both. Where
    the output has a `logit_bias`, the loss is SigLIP's, otherwise softmax (with
    `args.label_smoothing_factor`). Embeddings and caption ids are gathered over all ranks with
    gradient, so that n processes compute the loss and the gradient of one with the same global
    batch.

    Args:
        model: The model.
        args: Training arguments; incomplete batches must be dropped.
        train_dataset: Pairs.
        learning_rates: Prefix of parameter names to learning rate.
        layer_decay: See `build_param_groups`.
        micro_batch_size: Images per forward pass; more go through GradCache
            (:func:`~llm2clip_vlm.training.grad_cache.cached_loss`). None: all at once.
        text_inputs: Captions to the model's text arguments, for a data set that leaves this to the
            process that trains (a cache that fills itself). None: batches have them.
        teacher: Adds its penalty on the image embeddings to the loss.
        flops_per_image: FLOPs forward and backward, for the log; see :func:`prepare_model`.
        measure: See :class:`ContrastiveTrainer`, which the other arguments go to.
        callbacks: More callbacks.

    Raises:
        ValueError: See :class:`ContrastiveTrainer`; or label smoothing with the sigmoid loss.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: ImageTextDataset,
        *,
        learning_rates: Mapping[str, float],
        layer_decay: float = 1.0,
        micro_batch_size: int | None = None,
        text_inputs: TextInputs | None = None,
        teacher: TowerTeacher | None = None,
        flops_per_image: float = 0.0,
        measure: Measure | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        if args.label_smoothing_factor and getattr(model, "logit_bias", None) is not None:
            raise ValueError(
                f"trainer.label_smoothing_factor is {args.label_smoothing_factor}, but the sigmoid "
                "loss has no distribution to smooth; set it to 0 or choose the softmax loss"
            )
        for parameter in model.parameters():
            if parameter.ndim == 0:
                # DeepSpeed broadcasts parameters as bytes, which fails for a scalar; it leaves out
                # what has this mark. All ranks have read the same `logit_scale`.
                parameter.ds_optim_param = True
        self.micro_batch_size = micro_batch_size
        self.teacher = teacher
        self.text_inputs = text_inputs
        self.learning_rates = dict(learning_rates)
        self.layer_decay = layer_decay
        self.flops_per_image = flops_per_image
        self.statistics = running_statistics(model)
        """Those of the tower's norms before training, which stay."""
        own = [EachEpoch(train_dataset), _ClampLogitScale(model.logit_scale)]
        super().__init__(
            model,
            args,
            train_dataset,
            unit="images",
            parts=self.learning_rates,
            measure=measure,
            callbacks=[*own, *callbacks],
            data_collator=collate,
        )

    def _complete_checkpoint(self, folder: Path) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, WeightAverage):
                callback.save(folder, self.model)

    def export(self, directory: str | Path) -> None:
        """Write the model as `from_pretrained` reads it, and nothing that needs pickle to read.

        Args:
            directory: Where to; made if absent. Call on all ranks.

        Raises:
            ValueError: Running statistics of a norm are not those of the tower before training.
        """
        after = running_statistics(self.model)
        if moved := [
            n for n in after if not torch.equal(self.statistics[n].to(after[n]), after[n])
        ]:
            raise ValueError(
                f"{moved[0]}: {len(moved)} of {len(after)} running statistics are no more those of "
                "the pretrained tower, whose norms were in training mode, then or now; train again"
            )
        self.save_model(str(directory))
        if is_main():
            (Path(directory) / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        await_files(directory)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.text_inputs is not None and "captions" in inputs:
            others = {name: value for name, value in inputs.items() if name != "captions"}
            inputs = others | dict(self.text_inputs(inputs["captions"]))
        # 8-bit pixels until here: the loader and the device get a quarter of the bytes
        dataset: Any = self.train_dataset
        inputs = {**inputs, "pixel_values": dataset.to_float(inputs["pixel_values"])}
        return super()._prepare_inputs(inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Contrastive loss of this rank's rows against the global batch.

        Args:
            model: The (wrapped) model.
            inputs: A batch of `ImageTextDataset`.
            return_outputs: Also return an (empty) output.
            num_items_in_batch: Not used: the batch is the unit, and nothing is accumulated.

        Returns:
            The loss, or loss and output.
        """

        def embed(part: Mapping[str, Tensor]) -> Embeds:
            output = model(**part)
            scale, bias = (getattr(output, name, None) for name in ("logit_scale", "logit_bias"))
            if scale is None:
                owner: Any = self.accelerator.unwrap_model(model)
                scale = owner.logit_scale.exp()
            shared = (scale,) if bias is None else (scale, bias)
            return Embeds((output.image_embeds, output.text_embeds), shared)

        images, gather = len(inputs["pixel_values"]), is_initialized()
        self.throughput.add(images, images * self.flops_per_image)

        def loss(embeds: Embeds) -> Tensor:
            image_embeds, text_embeds = embeds.rows
            ids = inputs["caption_ids"]  # shared by the embeddings of all prompts
            ids = repeat(ids, "n -> (n k)", k=len(text_embeds) // len(ids))
            given = (image_embeds, text_embeds, *embeds.shared)
            if len(embeds.shared) > 1:
                value = sigmoid_loss(*given, caption_ids=ids, gather=gather)
            else:
                smoothing = self.args.label_smoothing_factor
                value = contrastive_loss(
                    *given, caption_ids=ids, label_smoothing=smoothing, gather=gather
                )
            if self.teacher is not None:
                value = value + self.teacher.penalty(image_embeds, targets, gather=gather)
            return value

        features = {name: value for name, value in inputs.items() if name != "caption_ids"}
        chunks = [features]
        if self.micro_batch_size is not None and torch.is_grad_enabled():
            chunks = split_batch(features, self.micro_batch_size)
        if self.teacher is not None:
            targets = torch.cat([self.teacher(chunk["pixel_values"]) for chunk in chunks])
        value = cached_loss(self.accelerator, model, chunks, embed, loss)
        return (value, {}) if return_outputs else value

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups with their own learning rates."""
        return build_param_groups(
            model, self.learning_rates, self.args.weight_decay, layer_decay=self.layer_decay
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with `logit_scale` (stored logarithm) beside every loss.

        Args:
            logs: What the Trainer logs.
            start_time: See transformers.
        """
        if "loss" in logs:
            logs["logit_scale"] = round(self.model.logit_scale.item(), 5)
        super().log(logs, start_time)


def split_batch(features: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Cut a batch into chunks.

    Args:
        features: Tensors whose rows are images, or k consecutive rows for each image.
        size: Images per chunk; the last may have fewer.
    """
    images = min(map(len, features.values()))
    return [
        {
            name: value[start * (len(value) // images) : (start + size) * (len(value) // images)]
            for name, value in features.items()
        }
        for start in range(0, images, size)
    ]


def prepare_model(
    model: nn.Module, dataset: ImageTextDataset, text_inputs: TextInputs, device: Any
) -> float:
    """Move a model to its device and freeze what its loss does not reach.

    Args:
        model: `LLM2CLIPModel` or `CLIPModel`, with `requires_grad` set.
        dataset: Gives two images.
        text_inputs: Their captions to the model's text arguments.
        device: Where it will train.

    Returns:
        FLOPs of an image with its caption, forward and backward.
    """
    rows = [0, 1 % len(dataset)]
    pixels = dataset.to_float(dataset.__getitems__(rows)["pixel_values"])
    features = {"pixel_values": pixels, **text_inputs([dataset.caption(row) for row in rows])}
    features = {name: value.to(device) for name, value in features.items()}
    model.to(device)
    with flop_counter() as counter:
        freeze_unused(model, lambda: model(**features, return_loss=True).loss)
    return float(counter.get_total_flops()) / len(rows)
