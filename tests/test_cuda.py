"""
The CUDA path on a machine without a GPU: torch.cuda is replaced, and its calls are recorded.

What a GPU computes is checked by benchmarks/on_gpu.py, which needs one.
"""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, one_error_line, run
from test_losses import Kernels

import gpt_train
import pretraining_advanced
import pretraining_simple
from parts.base import machine
from parts.base.machine import choose_dtype, pick_device
from parts.data.batches import Prefetch
from parts.storage import writer
from parts.training.engine import Engine, Replicated, Sharded
from parts.training.optim import Optimizer
from parts.training.progress import Progress
from parts.training.ranks import Ranks

CPU = torch.device("cpu")


def engine_on_cpu(kind=Engine, dtype=torch.float32):
    return kind(Ranks(CPU, group=False), dtype)


def gpt(**shape) -> gpt_train.GPT:
    return gpt_train.GPT(gpt_train.GPTConfig(vocab_size=64, **shape))


def prepare(engine, model, **options) -> None:
    """Prepare a GPT without an optimizer."""
    engine.prepare(model, (gpt_train.Block,), lambda model: None, **options)


class FakeCuda:
    """Two GPUs without memory. `asked`: (function, index of the device that it was given)."""

    n_gpus = 2

    def __init__(self, monkeypatch, bf16=True, first_use=None):
        self.asked = []
        self.current = 0
        self.first_use = first_use  # error of the first use of a GPU
        self.ones = torch.ones
        for name in ("set_device", "mem_get_info", "get_device_name"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: self.n_gpus)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(torch, "ones", self.make_ones)
        monkeypatch.setattr(dist, "init_process_group", self.init_process_group)
        monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
        monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
        monkeypatch.setattr(dist, "all_gather", lambda out, mine: [t.copy_(mine) for t in out])
        monkeypatch.setattr(pretraining_advanced, "attention_kernel", lambda *_: "chosen by torch")

    def index(self, function, device) -> int:
        """The index of a device. Raises ValueError for a device without one, as torch does."""
        device = torch.device(device)
        self.asked.append((function, device.index))
        if device.index is None:
            raise ValueError(f"Expected a torch.device with a specified index, but got:{device}")
        return device.index

    def set_device(self, device) -> None:
        self.current = self.index("set_device", device)

    def mem_get_info(self, device="cuda") -> tuple[int, int]:
        self.index("mem_get_info", device)
        return 1000, 1000  # bytes free: nothing fits, so that a plan ends before it computes

    def get_device_name(self, device="cuda") -> str:
        return f"Fake GPU {self.index('get_device_name', device)}"

    def init_process_group(self, backend, device_id=None) -> None:
        assert "nccl" in backend
        self.index("NCCL", device_id)

    def make_ones(self, *size, device=None, **options):
        if torch.device(device or "cpu").type != "cuda":
            return self.ones(*size, device=device, **options)
        if self.first_use:
            raise self.first_use
        index = torch.device(device).index
        index = self.current if index is None else index
        if index >= self.n_gpus:
            raise RuntimeError("CUDA error: invalid device ordinal\nGPU device may be out of range")
        return SimpleNamespace(item=lambda: 1.0, is_cuda=True, device=torch.device("cuda", index))


PLAN = {
    "tokenizer": "bytes",
    "model_size": "nano",
    "context_length": 16,
    "batch_size": 4,
    "plan": True,
}


def plan_advanced(device) -> int:
    config = pretraining_advanced.TrainConfig(device=device, dtype="fp32", **PLAN)
    return pretraining_advanced.run(config)


def plan_simple(device) -> int:
    return pretraining_simple.main(pretraining_simple.SimpleConfig(device=device, **PLAN))


