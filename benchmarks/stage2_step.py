"""A step of stage 2b with cached text against open_clip's own training step, on the same pixels.

Both train a ViT-B/32 at half its width and depth (50 tokens; images and texts keep B/32's
proportions) with AdamW in fp32, in one process and thread, without clipping:

- ours: `EncoderTrainer.train`, from the 8-bit batch on: normalising, looking captions up in the
  cache, tower, text adaptor, loss, backward, optimizer and callbacks;
- `locked`: `open_clip_train.train.train_one_epoch` over one batch, with its `ClipLoss`, its model
  from `create_model` and the optimizer of its `main`, the text tower locked as by `--lock-text`;
- `both`: the same with both towers trained;
- the limit: forward, loss against fixed text embeddings, backward and optimizer of images alone.

open_clip's arms hold a batch of floats and of token ids; nothing of theirs is tokenised or
normalised within the time. Equal: open_clip's visual tower gets our weights, and its features and
ours agree; so do both losses, and their gradients, on the same image and text features.

    python benchmarks/stage2_step.py [--quick]

`ratio` is the step with a locked text tower over ours, `ratio_both` that with both towers,
`limit_ratio` our step over the image-only one. Our trainer runs the loop, and the other arms take
their turn after each of its steps; the time of each is CPU time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from arms import finish, ratio, use_peers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, TrainerCallback, TrainingArguments
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.reading.pixels import PixelTable
from llm2clip_vlm.data.text.caption_draw import caption_id
from llm2clip_vlm.interop.libraries import open_clip_weights
from llm2clip_vlm.losses.contrastive import contrastive_loss
from llm2clip_vlm.models.llm2clip import LLM2CLIPConfig, LLM2CLIPModel
from llm2clip_vlm.training.encoder.encoder_trainer import EncoderTrainer

WIDTH, LAYERS, TEXT_WIDTH, JOINT = 384, 6, 256, 256
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": LAYERS,
}
VISION |= {"num_attention_heads": WIDTH // 64, "image_size": 224, "patch_size": 32}
TEXT_EMBEDS, VOCABULARY, CONTEXT = 768, 49408, 77
RATE, DECAY, BETAS, EPS = 1e-4, 0.05, (0.9, 0.98), 1e-6
PARTS = ("vision_tower", "visual_projection", "text_adaptor", "logit_scale")
GOALS = {"ratio": 1.3, "ratio_both": 1.6, "limit_ratio": 1.05}

Seconds = dict[str, dict[str, list[float]]]


class OneBatch(Dataset[dict[str, Any]]):
    """Gives the trainer the same batch again and again, as `ImageTextDataset` gives batches."""

    def __init__(self, pixels: Tensor, captions: list[str]) -> None:
        self.pixels, self.captions = pixels, captions
        self.ids = torch.tensor([caption_id(caption) for caption in captions])
        table = PixelTable.of(CLIPImageProcessorPil())
        assert table is not None
        self.to_float = table

    def __len__(self) -> int:
        return 1000 * len(self.pixels)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return {"pixel_values": self.pixels, "caption_ids": self.ids, "captions": self.captions}

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: there is one batch."""

    def items(self, epoch: int) -> range:
        """Any order will do."""
        return range(len(self))


