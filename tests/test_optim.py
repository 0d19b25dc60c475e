"""Learning rates in closed form, decay on matrices only, GaLore's memory, Muon's matrices."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from gpt_train import GPT, Block, GPTConfig
from parts.training.optim import Optimizer, learning_rate, predicted_state_bytes

CPU = torch.device("cpu")
KINDS = ["adamw", "galore", "muon"]


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [
        ("cosine", 0.1 + 0.9 / 2, 0.1),
        ("linear", 0.1 + 0.9 / 2, 0.1),
        ("constant", 1.0, 1.0),
        ("wsd", 1.0, 0.1),
    ],
)
def test_the_learning_rate_is_the_closed_form(schedule, middle, last):
    def lr(step):
        return learning_rate(step, schedule, max_lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=111)

    assert lr(0) == pytest.approx(0.1) and lr(4) == pytest.approx(0.5)  # (step + 1) / warmup
    assert lr(9) == lr(10) == 1.0
    assert lr(60) == pytest.approx(middle)  # half way from 10 to 110
    assert lr(110) == pytest.approx(last)
    if schedule == "cosine":
        assert lr(35) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    if schedule == "wsd":
        assert lr(87) == 1.0
        assert lr(99) == pytest.approx(1 - 0.9 / 2, abs=0.03)  # falls over the last fifth


@pytest.mark.parametrize("cycles", [1, 2, 3, 7])
def test_a_cosine_with_restarts_is_whole_cosines_that_end_low_and_begin_high(cycles):
    def lr(step, schedule="cosine_with_restarts", n=cycles):
        return learning_rate(step, schedule, 1.0, 0.1, 10, 10 + 420 + 1, n)

    length = 420 // cycles  # steps in a cycle
    assert [lr(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    for cycle in range(cycles):
        start = 10 + cycle * length
        assert lr(start) == 1.0
        for i in range(length):
            expected = 0.1 + 0.9 * (1 + math.cos(math.pi * i / length)) / 2
            assert lr(start + i) == pytest.approx(expected, rel=1e-15)
    assert lr(430) == pytest.approx(0.1, rel=1e-15)  # the last step
    if cycles == 1:
        assert [lr(step) for step in range(431)] == [lr(step, "cosine") for step in range(431)]


SCHEDULES = ["cosine", "cosine_with_restarts", "linear", "constant", "wsd"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (5, 5), (10, 5), (0, 2), (4, 5)])
def test_a_warmup_as_long_as_the_run_does_not_divide_by_zero(schedule, warmup, steps):
    rates = [learning_rate(s, schedule, 1.0, 0.1, warmup, steps, 3) for s in range(steps)]
    assert all(0 < r <= 1 for r in rates)


def small(n_embd=32):
    """A GPT of two blocks, always the same."""
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=n_embd))


def frozen():
    """The same, with all but the second block frozen, as adapters would leave it."""
    model = small()
    model.requires_grad_(False)
    model.h[1].requires_grad_(True)
    return model


def same_weights(model, twin) -> bool:
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def one_step(model, optimizer, seed):
    ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(seed))
    model(ids, ids).backward()
    optimizer.set_lr(1e-3)
    optimizer.step()
    optimizer.zero_grad()


def test_adamw_is_torch_s_with_decay_on_matrices_only():
    model, twin = small(), small()
    ours = Optimizer(model, (Block,), "adamw", 0.1, CPU)
    groups = [
        {"params": [p for p in twin.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    for step in range(3):
        one_step(model, ours, step)
        ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(step))
        twin(ids, ids).backward()
        theirs.step()
        theirs.zero_grad()
    assert same_weights(model, twin)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_divided_in_the_update_as_before_it(kind):
    model, twin = small(), small()
    ours, other = (Optimizer(m, (Block,), kind, 0.1, CPU, galore_rank=8) for m in (model, twin))
    ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        for m in (model, twin):
            m(ids, ids).backward()
        for optimizer in (ours, other):
            optimizer.set_lr(1e-3)
        ours.step(grad_scale=3.7)
        for p in twin.parameters():
            p.grad /= 3.7
        other.step()
        ours.zero_grad()
        other.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_one_process_starts_without_the_compiler():
    program = """
import sys
import torch
from parts.training.optim import AdamW
p = torch.nn.Parameter(torch.ones(2))
p.grad = p.data
AdamW([{"params": [p], "weight_decay": 0.0}], fused=True).step(2.0)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_state_continues_bit_identically(kind):
    options = {"galore_rank": 4, "galore_update_gap": 3}
    model = small()
    optimizer = Optimizer(model, (Block,), kind, 0.1, CPU, **options)
    for step in range(4):
        one_step(model, optimizer, step)
    tensors, numbers = copy.deepcopy(optimizer.state_dict())
    assert all(torch.is_tensor(t) for t in tensors.values())
    assert all(isinstance(n, int | float) for n in numbers.values())
    twin = small()
    twin.load_state_dict(model.state_dict())
    other = Optimizer(twin, (Block,), kind, 0.1, CPU, **options)
    other.load_state_dict({**tensors, **numbers})
    for step in range(4, 8):
        one_step(model, optimizer, step)
        one_step(twin, other, step)
    assert same_weights(model, twin)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("adamw", "h.9.weight|exp_avg", torch.zeros(1), "no such trainable parameter"),
        (
            "adamw",
            "wte.weight|exp_avg",
            torch.zeros(50, 31),
            r"has shape \[50, 31\], .* \[50, 32\]",
        ),
        ("adamw", "wte.weight|exp_avg_sq", torch.zeros(1), r"has shape \[1\], .* \[50, 32\]"),
        ("adamw", "wte.weight|exp_avg", 1.0, r"has shape \[\], .* \[50, 32\]"),
        ("adamw", "wte.weight|step", torch.zeros(3), r"has shape \[3\], .* \[\]"),
        ("galore", "wte.weight|exp_avg", torch.zeros(1), r"has shape \[1\], .* \[50, 32\]"),
        (
            "muon",
            "h.0.attn.c_attn.weight.k|momentum_buffer",
            torch.zeros(96, 32),
            r"has shape \[96, 32\], .* \[32, 32\]",
        ),
    ],
)
def test_state_of_another_model_is_refused_by_name(kind, name, value, message):
    optimizer = Optimizer(small(), (Block,), kind, 0.1, CPU)
    with pytest.raises(ValueError, match=message) as e:
        optimizer.load_state_dict({name: value})
    assert name in str(e.value)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_is_there_before_the_first_step(kind):
    """Otherwise a run whose first steps are all skipped saves another set of tensors."""
    model = small()
    optimizer = Optimizer(model, (Block,), kind, 0.1, CPU)
    names = set(optimizer.state_dict()[0])
    one_step(model, optimizer, 0)
    assert names == set(optimizer.state_dict()[0])


