"""Checkpoints in published layouts, and what they compute by the published definitions.

Everything here is written from the papers and the names in the files, in float64, one step a line;
nothing of the package is used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.unit.test_eva02 import naive as eva02_states

WIDTH, HIDDEN, DEPTH, PATCH = 128, 192, 2, 14
"""Two heads of 64, as in every published size but So400m."""

Weights = dict[str, Tensor]


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.05 * torch.randn(shape, generator=generator) + 1.0 * name.endswith(NORMS)
        for name, shape in shapes.items()
    }


NORMS = tuple(
    f"{name}.weight"
    for name in ("ln_1 ln_2 ln_pre ln_post norm norm1 norm2 inner_attn_ln ffn_ln ln".split())
)


def pixels(side: int = 28, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5))


def openai(out: int = 48, side: int = 28) -> Weights:
    """OpenAI CLIP's names (open_clip, LLM2CLIP's `visual.*`), with the projection."""
    width, grid = WIDTH, side // PATCH
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,),
        "positional_embedding": (grid**2 + 1, width),
        "proj": (width, out),
        "conv1.weight": (width, 3, PATCH, PATCH),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for n in range(DEPTH):
        at = f"transformer.resblocks.{n}."
        shapes |= {at + "attn.in_proj_weight": (3 * width, width)}
        shapes |= {at + "attn.in_proj_bias": (3 * width,)}
        shapes |= _linear(at + "attn.out_proj", width, width)
        shapes |= _linear(at + "mlp.c_fc", width, HIDDEN) | _linear(
            at + "mlp.c_proj", HIDDEN, width
        )
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{at}{norm}.weight": (width,), f"{at}{norm}.bias": (width,)}
    return _random(shapes, 1)


def _linear(name: str, inner: int, outer: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outer, inner)} | ({f"{name}.bias": (outer,)} if bias else {})


def openai_states(weights: Weights, images: Tensor) -> list[Tensor]:
    """Hidden states by the definition (CLIP, 2103.00020, section 2.4): QuickGELU, pre-norm."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = _patches(images, w["conv1.weight"], None)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + w["positional_embedding"]
    states = [norm(x, w, "ln_pre", 1e-5)]
    for n in range(DEPTH):
        at, x = f"transformer.resblocks.{n}.", states[-1]
        y = norm(x, w, at + "ln_1", 1e-5)
        y = _attention(y, y, w[at + "attn.in_proj_weight"], w[at + "attn.in_proj_bias"])
        x = x + _apply(y, w, at + "attn.out_proj")
        y = _apply(norm(x, w, at + "ln_2", 1e-5), w, at + "mlp.c_fc")
        states.append(x + _apply(y * torch.sigmoid(1.702 * y), w, at + "mlp.c_proj"))
    return states


def openai_features(weights: Weights, images: Tensor) -> Tensor:
    w = {name: tensor.double() for name, tensor in weights.items()}
    cls = openai_states(weights, images)[-1][:, 0]
    return norm(cls, w, "ln_post", 1e-5) @ w["proj"]


