"""
What this machine can do: its device, the number format of matrix products, the compiler, the attention kernel.

Used by every script before anything is built. Errors are ValueError with one line: the flag, what is
wrong with it here, and what to do.
"""

from __future__ import annotations

import contextlib
import os

import torch

# Words of an error that CUDA or torch raises on the first use of a device -> what to tell people.
WHY_NO_CUDA = {
    "not compiled with CUDA": "torch {torch} is built without CUDA; install a CUDA build",
    "driver on your system is too old": "the NVIDIA driver is too old for torch {torch}, which is built for CUDA {cuda}; "
    "update the driver, or install a torch that is built for an older CUDA",
    "no NVIDIA driver": "no NVIDIA driver was found; install one",
    "no kernel image": "torch {torch} has no kernels for this GPU (it has {architectures}); install a build that has them",
    "busy or unavailable": "the GPU is used by another program, which shares it with none; wait for that",
    "out of memory": "the memory of the GPU is full; end the programs that use it (nvidia-smi lists them)",
}


def pick_device(name: str) -> torch.device:
    """
    The device of a name, tried out; "auto" takes cuda, else mps, else cpu.

    Under torchrun "auto" and "cuda" are the GPU of this rank. A CUDA device has its index, which set_device, NCCL
    and mem_get_info need, and is made the current one. Raises ValueError for a device that cannot be used here.
    """
    wanted, local_rank = name, os.environ.get("LOCAL_RANK", "")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise ValueError(f"--device {name}: torchrun started several processes, and each needs a GPU of its own; leave out the number")
    if name == "cuda" and local_rank:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        probe = torch.ones(1, device=device)
        probe.item()  # also refuses "meta", which holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"--device {wanted}: {_why_not(name, str(e))}, or use --device cpu") from e
    if device.type != "cuda":
        return torch.device(device.type)  # there is one of them
    torch.cuda.set_device(probe.device)
    return probe.device


def _why_not(name: str, error: str) -> str:
    """Why a device cannot be used, and what to do, from the name of the device and the error of its first use."""
    if "invalid device ordinal" in error:
        n_gpus = torch.cuda.device_count()
        found = f"there is no {name}, this machine has {n_gpus} GPU{'s' if n_gpus > 1 else ''}"
        return f"{found}; use --nproc_per_node {n_gpus}" if "LOCAL_RANK" in os.environ else f"{found}; use cuda:0"
    for words, told in WHY_NO_CUDA.items():
        if words in error:
            has = ", ".join(torch.cuda.get_arch_list()) or "none"
            return told.format(torch=torch.__version__, cuda=torch.version.cuda, architectures=has)
    return f"{name!r} cannot be used here ({' '.join(error.split())[:120]}); choose another device"


def choose_dtype(name: str, device) -> tuple[torch.dtype, str]:
    """(dtype of the products, why) of --dtype auto, bf16, fp16 or fp32. Raises ValueError for what the device cannot do."""
    if name == "fp32":
        return torch.float32, "as asked"
    if name == "fp16" and device.type != "cuda":
        raise ValueError(f"--dtype fp16: needs CUDA, this run is on {device.type}; use bf16 or fp32")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"--dtype bf16: {torch.cuda.get_device_name(device)} has no bf16; use fp16 or fp32")
    if name in ("bf16", "fp16"):
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[name], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has it"
        return torch.float16, "this GPU has no bf16; the loss is scaled"
    for name, words in (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX512_BF16")):
        if device.type == "cpu" and getattr(torch.cpu, name, bool)():
            return torch.bfloat16, f"this CPU has {words}"
    return torch.float32, f"this {device.type} has no fast bf16"


def why_no_compiler(device) -> str | None:
    """
    None where torch.compile works on this device, else the reason, in a line.

    Its kernels are kept in the user's cache, not in the temporary folder, which a restart of the machine empties.
    """
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "torchinductor")
    with contextlib.suppress(OSError):  # no home that can be written: they stay where torch has them
        os.makedirs(folder, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        return None
    except Exception as e:  # noqa: BLE001  whatever the compiler raises, training goes on without it
        return " ".join(str(e).split())[:150] or type(e).__name__


OUT_OF_MEMORY = (
    "out of memory",  # torch, CUDA, NCCL, the driver
    "ALLOC_FAILED",  # cuBLAS, cuDNN
    "OutOfMemoryError",  # inside a compile
    "can't allocate memory",  # a CPU, where it has no class of its own
    "not enough memory",
)


def out_of_memory(e: BaseException) -> bool:
    """Whether an error says that the memory of the device does not suffice."""
    return isinstance(e, torch.OutOfMemoryError | MemoryError) or any(words in str(e) for words in OUT_OF_MEMORY)


def attention_kernel(n_head: int, head_dim: int, T: int, device, dtype, dropout: float) -> str:
    """Name of the kernel that scaled_dot_product_attention takes for these shapes."""
    from torch.nn.attention import SDPBackend

    q = torch.empty(1, n_head, T, head_dim, device=device, dtype=dtype, requires_grad=True)
    try:
        choice = torch._fused_sdp_choice(q, q, q, None, dropout, True)
    except (AttributeError, NotImplementedError, RuntimeError):  # not part of torch's promises, and only told
        return "chosen by torch"
    return next((name.lower() for name, backend in SDPBackend.__members__.items() if int(backend.value) == choice), "unknown")
