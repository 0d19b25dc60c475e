"""Products of a few rows are those of F.linear, and everything else is F.linear itself."""

import pytest
import torch
import torch.nn.functional as F

from parts.model.cpu_products import Linear, product


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