def siglip(side: int = 28) -> Weights:
    """timm's names of a SigLIP (LLM2CLIP's `visual.trunk.*`)."""
    width = WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, (side // PATCH) ** 2, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "attn_pool.latent": (1, 1, width),
    }
    shapes |= _linear("attn_pool.q", width, width) | _linear("attn_pool.kv", width, 2 * width)
    places = [(f"blocks.{n}.", "attn") for n in range(DEPTH)] + [("attn_pool.", "")]
    for at, attention in places:
        dot = f"{at}{attention}." if attention else at
        shapes |= _linear(dot + "qkv", width, 3 * width) if attention else {}
        shapes |= _linear(dot + "proj", width, width)
        shapes |= _linear(at + "mlp.fc1", width, HIDDEN) | _linear(at + "mlp.fc2", HIDDEN, width)
        for norm in ("norm1", "norm2") if attention else ("norm",):
            shapes |= {f"{at}{norm}.weight": (width,), f"{at}{norm}.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return _random(shapes, 2)


def siglip_features(weights: Weights, images: Tensor) -> Tensor:
    """Pooled by attention to one learned query (SigLIP, 2303.15343; timm's exact GELU)."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = _patches(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]) + w["pos_embed"]
    for n in range(DEPTH):
        at = f"blocks.{n}."
        y = norm(x, w, at + "norm1", 1e-6)
        y = _attention(y, y, w[at + "attn.qkv.weight"], w[at + "attn.qkv.bias"])
        x = x + _apply(y, w, at + "attn.proj")
        x = x + _gelu_mlp(norm(x, w, at + "norm2", 1e-6), w, at)
    x = norm(x, w, "norm", 1e-6)
    qkv = [
        torch.cat([w[f"attn_pool.{part}.{p}"] for part in ("q", "kv")]) for p in ("weight", "bias")
    ]
    pooled = _attention(w["attn_pool.latent"].expand(len(x), 1, -1), x, *qkv)
    pooled = _apply(pooled, w, "attn_pool.proj")
    pooled = pooled + _gelu_mlp(norm(pooled, w, "attn_pool.norm", 1e-6), w, "attn_pool.")
    return pooled[:, 0]


def eva02(out: int = 48, side: int = 28) -> Weights:
    """LLM2CLIP's names of an EVA02 tower, with its biased head and a rotary buffer."""
    width = WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (side // PATCH) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "rope.freqs_cos": ((side // PATCH) ** 2, 64),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    shapes |= _linear("head", width, out)
    for n in range(DEPTH):
        at = f"blocks.{n}."
        shapes |= _linear(at + "attn.q_proj", width, width) | _linear(
            at + "attn.v_proj", width, width
        )
        shapes |= _linear(at + "attn.k_proj", width, width, bias=False)
        shapes |= _linear(at + "attn.proj", width, width) | _linear(at + "mlp.w1", width, HIDDEN)
        shapes |= _linear(at + "mlp.w2", width, HIDDEN) | _linear(at + "mlp.w3", HIDDEN, width)
        for norm, size in (
            *(("norm1", width), ("norm2", width), ("attn.inner_attn_ln", width)),
            ("mlp.ffn_ln", HIDDEN),
        ):
            shapes |= {f"{at}{norm}.weight": (size,), f"{at}{norm}.bias": (size,)}
    return _random(shapes, 3)


def eva02_features(weights: Weights, images: Tensor) -> Tensor:
    w = {name: tensor for name, tensor in weights.items() if not name.startswith(("rope", "head"))}
    last = eva02_states(w, images, heads=WIDTH // 64, patch=PATCH)
    return last[:, 0] @ weights["head.weight"].double().T + weights["head.bias"].double()


def adaptor(prefix: str, width: int = 24, out: int = 48, blocks: int = 4) -> Weights:
    """LLM2CLIP's text adaptor (`llm2clip.md` section 1.2), numbered as a Sequential."""
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(blocks):
        shapes |= _linear(f"{prefix}{n}.fn.0", width, 2 * width)
        shapes |= _linear(f"{prefix}{n}.fn.3", 2 * width, width)
        shapes |= {f"{prefix}{n}.ln.weight": (width,), f"{prefix}{n}.ln.bias": (width,)}
    shapes |= {f"{prefix}{blocks}.weight": (width,), f"{prefix}{blocks}.bias": (width,)}
    shapes |= _linear(f"{prefix}{blocks + 1}", width, out)
    return _random(shapes, 4)


def adaptor_features(weights: Weights, prefix: str, x: Tensor, blocks: int = 4) -> Tensor:
    """Unit norm in, `x + W2 GELU(W1 LN(x))` four times, LN, linear, unit norm out."""
    w = {k.removeprefix(prefix): t.double() for k, t in weights.items() if k.startswith(prefix)}
    x = x.double() / x.double().norm(dim=-1, keepdim=True)
    for n in range(blocks):
        y = _apply(norm(x, w, f"{n}.ln", 1e-5), w, f"{n}.fn.0")
        x = x + _apply(0.5 * y * (1 + torch.erf(y / math.sqrt(2))), w, f"{n}.fn.3")
    x = _apply(norm(x, w, f"{blocks}", 1e-5), w, f"{blocks + 1}")
    return x / x.norm(dim=-1, keepdim=True)


def _patches(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    cut = F.unfold(images.double(), PATCH, stride=PATCH).mT
    out = cut @ weight.flatten(1).T
    return out if bias is None else out + bias


def norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _apply(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _gelu_mlp(x: Tensor, w: Weights, at: str) -> Tensor:
    y = _apply(x, w, at + "mlp.fc1")
    return _apply(0.5 * y * (1 + torch.erf(y / math.sqrt(2))), w, at + "mlp.fc2")


def _attention(query: Tensor, keys: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention of heads of 64, without the projection that follows."""
    wq, wk, wv = weight.chunk(3)
    bq, bk, bv = bias.chunk(3)
    q, k, v = query @ wq.T + bq, keys @ wk.T + bk, keys @ wv.T + bv
    outputs = []
    for start in range(0, q.shape[-1], 64):
        part = slice(start, start + 64)
        scores = q[..., part] @ k[..., part].mT / 8
        outputs.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(outputs, -1)
