"""
What on_gpu.py asks torch and this project, each question in its own process.

    echo '{"device": "cpu", "size": "nano", "T": 64, "rows": 2}' | python benchmarks/probes.py facts

Reads one JSON object from the standard input and prints one as its last line.
"""

import functools
import gzip
import importlib.util
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from ladder import RUNGS
from torch.profiler import ProfilerActivity, record_function
from train_step import ours

import gpt_train
from gpt_train import GPTConfig, pick_device
from parts.base.dtypes import DTYPES
from parts.base.machine import choose_dtype, free_memory
from parts.data import corpus, shard_writer
from parts.data.tokenizers import EOT, Tokenizer, byte_tokenizer
from parts.training.metrics import peak_flops, read_metrics
from parts.training.plan import Setting, flops_per_token, memory_of

OPTIONAL = ("transformers", "tqdm", "matplotlib", "datasets", "galore_torch")
CHECKS = ("python_and_packages", "optional_packages", "devices", "compiler", "disk")
STEPS = 3  # under the profiler
STEP = "whole step"  # a range in the trace
HEAD = "head and loss"  # another
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


# ------------------------------------------------------------------------------------------ data


def made_up_texts() -> list[str]:
    """Two million characters of made-up words, some of them frequent; the same on every machine."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfghklmnprstvw" for b in "aeiou"]
    words = np.array(["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(3000)])
    share = 1 / np.arange(1, len(words) + 1)  # Zipf's law
    share /= share.sum()
    return [" ".join(rng.choice(words, 300, p=share)) + "." for _ in range(1000)]


def prepare(given: dict) -> dict:
    """Write token shards of bytes, and of a vocabulary as large as GPT-2's: bytes and pairs."""
    texts = made_up_texts()
    folder = Path(given["data"])
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {bytes(divmod(i, 256)): 256 + i for i in range(50_000)}
    pairs = Tokenizer("pairs", ranks, {EOT: 50_256})

    def chunks(_state):
        yield [{"text": text} for text in texts], {}

    for name, tokenizer in {"bytes": byte_tokenizer(), "pairs": pairs}.items():
        tokenise = functools.partial(corpus.tokenise, tokenizer=tokenizer, val_share=0.05)
        facts = {"dataset_name": "made-up words"}
        shard_writer.build(folder / name, tokenizer, chunks, tokenise, facts, 1)
    return {"bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())}


# ---------------------------------------------------------------------------------------- device


def facts(given: dict) -> dict:
    """Device, versions, dtype, and how many rows of the measured shape fit by the plan."""
    device = pick_device(given["device"])
    cuda = device.type == "cuda"
    dtype, reason = choose_dtype("auto", device)
    shape = GPTConfig.of_size(given["size"], block_size=given["T"])
    short = next(name for name, kind in DTYPES.items() if kind == dtype)
    memory = free_memory(str(device))[0]
    name = platform.machine()
    if cuda:
        memory = torch.cuda.get_device_properties(device).total_memory
        name = torch.cuda.get_device_name(device)
    rows, too_many = rows_that_fit(shape, short, device.type, memory, given["rows"])
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    return {
        "device": f"cuda:{device.index or 0}" if cuda else str(device),
        "name": name,
        "memory_gb": memory / 1e9,
        "cores": os.cpu_count(),
        "shape": {
            "size": given["size"],
            "context_length": given["T"],
            "batch_size": rows,
            "dtype": short,
        },
        "dtype_reason": reason,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "missing": missing,
        "rungs": RUNGS,
        "too_many_rows": too_many,
        "flops_per_token": flops_per_token(shape),
        "peak_flops": peak_flops(device, dtype),
    }


def rows_that_fit(shape, dtype: str, device: str, memory: float, most: int) -> tuple[int, int]:
    """(rows that take 80 % of the memory, `most` at most; rows that take twice the memory)."""

    def peak(rows: int) -> int:
        return memory_of(shape, Setting(rows, dtype=dtype, device=device))["peak"]

    rows = most
    while rows > 1 and peak(rows) > 0.8 * memory:
        rows //= 2
    too_many = rows
    while peak(too_many) < 2 * memory:
        too_many += math.ceil(too_many / 8)
    return rows, too_many


def checks(_given: dict) -> dict:
    """The checks of test_smollm.py that need neither a network nor other packages."""
    import test_smollm

    results = {}
    for name in CHECKS:
        try:
            results[name.replace("_", " ")] = getattr(test_smollm, f"check_{name}")()
        except (AssertionError, test_smollm.Skipped) as e:  # reported; other parts depend on it
            results[name.replace("_", " ")] = str(e)
    return results


def peaks(given: dict) -> dict:
    """{run: [planned, measured]} bytes at the peak: allocated on a GPU, else resident."""
    results = {}
    for name, folder in given["folders"].items():
        run = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
        settings = run["config"]
        same = ("batch_size", "grad_accum_steps", "dtype", "optimizer", "activation_checkpointing")
        setting = {key: settings[key] for key in same}
        setting |= {"device": settings["device"].partition(":")[0], "keeps_copy": True}
        planned = memory_of(GPTConfig(**run["model_config"]), Setting(**setting))["peak"]
        measured = max(record.get("memory_gib", 0) for record in read_metrics(folder)) * 2**30
        results[name] = [planned, measured]
    return results


# -------------------------------------------------------------------------------------- profiler


def profile(given: dict) -> dict:
    """Figures of one step from torch.profiler; the trace is written to given["trace"]."""
    device = pick_device("auto")
    args = SimpleNamespace(**given)
    cuda = device.type == "cuda"
    head = gpt_train.cross_entropy_of_head
    wait = torch.cuda.synchronize if cuda else bool

    def recorded_head(*inputs):
        with record_function(HEAD):
            return head(*inputs)

    gpt_train.cross_entropy_of_head = recorded_head
    step = ours(args, device, choose_dtype(args.dtype, device)[0])
    ids = torch.randint(50257, (args.batch_size, args.context_length + 1)).to(device)
    for i in range(3 + STEPS):
        if i == 3:
            wait()
            began = time.perf_counter()
        step(ids)
    wait()
    ms = (time.perf_counter() - began) * 1000 / STEPS
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            with record_function(STEP):
                step(ids)
        wait()
    profiler.export_chrome_trace(args.trace)
    with gzip.open(args.trace, "rt", encoding="utf-8") as f:
        return {"ms": ms, **count_events(json.load(f)["traceEvents"], ms)}


def count_events(events: list[dict], ms: float) -> dict:
    """Figures of one step, from a trace of STEPS steps that take `ms` each without the profiler."""

    def of_kind(*kinds) -> list[dict]:
        return [e for e in events if e.get("cat") in kinds]

    def within(chosen, name: str) -> list[dict]:
        ranges = [e for e in of_kind("user_annotation") if e["name"] == name]
        ranges = [(e["ts"], e["ts"] + e["dur"]) for e in ranges]
        return [e for e in chosen if any(start <= e["ts"] <= stop for start, stop in ranges)]

    def per_step(chosen) -> float:
        return round(len(chosen) / STEPS, 1)

    operators = within(of_kind("cpu_op"), STEP)
    figures = {"operators": per_step(operators)}
    figures |= {"operators of the head": per_step(within(operators, HEAD))}
    calls = within(of_kind("cuda_runtime", "cuda_driver"), STEP)
    if not calls:
        return figures | {"note": "kernels are counted on GPUs only"}
    launches = {e["args"]["correlation"]: e for e in calls if "correlation" in e["args"]}
    work = of_kind("kernel", "gpu_memcpy", "gpu_memset")
    work = [e for e in work if e["args"].get("correlation") in launches]
    kernels = [e for e in work if e["cat"] == "kernel"]
    of_head = within([launches[e["args"]["correlation"]] for e in kernels], HEAD)
    figures |= {"kernels": per_step(kernels), "kernels of the head": per_step(of_head)}
    figures |= {"waits for the GPU": per_step([e for e in calls if e["name"] in WAITS])}
    figures |= {"copies to the CPU": per_step([e for e in work if "DtoH" in e["name"]])}
    busy = covered(work) / 1000 / STEPS
    return figures | {"GPU busy ms": busy, "GPU busy share": busy / ms}


def covered(events: list[dict]) -> float:
    """Microseconds in which at least one of the events runs."""
    total = 0.0
    end = -math.inf
    for start, stop in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


PROBES = {f.__name__: f for f in (prepare, facts, checks, peaks, profile)}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]](json.load(sys.stdin))))