SCRIPTS = {"advanced": plan_advanced, "simple": plan_simple}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_every_use_of_a_gpu_names_its_index(monkeypatch, capsys, tmp_path, script, device, index):
    cuda = FakeCuda(monkeypatch)
    with contextlib.chdir(tmp_path):
        assert SCRIPTS[script](device) == 0
    functions = {function for function, _ in cuda.asked}
    assert {found for _, found in cuda.asked} == {index}, cuda.asked
    assert {"set_device", "mem_get_info"} <= functions and cuda.current == index
    assert f"Fake GPU {index}" in capsys.readouterr().out, "memory of another GPU is reported"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_under_torchrun_each_rank_has_its_own_gpu(monkeypatch, tmp_path, device):
    cuda = FakeCuda(monkeypatch)
    for name, value in (("RANK", 1), ("LOCAL_RANK", 1), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    with contextlib.chdir(tmp_path):
        assert SCRIPTS["advanced"](device) == 0
    assert {"set_device", "NCCL", "mem_get_info"} <= {function for function, _ in cuda.asked}
    assert {found for _, found in cuda.asked} == {1}, cuda.asked
    with pytest.raises(ValueError, match="--device cuda:0: torchrun started several processes"):
        pick_device("cuda:0")


def test_sampling_and_scoring_take_the_gpu_that_was_named(monkeypatch, capsys):
    FakeCuda(monkeypatch)
    used = []

    def load_model(path, device):
        used.append(device)
        return model, SimpleNamespace(name="bytes"), {"step": 1}

    def show_samples(model, tokenizer, device, *_):
        used.append(device)

    model = gpt(block_size=4, n_layer=1, n_head=1, n_embd=4)
    monkeypatch.setattr(gpt_train, "load_model", load_model)
    monkeypatch.setattr(gpt_train, "show_samples", show_samples)
    gpt_train.main(gpt_train.SampleConfig(device="cuda:1"))
    assert used == [torch.device("cuda:1")] * 2 and "cuda:1" in capsys.readouterr().out


OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040)."
FIRST_USES = {  # error of the first use -> words of the message
    AssertionError("Torch not compiled with CUDA enabled"): "is built without CUDA; install",
    RuntimeError(OLD_DRIVER): "update the driver",
    RuntimeError("Found no NVIDIA driver on your system."): "no NVIDIA driver was found",
    RuntimeError("CUDA error: no kernel image is available for execution on the device"): (
        "has no kernels for this GPU, only"
    ),
    RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"): (
        "another program has this GPU for itself"
    ),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors"): "memory of the GPU is full",
    RuntimeError("CUDA error: something new\nmore"): (
        "'cuda' cannot be used here (CUDA error: something new more)"
    ),
}


@pytest.mark.parametrize(("error", "words"), FIRST_USES.items())
def test_a_gpu_that_cannot_be_used_is_one_line_with_the_way_out(monkeypatch, error, words):
    FakeCuda(monkeypatch, first_use=error)
    with pytest.raises(ValueError) as e:
        pick_device("cuda")
    text = str(e.value)
    assert text.startswith("--device cuda: ") and text.endswith(", or use --device cpu")
    assert words in text and "\n" not in text


def test_a_gpu_that_auto_cannot_use_is_reported(monkeypatch, capsys):
    """Otherwise a month of training runs on the CPU, because a driver is old."""
    FakeCuda(monkeypatch, first_use=RuntimeError(OLD_DRIVER))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/proc/driver/nvidia")
    assert pick_device("auto") == CPU
    warning = "warning: this run is on the CPU, not on the GPU: the NVIDIA driver is too old"
    assert capsys.readouterr().err.startswith(warning)
    assert pick_device("cpu") == CPU and capsys.readouterr().err == "", "as asked"


def test_a_gpu_that_does_not_exist_is_refused_with_the_number_of_gpus(monkeypatch):
    FakeCuda(monkeypatch)
    message = "--device cuda:7: there is no cuda:7, this machine has 2 GPUs; use cuda:0"
    with pytest.raises(ValueError, match=message):
        pick_device("cuda:7")
    monkeypatch.setenv("LOCAL_RANK", "3")
    message = "there is no cuda:3, this machine has 2 GPUs; use --nproc_per_node 2"
    with pytest.raises(ValueError, match=f"--device auto: {message}"):
        pick_device("auto")


