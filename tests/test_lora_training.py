"""Adapters in the production trainer: saved alone, resumed to the bit, the base left as it was."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import ranks
from safetensors.torch import load_file
from small_job import V, bits, config_of, records, small_job

from parts.model.llama import Llama, LlamaBlock, LlamaConfig
from parts.model.lora import adapter_config, adapter_tensors, add_lora, base_name, trainable_count
from parts.model.nf4 import quantise_linears
from parts.storage.checkpoint import newest_checkpoint
from pretraining_advanced import gpt_loss, run

SHAPE = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "n_hidden": 72, "head_dim": 8}
SHAPE |= {"vocab_size": V, "block_size": 32, "qkv_bias": True, "tied": True}
RANK = 4
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs go to a folder of their own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def base_model() -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(**SHAPE))


def lora_job(config, building, dropout=0.1, quantised=False, **changes):
    """The Job of a recipe that trains adapters."""
    with building:
        model = base_model()
    if quantised:
        quantise_linears(model, LlamaBlock)
    add_lora(model, RANK, 8.0, dropout, LlamaBlock, config.seed)
    files = {"adapter_config.json": json.dumps(adapter_config(model, "base")).encode()}
    fields = {
        "family": "llama",
        "model": model,
        "loss_fn": gpt_loss,
        "blocks": (LlamaBlock,),
        "weights": adapter_tensors,
        "weights_file": WEIGHTS,
        "files": files,
    }
    return small_job(config, building, **{**fields, **changes})


def train(name, stop_at=None, settings=None, seen=None, **options) -> int:
    """Train adapters; stop_at: micro-batch in which SIGTERM arrives. seen: a list for the model."""
    steps = {"seen": 0}

    def loss(model, batch):
        steps["seen"] += model.training
        if model.training and steps["seen"] == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return gpt_loss(model, batch)

    def make_job(config, building):
        job = lora_job(config, building, loss_fn=loss, **options)
        if seen is not None:
            seen.append(job.model)
        return job

    return run(config_of(name, **(settings or {})), make_job)


ARRANGEMENTS = {
    "lora": ({}, {}),
    "recomputed": ({"activation_checkpointing": True}, {"dropout": 0.5}),
    "qlora": ({}, {"quantised": True}),
    "qlora, bf16, recomputed": (
        {"dtype": "bf16", "activation_checkpointing": True},
        {"quantised": True, "dropout": 0.5},
    ),
    "muon": ({"optimizer": "muon"}, {}),
    "accumulated": ({"batch_size": 2, "grad_accum_steps": 2}, {"quantised": True}),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_adapters_are_resumed_to_the_bit_and_the_base_stays_as_it_was(name):
    settings, options = ARRANGEMENTS[name]
    models = []
    assert train("straight", None, settings, models, **options) == 0
    assert train("stopped", 5, settings, models, **options) == 75
    assert train("stopped", 4, settings, models, **options) == 75
    assert train("stopped", None, settings, models, **options) == 0
    assert bits("stopped") == bits("straight")
    losses = [r["val_loss"] for r in records("straight") if "val_loss" in r]
    assert losses[-1] < losses[0]
    expected = base_model()
    if options.get("quantised"):
        quantise_linears(expected, LlamaBlock)
    for model in models:
        held = {base_name(n): t for n, t in model.state_dict().items() if ".lora_" not in n}
        assert held.keys() == expected.state_dict().keys()
        assert all(held[n].equal(t) for n, t in expected.state_dict().items())


def test_recomputing_the_blocks_changes_no_bit_of_a_run_with_dropout():
    found = []
    for recomputed in (False, True):
        name = f"recomputed-{recomputed}"
        settings = {"activation_checkpointing": recomputed}
        assert train(name, settings=settings, dropout=0.5, quantised=True) == 0
        found.append(bits(name))
    assert found[0] == found[1]


def test_a_checkpoint_holds_the_adapters_alone_and_peft_loads_its_folder():
    models = []
    assert train("run", seen=models) == 0
    folder = newest_checkpoint("runs/run")
    assert not (folder / "model.safetensors").exists()
    saved = load_file(folder / WEIGHTS)
    n = trainable_count(base_model(), RANK, LlamaBlock)
    assert sum(t.numel() for t in saved.values()) == n
    state = load_file(folder / "optimizer.safetensors")
    moments = [t.numel() for name, t in state.items() if not name.endswith("|step")]
    assert sum(moments) == 2 * n, "no moments of frozen weights"
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    settings = transformers.Qwen2Config(
        vocab_size=V, hidden_size=32, intermediate_size=72, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    reference = transformers.Qwen2ForCausalLM(settings)
    reference.load_state_dict(base_model().state_dict(), strict=False)
    reference.tie_weights()
    theirs = peft.PeftModel.from_pretrained(reference, folder).eval()
    ids = torch.arange(V)[None]
    expected = theirs(ids, use_cache=False).logits
    assert (models[0].eval()(ids) - expected).abs().max() <= 1e-5


def test_a_checkpoint_of_adapters_of_another_rank_is_refused_by_its_name():
    assert train("run", settings={"max_steps": 3}) == 0

    def other(config, building):
        model = base_model()
        add_lora(model, RANK + 1, 8.0, 0.1, LlamaBlock)
        return lora_job(config, building, model=model)

    with pytest.raises(ValueError, match="lora_A.weight has shape") as e:
        run(config_of("run", max_steps=6, allow_change="max_steps"), other)
    assert "\n" not in str(e.value)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from parts.cli.config import parse
from parts.cli.launch import run_script
from pretraining_advanced import run
from small_job import SmallConfig
from test_lora_training import lora_job
make_job = lambda *where: lora_job(*where, dropout=0.0, quantised={quantised})
run_script(lambda: run(parse(SmallConfig), make_job))
"""


@pytest.mark.parametrize("quantised", [False, True])
def test_adapters_train_on_two_ranks_as_on_one(here, quantised):
    script = here / "adapters.py"
    tests = str(Path(__file__).parent)
    script.write_text(SCRIPT.format(tests=tests, quantised=quantised), encoding="utf-8")
    found = {}
    for name, world in (("none", 1), ("ddp", 2), ("fsdp", 2)):
        flags = ["--parallel", name, "--run_name", name, "--batch_size", str(4 // world)]
        flags += ["--max_steps", "8", "--max_lr", "1e-2", "--warmup_steps", "2", "--eval_freq", "4"]
        flags += ["--save_ckpt_freq", "4", "--device", "cpu", "--dtype", "fp32"]
        results = ranks(script, *flags, world=world, cwd=here).wait(150)
        assert [r.returncode for r in results] == [0] * world, results[0].stderr[-3000:]
        losses = [r["train_loss"] for r in records(name)[1:]]
        found[name] = (losses, load_file(newest_checkpoint(f"runs/{name}") / WEIGHTS))
    for name in ("ddp", "fsdp"):
        assert found[name][0] == pytest.approx(found["none"][0], rel=1e-5), name
        ours, expected = found[name][1], found["none"][1]
        assert ours.keys() == expected.keys()
        assert all(torch.allclose(ours[n], expected[n], atol=1e-5) for n in ours), name
