"""
What --plan prints is what happens: parameters, what autograd keeps, memory, disk, steps.

And a plan starts and writes nothing.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GPT2_CACHE, ROOT, TINY, one_error_line, ranks, run

from gpt_train import GPT, SIZES, GPTConfig
from parts.base.dtypes import DTYPES
from parts.base.units import format_bytes, format_duration
from parts.model.cpu_products import attends_in_products
from parts.model.families import FAMILIES
from parts.model.llama import Llama, LlamaConfig
from parts.training.engine import recompute_in_backward
from parts.training.optim import predicted_state_bytes
from parts.training.plan import (
    Setting,
    activation_bytes,
    count_parameters,
    flops_per_token,
    memory_of,
    parameters_by_part,
    seconds_of,
    ways_to_fit,
)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_by_part_are_those_of_the_modules(tied):
    config = GPTConfig(vocab_size=97, block_size=24, n_layer=3, n_head=2, n_embd=10, tied=tied)
    found = dict.fromkeys(parameters_by_part(config), 0)
    of = {
        "wte": "token embedding",
        "wpe": "positions",
        "attn": "attention",
        "mlp": "MLP",
        "ln_1": "norms",
        "ln_2": "norms",
        "ln_f": "norms",
    }
    for name, p in GPT(config).named_parameters():
        words = name.split(".")
        found[{**of, "lm_head": "head"}[words[2] if words[0] == "h" else words[0]]] += p.numel()
    assert found == parameters_by_part(config)


LLAMA = {"n_kv_head": 2, "head_dim": 16, "n_hidden": 176}


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"qkv_bias": True, "n_kv_head": 1}])
def test_parameters_of_a_llama_by_part_are_those_of_the_model(changes):
    shape = {"vocab_size": 300, "block_size": 16, "n_layer": 3, "n_head": 4, "n_embd": 32}
    config = LlamaConfig(**{**shape, **LLAMA, **changes})
    found = dict.fromkeys(parameters_by_part(config), 0)
    of = {"embed_tokens": "token embedding", "self_attn": "attention", "mlp": "MLP"}
    of |= {"input_layernorm": "norms", "post_attention_layernorm": "norms", "norm": "norms"}
    for name, p in Llama(config).named_parameters():
        words = name.split(".")
        found["head" if words[0] == "lm_head" else of[words[3 if "layers" in words else 1]]] += (
            p.numel()
        )
    assert found == parameters_by_part(config)
    assert sum(found.values()) == count_parameters(config)


def test_flops_of_a_llama_are_those_of_its_products():
    shape = {"vocab_size": 300, "block_size": 16, "n_layer": 3, "n_head": 4, "n_embd": 64}
    config = LlamaConfig(**shape, **LLAMA)
    matrices = [p for p in Llama(config).parameters() if p.ndim == 2]
    n = sum(p.numel() for p in matrices) - 300 * 64  # looking up the embedding is no product
    norms = (2 * 3 + 1) * 64
    assert flops_per_token(config) == 6 * (n + norms) + 12 * 3 * 64 * 16
    assert flops_per_token(replace(config, window=4)) == 6 * (n + norms) + 12 * 3 * 64 * 4


def kept_by_autograd(config, B: int, dtype, recomputed: bool) -> int:
    """Bytes that a forward pass keeps for the backward pass, besides parameters; shared once."""
    model, kept = FAMILIES[config.family].model(config), {}
    if recomputed:
        for block in model.modules():
            if isinstance(block, FAMILIES[config.family].block):
                recompute_in_backward(block)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:  # the tensor is kept, so that no other gets its address
            kept[memory.data_ptr()] = (memory.nbytes(), tensor)
        return tensor

    ids = torch.randint(config.vocab_size, (B, config.block_size))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(ids, ids)
    return sum(n for n, _ in kept.values())


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["gpt", "gpt with dropout", "llama"])
@pytest.mark.parametrize(("dtype", "T"), [("fp32", 40), ("bf16", 40), ("bf16", 520)])
def test_activations_are_what_autograd_keeps(dtype, T, kind, recomputed):
    shape = {"vocab_size": 512, "block_size": T, "n_layer": 3, "n_head": 4, "n_embd": 64}
    dropout = 0.1 if "dropout" in kind else 0.0
    config = LlamaConfig(**shape, **LLAMA)
    if kind != "llama":
        config = GPTConfig(**shape, dropout=dropout)
    products = attends_in_products(torch.device("cpu"), DTYPES[dtype], T, dropout)
    setting = Setting(3, dtype=dtype, attends_in_products=products)
    planned = activation_bytes(config, replace(setting, activation_checkpointing=recomputed))
    if recomputed:  # the plan includes one block that is recomputed, after the forward pass
        two = activation_bytes(replace(config, n_layer=2), setting)
        planned -= two - activation_bytes(replace(config, n_layer=1), setting)
        if kind == "llama":  # the hook does not see cosines and sines, which a closure keeps
            planned -= 4 * T * config.head_dim
    head = 4 * config.vocab_size * config.n_embd
    kept = kept_by_autograd(config, 3, DTYPES[dtype], recomputed)
    assert planned + head == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("kind", ["adamw", "muon", "galore"])
def test_the_optimizer_of_a_plan_is_that_of_the_model(kind):
    shape = {"vocab_size": 300, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    for config in (GPTConfig(**shape), LlamaConfig(**shape, **LLAMA)):
        family = FAMILIES[config.family]
        planned = memory_of(config, Setting(2, optimizer=kind), galore_rank=8)
        predicted = predicted_state_bytes(family.model(config), (family.block,), kind, 8)
        assert planned["optimizer"] == predicted


def test_sizes_have_growing_plans_and_more_rows_never_need_less():
    peaks = [memory_of(GPTConfig.of_size(size), Setting(8, dtype="bf16"))["peak"] for size in SIZES]
    assert peaks == sorted(peaks)
    config = GPTConfig.of_size("124M")
    by_rows = [memory_of(config, Setting(B, device="cuda"))["peak"] for B in (1, 2, 3, 8, 64)]
    assert by_rows == sorted(by_rows) and by_rows[0] > 16 * count_parameters(config)
    setting = Setting(8, device="cuda", parallel="fsdp", world=8)
    sharded = memory_of(config, setting)
    assert sharded["optimizer"] == 8 * count_parameters(config) // 8
    offloaded = memory_of(config, replace(setting, cpu_offload=True))
    assert sharded["peak"] - offloaded["peak"] == 12 * count_parameters(config) // 8


def test_gradients_of_earlier_micro_batches_are_whole_also_under_fsdp():
    config, whole = GPTConfig.of_size("1558M"), 4 * count_parameters(GPTConfig.of_size("1558M"))

    def planned(parallel, world, accum):
        setting = Setting(4, accum, dtype="bf16", device="cuda", activation_checkpointing=True)
        return memory_of(config, replace(setting, parallel=parallel, world=world))

    one, four = (planned("fsdp", 8, accum) for accum in (1, 4))
    # set_requires_gradient_sync(False) keeps them
    assert four["peak"] - one["peak"] == whole == four["gradients"]
    assert one["gradients"] == whole // 8
    # the gradients of ddp are in the buckets that are exchanged, but not those of several batches
    alone = planned("none", 1, 4)["peak"]
    assert planned("ddp", 8, 1)["peak"] == alone
    assert planned("ddp", 8, 4)["peak"] == alone + whole


def test_without_reshard_whole_weights_stay_during_the_step():
    config, whole = GPTConfig.of_size("1558M"), 4 * count_parameters(GPTConfig.of_size("1558M"))
    setting = Setting(4, device="cuda", parallel="fsdp", world=8)
    freed, kept = (memory_of(config, replace(setting, reshard=on)) for on in (True, False))
    gathered = freed["exchange"] // 2  # whole weights of the embedding and two blocks
    assert kept["peak"] - freed["peak"] == whole - gathered > 0


def test_the_logits_of_fp16_take_12_bytes_each_in_the_backward_pass():
    config, B = GPTConfig.of_size("124M"), 4
    parts = memory_of(config, Setting(B, dtype="fp16", device="cuda"))
    assert parts["logits"] == 12 * B * config.block_size * config.vocab_size


def test_ways_out_fit_and_are_the_same_step():
    config, s = GPTConfig.of_size("124M"), Setting(32, dtype="bf16", device="cuda")
    ways = ways_to_fit(s, 4e9, lambda other: memory_of(config, other)["peak"])
    assert ways
    for way in ways:
        B = int(re.search(r"--batch_size (\d+)", way)[1])
        accum = int(re.search(r"--grad_accum_steps (\d+)", way)[1])
        assert B * accum == 32
        changes = {"activation_checkpointing": "--activation_checkpointing" in way}
        if optimizer := re.search(r"--optimizer (\w+)", way):
            changes["optimizer"] = optimizer[1]
        changed = replace(s, batch_size=B, grad_accum_steps=accum, **changes)
        assert memory_of(config, changed)["peak"] <= 4e9
    assert ways_to_fit(s, 1e9, lambda other: memory_of(config, other)["peak"]) == []


def test_figures_for_people():
    sizes = [format_bytes(n) for n in (0, 999, 1000, 12_345_678, 999_600_000, 1.493e9, 123e9)]
    assert sizes == ["0 bytes", "999 bytes", "1 kB", "12.3 MB", "1 GB", "1.49 GB", "123 GB"]
    durations = [format_duration(s) for s in (0.123, 45, 200, 7500, 273_600)]
    assert durations == ["0.12 s", "45 s", "3 min 20 s", "2 h 5 min", "3 days 4 h"]
    assert format_duration(90_000) == "1 day 1 h" and format_duration(59.7) == "1 min 0 s"
    calls = []
    assert 0 <= seconds_of(lambda: calls.append(1)) < 1 and len(calls) == 4
    # two of seven seconds are enough
    assert seconds_of(lambda: calls.append(1), lambda seconds: 7.0) == 7 and len(calls) == 6


def test_memory_and_files_of_a_run_are_those_planned(request):
    if not GPT2_CACHE.exists():
        pytest.skip("needs ../shared/data/gpt2/tiktoken_cache")
    only = [] if request.config.getoption("--nightly") else ["--only", "tiny"]
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(GPT2_CACHE)}
    command = [sys.executable, "benchmarks/memory.py", *only]
    options = {"capture_output": True, "text": True, "check": True}
    out = subprocess.run(command, cwd=ROOT, env=environment, **options).stdout
    found = re.findall(r"ratio ([\d.]+); checkpoint: .* ratio ([\d.]+)", out)
    assert len(found) == (1 if only else 9), out
    for memory, files in found:
        assert float(memory) == pytest.approx(1, abs=0.15), out
        assert float(files) == pytest.approx(1, abs=0.02), out


def test_a_plan_starts_and_writes_nothing_and_counts_the_steps_to_go(
    texts, tmp_path_factory, tmp_path
):
    text = tmp_path_factory.mktemp("documents") / "all.txt"
    documents = (texts / "text_0.txt").read_text(encoding="utf-8").split("\n\n")[:60]
    text.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    flags = (*TINY, "--dataset_name", text, "--val_share", "0.2", "--max_steps", "6", "--plan")
    result = run("pretraining_advanced.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    config = GPTConfig.of_size("nano", vocab_size=257, block_size=16)
    assert f"parameters: {count_parameters(config):,} (" in result.stdout
    assert "fits the" in result.stdout
    assert "to go: 6 of 6 steps, 384 tokens" in result.stdout
    assert re.search(r"time: .* a step \(measured\)", result.stdout), result.stdout
    stopping = (*flags[:-1], "--save_ckpt_freq", "4", "--max_minutes", "1e-9")
    assert run("pretraining_advanced.py", *stopping, cwd=tmp_path).returncode == 75
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    planned = run("pretraining_advanced.py", *flags, cwd=tmp_path).stdout
    assert "to go: 5 of 6 steps" in planned and "rows in an epoch" in planned, planned
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    number, unit = re.search(r"disk: (\S+) (\S+) a checkpoint", planned).groups()
    checkpoint = next((tmp_path / "runs/advanced/checkpoints").iterdir())
    n_bytes = sum(p.stat().st_size for p in checkpoint.iterdir())
    assert float(number) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(n_bytes, rel=0.03)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_one_plan(kind, texts, tmp_path):
    flags = (*TINY, "--dataset_name", texts, "--max_steps", "6", "--grad_accum_steps", "3")
    flags += ("--parallel", kind, "--plan")
    first, second = ranks("pretraining_advanced.py", *flags, world=2, cwd=tmp_path).wait(120)
    errors = first.stderr + second.stderr
    assert (first.returncode, second.returncode, second.stdout) == (0, 0, ""), errors
    for line in ("step: 24 x 16 tokens, 3 micro-batches of 4 rows", "exchange", "time: "):
        assert line in first.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_simple_trainer_plans_too_and_reads_no_text(tmp_path):
    flags = ("--plan", "--model_size", "nano", "--data_dir", "nowhere")
    result = run("pretraining_simple.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "time: " in result.stdout and "1,400 steps in" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_without_bf16_is_planned_for_from_a_laptop(tmp_path):
    flags = ("--model_size", "124M", "--batch_size", "8", "--tokenizer", "gpt2")
    flags += ("--plan_memory_gb", "16", "--dtype", "fp16")
    result = run("pretraining_advanced.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "fp16: planned for another GPU" in result.stdout, result.stdout
    assert ", fits the 16 GB" in result.stdout, result.stdout
    assert "logits 4.94 GB" in result.stdout, "12 bytes each"


def test_another_device_is_planned_for_with_what_would_fit(tmp_path):
    flags = ("--model_size", "124M", "--batch_size", "64", "--dtype", "bf16")
    flags += ("--tokenizer", "gpt2", "--plan_memory_gb")
    out = run("pretraining_advanced.py", *flags, "8", cwd=tmp_path).stdout
    assert "does NOT fit the 8 GB of --plan_memory_gb" in out and "time: not measured" in out, out
    way = re.search(r"what would fit, with pretraining_advanced.py: (.*?);", out)[1].split()
    again = run("pretraining_advanced.py", *flags, "8", *way, cwd=tmp_path)
    assert ", fits the 8 GB" in again.stdout, again.stdout
    refused = run("pretraining_advanced.py", *flags, "-1", cwd=tmp_path)
    assert "--plan_memory_gb: -1.0 is out of range" in one_error_line(refused, 2)
    assert list(tmp_path.iterdir()) == [] and np.isfinite(float(way[1]))
