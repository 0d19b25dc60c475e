"""
What a run tells: speed, memory, metrics.jsonl, and mirrors of it in TensorBoard and wandb.

wandb runs in a thread of its own behind a queue that never blocks: it can fail, hang or be offline, and the training
neither stops nor slows.
"""

from __future__ import annotations

import contextlib
import json
import math
import netrc
import os
import queue
import re
import sys
import threading
import time
from pathlib import Path

import torch

from parts.base.files import append_lines

# Dense bf16/fp16 operations per second with fp32 sums, from the makers' data sheets. A key matches
# a device whose name contains all its words; of several keys the one with the most words counts.
PEAK_FLOPS = {
    "GB300": 2500e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L20": 119e12,
    "L4": 121e12,
    "A10": 125e12,
    "A10G": 70e12,
    "RTX A6000": 155e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
# Words that make it another device: a variant of the chip, or a part of it (MIG, a vGPU like 24Q).
OTHER_DEVICE = re.compile(r"Laptop|Mobile|Max|D|Ti|SUPER|MIG|\d+[ABCQ]")
HISTOGRAM_BINS = 64
FIGURES = (
    "tokens",
    "train_loss",
    "val_loss",
    "lr",
    "grad_norm",
)  # of a record; what is no number there is damage


def peak_flops(device, dtype) -> float | None:
    """Peak of the device in 16 bits; None where it is not known, or the products are in fp32: no number is better than a wrong one."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    words = re.findall(r"\w+", torch.cuda.get_device_name(device))
    if any(OTHER_DEVICE.fullmatch(word) for word in words):
        return None
    known = [key for key in PEAK_FLOPS if set(key.split()) <= set(words)]
    return PEAK_FLOPS[max(known, key=lambda key: len(key.split()))] if known else None


def memory_gib(device) -> float:
    """Highest memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # on Linux not getrusage, whose figure begins with that of the process which started this one
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2**20
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Speed:
    """tokens/s of training alone: evaluation, samples and checkpoints are not in it. `peak` is that of one device."""

    def __init__(self, flops_per_token: int, peak: float | None, n_devices: int = 1):
        self.flops_per_token, self.peak, self.recent, self.started = (
            flops_per_token,
            peak and peak * n_devices,
            [],
            None,
        )

    def start(self) -> None:
        """A step begins."""
        self.started = time.perf_counter()

    def stop(self, n_tokens: int) -> dict:
        """It is done: {"tokens_per_s", "mfu"} over the last 50 steps, mfu None where the peak is unknown; n_tokens of all ranks."""
        self.recent = [*self.recent[-49:], (n_tokens, time.perf_counter() - self.started)]
        tokens, seconds = map(sum, zip(*self.recent, strict=True))
        rate = tokens / seconds
        return {
            "tokens_per_s": round(rate, 1),
            "mfu": rate * self.flops_per_token / self.peak if self.peak else None,
        }


class Journal:
    """
    metrics.jsonl of a run folder, one line per step, and its mirrors.

    On opening, lines behind `step` (of an attempt that was killed) are dropped; `last` is a copy of the record of that step.
    A disk that refuses costs a warning, not the run. `write` is cheap: lines reach the disk once a second and with `flush`.
    """

    def __init__(self, run_dir, step: int, tensorboard: bool = False, wandb: dict | None = None):
        self.path = Path(run_dir) / "metrics.jsonl"
        self.lines = []  # not written yet
        self.flushed = time.monotonic()
        self.rewind(step)
        self.board = _tensorboard(Path(run_dir) / "tensorboard", step) if tensorboard else None
        self.wandb = Wandb(**wandb) if wandb else None

    def rewind(self, step: int) -> None:
        """Drop what lies behind that step, whose record is the one to go on from."""
        append_lines(self.path, self.lines)
        self.last, self.found = {"step": step}, False
        if self.path.exists():
            self._rewrite(step, None)

    def _rewrite(self, step: int, last: dict | None) -> None:
        """The file up to this step, whose own record becomes `last` (None: stays); at no time is there less in it."""
        part = self.path.with_name("metrics.jsonl.part")
        with open(part, "w", encoding="utf-8") as out:
            for record in read_metrics(self.path.parent):
                if record["step"] == step:
                    self.last, self.found = dict(last or record), True
                    record = self.last
                if record["step"] <= step:
                    out.write(json.dumps(record) + "\n")
        os.replace(part, self.path)

    def write(self, record: dict) -> None:
        """One step's record, {"step": ..., ...}; that of the step the run went on from is there already, perhaps less complete."""
        record = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }  # JSON has no nan
        if self.found and record["step"] == self.last["step"]:
            if record != self.last:
                self._rewrite(record["step"], record)
            return
        self.lines.append(record)
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, record["step"])
        if self.wandb:
            self.wandb.put((record["step"], numbers))
        if time.monotonic() - self.flushed > 1:
            self.flush()

    def histograms(self, step: int, model) -> None:
        """Distributions of parameters and gradients, to wandb."""
        if self.wandb:
            for kind in ("parameters", "gradients"):
                named = {
                    n: (p if kind == "parameters" else p.grad) for n, p in model.named_parameters()
                }
                self.wandb.put(
                    (
                        step,
                        {f"{kind}/{n}": _histogram(t) for n, t in named.items() if t is not None},
                    )
                )

    def flush(self) -> None:
        """Everything so far is in the file."""
        append_lines(self.path, self.lines)
        if self.board:
            self.board.flush()
        self.flushed = time.monotonic()

    def close(self) -> None:
        """Flush, and end the mirrors; waits half a minute for wandb at most."""
        self.flush()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.close()


