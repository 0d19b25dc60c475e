"""What the code examples of docs/how-to-extend.md compute; test_doc_commands.py runs them."""

import importlib.util

import pytest
import torch
from documents import DOCS, blocks


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


def test_the_decoder_rotates_by_distance_and_never_looks_ahead(example):
    module = example("my_decoder")
    torch.manual_seed(0)
    x = torch.randn(8).expand(1, 1, 12, 8)
    rotated = module.rotated(x)[0, 0]
    products = rotated @ rotated.T
    for distance in range(12):
        assert torch.allclose(products.diagonal(distance), products[0, distance], atol=1e-5)
    assert torch.allclose(rotated.norm(dim=1), x[0, 0].norm(dim=1))

    model = module.Decoder(50, 2, 2, 16)
    ids = torch.randint(50, (2, 9))
    targets = torch.full((2, 9), -100)
    targets[:, :4] = ids[:, 1:5]
    other = ids.clone()
    other[:, 4:] = (ids[:, 4:] + 1) % 50
    assert torch.allclose(model(ids, targets), model(other, targets))
    other[:, 3] = (ids[:, 3] + 1) % 50
    assert not torch.allclose(model(ids, targets), model(other, targets))


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
