"""
What this machine can do: its device, the number format of products, the compiler, attention.

Used by every script before anything is built. Errors are ValueError with one line: the flag, what
is wrong with it here, and what to do.
"""

from __future__ import annotations

import contextlib
import os
import sys

import torch

from parts.base.dtypes import DTYPES
from parts.base.text import one_line

# Words of an error that CUDA or torch raises on the first use of a device -> message for the user.
WHY_NO_CUDA = {
    "not compiled with CUDA": "torch {torch} is built without CUDA; install a CUDA build",
    "driver on your system is too old": "the NVIDIA driver is too old for torch {torch}, "
    "which is built for CUDA {cuda}; update the driver, or install a torch built for an older CUDA",
    "no NVIDIA driver": "no NVIDIA driver was found; install one",
    "no kernel image": "torch {torch} has no kernels for this GPU, only {has}; "
    "install another build",
    "busy or unavailable": "another program has this GPU for itself; wait until it has ended",
    "out of memory": "the memory of the GPU is full; end the programs that nvidia-smi lists",
}
OUT_OF_MEMORY = (
    "out of memory",  # torch, CUDA, NCCL, the driver
    "ALLOC_FAILED",  # cuBLAS, cuDNN
    "OutOfMemoryError",  # inside a compile
    "can't allocate memory",  # a CPU, where the error has no class of its own
    "not enough memory",
)


def pick_device(name: str) -> torch.device:
    """
    The device of a name, after trying it out; "auto" takes cuda, else mps, else cpu.

    Under torchrun "auto" and "cuda" are the GPU of this rank. A CUDA device has an index, without
    which set_device, NCCL and mem_get_info fail, and becomes the current device.
    Raises ValueError for a device that cannot be used here.
    """
    wanted = name
    local_rank = os.environ.get("LOCAL_RANK", "")
    if name == "auto":
        name = _best_device()
    if name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        why = "torchrun started several processes, and each needs a GPU of its own"
        raise ValueError(f"--device {name}: {why}; leave out the number")
    if name == "cuda" and local_rank:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        probe = torch.ones(1, device=device)
        probe.item()  # also refuses "meta", which holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"--device {wanted}: {_why_not(name, str(e))}, or use --device cpu") from e
    if device.type != "cuda":
        return torch.device(device.type)  # there is only one
    torch.cuda.set_device(probe.device)
    return probe.device


def _best_device() -> str:
    """The name of the fastest device here; says why if that is not the GPU of the machine."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    if os.path.exists("/proc/driver/nvidia") and os.environ.get("RANK", "0") == "0":
        try:
            torch.ones(1, device="cuda")
        except (RuntimeError, AssertionError) as e:
            why = _why_not("cuda", str(e))
            print(f"warning: this run is on the CPU, not on the GPU: {why}", file=sys.stderr)
    return "cpu"


def _why_not(name: str, error: str) -> str:
    """Why a device cannot be used and what to do, from its name and the error of its first use."""
    if "invalid device ordinal" in error:
        n_gpus = torch.cuda.device_count()
        found = f"there is no {name}, this machine has {n_gpus} GPU{'s' if n_gpus > 1 else ''}"
        instead = f"--nproc_per_node {n_gpus}" if "LOCAL_RANK" in os.environ else "cuda:0"
        return f"{found}; use {instead}"
    for words, message in WHY_NO_CUDA.items():
        if words in error:
            has = ", ".join(torch.cuda.get_arch_list()) or "none"
            return message.format(torch=torch.__version__, cuda=torch.version.cuda, has=has)
    error = " ".join(error.split())[:120]
    return f"{name!r} cannot be used here ({error}); choose another device"


def choose_dtype(name: str, device) -> tuple[torch.dtype, str]:
    """
    (dtype of the products, why) of --dtype auto, bf16, fp16 or fp32.

    Raises ValueError for a dtype that the device does not have.
    """
    kind = device.type
    bf16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "fp32":
        return torch.float32, "as asked"
    if name == "fp16" and kind != "cuda":
        raise ValueError(f"--dtype fp16: needs CUDA, this run is on {kind}; use bf16 or fp32")
    if name == "bf16" and kind == "cuda" and not bf16:
        gpu = torch.cuda.get_device_name(device)
        raise ValueError(f"--dtype bf16: {gpu} has no bf16; use fp16 or fp32")
    if name in ("bf16", "fp16"):
        return DTYPES[name], "as asked"
    if bf16:
        return torch.bfloat16, "this GPU has it"
    if kind == "cuda":
        return torch.float16, "this GPU has no bf16; the loss is scaled"
    of_cpus = {"_is_amx_tile_supported": "AMX", "_is_avx512_bf16_supported": "AVX512_BF16"}
    for function, words in of_cpus.items():
        if kind == "cpu" and getattr(torch.cpu, function, bool)():
            return torch.bfloat16, f"this CPU has {words}"
    return torch.float32, f"this {kind} has no fast bf16"


def why_no_compiler(device) -> str | None:
    """
    None if torch.compile works on this device, else the reason, in one line.

    Its kernels are kept in the user's cache instead of the temporary folder, which a restart of
    the machine empties.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(cache, "torchinductor")
    with contextlib.suppress(OSError):  # a home that cannot be written: torch uses its own folder
        os.makedirs(folder, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        return None
    except Exception as e:  # noqa: BLE001  whatever the compiler raises, training runs without it
        return one_line(e, 150) or type(e).__name__


def out_of_memory(e: BaseException) -> bool:
    """Whether an error says that the memory of the device does not suffice."""
    if isinstance(e, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(e) for words in OUT_OF_MEMORY)


def attention_kernel(n_head: int, head_dim: int, T: int, device, dtype, dropout: float) -> str:
    """Name of the kernel that scaled_dot_product_attention takes for these shapes."""
    from torch.nn.attention import SDPBackend

    q = torch.empty(1, n_head, T, head_dim, device=device, dtype=dtype, requires_grad=True)
    try:
        choice = torch._fused_sdp_choice(q, q, q, None, dropout, True)
    except (AttributeError, NotImplementedError, RuntimeError):  # private, and only reported
        return "chosen by torch"
    names = {int(backend.value): name for name, backend in SDPBackend.__members__.items()}
    return names.get(choice, "unknown").lower()


def available_memory() -> float:
    """Bytes of memory that are free or can be freed; infinite if the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            lines = (line for line in f if line.startswith("MemAvailable"))
            return int(next(lines).split()[1]) * 1024
    except (OSError, StopIteration):
        return float("inf")


def free_memory(device: str) -> tuple[float, str]:
    """
    (bytes that a process can have on a device such as "cuda:1", the name of the device).

    The processes of one machine share the memory of its CPU.
    """
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    if device == "mps":
        return torch.mps.recommended_max_memory(), "the GPU"
    return available_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1)), "free memory"
