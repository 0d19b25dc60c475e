"""The loss in blocks is plain cross-entropy: its value and gradients, for all blocks and dtypes."""

from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gpt_train
from gpt_train import GPT, Block, GPTConfig
from parts.model import cpu_products, losses
from parts.model.losses import _padded, cross_entropy_of_head
from parts.training.optim import Optimizer


def inputs(N=37, C=24, V=301, ignored=5, biased=False):
    """hidden (N, C), weight (V, C), targets (N,) and, if biased, bias (V,)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator).requires_grad_()
    weight = torch.randn(V, C, generator=generator).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.randperm(N, generator=generator)[:ignored]] = -100
    bias = [torch.randn(V, generator=generator).requires_grad_()] if biased else []
    return hidden, weight, targets, *bias


def plain(hidden, weight, targets, bias=None):
    logits = F.linear(hidden, weight, bias).float()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def loss_and_gradients(function, dtype=torch.float32, **shape):
    """The loss and its gradients by hidden, weight and, if biased, bias."""
    hidden, weight, targets, *bias = inputs(**shape)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = function(hidden, weight, targets, *bias)
    (loss * 0.37).backward()
    return loss.detach(), hidden.grad, weight.grad, *(b.grad for b in bias)


def relative(a, b) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("held", "in_cache", "tile"), [(2**25, 2**22, 4096), (301 * 10, 301 * 3, 64), (1, 1, 1000)]
)
def test_loss_and_gradients_equal_those_of_the_whole_logits(
    monkeypatch, held, in_cache, tile, biased
):
    for name, value in (("HELD", held), ("IN_CACHE", in_cache), ("TILE", tile)):
        monkeypatch.setattr(losses, name, value)
    ours = loss_and_gradients(cross_entropy_of_head, biased=biased)
    theirs = loss_and_gradients(plain, biased=biased)
    assert len(ours) == 3 + biased
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < 1e-6


def test_with_the_vocabulary_of_gpt2_too():
    shape = {"N": 200, "V": 50257, "C": 16, "biased": True}
    ours, theirs = (loss_and_gradients(f, **shape) for f in (cross_entropy_of_head, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < 1e-6


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_loss_is_that_of_the_same_logits(dtype, biased):
    options = {"dtype": dtype, "biased": biased}
    ours, theirs = (loss_and_gradients(f, **options) for f in (cross_entropy_of_head, plain))
    assert relative(ours[0], theirs[0]) < 1e-6  # the softmax is in fp32
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert a.dtype == torch.float32 and relative(a, b) < 0.01


def test_an_unlikely_token_has_a_finite_loss():
    hidden, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]])
    # its probability is zero in fp32
    assert cross_entropy_of_head(hidden, weight, torch.tensor([1])).item() == 2000.0


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_target_loss_and_gradients_are_zero(dtype, biased):
    for value in loss_and_gradients(cross_entropy_of_head, dtype, ignored=37, biased=biased):
        assert not value.any()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_gradients_it_is_the_same_loss(dtype, biased):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = cross_entropy_of_head(*inputs(biased=biased))
        with torch.no_grad():
            loss = cross_entropy_of_head(*inputs(biased=biased))
    assert loss == expected and not loss.requires_grad


@pytest.mark.parametrize("wanting", [(0,), (1,), (3,), (0, 3), (1, 3), (0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_of_hidden_weight_and_bias_may_want_a_gradient(dtype, wanting):
    ours, theirs = [
        [t if i in (2, *wanting) else t.detach() for i, t in enumerate(inputs(biased=True))]
        for _ in range(2)
    ]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        cross_entropy_of_head(*ours).backward()
        plain(*theirs).backward()
    for i in (0, 1, 3):
        if i in wanting:
            limit = 1e-6 if dtype == torch.float32 else 0.01
            assert relative(ours[i].grad, theirs[i].grad) < limit
        else:
            assert ours[i].grad is None


def test_only_a_bias_costs_the_operations_of_a_bias():
    kernels = []
    for biased in (False, True):
        tensors = inputs(biased=biased)
        with Kernels() as counted:
            cross_entropy_of_head(*tensors)
        kernels.append(Counter(name.removeprefix("aten.") for name in counted.names))
    without, with_bias = kernels
    assert without.total() == 24  # as many as before there was a bias
    added = {"addmm.out": 1, "zeros.default": 1, "mul_.Tensor": 1, "sum.dim_IntList": 1}
    assert with_bias - without == added | {"add_.Tensor": 1}
    assert without - with_bias == {"mm.out": 1}


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
    wanted = (True, True, False)
    losses._adds_in_fp32("meta", torch.bfloat16)  # tested once in a process
    with Kernels() as kernels:
        losses._loss_and_gradients(hidden, weight, targets, torch.bfloat16, False, wanted)
    return kernels.names


def test_on_a_gpu_the_head_takes_few_kernels():
    assert len(kernels_of_head()) <= 300


def test_on_a_gpu_a_step_of_124m_takes_few_kernels(monkeypatch):
    """The blocks on the CPU, small, in bf16, with torch's attention kernel; the head as above."""
    monkeypatch.setattr(gpt_train, "cross_entropy_of_head", lambda x, *_: x.float().sum())
    monkeypatch.setattr(cpu_products, "attends_in_products", lambda *_: False)
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


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("N", [1, 37, 4096 + 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_large_pieces_of_a_gpu_give_the_same_loss_and_gradients(monkeypatch, dtype, N, biased):
    monkeypatch.setattr(losses, "HELD_ON_GPU", 301 * 1024)
    hidden, weight, targets, *bias = inputs(N=N, ignored=N // 7, biased=biased)
    with torch.no_grad():
        options = (dtype, False, (True, True, biased), *bias)
        ours = losses._loss_and_gradients(hidden, weight, targets, *options)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = plain(hidden, weight, targets, *bias)
    theirs = (loss, *torch.autograd.grad(loss, (hidden, weight, *bias)))
    for a, b in zip(ours[: len(theirs)], theirs, strict=True):
        limit = 1e-6 if dtype == torch.float32 else 0.01
        assert a.dtype == torch.float32 and relative(a, b) < limit
    assert biased or ours[3] is None


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_compiled_kernel_gives_the_same_loss_and_gradients(monkeypatch, dtype, biased):
    in_torch = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", in_torch)
    losses.compile_softmax(True)
    try:
        ours = loss_and_gradients(cross_entropy_of_head, dtype, biased=biased)
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            assert relative(cross_entropy_of_head(*inputs(biased=biased)), ours[0]) < 1e-6
    finally:
        losses.compile_softmax(False)
    one_by_one = loss_and_gradients(cross_entropy_of_head, dtype, biased=biased)
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
    # the logits, and in training the gradients by hidden and by weight
    assert [len(names) for names in products] == [3, 1]


def test_fp16_multiplies_a_head_whose_length_is_a_multiple_of_64(monkeypatch):
    shapes, linear = [], F.linear

    def recorded(x, weight, bias):
        shapes.extend([tuple(weight.shape), tuple(bias.shape)])
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", recorded)
    ours = loss_and_gradients(cross_entropy_of_head, torch.float16, biased=True)
    assert shapes == [(320, 24), (320,)]
    assert [tuple(t.shape) for t in ours[1:]] == [(37, 24), (301, 24), (301,)]


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


def test_a_frozen_head_in_16_bits_is_not_copied_and_gives_the_same():
    torch.manual_seed(0)
    head = torch.randn(128, 16).bfloat16()
    assert _padded(head, torch.bfloat16) is head
    assert _padded(head[:100], torch.bfloat16).shape == (128, 16)
    targets = torch.randint(128, (9,))
    results = []
    for weight in (head, head.float()):
        hidden = torch.randn(9, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy_of_head(hidden, weight, targets)
        loss.backward()
        results.append((loss.item(), hidden.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
