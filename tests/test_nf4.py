"""NF4: codes as bitsandbytes has them, small errors, gradients of a plain layer, odd weights."""

import copy

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from parts.base.machine import why_no_compiler
from parts.model.llama import Llama, LlamaBlock, LlamaConfig, rotations
from parts.model.nf4 import BLOCK, LEVELS, NF4Linear, dequantise, quantise, quantise_linears

SHAPES = [(64, 64), (96, 200), (1, 1), (3, 7), (5, 64), (129, 31), (17, 1000)]


def random_weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def back(weight, dtype=torch.float32):
    return dequantise(*quantise(weight), weight.shape, dtype)


def bytes_of(weight) -> int:
    return sum(tensor.nbytes for tensor in quantise(weight))


def plain(layer: NF4Linear) -> nn.Linear:
    """The ordinary layer with the numbers that the quantised one stands for."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    with torch.no_grad():
        linear.weight.copy_(layer.weight())
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_those_of_bitsandbytes_to_the_bit(shape, dtype):
    functional = pytest.importorskip("bitsandbytes").functional
    for seed in range(3):
        weight = random_weight(*shape, seed=seed).to(dtype)
        settings = {"quant_type": "nf4", "blocksize": BLOCK, "compress_statistics": False}
        theirs, state = functional.quantize_4bit(weight, **settings)
        ours = quantise(weight)
        n = weight.numel()
        codes = torch.stack((ours.codes >> 4, ours.codes & 15), dim=1).flatten()[:n]
        expected = torch.stack((theirs >> 4, theirs & 15), dim=1).flatten()[:n]
        assert codes.equal(expected)
        assert torch.allclose(torch.tensor(LEVELS), state.code, atol=0, rtol=0)


def test_every_level_and_every_boundary_between_two_is_coded_as_in_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    levels = torch.tensor(LEVELS)
    middle = (levels[1:] + levels[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(end)) for end in (-2.0, 2.0)]
    block = torch.cat((levels, middle, *near, torch.ones(3)))  # 64 numbers
    weight = torch.stack([block * factor for factor in (1.0, 0.37, 1e-3, 1.7e4)])
    theirs, _ = functional.quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK)
    assert quantise(weight).codes.equal(theirs.flatten())


def test_a_normal_weight_is_nine_per_cent_off_at_half_a_byte_per_parameter():
    weight = random_weight(1024, 704)
    error = (back(weight) - weight).norm() / weight.norm()
    assert 0.08 < error <= 0.0925
    assert bytes_of(weight) <= 0.52 * weight.numel()


def test_the_error_is_not_above_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    weight = random_weight(704, 1024, seed=5)
    settings = {"quant_type": "nf4", "blocksize": BLOCK, "compress_statistics": True}
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, **settings))
    assert (back(weight) - weight).norm() <= 1.001 * (theirs - weight).norm()


@pytest.mark.parametrize("shape", [*SHAPES, (64,), (2, 3, 5)])
def test_weights_of_any_shape_come_back(shape):
    weight = random_weight(*shape, seed=2)
    found = back(weight)
    assert found.shape == weight.shape and found.dtype == torch.float32
    # half of the widest gap between two levels, and what the int8 scales are off
    assert (found - weight).abs().max() <= 0.17 * weight.abs().max()
    assert back(weight, torch.bfloat16).equal(found.bfloat16())


def test_zeros_stay_zeros_and_constants_stay_constant():
    assert back(torch.zeros(10, 64)).equal(torch.zeros(10, 64))
    for value in (1.0, -3.5, 1e-30, 2e38):
        assert torch.allclose(back(torch.full((5, 64), value)), torch.tensor(value), rtol=1e-5)
    mixed = random_weight(4, 64)
    mixed[1] = 0
    assert back(mixed)[1].equal(torch.zeros(64))


def test_no_number_changes_its_sign_beside_much_larger_ones():
    weight = random_weight(300, 64)
    for factor in (1e-3, 1e-6, 1e-20, 1e-36):
        weight[1::2] = random_weight(150, 64, seed=1) * factor
        found = back(weight)
        assert found.isfinite().all()
        assert (found * weight >= 0).all()
        assert (found - weight)[::2].norm() <= 0.1 * weight[::2].norm()


@pytest.mark.parametrize("value", [1e38, 3e38, 1e-38, 1e-42])
def test_huge_and_tiny_numbers_neither_overflow_nor_become_nan(value):
    found = back(torch.full((200, 64), value) * random_weight(200, 64).sign())
    assert found.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_its_name(value):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight: has numbers") as e:
        quantise_linears(model, LlamaBlock)
    assert "\n" not in str(e.value)


# --------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 96), (33, 7), (10, 300)])
def test_output_and_gradient_equal_those_of_a_plain_layer(shape, bias, dtype):
    torch.manual_seed(0)
    layer = NF4Linear(nn.Linear(*shape, bias=bias))
    linear = plain(layer).to(dtype)
    x = torch.randn(2, 5, shape[0]).to(dtype)
    of_y = torch.randn(2, 5, shape[1]).to(dtype)
    gradients = []
    for module in (layer, linear):
        own = x.clone().requires_grad_(True)
        y = module(own)
        y.backward(of_y)
        gradients.append((y.detach(), own.grad))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for found, expected in zip(*gradients, strict=True):
        assert found.dtype == dtype
        assert (found - expected).norm() <= tolerance * expected.norm()
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_format_of_the_product(dtype):
    torch.manual_seed(0)
    layer = NF4Linear(nn.Linear(64, 32))
    linear = plain(layer).requires_grad_(False)
    found = []
    for module in (layer, linear):
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        with torch.autocast("cpu", dtype, cache_enabled=False):
            y = module(x)
        y.float().square().sum().backward()
        assert y.dtype == dtype and x.grad.dtype == torch.float32
        found.append((y.detach().float(), x.grad))
    for ours, expected in zip(*found, strict=True):
        assert (ours - expected).norm() <= 2e-2 * expected.norm()


def tiny_llama(**changes) -> Llama:
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    shape |= {"n_hidden": 72, "head_dim": 8, "block_size": 16, "qkv_bias": True, "tied": True}
    return Llama(LlamaConfig(**{**shape, **changes}))


def test_an_evaluation_between_two_steps_changes_no_bit_of_the_next_gradient():
    """As bitsandbytes 0.50 does on a CPU, where one evaluation packs the weights anew for good."""
    layer = NF4Linear(nn.Linear(256, 256))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for evaluated in (False, True):
            if evaluated:
                with torch.no_grad():
                    layer.eval()(x.to(dtype))
                layer.train()
            own = x.to(dtype, copy=True).requires_grad_(True)
            layer(own).square().sum().backward()
            found.append(own.grad)
    assert found[0].equal(found[1]) and found[2].equal(found[3])
    assert found[0].norm() > 0 and found[2].norm() > 0


def test_only_the_linear_layers_of_the_blocks_are_quantised_and_no_weight_is_kept():
    model = tiny_llama(tied=False)
    names = quantise_linears(model, (LlamaBlock,))
    assert len(names) == 14 and names[0] == "model.layers.0.self_attn.q_proj"
    assert type(model.lm_head).__name__ == "Linear"
    assert not any("proj.weight" in name for name in model.state_dict())
    held = sum(t.nbytes for name, t in model.state_dict().items() if "proj." in name)
    n_weights = sum(m.in_features * m.out_features for m in model.modules() if is_nf4(m))
    # groups of 256 scales are padded, which only layers as small as these notice
    assert held < 4 * n_weights and all(b.dtype != torch.bfloat16 for b in model.buffers())
    assert quantise_linears(model, (LlamaBlock,)) == [], "nothing is left to quantise"


def is_nf4(module) -> bool:
    return isinstance(module, NF4Linear)


def test_quantised_tensors_are_saved_under_names_and_loaded_to_the_bit():
    model = tiny_llama()
    quantise_linears(model, LlamaBlock)
    other = tiny_llama()
    quantise_linears(other, LlamaBlock)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    assert "model.layers.0.mlp.up_proj.codes" in state
    for buffer in other.buffers():
        if buffer.dtype == torch.uint8:
            buffer.zero_()
    other.load_state_dict(state)
    ids = torch.arange(10)[None]
    assert model(ids).equal(other(ids))


def test_blocks_are_quantised_one_by_one_as_the_whole_model_is():
    whole = tiny_llama()
    apart = copy.deepcopy(whole)
    quantise_linears(whole, LlamaBlock)
    for block in apart.model.layers:
        quantise_linears(block, LlamaBlock)
    ids = torch.arange(10)[None]
    assert whole(ids).equal(apart(ids))


def test_a_model_without_memory_has_the_bytes_that_a_real_one_takes():
    with torch.device("meta"):
        shell = tiny_llama()
    model = tiny_llama()
    sizes = []
    for each in (shell, model):
        quantise_linears(each, LlamaBlock)
        sizes.append({name: (t.shape, t.dtype) for name, t in each.state_dict().items()})
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_of_the_model_rounds_no_scale(dtype):
    layer = NF4Linear(nn.Linear(64, 64))
    before = layer.weight()
    layer.to(dtype)
    assert layer.weight().equal(before) and layer.bias.dtype == dtype
    assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype


def test_activation_checkpointing_gives_the_same_bits():
    layer = NF4Linear(nn.Linear(64, 64))
    found = []
    for again in (False, True):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        y.tanh().sum().backward()
        found.append(x.grad)
    assert found[0].equal(found[1])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_block_is_one_graph_with_the_same_results(backend):
    if backend == "inductor" and why_no_compiler(torch.device("cpu")):
        pytest.skip("no compiler works here")
    model = tiny_llama()
    quantise_linears(model, LlamaBlock)
    block = model.model.layers[0]
    compiled = torch.compile(block, fullgraph=True, dynamic=False, backend=backend)
    rotation = rotations(model.config, 0, 6, torch.device("cpu"))
    found = []
    for each in (block, compiled):
        x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        each(x, rotation, None).square().sum().backward()
        found.append(x.grad)
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()
