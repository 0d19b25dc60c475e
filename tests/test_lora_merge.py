"""Adapters merged into their base: equal to the adapters and to peft, streamed tensor by tensor."""

import pytest
import torch
from test_llama import both
from test_lora import ALPHA, IDS, RANK, adapted, with_peft

from parts.model.lora import adapter_tensors, check_merge, merged


@pytest.mark.parametrize("name", ["qwen2", "llama", "mistral"])
def test_the_merged_model_has_the_logits_and_names_of_adapters_and_base(name):
    model, _ = adapted(name)
    base, _ = both(name)
    adapters = adapter_tensors(model)
    tensors = base.state_dict()
    check_merge({n: tuple(t.shape) for n, t in tensors.items()}, adapters)
    found = {n: merged(n, t, adapters, ALPHA / RANK) for n, t in tensors.items()}
    assert found.keys() == tensors.keys()
    changed = {n for n in found if not found[n].equal(tensors[n])}
    assert changed == {n for n in tensors if "proj.weight" in n}
    base.load_state_dict(found)
    expected = model(IDS)
    assert (base(IDS) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_merge_is_computed_in_fp32_and_keeps_the_dtype_of_the_base(dtype):
    torch.manual_seed(0)
    W = torch.randn(24, 40).to(dtype)
    A, B = torch.randn(4, 40), torch.randn(24, 4)
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    adapters = {f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": B}
    found = merged("model.layers.0.mlp.up_proj.weight", W, adapters, 3.0)
    exact = W.double() + 3 * B.double() @ A.double()
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    for name in ("model.layers.0.mlp.up_proj.bias", "model.norm.weight", "lm_head.weight"):
        assert merged(name, W, adapters, 3.0) is W


def test_merge_of_peft_is_the_same():
    model, reference = adapted()
    theirs = with_peft(reference, model).merge_and_unload()
    base, _ = both("qwen2")
    adapters = adapter_tensors(model)
    for name, tensor in theirs.state_dict().items():
        if name in base.state_dict():
            found = merged(name, base.state_dict()[name], adapters, ALPHA / RANK)
            assert (found - tensor).abs().max() <= 1e-6, name


@pytest.mark.parametrize("how", ["unexpected", "a shape", "half", "a norm", "B"])
def test_a_merge_with_adapters_of_another_base_is_refused_before_it_begins(how):
    model, _ = adapted()
    shapes = {n: tuple(t.shape) for n, t in both("qwen2")[0].state_dict().items()}
    tensors = dict(adapter_tensors(model))
    first = next(iter(tensors))
    norm = "base_model.model.model.norm.lora_A.weight"
    changes = {
        "unexpected": {"x.lora_A.weight": torch.ones(1)},
        "a shape": {first: torch.ones(4, 33)},
        "a norm": {norm: torch.ones(4, 32)},
        "B": {first.replace("lora_A", "lora_B"): torch.ones(31, 4)},
    }
    check_merge(shapes, tensors)
    tensors.update(changes.get(how, {}))
    if how == "half":
        tensors.pop(first)
    with pytest.raises(ValueError, match="the adapters do not fit") as e:
        check_merge(shapes, tensors)
    assert "\n" not in str(e.value)
