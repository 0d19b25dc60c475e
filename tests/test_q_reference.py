"""recipes/q_lora against transformers, peft and torch.optim.AdamW: the same loss at each step."""

import json
import math
from dataclasses import replace

import pytest
import torch
from corpus_cases import documents
from q_cases import write_model, write_rows

from parts.model.lora import adapter_tensors
from pretraining_advanced import run
from recipes.q_lora.train_pretrain import QConfig, code_job

STEPS, T, EOT = 20, 48, 256
RANK, ALPHA = 4, 8.0
MAX_LR = {"lora": 1e-2, "full": 1e-3}  # higher, and rounding grows to 1e-2 within the 20 steps
WARMUP = 4
MAX_NORM = {"lora": 0.5, "full": 2.5}
DECAY = 0.1


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny Qwen2 as a Hugging Face folder, and data of both kinds."""
    folder = tmp_path_factory.mktemp("q")
    write_model(folder / "model", as_trained=True)
    # from shorter than a row to longer than two
    texts = [(text * 3)[: 7 + 13 * n % 120] for n, text in enumerate(documents(120))]
    write_rows(folder / "data", texts)
    return folder


def our_run(home, method: str, data_type: str):
    """(losses, norms, micro-batches of each step, first adapters) of a run of the recipe."""
    config = QConfig(
        model_name="model", data_type=data_type, training_method=method, max_seq_length=T,
        batch_size=2, grad_accum_steps=2, max_steps=STEPS, max_lr=MAX_LR[method],
        warmup_steps=WARMUP, weight_decay=DECAY, max_grad_norm=MAX_NORM[method], lora_rank=RANK,
        lora_alpha=ALPHA, lora_dropout=0.0, dtype="fp32", device="cpu", eval_freq=STEPS,
        save_ckpt_freq=STEPS, print_sample_iter=STEPS, run_name="reference",
        output_dir=f"{method}-{data_type}",
    )  # fmt: skip
    batches, adapters = [], {}

    def make_job(config, building):
        job = code_job(config, building)
        adapters.update({name: t.clone() for name, t in adapter_tensors(job.model).items()})

        def loss_fn(model, batch):
            if model.training:
                batches.append((batch["inputs"].clone(), batch["targets"].clone()))
            return job.loss_fn(model, batch)

        return replace(job, loss_fn=loss_fn)

    assert run(config, make_job) == 0
    lines = (home / config.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines][1:]
    losses, norms = ([r[name] for r in records] for name in ("train_loss", "grad_norm"))
    return losses, norms, [batches[i : i + 2] for i in range(0, 2 * STEPS, 2)], adapters


def positions_of(ids: torch.Tensor) -> torch.Tensor:
    """Positions (B, T) that begin anew after each end of a document."""
    positions = torch.zeros_like(ids)
    for b, row in enumerate(ids.tolist()):
        for t in range(1, len(row)):
            positions[b, t] = 0 if row[t - 1] == EOT else positions[b, t - 1] + 1
    return positions


def learning_rate(step: int, max_lr: float) -> float:
    """Linear warmup, then a cosine to a tenth of max_lr in the last step."""
    if step < WARMUP:
        return max_lr * (step + 1) / WARMUP
    done = (step - WARMUP) / (STEPS - 1 - WARMUP)
    return max_lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def reference_losses(home, adapters: dict, steps: list) -> list[float]:
    """The losses of a plain loop around transformers and, if there are adapters, peft."""
    import peft
    from transformers import AutoModelForCausalLM

    # without use_cache=False transformers does not see that rows are packed
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(home / "model", **options)
    model.config.use_cache = False
    if adapters:
        settings = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model = peft.get_peft_model(model, settings)
        loaded = peft.set_peft_model_state_dict(model, adapters)
        assert not loaded.unexpected_keys
        assert not [name for name in loaded.missing_keys if "lora" in name]
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == (len(adapters) or len(list(model.parameters())))
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    method = "lora" if adapters else "full"
    losses = []
    for step, micro_batches in enumerate(steps):
        n_targets = sum(int((targets != -100).sum()) for _, targets in micro_batches)
        total = 0.0
        for inputs, targets in micro_batches:
            positions = positions_of(inputs)
            logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / n_targets).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM[method])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, MAX_LR[method])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / n_targets)
    return losses


@pytest.mark.parametrize(
    ("method", "data_type"),
    [("lora", "raw"), ("full", "raw"), ("lora", "described_filtered")],
)
def test_twenty_losses_equal_those_of_transformers_and_peft(home, monkeypatch, method, data_type):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    monkeypatch.chdir(home)
    ours, norms, steps, adapters = our_run(home, method, data_type)
    assert len(ours) == STEPS and len(adapters) == (0 if method == "full" else 2 * 2 * 7)
    assert min(norms) < MAX_NORM[method] < max(norms), "some steps must be clipped, and some not"
    ends = torch.stack([inputs for step in steps for inputs, _ in step]) == EOT
    assert ends.any(dim=2).float().mean() > 0.5, "most rows must have several documents"
    masked = any((targets == -100).any() for step in steps for _, targets in step)
    assert masked == (data_type == "described_filtered")
    expected = reference_losses(home, adapters, steps)
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) <= 1e-4
    assert ours[-1] < ours[0] - 0.1, "it must have learned"
