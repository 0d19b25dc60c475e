"""
Processes that on_gpu.py starts, watches and ends. Only the standard library is imported here.

A child has a time limit, its output is kept in a log, and everything it started ends with it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "BENCHMARK_MARK"  # environment variable that every process started here inherits
TOLERANCE = 0.05  # relative difference of losses; more is another computation, not rounding
QUIET = {"eval_freq": 10**6, "print_sample_iter": 10**6, "save_ckpt_freq": 10**6, "keep_last": 1}


@dataclass
class Child:
    """A process that has ended; its exit code is None if it was killed at its time limit."""

    code: int | None
    out: str = ""
    error: str = ""
    seconds: float = 0.0
    folder: Path | None = None  # run folder of a training

    @property
    def failure(self) -> dict:
        """{} after exit code 0, else {"failed": reason}."""
        if self.code == 0:
            return {}
        if self.code is None and not self.seconds:
            return {"failed": "not started: out of time"}
        if self.code is None:
            return {"failed": f"timed out after {self.seconds:.0f} s"}
        return {"failed": f"exit code {self.code}: {self.error}"}

    @property
    def losses(self) -> dict[int, str]:
        """{step: loss as a hexadecimal number} of a run with --log_exact."""
        pairs = re.findall(r"^step (\d+) loss (\S+)$", self.out, re.MULTILINE)
        return {int(step): loss for step, loss in pairs}

    @property
    def answer(self):
        """The JSON value of the last line. Raises RuntimeError if the process failed."""
        if self.failure:
            raise RuntimeError(self.failure["failed"])
        return json.loads(self.out.splitlines()[-1])

    @property
    def figures(self) -> dict:
        """Exit code, first and last loss and seconds of a training run."""
        losses = [float.fromhex(loss) for loss in self.losses.values()]
        figures = {"exit": self.code}
        figures |= {"first loss": losses[0], "last loss": losses[-1]} if losses else {}
        off = [line for line in self.out.splitlines() if line.startswith("--compile is off")]
        figures |= {"note": off[0]} if off else {}
        return {**figures, "seconds": self.seconds, **self.failure}

    @property
    def hashes(self) -> list[str]:
        """sha256 of weights and optimizer state in the last checkpoint of a training run."""
        manifest = max(self.folder.glob("checkpoints/step_*")) / "MANIFEST.json"
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        return [files[f"{name}.safetensors"]["sha256"] for name in ("model", "optimizer")]

    def compare_losses(self, other: Child) -> dict:
        """The largest relative difference from the losses of a run that differs by rounding."""
        steps = [step for step in self.losses if step in other.losses]
        if not steps:
            return {"failed": "no losses to compare", **self.failure}
        pairs = [(float.fromhex(self.losses[s]), float.fromhex(other.losses[s])) for s in steps]
        differences = [abs(a - b) / abs(b) for a, b in pairs]
        largest = math.nan if any(map(math.isnan, differences)) else max(differences)
        figures = {"largest difference": largest, "steps compared": len(steps)}
        if not largest <= TOLERANCE:
            figures["failed"] = f"the losses differ by more than {TOLERANCE:.0%}"
        return figures

    def compare_bits(self, other: Child) -> dict:
        """Whether the losses are bit-identical to those of another run, in the steps of both."""
        steps = [step for step in self.losses if step in other.losses]
        differ = [step for step in steps if self.losses[step] != other.losses[step]]
        if differ:
            return {"failed": f"the losses differ from step {differ[0]} on"}
        return {"losses": f"equal in {len(steps)} steps"}


def error_line(text: str) -> str:
    """The line of stderr that names the error; torchrun and Python print more around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (ours or raised or lines or ["no message"])[-1].removeprefix("error: ")[:300]


