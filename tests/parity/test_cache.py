"""An adaptor fed from the cache computes what it does when fed by the LLM itself."""

from __future__ import annotations

from pathlib import Path

import torch

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.models.text.text_adaptor import TextAdaptor
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from tests.parity import reference

TEXTS = ["a red dog .", "two blue circles on the left", "a photo", "a big green star"]


@torch.no_grad()
def test_cached_path_is_the_online_path(tiny_llm: Path, tmp_path: Path) -> None:
    encoder = TextEncoder.from_pretrained(tiny_llm)
    adaptor = TextAdaptor(encoder.hidden_size, 12).eval()
    cache = EmbeddingCache.build(tmp_path, TEXTS, encoder.encode, encoder.fingerprint)
    again = EmbeddingCache.open(tmp_path, encoder.fingerprint)
    online = adaptor(encoder.encode(TEXTS, normalize=False))
    # Rows are float16: measured: at most 1.6e-4 of values up to 1.1.
    for source in (cache, again):
        cached = adaptor(source.lookup(TEXTS))
        torch.testing.assert_close(cached, online, atol=1e-3, rtol=1e-3)
    # A row is the online vector within one step of float16: other kernels may take its norm.
    rows, rounded = again.lookup(TEXTS), encoder.encode(TEXTS).half().float()
    torch.testing.assert_close(rows, rounded, atol=2.0**-24, rtol=2.0**-10)
    assert torch.equal(rows, rows.half().float())


@torch.no_grad()
def test_text_adaptor_is_the_definition() -> None:
    weights = reference.adaptor("", width=24, out=12, blocks=4)
    ours = TextAdaptor(24, 12)
    names = {"fn.0": "fc1", "fn.3": "fc2", "ln": "norm"}
    state = {}
    for name, tensor in weights.items():
        number, _, rest = name.partition(".")
        if number == "4":
            state[f"norm.{rest}"] = tensor
        elif number == "5":
            state[f"head.{rest}"] = tensor
        else:
            part, _, kind = rest.rpartition(".")
            state[f"blocks.{number}.{names[part]}.{kind}"] = tensor
    ours.load_state_dict(state)
    for scale in (1.0, 300.0):  # any norm
        x = scale * torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
        want = reference.adaptor_features(weights, "", x)
        got = torch.nn.functional.normalize(ours(x), dim=-1)
        # Measured: at most 6.4e-8.
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
