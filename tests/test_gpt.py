"""The model equals GPT-2, and what is built on its logits equals a plain way to compute it."""

import dataclasses
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from gpt_train import (
    GPT,
    SIZES,
    GPTConfig,
    calc_loss_batch,
    calc_loss_loader,
    evaluate_model,
    generate,
    pick_device,
    plot_losses,
    sample_text,
    text_to_token_ids,
    token_ids_to_text,
)
from parts.data.tokenizers import byte_tokenizer
from parts.model.kv_cache import LayerCache
from parts.training.plan import count_parameters, flops_per_token

TINY = GPTConfig(vocab_size=97, block_size=16, n_layer=2, n_head=2, n_embd=32)


def tiny_model(seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**vars(TINY), **changes})).eval()


def as_transformers(model: GPT):
    """transformers' GPT2LMHeadModel with the same weights."""
    import transformers

    c = model.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
    )
    reference = transformers.GPT2LMHeadModel(config).eval()
    # transformers keeps its linear weights as (in, out)
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {
        f"transformer.{k}": v.t() if k.endswith(transposed) else v
        for k, v in model.state_dict().items()
    }
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name == "lm_head.weight" or name.endswith(".attn.bias") for name in missing)
    reference.tie_weights()
    return reference


@pytest.mark.parametrize("T", [1, 17, 1024])
@torch.no_grad()
def test_logits_equal_transformers(T):
    model = tiny_model(block_size=1024, n_layer=3, n_embd=96, n_head=3, vocab_size=1000)
    # biases and norms away from 0 and 1, or half of the model is not tested
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.randint(1000, (3, T))
    assert (model(ids) - as_transformers(model)(ids).logits).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("size", "n"),
    [("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)],
)
def test_published_sizes_have_the_published_number_of_parameters(size, n):
    assert count_parameters(GPTConfig.of_size(size)) == n


def test_every_size_is_a_valid_shape():
    for size in SIZES:
        assert count_parameters(GPTConfig.of_size(size)) > 0


def test_an_unknown_size_lists_the_sizes():
    with pytest.raises(ValueError, match=r"1600M.*nano.*1558M"):
        GPTConfig.of_size("1600M")


@pytest.mark.parametrize(
    "wrong", [{"n_embd": 33}, {"n_layer": 0}, {"dropout": 1.0}, {"vocab_size": -1}]
)
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTConfig(**{**vars(TINY), **wrong})


def test_initialisation_is_gpt2s():
    model = tiny_model(n_layer=8, n_embd=256)
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    last_product = model.h[3].mlp.c_proj.weight.std().item()
    assert last_product == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert model.h[3].attn.c_attn.bias.abs().max() == 0


def test_first_loss_is_that_of_guessing_evenly():
    model, ids = tiny_model(), torch.randint(97, (8, 16))
    loss = calc_loss_batch(ids, ids.roll(-1, 1), model, "cpu").item()
    assert loss == pytest.approx(math.log(97), abs=0.3)


def test_the_loss_is_the_fp32_sum_over_targets_that_are_not_ignored():
    model, ids, targets = tiny_model(), torch.randint(97, (2, 16)), torch.randint(97, (2, 16))
    targets[0, 3:] = -100
    expected = sum(
        F.cross_entropy(model(ids)[b, t], targets[b, t])
        for b in range(2)
        for t in range(16)
        if targets[b, t] != -100
    )
    loss = model(ids, targets)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_batch_without_targets_has_loss_zero_and_no_nan():
    model, ids = tiny_model(), torch.randint(97, (2, 16))
    assert calc_loss_batch(ids, torch.full_like(ids, -100), model, "cpu").item() == 0
    assert math.isnan(calc_loss_loader([], model, "cpu"))


def test_text_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="17 tokens are more than the context of 16"):
        tiny_model()(torch.zeros(1, 17, dtype=torch.long))


