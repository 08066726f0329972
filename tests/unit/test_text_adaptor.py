"""The text adaptor is the released one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llm2clip_vlm.models.text.text_adaptor import TextAdaptor


def test_parameter_count_of_the_paper() -> None:
    with torch.device("meta"):
        adaptor = TextAdaptor(2048, 1280)
    blocks = sum(p.numel() for p in adaptor.blocks.parameters())
    assert blocks == 67_149_824  # "67.1M", paper v6
    assert sum(p.numel() for p in adaptor.parameters()) == 69_776_640


def test_forward_is_the_formula() -> None:
    torch.manual_seed(0)
    adaptor = TextAdaptor(8, 4, num_blocks=2, expansion=3)
    given = 5 * torch.randn(3, 8)
    x = given / given.norm(dim=-1, keepdim=True)
    for block in adaptor.blocks:
        hidden = F.layer_norm(x, (8,), block.norm.weight, block.norm.bias)
        hidden = F.gelu(hidden @ block.fc1.weight.T + block.fc1.bias)
        assert hidden.shape == (3, 24)
        x = x + hidden @ block.fc2.weight.T + block.fc2.bias
    x = F.layer_norm(x, (8,), adaptor.norm.weight, adaptor.norm.bias)
    want = x @ adaptor.head.weight.T + adaptor.head.bias
    torch.testing.assert_close(adaptor(given), want)


def test_norm_and_dtype_of_the_input_do_not_matter() -> None:
    adaptor = TextAdaptor(8, 4)
    given = F.normalize(torch.randn(3, 8), dim=-1).half()
    out = adaptor(given)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, adaptor(7 * given.float()), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out.norm(dim=-1), torch.ones(3), atol=1e-2)


def test_sizes() -> None:
    assert len(TextAdaptor(8, 4, num_blocks=0).blocks) == 0
    assert TextAdaptor(8, 4, expansion=3).blocks[0].fc1.out_features == 24
    with pytest.raises(ValueError, match="num_blocks=-1"):
        TextAdaptor(8, 4, num_blocks=-1)
