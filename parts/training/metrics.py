"""
What a run reports: speed, memory, metrics.jsonl, and its mirrors in TensorBoard and wandb.

wandb runs in its own thread, fed by a queue that never blocks: it can fail, hang or be offline
without stopping or slowing the training.
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

from parts.base.files import add_file_name, append_lines, rename_durably
from parts.base.text import one_line
from parts.cli.launch import error_line

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
# Words of another device: a variant of the chip, or a part of it (MIG, a vGPU such as 24Q).
OTHER_DEVICE = re.compile(r"Laptop|Mobile|Max|D|Ti|SUPER|MIG|\d+[ABCQ]")
FLUSH_S = 1.0  # between two writes of metrics.jsonl
FLUSH_AGAIN_S = 60.0  # the same after one that the disk refused, each of which prints a warning
STEPS_OF_SPEED = 50  # the speed is the mean over so many steps
HISTOGRAM_BINS = 64
WANDB_QUEUE = 10_000  # records
WANDB_END_S = 30
# Values of a record that are numbers or None; a line in which one of them is not is damaged.
FIGURES = ("tokens", "train_loss", "val_loss", "lr", "grad_norm")


# --------------------------------------------------------------------------- speed and memory


def peak_flops(device, dtype) -> float | None:
    """
    Peak of the device in 16 bits, in operations per second.

    None if it is not known, or if products are in fp32: None is better than a wrong number.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return None
    words = re.findall(r"\w+", torch.cuda.get_device_name(device))
    if any(OTHER_DEVICE.fullmatch(word) for word in words):
        return None
    known = [key for key in PEAK_FLOPS if set(key.split()) <= set(words)]
    return PEAK_FLOPS[max(known, key=lambda key: len(key.split()))] if known else None


def memory_gib(device) -> float:
    """Highest memory so far, in GiB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # on Linux not getrusage, whose figure begins with that of the parent process
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2**20
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Speed:
    """
    Tokens per second of training alone, without evaluation, samples and checkpoints.

    peak: operations per second of one device; None: not known. window: steps that the speed is the
    mean over. clock() -> seconds; None: time.perf_counter.
    """

    def __init__(
        self,
        flops_per_token: int,
        peak: float | None,
        n_devices: int = 1,
        window: int = STEPS_OF_SPEED,
        clock=None,
    ):
        self.flops_per_token = flops_per_token
        self.peak = peak and peak * n_devices
        self.window, self.clock = window, clock or time.perf_counter
        self.recent = []  # (tokens, seconds) of the last steps
        self.started = None

    def start(self) -> None:
        """Begin to measure a step."""
        self.started = self.clock()

    def stop(self, n_tokens: int) -> dict:
        """
        End the step; returns {"tokens_per_s", "mfu"} over the last steps.

        n_tokens: of this step on all ranks. mfu, the share of the peak, is None if that is unknown.
        """
        self.recent.append((n_tokens, self.clock() - self.started))
        self.recent = self.recent[-self.window :]
        tokens, seconds = map(sum, zip(*self.recent, strict=True))
        rate = tokens / seconds if seconds else 0.0
        mfu = rate * self.flops_per_token / self.peak if self.peak else None
        return {"tokens_per_s": round(rate, 1), "mfu": mfu}


# ------------------------------------------------------------------------------ metrics.jsonl


class Journal:
    """
    metrics.jsonl of a run folder, one line per step, and its mirrors.

    Opening drops the lines after `step`, of an attempt that was killed; `last` is a copy of the
    record of that step. `write` is cheap: lines reach the file once a second and with `flush`. A
    write that the disk refuses costs a warning, not the run.
    """

    def __init__(self, run_dir, step: int, tensorboard: bool = False, wandb: dict | None = None):
        self.path = Path(run_dir) / "metrics.jsonl"
        self.lines = []  # not written yet
        self.flushed, self.interval_s = time.monotonic(), FLUSH_S
        self.board = self.wandb = None
        self.rewind(step)
        self.board = _tensorboard(self.board_dir, step) if tensorboard else None
        self.wandb = Wandb(**wandb) if wandb else None

    @property
    def board_dir(self) -> Path:
        """The folder of TensorBoard's files."""
        return self.path.parent / "tensorboard"

    def rewind(self, step: int) -> None:
        """
        Drop the records after `step`, from which the run continues. Raises OSError.

        TensorBoard drops them too; wandb keeps what it has, and gets no step a second time.
        """
        append_lines(self.path, self.lines)
        self.lines = [record for record in self.lines if record["step"] <= step]
        if self.board:
            self.board.close()
            self.board = _tensorboard(self.board_dir, step)
        if self.wandb:
            self.wandb.rewind()
        self.last = {"step": step}
        self.found = False  # whether the file has the record of that step
        if self.path.exists():
            self._rewrite(step, None)

    def _rewrite(self, step: int, last: dict | None) -> None:
        """
        Write the file anew up to `step`, whose record becomes `last` (None: stays).

        The old file stays until the new one is complete. Raises OSError.
        """
        part = self.path.with_name("metrics.jsonl.part")
        found = None
        try:
            with open(part, "w", encoding="utf-8") as out:
                for record in read_metrics(self.path.parent):
                    if record["step"] == step:
                        record = found = dict(last or record)
                    if record["step"] <= step:
                        out.write(json.dumps(record) + "\n")
            rename_durably(part, self.path)
        except OSError as e:
            part.unlink(missing_ok=True)
            add_file_name(e, self.path)
            raise
        if found:
            self.last = found
            self.found = True

    def write(self, record: dict) -> None:
        """
        Write the record of a step, {"step": ..., ...}.

        The record of the step that the run resumed from is in the file already, perhaps without its
        evaluation; it is replaced.
        """
        record = {name: _json_value(value) for name, value in record.items()}
        if self.found and record["step"] == self.last["step"]:
            if record != self.last:
                try:
                    self._rewrite(record["step"], record)
                except OSError as e:
                    print(f"warning: {self.path}: {e.strerror}; the run continues", flush=True)
            return
        self.lines.append(record)
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, record["step"])
        if self.wandb:
            self.wandb.put((record["step"], numbers))
        if time.monotonic() - self.flushed > self.interval_s:
            self.flush()

    def histograms(self, step: int, model) -> None:
        """Send the distributions of parameters and gradients to wandb."""
        if not self.wandb:
            return
        # under DeepSpeed's ZeRO 3 parameters are empty between two steps
        named = {name: p for name, p in model.named_parameters() if p.numel()}
        self.wandb.put((step, {f"parameters/{n}": _histogram(p) for n, p in named.items()}))
        grads = {n: p.grad for n, p in named.items() if p.grad is not None}
        self.wandb.put((step, {f"gradients/{n}": _histogram(g) for n, g in grads.items()}))

    def flush(self) -> None:
        """Write everything so far to the file."""
        append_lines(self.path, self.lines)
        if self.board:
            self.board.flush()
        self.flushed = time.monotonic()
        self.interval_s = FLUSH_AGAIN_S if self.lines else FLUSH_S

    def close(self) -> None:
        """Flush, and end the mirrors; waits half a minute for wandb at most."""
        self.flush()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.close()