def test_evaluation_weighs_tokens_not_batches():
    """A ragged last batch counts by its tokens: the mean of means would differ."""
    model, tokens = tiny_model(dropout=0.5).train(), torch.randint(97, (1, 41))
    inputs = F.pad(tokens[:, :-1], (0, 8)).view(-1, 16)
    targets = F.pad(tokens[:, 1:], (0, 8), value=-100).view(-1, 16)
    ragged = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    whole = evaluate_model(model, [(inputs, targets)], "cpu")
    assert evaluate_model(model, ragged, "cpu")["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert whole["tokens"] == 40 and model.training
    model.eval()  # dropout was off
    assert whole["loss"] == pytest.approx(model(inputs, targets).item() / 40, rel=1e-6)


def test_bits_per_byte_of_an_even_guess_over_bytes_is_eight():
    class Even(torch.nn.Module):
        def forward(self, ids, targets):
            return torch.tensor(math.log(256)) * (targets != -100).sum()

    tokenizer = byte_tokenizer()
    ids = text_to_token_ids("any text, also żółć", tokenizer)
    result = evaluate_model(Even(), [(ids, ids)], "cpu", tokenizer.token_bytes())
    assert result["bits_per_byte"] == pytest.approx(8)


# --------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.3}],
)
@pytest.mark.parametrize(
    "prompt", [[[1]], [[1, 2, 3]], [[5, 6], [7, 8]], [list(range(20)), list(range(20, 40))]]
)
def test_cached_generation_equals_uncached_also_past_the_context(prompt, options):
    model, ids = tiny_model(), torch.tensor(prompt)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # far from even, so that a wrong cache would be seen
    cached = generate(model, ids, 40, seed=1, **options)
    assert torch.equal(cached, generate(model, ids, 40, seed=1, use_cache=False, **options))
    assert cached.shape == (len(prompt), len(prompt[0]) + 40)
    assert torch.equal(cached[:, : ids.shape[1]], ids)


def test_several_new_tokens_read_the_cache_as_one_pass_would():
    model, ids = tiny_model(), torch.randint(97, (2, 12))
    cache = [LayerCache(12) for _ in model.h]
    parts = [model(ids[:, a:b], cache=cache) for a, b in ((0, 5), (5, 9), (9, 10), (10, 12))]
    assert torch.allclose(torch.cat(parts, dim=1), model(ids), atol=1e-5)


def test_generation_neither_reads_nor_changes_the_global_random_state():
    model, ids = tiny_model(), torch.tensor([[1]])
    torch.manual_seed(5)
    first, state = generate(model, ids, 8, seed=3), torch.get_rng_state()
    torch.manual_seed(6)
    assert torch.equal(first, generate(model, ids, 8, seed=3))
    generate(model, ids, 8)
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())


def test_sampling_follows_the_distribution_of_the_options():
    class Fixed(torch.nn.Module):
        config = dataclasses.replace(TINY, vocab_size=4)
        h = ()

        def forward(self, ids, cache=None, last=False):
            return torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(len(ids), 1, 4)

    def shares(**options):
        start = torch.zeros(20_000, 1, dtype=torch.long)
        ids = generate(Fixed(), start, 1, seed=0, use_cache=False, **options)
        return (torch.bincount(ids[:, 1], minlength=4) / 20_000).tolist()

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.02)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.02)
    assert shares(top_p=0.79) == pytest.approx([0.625, 0.375, 0, 0], abs=0.02)
    assert shares(top_p=0.01) == [1, 0, 0, 0]
    squares = [x / 0.365 for x in (0.25, 0.09, 0.0225, 0.0025)]
    assert shares(temperature=0.5) == pytest.approx(squares, abs=0.02)


def test_a_row_that_stopped_stays_stopped_while_others_continue():
    model = tiny_model()
    ids = generate(model, torch.tensor([[1], [2], [3]]), 200, seed=2, stop_token=7)
    for row in ids.tolist():
        if 7 in row:
            assert set(row[row.index(7) :]) == {7}
    first = torch.tensor([[1]])
    likeliest = int(model(first).argmax())
    ids = generate(model, first, 200, temperature=0, stop_token=likeliest)
    assert ids.shape == (1, 2)


def test_ids_that_the_tokenizer_lacks_are_never_sampled():
    ids = generate(tiny_model(), torch.tensor([[1], [2]]), 200, temperature=3.0, seed=1, n_ids=5)
    assert ids.max() == 4