def test_bf16_asked_of_a_gpu_without_it_names_the_gpu(monkeypatch):
    FakeCuda(monkeypatch, bf16=False)
    with pytest.raises(ValueError, match="--dtype bf16: Fake GPU 1 has no bf16; use fp16 or fp32"):
        choose_dtype("bf16", torch.device("cuda:1"))
    assert choose_dtype("auto", torch.device("cuda:1"))[0] == torch.float16


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("script", ["pretraining_advanced.py", "pretraining_simple.py"])
def test_cuda_asked_of_a_machine_without_it_is_one_line(tmp_path, script):
    flags = [flag.replace("cpu", "cuda") for flag in TINY]
    assert one_error_line(run(script, *flags, cwd=tmp_path), 2).startswith("error: --device cuda: ")
    assert os.listdir(tmp_path) == []


def test_a_run_on_the_cpu_makes_no_cuda_context(monkeypatch, tmp_path):
    """It would cost the GPU half a gigabyte, and fail where the GPU is full."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("a CUDA context was made"))
    monkeypatch.setattr(writer, "SMALL", -1)  # checkpoints are copied, and written by the thread
    text = "\n".join(f"{n} bottles of beer on the wall" for n in range(3000))
    (tmp_path / "text.txt").write_text(text.replace("99", "\n<|endoftext|>\n"), encoding="utf-8")
    settings = {
        "dataset_name": "text.txt",
        "tokenizer": "bytes",
        "model_size": "nano",
        "context_length": 16,
        "batch_size": 4,
        "max_steps": 4,
        "save_ckpt_freq": 2,
        "val_share": 0.3,
        "device": "cpu",
        "activation_checkpointing": True,
    }
    with contextlib.chdir(tmp_path):
        assert pretraining_advanced.run(pretraining_advanced.TrainConfig(**settings)) == 0
    assert len(list(tmp_path.glob("runs/advanced/checkpoints/*"))) == 2


NO_GROUP = {  # error of torch -> start of the message
    dist.DistBackendError("NCCL error in: init.cpp:94, Duplicate GPU detected"): (
        "NCCL cannot start on cuda:1 (NCCL error"
    ),
    RuntimeError("Distributed package doesn't have NCCL built in"): "NCCL cannot start on cuda:1",
    dist.DistNetworkError("The server socket has failed to listen"): (
        "the processes do not find each other at here:1"
    ),
    dist.DistStoreError("Timed out waiting for clients"): (
        "the processes do not find each other at here:1"
    ),
}


@pytest.mark.parametrize(("error", "start"), NO_GROUP.items())
def test_errors_of_nccl_are_not_reported_as_those_of_the_network(monkeypatch, error, start):
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(ValueError) as e:
        Ranks(torch.device("cuda:1"), group=True)
    assert str(e.value).startswith(start) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("backend='inductor' raised: OutOfMemoryError: CUDA ran out"),
        RuntimeError("NCCL error: Failed to CUDA malloc: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_every_out_of_memory_error_is_recognised(error):
    assert machine.out_of_memory(error)
    other = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert not machine.out_of_memory(other)


@pytest.mark.parametrize("recomputed", [False, True])
def test_autocast_keeps_no_copy_of_the_weights(recomputed):
    model = gpt(block_size=8, n_layer=6, n_head=2, n_embd=128)
    engine = engine_on_cpu(dtype=torch.bfloat16)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    prepare(engine, model, activation_checkpointing=recomputed)
    one_block = 2 * 12 * 128 * 128  # bytes of its matrices in bf16
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    with torch.set_grad_enabled(recomputed), engine.autocast(), profiler as profile:
        loss = model(ids, ids)
    n_bytes = sum(event.self_cpu_memory_usage for event in profile.events())
    assert n_bytes < one_block, "of six blocks"
    assert torch.isfinite(loss)


def test_only_blocks_that_draw_random_numbers_save_the_random_state(monkeypatch):
    saved = []
    get = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: saved.append(1) or get())
    for dropout in (0.0, 0.1):
        model = gpt(block_size=8, n_layer=2, n_head=2, n_embd=8, dropout=dropout)
        prepare(engine_on_cpu(), model, activation_checkpointing=True)
        saved.clear()
        ids = torch.zeros(1, 8, dtype=torch.int64)
        model(ids, ids).backward()
        assert bool(saved) == bool(dropout)
    block = torch.nn.Linear(8, 8)  # of another model, which says nothing
    options = {"activation_checkpointing": True}
    engine_on_cpu().prepare(block, (torch.nn.Linear,), lambda model: None, **options)
    saved.clear()
    block(torch.ones(1, 8)).sum().backward()
    assert saved, "without a word from the block it is saved"


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")
def test_ddp_leaves_a_compiled_block_whole(monkeypatch, tmp_path):
    """Dynamo otherwise splits a block larger than a bucket, 1 MB at first, into two graphs."""
    compile_block = torch.nn.Module.compile
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def compile_with_backend(block, **options):
        return compile_block(block, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with_backend)
    torch._dynamo.reset()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    engine = engine_on_cpu(Replicated)
    model = gpt(block_size=16, n_layer=1, n_head=2, n_embd=384)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    try:
        with torch._dynamo.config.patch(optimize_ddp=True):  # restored after the test
            prepare(engine, model, compile_blocks=True)
            engine.model(ids, ids).backward()
        assert len(graphs) == 1
        weight = model.h[0].mlp.c_fc.weight
        in_bucket = weight.grad.untyped_storage().nbytes() > weight.nbytes
        assert in_bucket, "the gradient is a copy of the one in the bucket"
    finally:
        engine.model = None
        dist.destroy_process_group()
        torch._dynamo.reset()


def test_a_step_reads_the_device_once():
    """Each read waits until the GPU has done all its work; loss and norm are read together."""
    model = gpt(block_size=8, n_layer=1, n_head=2, n_embd=8)
    engine = engine_on_cpu()
    blocks = (gpt_train.Block,)
    engine.prepare(model, blocks, lambda model: Optimizer(model, (), "adamw", 0.1, CPU))
    loss_fn = pretraining_advanced.gpt_loss
    job = pretraining_advanced.Job("gpt", model, None, None, loss_fn, (), 1, 8, {})
    ids = torch.zeros(2, 8, dtype=torch.int64)
    config = pretraining_advanced.TrainConfig(batch_size=2)
    batches = [{"inputs": ids, "targets": ids}]
    with Kernels() as operators:
        total = pretraining_advanced.gradients(job, engine, batches, 16, Progress({}, 2), config)
        expected = total, torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        operators.names.clear()
        loss = engine.read(total)
        norm, _ = engine.step(1e-3, 1.0)
    assert (loss, norm) == tuple(t.item() for t in expected)
    reads = [name for name in operators.names if "_local_scalar_dense" in name]
    assert not reads, "besides the list of the two"


@pytest.mark.parametrize(("device", "threads"), [("cuda:0", [4]), ("cpu", [])])
def test_offloaded_ranks_share_the_cores_of_the_machine(monkeypatch, device, threads):
    """torchrun gives each rank one thread, but with --cpu_offload the optimizer needs the CPU."""
    found = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(Sharded, "_shard", lambda *_: None)
    engine = Sharded(Ranks(torch.device(device), group=False), torch.float32)
    engine.prepare(torch.nn.Linear(2, 2), (), lambda model: None, cpu_offload=True)
    assert found == threads


def test_the_simple_trainer_multiplies_in_tf32_on_a_gpu_only(monkeypatch, tmp_path):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    with contextlib.chdir(tmp_path):
        assert SCRIPTS["simple"]("cpu") == 0 and chosen == []
        FakeCuda(monkeypatch)
        assert SCRIPTS["simple"]("cuda") == 0 and chosen == ["high"]


def test_the_thread_that_pins_batches_sets_its_gpu(monkeypatch):
    """A new thread begins with GPU 0, where pinning would make a context."""
    cuda = FakeCuda(monkeypatch)
    Prefetch([], torch.device("cuda:1")).close()
    assert cuda.asked == [("set_device", 1)]
