"""What the code examples of docs/how-to-extend.md compute; test_doc_commands.py runs them."""

import importlib.util

import pytest
import torch
from documents import DOCS, blocks

from gpt_train import GPT, GPTConfig, generate


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """name -> module of that file of docs/how-to-extend.md."""
    folder = tmp_path_factory.mktemp("examples")
    for block in blocks(DOCS["docs/how-to-extend.md"], "python"):
        (folder / block.split()[1]).write_text(block, encoding="utf-8")

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield load


SHAPE = {"vocab_size": 50, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 24}
C, L = SHAPE["n_embd"], SHAPE["n_layer"]
# part -> how many parameters the model has more or fewer
PARTS = {
    "none": 0,
    "no_biases": -(L * (3 + 1 + 4 + 1 + 2) * C + C),
    "rmsnorm": -(2 * L + 1) * C,
    "rotary": -12 * C - L * 4 * C,
    "swiglu": -L * 5 * C,
    "grouped": -L * (C * C + 4 * C),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_gpt_with_one_part_of_a_llama_still_never_looks_ahead(example, part):
    module = example("one_part")
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    before = sum(p.numel() for p in model.parameters())
    module.put_in(model, part)
    assert sum(p.numel() for p in model.parameters()) - before == PARTS[part]
    assert part != "no_biases" or not any("bias" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    ids = torch.randint(50, (2, 9))
    other = ids.clone()
    other[:, 5:] = (ids[:, 5:] + 1) % 50
    logits, changed = model(ids), model(other)
    assert torch.allclose(logits[:, :5], changed[:, :5], atol=1e-5)
    assert not torch.allclose(logits[:, 5], changed[:, 5], atol=1e-3)
    cached = generate(model, ids, 3, temperature=0)
    assert cached.equal(generate(model, ids, 3, temperature=0, use_cache=False))


def test_masked_rows_are_the_same_in_any_batch_and_hide_the_promised_share(example):
    module = example("masked_lm")
    ids = torch.randint(200, (64, 100), generator=torch.Generator().manual_seed(0))
    targets = torch.where(torch.arange(100) < 90, ids, -100)
    batch = {"inputs": ids, "targets": targets}
    result = module.masked(batch, 200)
    hidden = result["inputs"] == 200
    assert torch.equal(hidden, result["targets"] != -100) and not hidden[:, 90:].any()
    assert torch.equal(result["targets"][hidden], ids[hidden])
    assert torch.equal(result["inputs"][~hidden], ids[~hidden])
    assert abs(hidden[:, :90].float().mean() - module.SHARE) < 0.02
    row = module.masked({name: t[7:8] for name, t in batch.items()}, 200)
    assert all(torch.equal(row[name], result[name][7:8]) for name in row)


def test_lion_is_the_published_update(example):
    module = example("lion")
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    lion = module.Lion([{"params": [p], "weight_decay": 0.1}], {"lr": 0.01})
    w = p.detach().clone()
    m = torch.zeros(3, dtype=torch.float64)
    for step in range(5):
        p.grad = torch.tensor([0.3, -0.1, 0.0], dtype=torch.float64) * (-1) ** (step // 2)
        c = 0.9 * m + (1 - 0.9) * p.grad
        w = w - 0.01 * (torch.sign(c) + 0.1 * w)
        m = 0.99 * m + (1 - 0.99) * p.grad
        lion.step()
    assert torch.allclose(p.detach(), w, rtol=0, atol=1e-12)
    assert torch.allclose(lion.state[p]["exp_avg"], m, rtol=0, atol=1e-12)
