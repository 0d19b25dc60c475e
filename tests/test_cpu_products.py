"""Products of a few rows are those of F.linear, and everything else is F.linear itself."""

import pytest
import torch
import torch.nn.functional as F

from parts.model.cpu_products import Linear, attend, attends_in_blocks, product


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (5, 1), (8, 1), (2, 4), (3, 3), (0, 1)])
@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_a_few_rows_give_what_linear_gives(shape, biased):
    torch.manual_seed(1)
    weight, bias = torch.randn(48, 16), torch.randn(48) if biased else None
    x = torch.randn(*shape, 16)
    y = product(x, weight, bias)
    assert y.shape == (*shape, 48) and torch.allclose(y, F.linear(x, weight, bias), atol=1e-5)
    strided, whole = (x[..., :8], weight[:8, :8]), (x[..., :8].contiguous(), weight[:8, :8])
    assert torch.equal(product(*strided), product(whole[0], whole[1].contiguous()))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    torch.manual_seed(2)
    weight, x = torch.randn(48, 16), torch.randn(8, 16)
    with torch.no_grad():
        assert torch.allclose(product(x, weight)[:3], product(x[:3], weight), atol=1e-6)


def test_training_half_precision_and_long_sides_go_through_linear():
    torch.manual_seed(3)
    layer, x = Linear(16, 48), torch.randn(2, 16)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)) and layer(x).requires_grad
    with torch.no_grad():
        half, narrow = layer.to(torch.bfloat16), Linear(48, 16)
        assert torch.equal(half(x.bfloat16()), F.linear(x.bfloat16(), half.weight, half.bias))
        wide = torch.randn(2, 48)
        assert torch.equal(narrow(wide), F.linear(wide, narrow.weight, narrow.bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert product(x, torch.randn(48, 16)).dtype == torch.bfloat16


@pytest.mark.parametrize("case", ["documents", "window", "both directions", "one mask for all"])
def test_attention_in_blocks_is_attention_with_the_same_mask(case):
    torch.manual_seed(4)
    B, H, K, T, D = 2, 4, 2, 700, 8  # 700 is no multiple of the block
    positions = torch.arange(T)
    mask = (positions <= positions[:, None]).expand(B, 1, T, T)
    documents = (torch.rand(B, T) < 0.01).long().cumsum(dim=1)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    if case == "documents":
        mask = mask & same
    elif case == "window":
        mask = mask & (positions[:, None] - positions < 50)
    elif case == "both directions":
        mask = same
    else:
        mask = mask[0, 0]
    found = {}
    weights = torch.randn(B, H, T, D)
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(5)
        q, k, v = (torch.randn(B, n, T, D).bfloat16() for n in (H, K, K))
        q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
        in_blocks = attends_in_blocks(q.device, dtype, T, 0.0)
        assert in_blocks == (dtype == torch.bfloat16)
        y = attend(q, k, v, mask)
        assert ("InBlocks" in y.grad_fn.name()) == in_blocks
        (y.float() * weights).sum().backward()
        found[dtype] = [x.detach().float() for x in (y, q.grad, k.grad, v.grad)]
    for ours, expected in zip(*found.values(), strict=True):
        assert (ours - expected).norm() / expected.norm() < 1e-2  # bf16


def test_attention_in_blocks_reads_nothing_that_the_mask_hides():
    torch.manual_seed(6)
    q, k, v = torch.randn(3, 1, 2, 600, 8).bfloat16()
    documents = (torch.arange(600) >= 300).long()
    mask = (documents == documents[:, None]).tril()
    first = attend(q, k, v, mask)[:, :, :300]
    k[:, :, 300:], v[:, :, 300:] = torch.nan, torch.nan
    k[:, :, 310:], v[:, :, 310:] = 0, 0
    assert attend(q, k, v, mask)[:, :, :256].equal(first[:, :, :256])
