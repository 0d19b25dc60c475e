"""The loss in blocks is plain cross-entropy: loss and gradients, whatever the blocks, also in bf16 and with targets left out."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gpt_train
from gpt_train import GPT, Block, GPTConfig
from parts.model import losses
from parts.model.losses import cross_entropy_of_head
from parts.training.optim import Optimizer


def inputs(N=37, C=24, V=301, ignored=5):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator).requires_grad_()
    weight = torch.randn(V, C, generator=generator).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.randperm(N, generator=generator)[:ignored]] = -100
    return hidden, weight, targets


def plain(hidden, weight, targets):
    return F.cross_entropy(
        F.linear(hidden, weight).float(), targets, ignore_index=-100, reduction="sum"
    )


def loss_and_gradients(function, dtype=torch.float32, **shape):
    hidden, weight, targets = inputs(**shape)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = function(hidden, weight, targets)
    (loss * 0.37).backward()
    return loss.detach(), hidden.grad, weight.grad


def relative(a, b) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize(
    ("held", "in_cache", "tile"), [(2**25, 2**22, 4096), (301 * 10, 301 * 3, 64), (1, 1, 1000)]
)
def test_loss_and_gradients_are_those_of_the_whole_logits(monkeypatch, held, in_cache, tile):
    for name, value in (("HELD", held), ("IN_CACHE", in_cache), ("TILE", tile)):
        monkeypatch.setattr(losses, name, value)
    for a, b in zip(
        loss_and_gradients(cross_entropy_of_head), loss_and_gradients(plain), strict=True
    ):
        assert relative(a, b) < 1e-6


def test_so_it_is_with_gpt2s_vocabulary():
    shape = {"N": 200, "V": 50257, "C": 16}
    for a, b in zip(
        loss_and_gradients(cross_entropy_of_head, **shape),
        loss_and_gradients(plain, **shape),
        strict=True,
    ):
        assert relative(a, b) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_loss_is_that_of_the_same_logits(dtype):
    ours, theirs = (
        loss_and_gradients(cross_entropy_of_head, dtype),
        loss_and_gradients(plain, dtype),
    )
    assert relative(ours[0], theirs[0]) < 1e-6  # the softmax is in fp32
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert a.dtype == torch.float32 and relative(a, b) < 0.01


def test_a_hopeless_token_has_a_finite_loss():
    hidden, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]])
    assert (
        cross_entropy_of_head(hidden, weight, torch.tensor([1])).item() == 2000.0
    )  # its probability is zero in fp32


def test_nothing_to_predict_is_zero_and_no_nan():
    for value in loss_and_gradients(cross_entropy_of_head, ignored=37):
        assert not value.any()


def test_without_gradients_it_is_the_same_loss():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        assert cross_entropy_of_head(hidden, weight, targets) == cross_entropy_of_head(*inputs())


class Kernels(TorchDispatchMode):
    """Records the operators that start a kernel: all but views and allocations."""

    NO_KERNEL = ("aten.empty", "aten.new_empty", "aten.detach", "aten.lift_fresh")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        views = [r.alias_info and not r.alias_info.is_write for r in operator._schema.returns]
        if not any(views) and not str(operator).startswith(self.NO_KERNEL):
            self.names.append(str(operator))
        return operator(*arguments, **(keywords or {}))


def kernels_of_head(N=16 * 1024, C=768, V=50257) -> list[str]:
    """Of 124M with 16 rows of 1,024 tokens in bf16, on tensors without memory."""
    hidden, weight = torch.empty(N, C, device="meta"), torch.empty(V, C, device="meta")
    targets = torch.empty(N, dtype=torch.int64, device="meta")
    losses._adds_in_fp32("meta", torch.bfloat16)  # asked once in a process
    with Kernels() as kernels:
        wanted = (True, True, False)
        losses._loss_and_gradients(hidden, weight, targets, torch.bfloat16, False, wanted)
    return kernels.names


def test_on_a_gpu_the_head_takes_few_kernels():
    assert len(kernels_of_head()) <= 300


def test_on_a_gpu_a_step_of_124m_takes_few_kernels(monkeypatch):
    """The blocks on the CPU, small, in bf16, with torch's attention kernel; the head as above."""
    monkeypatch.setattr(gpt_train, "cross_entropy_of_head", lambda x, *_: x.float().sum())
    monkeypatch.setattr(gpt_train, "attends_in_products", lambda *_: False)
    # tied=False: the gradient of the embedding is dense, as on a GPU
    shape = GPTConfig(vocab_size=64, block_size=16, n_layer=12, n_head=2, n_embd=16, tied=False)
    model = GPT(shape)
    optimizer = Optimizer(model, (Block,), "adamw", 0.1, torch.device("cpu"))
    optimizer.set_lr(1e-3)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    with Kernels() as kernels:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = model(ids, ids)
        loss.backward()
        optimizer.step(2.0)
    assert len(kernels.names) > 500 and len(kernels.names) + len(kernels_of_head()) <= 1050