def test_muon_with_no_matrix_to_train_is_refused():
    model = small()
    model.requires_grad_(False)
    model.wte.requires_grad_(True)
    with pytest.raises(ValueError, match="--optimizer muon: no matrix in the blocks"):
        Optimizer(model, (Block,), "muon", 0.1, CPU)


@pytest.mark.parametrize("make", [lambda: small(64), frozen], ids=["whole", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_predicted_bytes_are_the_bytes(kind, make):
    model = make()
    optimizer = Optimizer(model, (Block,), kind, 0.1, CPU, galore_rank=4)
    for step in range(2):
        one_step(model, optimizer, step)
    assert optimizer.state_bytes() == predicted_state_bytes(model, (Block,), kind, 4)
    held = sum(
        t.untyped_storage().nbytes()
        for key, t in optimizer.state_dict()[0].items()
        if not key.endswith("|step")
    )
    assert held == optimizer.state_bytes(), "a view keeps more memory than it shows"


def test_galore_of_rank_128_on_the_124m_shape():
    """One block of GPT-2's, with real state; parameters outside the blocks are added by shape."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=1, n_head=12, n_embd=768))
    sizes = {}
    for kind in ("adamw", "galore"):
        optimizer = Optimizer(model, (Block,), kind, 0.1, CPU, galore_rank=128)
        ids = torch.randint(0, 64, (2, 16))
        model(ids, ids).backward()
        optimizer.set_lr(1e-4)
        optimizer.step()
        optimizer.zero_grad()
        sizes[kind] = optimizer.state_bytes()
        assert sizes[kind] == predicted_state_bytes(model, (Block,), kind, 128)
    with torch.device("meta"):
        whole = GPT(GPTConfig())
    galore = predicted_state_bytes(whole, (Block,), "galore", 128)
    ratio = galore / predicted_state_bytes(whole, (Block,), "adamw")
    outside = 2 * 4 * (50257 + 1024) * 768 + 2 * 4 * 2 * 768
    of_a_block = {kind: size - 2 * 4 * ((64 + 16) * 768 + 2 * 768) for kind, size in sizes.items()}
    measured = (outside + 12 * of_a_block["galore"]) / (outside + 12 * of_a_block["adamw"])
    assert measured == pytest.approx(ratio) and 0.4 < ratio < 0.5
    print(f"GaLore rank 128 on 124M: {ratio:.4f} of AdamW's optimizer state")


def test_galore_updates_have_the_rank_they_promise():
    model = small(64)
    before = model.h[0].mlp.c_fc.weight.detach().clone()
    one_step(model, Optimizer(model, (Block,), "galore", 0.0, CPU, galore_rank=4), 0)
    assert torch.linalg.matrix_rank(model.h[0].mlp.c_fc.weight.detach() - before, atol=1e-7) == 4


def test_muon_orthogonalises_query_key_and_value_apart():
    model, twin = small(), small()
    one_step(model, Optimizer(model, (Block,), "muon", 0.0, CPU), 0)
    ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))
    twin(ids, ids).backward()
    weight = twin.h[0].attn.c_attn.weight
    for i in range(3):
        rows = slice(32 * i, 32 * i + 32)
        alone = torch.nn.Parameter(weight.detach()[rows].clone())
        alone.grad = weight.grad[rows].clone()
        torch.optim.Muon([alone], lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
        assert torch.equal(model.h[0].attn.c_attn.weight[rows], alone)


def test_galore_8bit_is_refused_without_cuda():
    with pytest.raises(ValueError, match="galore8bit: needs CUDA"):
        Optimizer(small(), (Block,), "galore8bit", 0.1, CPU)


def test_galore_8bit_moves_a_bias_that_begins_at_zero(monkeypatch):
    pytest.importorskip("bitsandbytes")  # its CPU backend
    # galore-torch waits for a GPU after each tensor
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    model = small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, (Block,), "galore8bit", 0.0, torch.device("cuda"), galore_rank=8)
    for step in range(5):
        one_step(model, optimizer, step)
    changes = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    moved = {name: float(change.abs().max()) for name, change in changes.items()}
    assert not any(before["h.0.mlp.c_fc.bias"].tolist())
    biases = [change for name, change in moved.items() if name.endswith("bias")]
    assert min(biases) > 1e-3 and max(moved.values()) < 0.1, moved  # five steps at a rate of 1e-3


def test_muon_is_refused_on_a_gpu_without_bf16(monkeypatch):
    def emulated_only(including_emulation=True):
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated_only)
    message = "--optimizer muon: torch computes it in bf16, which this GPU does not have"
    with pytest.raises(ValueError, match=message):
        Optimizer(small(), (Block,), "muon", 0.1, torch.device("cuda"))