def read_metrics(run_dir):
    """Yield the records of a run's metrics.jsonl, in order; skips what is not a record."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError):  # torn by a kill
                record = json.loads(line)
                if _is_record(record):
                    yield record


def _is_record(value) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("step"), int):
        return False
    return all(isinstance(value.get(name), int | float | None) for name in FIGURES)


def _json_value(value):
    """The value, None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -------------------------------------------------------------------------------- the mirrors


def _histogram(tensor) -> tuple[float, float, list]:
    """(lowest, highest, counts in HISTOGRAM_BINS bins); under fsdp of this rank's shard."""
    t = tensor.detach()
    t = t.to_local() if hasattr(t, "to_local") else t
    t = t.float()
    low, high = t.min().item(), t.max().item()
    if not (math.isfinite(low) and math.isfinite(high)):
        return 0.0, 1.0, [0] * HISTOGRAM_BINS
    end = high if high > low else low + 1
    return low, high, torch.histc(t.cpu(), HISTOGRAM_BINS, low, end).tolist()


def _tensorboard(folder: Path, step: int):
    """A writer that replaces what was written after `step`; None, with a warning, without one."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        print(f"warning: --tensorboard is off: {e}; pip install tensorboard", flush=True)
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


class Wandb:
    """
    A wandb run fed from a queue by its own thread; `put` never waits.

    missing: steps that wandb does not have, or not yet.
    """

    def __init__(self, project: str, name: str, run_id: str, config: dict, folder):
        self.settings = {
            "project": project,
            "name": name,
            "id": run_id,
            "config": config,
            "dir": str(folder),
            "resume": "allow",
        }
        self.queue = queue.Queue(WANDB_QUEUE)
        self.missing = set()
        self.newest = self.known = -1  # steps: the newest one, and the newest before a rewind
        self.why_off = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    @staticmethod
    def mode() -> str:
        """WANDB_MODE, else online if there is a key, else offline: a run waits for no login."""
        if os.environ.get("WANDB_MODE"):
            return os.environ["WANDB_MODE"]
        if os.environ.get("WANDB_API_KEY"):
            return "online"
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc().authenticators("api.wandb.ai"):
                return "online"
        return "offline"

    def put(self, item) -> None:
        """
        Queue (step, {name: number or histogram}); drop it if wandb is too slow.

        Also drops a step from before a rewind: wandb cannot replace what it has.
        """
        step = item[0]
        if step <= self.known:
            return
        self.newest = max(self.newest, step)
        self.missing.add(step)
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(item)

    def rewind(self) -> None:
        """The run rolled back: the steps so far are not logged again."""
        self.known = self.newest

    def _work(self) -> None:
        item = ()
        try:
            import wandb

            quiet = wandb.Settings(silent=True, console="off")
            run = wandb.init(mode=self.mode(), settings=quiet, **self.settings)
            while (item := self.queue.get()) is not None:
                step, values = item
                run.log({k: _wandb_value(wandb, v) for k, v in values.items()}, step=step)
                self.missing.discard(step)
            run.finish()
        except (Exception, SystemExit) as e:  # noqa: BLE001  the training continues
            self.why_off = one_line(error_line(e), 150)
            what = f"wandb is off: {self.why_off}"
            print(f"warning: {what}; metrics.jsonl has everything", flush=True)
            while item is not None:
                item = self.queue.get()

    def close(self) -> None:
        """End the run; does not wait longer than half a minute."""
        ends = time.monotonic() + WANDB_END_S
        with contextlib.suppress(queue.Full):
            self.queue.put(None, timeout=WANDB_END_S)
        self.thread.join(timeout=max(0.0, ends - time.monotonic()))
        if not self.missing and not self.thread.is_alive():
            return
        why = f"is off ({self.why_off})" if self.why_off else "was too slow"
        what = "what it has may not be uploaded"
        if self.missing:
            what = f"{len(self.missing):,} steps are only in metrics.jsonl"
        print(f"warning: wandb {why}; {what}", flush=True)


def _wandb_value(wandb, value):
    """A number as it is, a histogram as wandb's."""
    if not isinstance(value, tuple):
        return value
    low, high, counts = value
    edges = [low + (high - low) * i / HISTOGRAM_BINS for i in range(HISTOGRAM_BINS + 1)]
    return wandb.Histogram(np_histogram=(counts, edges))