@pytest.mark.parametrize("N", [1, 37, 4096 + 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_large_pieces_of_a_gpu_give_the_same_loss_and_gradients(monkeypatch, dtype, N):
    monkeypatch.setattr(losses, "HELD_ON_GPU", 301 * 1024)
    hidden, weight, targets = inputs(N=N, ignored=N // 7)
    with torch.no_grad():
        options = (None, dtype, False, True, True, False)
        loss, (d_hidden, d_weight, _) = losses._loss_and_gradients(
            hidden, weight, targets, *options
        )
    ours = (loss, d_hidden, d_weight)
    loss = plain(hidden, weight, targets)
    for a, b in zip(ours, (loss, *torch.autograd.grad(loss, (hidden, weight))), strict=True):
        assert a.dtype == torch.float32 and relative(a, b) < (
            1e-6 if dtype == torch.float32 else 0.01
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_compiled_kernel_gives_the_same_loss_and_gradients(monkeypatch, dtype):
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True)
    )
    losses.compile_softmax(True)
    try:
        ours = loss_and_gradients(cross_entropy_of_head, dtype)
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            assert relative(cross_entropy_of_head(*inputs()), ours[0]) < 1e-6
    finally:
        losses.compile_softmax(False)
    one_by_one = loss_and_gradients(cross_entropy_of_head, dtype)
    for a, b in zip(ours, one_by_one, strict=True):
        assert relative(a, b) < (1e-6 if dtype == torch.float32 else 1e-3)


def test_an_evaluation_computes_no_gradient_of_the_head():
    hidden, weight, targets = inputs()
    with Kernels() as training:
        cross_entropy_of_head(hidden, weight, targets)
    with torch.no_grad(), Kernels() as evaluation:
        cross_entropy_of_head(hidden, weight, targets)
    products = [
        [name for name in kernels.names if name.startswith("aten.mm")]
        for kernels in (training, evaluation)
    ]
    assert [len(names) for names in products] == [3, 1], (
        "the logits, and in training the gradients by hidden and by weight"
    )


def test_fp16_multiplies_a_head_whose_length_is_a_multiple_of_64(monkeypatch):
    shapes, linear = [], F.linear
    monkeypatch.setattr(
        F, "linear", lambda x, weight: shapes.append(tuple(weight.shape)) or linear(x, weight)
    )
    ours = loss_and_gradients(cross_entropy_of_head, torch.float16)
    assert shapes == [(320, 24)] and [tuple(t.shape) for t in ours[1:]] == [(37, 24), (301, 24)]


def test_only_the_hidden_states_may_want_a_gradient():
    hidden, weight, targets = inputs()
    cross_entropy_of_head(hidden, weight.detach(), targets).backward()
    expected, other, _ = inputs()
    plain(expected, other, targets).backward()
    assert relative(hidden.grad, expected.grad) < 1e-6 and weight.grad is None


def test_a_second_backward_is_an_error_not_another_gradient():
    hidden, weight, targets = inputs()
    loss = cross_entropy_of_head(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_the_tied_embedding_gets_both_gradients_as_one_dense_tensor():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=301, block_size=16, n_layer=1, n_head=2, n_embd=16))
    ids = torch.randint(301, (4, 17))
    gradients = []
    for _ in range(2):  # the second is added to the first
        model(ids[:, :-1], ids[:, 1:]).backward()
    gradients.append(model.wte.weight.grad)
    model.zero_grad()
    for _ in range(2):
        F.cross_entropy(
            model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).backward()
    gradients.append(model.wte.weight.grad)
    assert not gradients[0].is_sparse and relative(*gradients) < 1e-6


def test_attention_as_products_is_attention():
    torch.manual_seed(0)
    block = Block(GPTConfig(block_size=64, n_layer=1, n_head=4, n_embd=64))
    x = torch.randn(2, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = block(x).float()
        block.attn.dropout = 1e-9  # with dropout it is torch's own kernel
        theirs = block.train()(x).float()
    assert relative(ours - x, theirs - x) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [0, 9, 40])
@pytest.mark.parametrize("held", [2**25, 300])
def test_a_bias_of_the_head_is_added_and_trained(monkeypatch, dtype, ignored, held):
    """Against the whole logits; in bf16 to its precision. ignored: targets of 40 that are -100."""
    monkeypatch.setattr(losses, "HELD", held)
    torch.manual_seed(0)
    tensors = [torch.randn(40, 8), torch.randn(23, 8), torch.randn(23)]
    targets = torch.randint(23, (40,))
    targets[:ignored] = -100

    def results(function):
        hidden, weight, bias = [t.clone().requires_grad_() for t in tensors]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = function(hidden, weight, bias)
        (2 * loss).backward()
        return [loss.detach(), hidden.grad, weight.grad, bias.grad]

    ours = results(lambda h, w, b: cross_entropy_of_head(h, w, targets, b))
    with_logits = results(
        lambda h, w, b: torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(h, w, b).float(), targets, reduction="sum"
        )
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for a, b in zip(ours, with_logits, strict=True):
        assert torch.allclose(a, b, atol=tolerance, rtol=tolerance)


def test_a_bias_that_is_not_trained_gets_no_gradient():
    hidden, weight, targets = inputs(N=5)
    bias = torch.randn(len(weight))
    cross_entropy_of_head(hidden, weight, targets, bias).backward()
    assert bias.grad is None and hidden.grad is not None
    with torch.no_grad():
        loss = cross_entropy_of_head(hidden, weight, targets, bias)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    plain_loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert torch.allclose(loss, plain_loss, rtol=1e-5)
