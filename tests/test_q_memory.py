"""recipes/q_lora --plan: shapes as published, and memory as autograd and real runs have it."""

from dataclasses import replace

import pytest
import torch
from conftest import run

from parts.base.dtypes import DTYPES
from parts.model import lora, nf4
from parts.model.cpu_products import attends_in_products
from parts.model.families import shell
from parts.model.llama import Llama, LlamaBlock, LlamaConfig
from parts.training.engine import recompute_in_backward
from parts.training.plan import Setting, count_parameters
from recipes.q_lora.memory import (
    QWEN25,
    activation_bytes,
    frozen_bytes,
    memory,
    published_shape,
    rows_that_fit,
    tips,
    trained_numbers,
)

SCRIPT = "recipes/q_lora/run_pretraining.py"
SHAPE = LlamaConfig(
    512, 40, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, n_hidden=176, head_dim=16,
    qkv_bias=True, tied=True,
)  # fmt: skip


def test_shapes_of_qwen25_have_the_published_parameters():
    parameters = {
        "0.5B": 494_032_768,
        "1.5B": 1_543_714_304,
        "3B": 3_085_938_688,
        "7B": 7_615_616_512,
        "14B": 14_770_033_664,
        "32B": 32_763_876_352,
        "72B": 72_706_203_648,
    }
    for size in QWEN25:
        shape = published_shape(f"Qwen/Qwen2.5-{size}-Instruct")
        assert count_parameters(shape) == parameters[size]
    assert published_shape("Qwen/Qwen2.5-Coder-7B") == published_shape("Qwen/Qwen2.5-7B")
    assert published_shape("models/Qwen2.5") is None and published_shape("Qwen/Qwen3-8B") is None


def test_sizes_of_7b_are_those_of_the_document():
    shape = replace(published_shape("Qwen/Qwen2.5-7B-Instruct"), block_size=2048)
    assert trained_numbers(shape, "lora", 16) == 40_370_176
    assert round(frozen_bytes(shape, "lora", 2) / 1e9, 1) == 15.2
    assert round(frozen_bytes(shape, "qlora", 2) / 1e9, 1) == 5.5
    full = memory(shape, Setting(1, dtype="bf16", device="cuda"), "full", 16, 0.1)
    state = sum(full[name] for name in ("weights", "gradients", "optimizer"))
    assert round(state / 1e9, 1) == 121.8


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_frozen_and_trained_numbers_are_those_of_a_model(method):
    model = Llama(SHAPE).to(torch.bfloat16)
    if method == "qlora":
        nf4.quantise_linears(model, (LlamaBlock,))
    lora.add_lora(model, 4, 8.0, 0.0, (LlamaBlock,))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == trained_numbers(SHAPE, method, 4)
    tensors = [t for name, t in model.state_dict().items() if ".lora_" not in name]
    kept = sum(t.nbytes for t in tensors)
    assert kept == frozen_bytes(SHAPE, method, 2)


def kept_by_autograd(shape, method: str, dropout: float, dtype, recomputed: bool) -> int:
    """Bytes that a forward pass of 3 rows keeps besides parameters and buffers; shared once."""
    model = Llama(shape).to(dtype)
    if method == "qlora":
        nf4.quantise_linears(model, (LlamaBlock,))
    lora.add_lora(model, 4, 8.0, dropout, (LlamaBlock,))
    for block in model.model.layers:
        if recomputed:
            recompute_in_backward(block)
    memories = [*model.parameters(), *model.buffers()]
    own, kept = {t.untyped_storage().data_ptr() for t in memories}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(shape.vocab_size, (3, shape.block_size))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
        model(ids, ids, torch.zeros_like(ids))
    return sum(n for n, _ in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(("dtype", "T"), [("fp32", 40), ("bf16", 40), ("bf16", 520)])
def test_activations_are_what_autograd_keeps(dtype, T, method, dropout):
    shape, kind = replace(SHAPE, block_size=T), DTYPES[dtype]
    two = replace(shape, n_layer=2)
    products = attends_in_products(torch.device("cpu"), kind, T, 0.0)
    setting = Setting(3, dtype=dtype, attends_in_products=products)

    def planned(shape, recomputed: bool) -> int:
        s = replace(setting, activation_checkpointing=recomputed)
        return activation_bytes(shape, s, 4, dropout)

    three_kept = kept_by_autograd(shape, method, dropout, kind, False)
    block = three_kept - kept_by_autograd(two, method, dropout, kind, False)
    planned_block = planned(shape, False) - planned(two, False)
    assert planned_block == pytest.approx(block, rel=0.002)
    # the first block keeps less: its input needs no gradient
    assert three_kept <= planned(shape, False) <= 1.15 * three_kept
    recomputed = kept_by_autograd(shape, method, dropout, kind, True)
    # the hook does not see cosines and sines, which a closure keeps
    assert planned(shape, True) - 4 * T * shape.head_dim == pytest.approx(recomputed, rel=0.01)


def test_the_tips_get_larger_with_the_gpu_and_smaller_methods():
    shape = replace(published_shape("Qwen/Qwen2.5-7B"), block_size=2048)
    gpu = Setting(1, dtype="bf16", device="cuda", activation_checkpointing=True)
    rows = {
        method: [rows_that_fit(shape, gpu, method, 16, 0.1, GB * 1e9) for GB in (8, 24, 80)]
        for method in ("full", "lora", "qlora")
    }
    assert rows["full"] == [0, 0, 0]
    assert 0 == rows["lora"][0] < rows["lora"][1] < rows["lora"][2] <= rows["qlora"][2]
    assert rows["lora"][1] < rows["qlora"][1]
    lines = tips(shape, gpu, 16, 0.1)
    assert len(lines) == 10 and all(f"{i}. " in line for i, line in enumerate(lines[1:5], 1))


def test_a_plan_of_7b_needs_no_weights_no_data_and_no_network(tmp_path):
    for method, trained in (("lora", "40,370,176"), ("full", "7,615,616,512")):
        words = ("--plan", "--plan_memory_gb", "24", "--training_method", method)
        result = run(SCRIPT, *words, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert f"{method}: trains {trained} numbers of a model of 7,615,616,512" in result.stdout
        assert ("does NOT fit the 24 GB" in result.stdout) == (method == "full")
    assert not any(tmp_path.iterdir())


def test_a_plan_of_a_small_model_measures_a_step(tmp_path):
    words = ("--plan", "--model_name", "tiny", "--max_seq_length", "32", "--device", "cpu")
    result = run(SCRIPT, *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "a step (measured)" in result.stdout and "4. activation" in result.stdout
    assert not any(tmp_path.iterdir()) and shell(SHAPE) is not None