def read_metrics(run_dir):
    """The records of a run's metrics.jsonl, in order; a torn line is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    numbers = isinstance(record, dict) and all(
                        isinstance(record.get(k, 0), int | float | None) for k in FIGURES
                    )
                    if numbers and isinstance(record.get("step"), int):
                        yield record


def _histogram(tensor) -> tuple:
    t = tensor.detach()
    t = (
        t.to_local() if hasattr(t, "to_local") else t
    ).float()  # under fsdp that of this rank's slice
    low, high = t.min().item(), t.max().item()
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        return (0.0, 1.0, [0] * HISTOGRAM_BINS)
    return (
        low,
        high,
        torch.histc(t.cpu(), HISTOGRAM_BINS, low, high if high > low else low + 1).tolist(),
    )


def _tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        print(f"warning: --tensorboard is off: {e}; pip install tensorboard", flush=True)
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


class Wandb:
    """A wandb run fed from a queue by its own thread; `put` never waits, and what fails is told once."""

    def __init__(self, project: str, name: str, run_id: str, config: dict, folder):
        self.settings = {
            "project": project,
            "name": name,
            "id": run_id,
            "config": config,
            "dir": str(folder),
            "resume": "allow",
        }
        self.queue, self.dropped = queue.Queue(10_000), 0
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    @staticmethod
    def mode() -> str:
        """WANDB_MODE, else online where a key is at hand, else offline: a run must never wait for a login."""
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if "WANDB_MODE" not in os.environ and netrc.netrc().authenticators("api.wandb.ai"):
                return "online"
        return os.environ.get("WANDB_MODE") or (
            "online" if os.environ.get("WANDB_API_KEY") else "offline"
        )

    def put(self, item) -> None:
        """(step, {name: number or histogram}); dropped where wandb is too far behind."""
        try:
            self.queue.put_nowait(item)
        except queue.Full:
            self.dropped += 1

    def _work(self) -> None:
        try:
            import wandb

            quiet = wandb.Settings(silent=True, console="off")
            run = wandb.init(mode=self.mode(), settings=quiet, **self.settings)
            while (item := self.queue.get()) is not None:
                step, values = item
                run.log({k: _wandb_value(wandb, v) for k, v in values.items()}, step=step)
            run.finish()
        except Exception as e:  # noqa: BLE001  whatever wandb raises, the training goes on
            print(
                f"warning: wandb is off: {' '.join(str(e).split())[:150]}; metrics.jsonl has everything",
                flush=True,
            )
            while self.queue.get() is not None:
                pass

    def close(self) -> None:
        """End the run; after half a minute it is left behind."""
        self.put(None)
        self.thread.join(timeout=30)
        if self.dropped or self.thread.is_alive():
            print(
                f"warning: wandb was too slow, {self.dropped} records are only in metrics.jsonl",
                flush=True,
            )


def _wandb_value(wandb, value):
    if not isinstance(value, tuple):
        return value
    low, high, counts = value
    edges = [low + (high - low) * i / HISTOGRAM_BINS for i in range(HISTOGRAM_BINS + 1)]
    return wandb.Histogram(np_histogram=(counts, edges))