def test_a_stream_gives_the_text_of_the_whole_and_never_half_a_character():
    tokenizer, model = (
        byte_tokenizer(),
        GPT(dataclasses.replace(TINY, vocab_size=257, block_size=40)),
    )
    with torch.no_grad():
        model.wte.weight[:] = torch.randn(
            257, TINY.n_embd, generator=torch.Generator().manual_seed(3)
        )
        model.wte.weight[256] = 0  # end-of-text is never the likeliest
    whole = sample_text(model, tokenizer, "cpu", "za\u017c", 1, 60, seed=4, temperature=2.0)[0]
    pieces = []
    options = {"seed": 4, "temperature": 2.0, "on_piece": pieces.append}
    text = sample_text(model, tokenizer, "cpu", "za\u017c", 1, 60, **options)[0]
    assert text == whole == "".join(pieces) and len(pieces) > 20
    euro, pieces = "\u20ac".encode(), []
    tokenizer.decode_bytes = lambda ids: euro[len(pieces) : len(pieces) + 1]
    tokenizer.decode = lambda ids: ""
    sample_text(model, tokenizer, "cpu", "", 1, 3, temperature=0, on_piece=pieces.append)
    assert pieces == ["", "", "\u20ac", ""], "a character comes when it is complete"


def test_a_head_of_its_own_is_used_trained_and_counted():
    config = dataclasses.replace(TINY, tied=False)
    model, ids = GPT(config), torch.randint(TINY.vocab_size, (2, 5))
    n = count_parameters(TINY) + TINY.vocab_size * TINY.n_embd
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config) == n
    assert flops_per_token(config) == flops_per_token(TINY)
    before = model(ids)
    model(ids, ids).backward()
    assert not model.wte.weight.grad.is_sparse and model.lm_head.weight.grad.abs().sum() > 0
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert torch.allclose(model(ids), 2 * before)
    assert torch.allclose(model(ids, last=True), model(ids)[:, -1:], atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": 0}, {"top_k": 98}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate(tiny_model(), torch.tensor([[1]]), 1, **wrong)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        generate(tiny_model(), torch.zeros(1, 0, dtype=torch.long), 1)


# --------------------------------------------------------------------------------------------- rest


def test_text_to_ids_and_back():
    tokenizer = byte_tokenizer()
    ids = text_to_token_ids("naïve 😀", tokenizer)
    assert token_ids_to_text(ids, tokenizer) == "naïve 😀"


def test_flops_are_six_per_matrix_weight_and_attention():
    c = TINY
    blocks = c.n_layer * (12 * c.n_embd**2 + 13 * c.n_embd)
    matrices = c.vocab_size * c.n_embd + blocks + 2 * c.n_embd
    assert flops_per_token(c) == 6 * matrices + 12 * c.n_layer * c.n_embd * c.block_size


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_plots_are_written_without_a_display_or_not_at_all(tmp_path, suffix, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    lists = ([0, 1, 2], [0, 10, 20], [None, 3.0, 2.5], [4.0, None, 2.8])
    path = plot_losses(*lists, tmp_path / f"loss.{suffix}", uniform_loss=4.2)
    assert path.read_bytes()[:4] in (b"\x89PNG", b"%PDF")
    plot_losses([0], [0], [None], [None], tmp_path / f"empty.{suffix}")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"empty.{suffix}", f"loss.{suffix}"]


def test_an_unknown_device_is_one_clear_error():
    with pytest.raises(ValueError, match="--device tpux: 'tpux'"):
        pick_device("tpux")


def test_the_model_can_be_copied_with_torch_and_two_modules_of_ours(tmp_path):
    source = (ROOT / "gpt_train.py").read_text(encoding="utf-8")
    start = source.index("# ---", source.index("from parts.training.plan"))
    section = source[start : source.index("# ---", start + 90)]
    head = "from __future__ import annotations\nimport math\nfrom dataclasses import dataclass\n"
    head += "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n"
    head += "from typing import ClassVar\nfrom cpu_products import Linear, attend, product\n"
    head += "from losses import cross_entropy_of_head\n"
    (tmp_path / "model.py").write_text(head + section, encoding="utf-8")
    for name in ("cpu_products", "losses"):
        shutil.copy(ROOT / f"parts/model/{name}.py", tmp_path)
    torch.save(tiny_model().state_dict(), tmp_path / "weights.pt")
    ids = torch.randint(97, (2, 12))
    code = (
        "import torch, model\n"
        f"gpt = model.GPT(model.GPTConfig(**{dataclasses.asdict(TINY)}))\n"
        "gpt.load_state_dict(torch.load('weights.pt', weights_only=True))\n"
        f"ids = torch.tensor({ids.tolist()})\n"
        "torch.save([gpt.eval()(ids), gpt(ids, ids)], 'out.pt')\n"
        "import sys; assert not any(name.startswith('parts') for name in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=environment)
    logits, loss = torch.load(tmp_path / "out.pt", weights_only=True)
    model = tiny_model().eval()
    assert torch.equal(logits, model(ids)) and torch.equal(loss, model(ids, ids))