class Turns(TrainerCallback):
    """Times each step of our trainer, and has the other arms take their turn after it."""

    def __init__(self, others: dict[str, Callable[[], Any]], rounds: int) -> None:
        self.others, self.left = others, rounds + 1  # the first warms up
        self.seconds: Seconds = {name: {"cpu": [], "wall": []} for name in ("ours", *others)}
        self._since = (0.0, 0.0)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._since = (time.process_time(), time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it, and give the others a step each."""
        self._add("ours")
        for name, arm in self.others.items():
            self.on_step_begin()
            arm()
            self._add(name)
        self.left -= 1
        control.should_training_stop = not self.left

    def _add(self, name: str) -> None:
        for kind, now, since in zip(
            ("cpu", "wall"), (time.process_time(), time.perf_counter()), self._since, strict=True
        ):
            self.seconds[name][kind].append(now - since)


def our_model() -> LLM2CLIPModel:
    """A tower, its head and the paper's text adaptor."""
    torch.manual_seed(0)
    config = LLM2CLIPConfig(
        vision_config=CLIPVisionConfig(**VISION, hidden_act="gelu"),
        text_embed_dim=TEXT_EMBEDS,
        projection_dim=JOINT,
    )
    return LLM2CLIPModel(config)


def peer_model(folder: Path, ours: LLM2CLIPModel) -> Any:
    """open_clip's model by its own `create_model`, with our tower's weights."""
    import open_clip

    config = {
        "embed_dim": JOINT,
        "vision_cfg": {"image_size": 224, "layers": LAYERS, "width": WIDTH, "patch_size": 32},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": VOCABULARY,
            "width": TEXT_WIDTH,
            "heads": TEXT_WIDTH // 64,
            "layers": LAYERS,
        },
    }
    (folder / "half-B-32.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    model: Any = open_clip.create_model("half-B-32", precision="fp32", output_dict=True)
    model.visual.load_state_dict(open_clip_weights(ours.vision_tower, ours.visual_projection))
    return model


def adamw(model: nn.Module, *, fused: bool = False) -> torch.optim.Optimizer:
    """The optimizer that `open_clip_train.main` makes: no decay for gains and biases.

    Args:
        model: Its parameters that train.
        fused: One kernel for all, as our recipe has it.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def plain(name: str, p: Tensor) -> bool:
        return p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

    groups = [
        {"params": [p for name, p in trained if plain(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in trained if not plain(name, p)], "weight_decay": DECAY},
    ]
    return torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS, fused=fused or None)


def peer_step(model: Any, pixels: Tensor, tokens: Tensor) -> Callable[[], None]:
    """An epoch of one batch of open_clip's own loop."""
    from open_clip import ClipLoss
    from open_clip_train.scheduler import const_lr
    from open_clip_train.train import train_one_epoch

    class Loader(list[tuple[Tensor, Tensor]]):
        num_batches, num_samples = 1, len(pixels)

    data = {"train": SimpleNamespace(dataloader=Loader([(pixels, tokens)]), set_epoch=int)}
    args = SimpleNamespace(
        **{"device": "cpu", "precision": "fp32", "distill": False, "accum_freq": 1},
        **{"skip_scheduler": False, "horovod": False, "grad_clip_norm": None, "wandb": False},
        **{"batch_size": len(pixels), "world_size": 1, "log_every_n_steps": 100},
        **{"rank": 0, "local_rank": 0, "log_local": False},
    )
    optimizer = adamw(model)
    scheduler = const_lr(optimizer, RATE, 0, 1000)
    return lambda: train_one_epoch(
        model, data, ClipLoss(), 0, optimizer, None, scheduler, None, args
    )


def image_step(pixels: Tensor) -> Callable[[], None]:
    """The images' part of our step alone."""
    model = our_model().train()
    model.text_adaptor.requires_grad_(False)
    optimizer = adamw(model, fused=True)
    fixed = nn.functional.normalize(torch.randn(len(pixels), JOINT), dim=-1)

    def step() -> None:
        optimizer.zero_grad()
        embeds = model.get_image_features(pixels)
        contrastive_loss(embeds, fixed, model.logit_scale.exp()).backward()
        optimizer.step()

    return step


def differences(ours: LLM2CLIPModel, peer: Any, pixels: Tensor, tokens: Tensor) -> dict[str, float]:
    """Largest difference of the towers' features, of the losses and of their gradients."""
    from open_clip import ClipLoss

    with torch.no_grad():
        mine = ours.eval().get_image_features(pixels)
        theirs = peer.eval().encode_image(pixels, normalize=True)
        texts = peer.encode_text(tokens, normalize=True)
    scale = peer.logit_scale.detach().exp()
    found = []
    losses: tuple[Callable[..., Tensor], ...] = (contrastive_loss, ClipLoss())
    for loss in losses:
        leaves = [features.clone().requires_grad_() for features in (theirs, texts)]
        value = loss(*leaves, scale)
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    (loss_a, *grads_a), (loss_b, *grads_b) = found
    return {
        "features": float((mine - theirs).abs().max()),
        "loss": float((loss_a - loss_b).abs()),
        "gradients": max(float((a - b).abs().max()) for a, b in zip(grads_a, grads_b, strict=True)),
    }


def main() -> None:
    """Print each arm's time a step and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="batch 32, 3 rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    use_peers("torchvision", "open_clip", "open_clip_train.train")
    batch, rounds = (32, 3) if options.quick else (options.batch, 11)
    torch.manual_seed(0)
    tokens = torch.randint(1, VOCABULARY - 1, (batch, CONTEXT))
    tokens[:, -1] = VOCABULARY - 1  # end of text, where open_clip pools
    captions = [f"caption {i}" for i in range(batch)]
    data = OneBatch(torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8), captions)
    pixels = data.to_float(data.pixels)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = EmbeddingCache.build(
            folder / "cache", captions, lambda texts: torch.randn(len(texts), TEXT_EMBEDS), {}
        )
        model = our_model()
        locked, both = (peer_model(folder, model) for _ in range(2))
        apart = differences(model, locked, pixels, tokens)
        locked.lock_text_tower()
        turns = Turns(
            {
                "locked": peer_step(locked, pixels, tokens),
                "both": peer_step(both, pixels, tokens),
                "images": image_step(pixels),
            },
            rounds,
        )
        args = TrainingArguments(
            output_dir=str(folder / "run"),
            per_device_train_batch_size=batch,
            max_steps=1000,
            learning_rate=RATE,
            weight_decay=DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            max_grad_norm=0.0,
            optim="adamw_torch_fused",
            lr_scheduler_type="constant",
            logging_steps=100,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_drop_last=True,
            remove_unused_columns=False,
        )
        trainer = EncoderTrainer(
            model.train(),
            args,
            data,  # type: ignore[arg-type]
            learning_rates=dict.fromkeys(PARTS, RATE),
            text_inputs=partial(_features, cache),
            callbacks=[turns],
        )
        trainer.train()
    seconds = {arm: {k: v[1:] for k, v in kinds.items()} for arm, kinds in turns.seconds.items()}
    median = {arm: statistics.median(values["cpu"]) for arm, values in seconds.items()}
    print(", ".join(f"{arm} {1000 * value:.0f} ms" for arm, value in median.items()))
    factor, spread = ratio(seconds, "locked", "ours")
    of_both, spread_both = ratio(seconds, "both", "ours")
    limit, spread_limit = ratio(seconds, "ours", "images")
    finish(
        "stage2_step",
        ours=round(median["ours"], 4),
        baseline=round(median["locked"], 4),
        ratio=factor,
        spread=spread,
        ratio_both=of_both,
        spread_both=spread_both,
        limit_ratio=limit,
        spread_limit=spread_limit,
        equal=max(apart.values()) < 1e-5,
        differences=apart,
        goals=GOALS,
        settings={
            "batch": batch,
            "vision": VISION,
            "text": {"width": TEXT_WIDTH, "layers": LAYERS, "tokens": CONTEXT},
            "text_embeds": TEXT_EMBEDS,
            "dtype": "float32",
            "repeats": rounds,
            "unit": "s of CPU a step",
            "equal": "the towers' features; both losses and their gradients on equal features",
            "limit": "our step over forward, loss, backward and AdamW of the images alone",
        },
    )


def _features(cache: EmbeddingCache, captions: Any) -> dict[str, Tensor]:
    return {"text_features": cache.lookup(captions)}


if __name__ == "__main__":
    main()