def kill_marked(mark: str) -> None:
    """Kill every process with this mark, also in another session, as torchrun's workers are."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


@dataclass
class Bench:
    """What every part of a benchmark needs: folders, device facts, deadline, finished runs."""

    quick: bool
    data: Path  # token shards
    out: Path  # logs/ is in it
    work: Path  # runs and checkpoints, deleted at the end
    env: dict
    ends: float = math.inf  # deadline of the current part, in seconds of time.monotonic()
    facts: dict = field(default_factory=dict)
    runs: dict[str, Child] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.facts["device"].startswith("cuda")

    @property
    def trained_shape(self) -> dict:
        """The measured model as flags of pretraining_advanced.py."""
        shape = self.facts["shape"]
        sizes = {name: shape[name] for name in ("context_length", "batch_size")}
        return {"model_size": shape["size"], **sizes}

    def run(self, name: str, *command, given: str = "", kill_at: str | None = None) -> Child:
        """
        Run a Python script to its end, or to the deadline of the part.

        given: its standard input. kill_at: SIGKILL it after a line that begins like this.
        """
        began = time.monotonic()
        if began >= self.ends:
            return Child(None)
        log = self.out / "logs" / name
        lines = []
        late = threading.Event()
        with open(f"{log}.out", "w", encoding="utf-8") as out, open(f"{log}.err", "wb") as err:
            process, end = self._start(command, err)
            timer = threading.Timer(min(self.ends - began, 86_400), lambda: (late.set(), end()))
            timer.start()
            try:
                with contextlib.suppress(BrokenPipeError), process.stdin:  # if it ends unread
                    process.stdin.write(given)
                with process.stdout:
                    for line in process.stdout:
                        lines.append(line)
                        out.write(line)
                        if kill_at and line.startswith(kill_at):
                            process.kill()
                process.wait()
            finally:
                timer.cancel()
                end()
                process.wait()
        error = error_line(Path(f"{log}.err").read_text(encoding="utf-8", errors="replace"))
        code = None if late.is_set() else process.returncode
        return Child(code, "".join(lines), error, time.monotonic() - began)

    def _start(self, command, err):
        """The process, and a function that kills it and everything it started."""
        mark = f"{self.mark}-{secrets.token_hex(4)}"
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=err,
            encoding="utf-8",
            errors="replace",
            cwd=self.work,
            env={**self.env, MARK: mark},
            start_new_session=True,
        )

        def end() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            kill_marked(mark)

        return process, end

    def ask(self, name: str, **given) -> dict:
        """The answer of a function of probes.py. Raises RuntimeError if it fails."""
        script = ROOT / "benchmarks/probes.py"
        return self.run(f"probe-{name}", script, name, given=json.dumps(given)).answer

    def train(self, name: str, launcher=(), kill_at=None, log="", **settings) -> Child:
        """Run pretraining_advanced.py in the folder `name`. True is a flag without a value."""
        flags = {"dataset_name": self.data / "bytes", "output_dir": self.work / name}
        flags |= {"device": self.facts["device"], "eval_tokens": 2000, **QUIET}
        flags |= {"model_size": "nano", "context_length": 64, "batch_size": 8, "max_steps": 20}
        flags |= {"log_exact": True, **settings}
        words = [word for key, value in flags.items() if value for word in (f"--{key}", value)]
        words = [word for word in words if word is not True]
        script = ROOT / "pretraining_advanced.py"
        child = self.run(log or name, *launcher, script, *words, kill_at=kill_at)
        child.folder = self.work / name
        self.runs[name] = child
        return child

    def together(self, jobs: dict, at_once: int = 4) -> dict:
        """{name: result} of functions that start processes; their start-up takes one core each."""
        with ThreadPoolExecutor(min(at_once, os.cpu_count() or 1)) as pool:
            results = {name: pool.submit(job) for name, job in jobs.items()}
            try:
                return {name: result.result() for name, result in results.items()}
            except BaseException:  # Ctrl-C too: the threads wait for their processes
                pool.shutdown(wait=False, cancel_futures=True)
                self.ends = 0.0
                kill_marked(self.mark)
                raise


def output_of(*command: str) -> str | None:
    """The first line that a program prints; None if it is not installed or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "timeout": 20}
        done = subprocess.run(command, cwd=ROOT, encoding="utf-8", check=True, **options)
        return done.stdout.strip().partition("\n")[0]


def environment(device: str, quick: bool) -> dict:
    """The environment of the children: finds our modules, needs no network, sees one device."""
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": "1"} if quick else {}
    kind, _, index = device.partition(":")
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if kind == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    elif kind == "cuda" and index.isdecimal():
        last = int(index) >= len(visible)
        env["CUDA_VISIBLE_DEVICES"] = ("" if last else visible[int(index)]) if visible else index
    return env
