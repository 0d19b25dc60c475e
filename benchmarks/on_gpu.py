"""
Does the project work on this GPU, and what does a step cost? One command, nine minutes, one table.

    python benchmarks/on_gpu.py                          # a machine with a CUDA GPU
    python benchmarks/on_gpu.py --device cpu --quick     # two CPU cores, about four minutes
    python benchmarks/on_gpu.py --only nano kills        # some of the parts
    python benchmarks/on_gpu.py --prepare                # only make on_gpu_data/, to copy it along

Needs torch, numpy, safetensors, tiktoken, PyYAML and tyro. No network, and no installation of this
project. A part that needs another package is skipped and names it. The parts run in this order:

    ready    packages, device, compiler, disk; does the trainer start
    nano     20 steps of a small model: plain, compiled, deterministic twice, fp16, muon
    kills    a run killed five times with SIGKILL has the losses and weights of one left alone
    step     124M, 1,024 tokens of context: ms, tokens/s, MFU, memory, also of transformers
    profile  kernels, synchronisations and copies of such a step
    memory   the peak of real runs against that of the plan
    retry    a micro-batch that does not fit is split, and the run finishes
    fsdp     --parallel fsdp in one process, also with --cpu_offload
    ladder   benchmarks/ladder.py

Each process that uses the GPU is a child, so a crash ends one part and the next one runs. --quick
takes a nano model and 32 tokens instead of 124M. On disk: on_gpu_data/ (8 MB of token shards, made
if it is absent); on_gpu/ with on_gpu.json and on_gpu.md, written again after each part, traces
of the profiler, and logs/ with the output of each child. Runs and checkpoints are in $TMPDIR (10
GB) until the end. Exit code 0: all parts are ok or skipped; 1: one failed or did not run; 2: bad
arguments; 130: stopped by Ctrl-C or SIGTERM, after the table.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from children import ROOT, Bench, Child, environment, kill_marked, output_of

SHAPES = {False: ("124M", 1024, 16), True: ("nano", 32, 1)}  # --quick -> size, context, most rows
KILLED_AT = (3, 7, 11, 15, 19)  # steps of the 24 in the part `kills`
STANDALONE = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")


class Skipped(Exception):
    """A part cannot run here; the message names what it needs."""


# ----------------------------------------------------------------------------------------- parts
# Each returns {row of the table: {figure: value}}; a row with the key "failed" fails the part.


def ready(bench: Bench) -> dict:
    """What is installed, and whether the trainer starts with --device as it was given."""
    start = partial(bench.train, "start", device=bench.facts["asked"], plan=True)
    done = bench.together({"checks": partial(bench.ask, "checks"), "start": start})
    first_line = done["start"].out.partition("\n")[0]
    start = {"first line": first_line, **done["start"].failure}
    return {"checks": done["checks"], "start": start}


def nano(bench: Bench) -> dict:
    """Twenty steps of a small model, in each kind of arithmetic."""
    kinds = {"plain": {}, "compile": {"compile": True}, "muon": {"optimizer": "muon"}}
    kinds |= {"deterministic": {"deterministic": True}, "again": {"deterministic": True}}
    kinds |= {"fp16": {"dtype": "fp16"}} if bench.cuda else {}
    jobs = {kind: partial(bench.train, f"nano-{kind}", **more) for kind, more in kinds.items()}
    runs = bench.together(jobs)
    rows = {kind: run.figures for kind, run in runs.items()}
    for kind in [kind for kind in ("compile", "fp16") if kind in runs]:
        rows[kind] |= runs[kind].compare_losses(runs["plain"])
    rows["again"] |= runs["again"].compare_bits(runs["deterministic"])
    return rows


def kills(bench: Bench) -> dict:
    """A run that is killed five times, and the same run left alone."""
    settings = {"max_steps": 24, "save_ckpt_freq": 4, "deterministic": bench.cuda}

    def killed_run() -> list[Child]:
        attempts = []
        for i, step in enumerate((*KILLED_AT, None)):
            line = f"step {step} loss" if step else None
            attempts.append(bench.train("killed", log=f"killed-{i}", kill_at=line, **settings))
        return attempts

    straight_run = partial(bench.train, "straight", **settings)
    done = bench.together({"straight": straight_run, "killed": killed_run})
    straight, attempts = done["straight"], done["killed"]
    n_killed = sum(run.code == -signal.SIGKILL for run in attempts)
    row = {"killed": n_killed, "steps compared": sum(len(run.losses) for run in attempts)}
    for run in attempts:
        row |= run.compare_bits(straight)
    if n_killed < len(KILLED_AT):
        row["failed"] = f"only {n_killed} of {len(KILLED_AT)} were killed"
    row |= straight.failure or attempts[-1].failure
    if straight.code == attempts[-1].code == 0:
        same = straight.hashes == attempts[-1].hashes
        row |= {"losses": "equal in all attempts"} if "failed" not in row else {}
        row |= {"weights": "equal"} if same else {"failed": "the weights differ"}
    return {"24 steps": row}


def step(bench: Bench) -> dict:
    """A training step, ours and that of transformers, by benchmarks/train_step.py."""
    shape = bench.facts["shape"]
    script = ROOT / "benchmarks/train_step.py"
    flags = [word for name, value in shape.items() for word in (f"--{name}", value)]
    given = "step\n" * 3 + "measure\n" + "step\n" * 9
    jobs, rows = {}, {}
    for name in ("ours eager", "ours compiled", "transformers compiled"):
        side, kind = name.split()
        rows[name] = {"skipped": f"needs {side}"}
        if side not in bench.facts["missing"]:
            line = [script, "--side", side, *flags, *(["--eager"] if kind == "eager" else [])]
            jobs[name] = partial(bench.run, f"step-{side}-{kind}", *line, given=given)
    for name, run in bench.together(jobs, at_once=2 if bench.quick else 1).items():
        steps = [json.loads(line) for line in run.out.splitlines() if line.startswith("[")]
        rows[name] = step_figures(bench, steps) if len(steps) == 13 else {}
        rows[name] |= run.failure
    ours, theirs = rows["ours compiled"], rows["transformers compiled"]
    if "ms" in ours and "ms" in theirs:
        ours |= {"times the tokens/s of transformers": theirs["ms"] / ours["ms"]}
        ours |= {"times its memory": ours["peak MiB"] / theirs["peak MiB"]}
    return rows


def step_figures(bench: Bench, steps: list) -> dict:
    """Median of [seconds, loss, peak bytes] of the steps after the third."""
    seconds = statistics.median(s for s, _, _ in steps[3:])
    shape = bench.facts["shape"]
    rate = shape["batch_size"] * shape["context_length"] / seconds
    figures = {"ms": seconds * 1000, "tokens/s": rate}
    if bench.facts["peak_flops"]:
        figures["MFU"] = rate * bench.facts["flops_per_token"] / bench.facts["peak_flops"]
    return figures | {"peak MiB": steps[-1][2] / 2**20, "first loss": steps[0][1]}


def profile(bench: Bench) -> dict:
    """What a step launches, and how long it waits, by torch.profiler."""
    rows = {}
    for kind in ("eager", "compiled"):
        trace = str(bench.out / f"trace-{kind}.json.gz")
        try:
            eager = kind == "eager"
            rows[kind] = bench.ask("profile", eager=eager, trace=trace, **bench.facts["shape"])
        except RuntimeError as e:
            rows[kind] = {"failed": str(e)}
    return rows


def memory(bench: Bench) -> dict:
    """
    The peak of real runs against that of the plan: on a GPU what torch allocated.

    On a CPU what is resident, less that of the smallest model, which is Python and torch. The model
    is large enough there to stand out.
    """
    shape = {"dataset_name": bench.data / "pairs", **bench.trained_shape, "max_steps": 3}
    kinds = {"plain": {}, "activation checkpointing": {"activation_checkpointing": True}}
    kinds |= {"accumulation of 2": {"grad_accum_steps": 2}}
    if not bench.cuda:
        shape = {"model_size": "micro", "context_length": 128, "batch_size": 32, "max_steps": 1}
        smallest = {"n_layer": 1, "n_head": 1, "n_embd": 2, "context_length": 8, "batch_size": 1}
        kinds |= {"smallest": smallest}
    names = {kind: f"memory-{kind.split()[0]}" for kind in kinds}
    jobs = {k: partial(bench.train, names[k], **shape | more) for k, more in kinds.items()}
    runs = bench.together(jobs, at_once=1 if bench.cuda else 2)
    rows = {kind: dict(run.failure) for kind, run in runs.items()}
    folders = {kind: str(run.folder) for kind, run in runs.items() if run.code == 0}
    peaks = bench.ask("peaks", folders=folders)
    planned, measured = peaks.pop("smallest", [0, 0])
    for kind, (plan, peak) in peaks.items():
        peak -= measured - planned
        rows[kind] |= {"planned GB": plan / 1e9, "measured GB": peak / 1e9, "ratio": plan / peak}
    return {kind: row for kind, row in rows.items() if row}


def retry(bench: Bench) -> dict:
    """A micro-batch that needs twice the GPU: it is split, and the run finishes."""
    if not bench.cuda:
        raise Skipped("needs CUDA")
    n_rows = bench.facts["too_many_rows"]
    data = bench.data / "pairs"
    shape = bench.trained_shape | {"batch_size": n_rows, "max_steps": 2}
    run = bench.train("retry", dataset_name=data, **shape)
    parts = re.findall(r"out of memory with micro-batches of .*; each in (\d+) parts", run.out)
    row = {"rows": n_rows, "parts": parts[-1] if parts else 1, **run.figures}
    if not parts:
        row = {"failed": "it did not run out of memory"} | row
    return {"twice the memory": row}


def fsdp(bench: Bench) -> dict:
    """One process of torchrun with --parallel fsdp, against the plain run."""
    start = partial(bench.train, launcher=STANDALONE, parallel="fsdp")
    jobs = {"fsdp": partial(start, "fsdp")}
    jobs |= {"cpu_offload": partial(start, "fsdp-offload", cpu_offload=True)}
    if "nano-plain" not in bench.runs:
        jobs["plain"] = partial(bench.train, "nano-plain")
    runs = bench.together(jobs)
    plain = bench.runs["nano-plain"]
    names = ("fsdp", "cpu_offload")
    return {name: runs[name].figures | runs[name].compare_losses(plain) for name in names}


def ladder(bench: Bench) -> dict:
    """What each optimisation is worth, by the lines of benchmarks/ladder.py."""
    shape = bench.facts["shape"].items()
    script = ROOT / "benchmarks/ladder.py"
    flags = [word for name, value in shape if name != "dtype" for word in (f"--{name}", value)]
    jobs = {}
    for i, name in enumerate(bench.facts["rungs"]):
        jobs[name] = partial(bench.run, f"ladder-{i}", script, *flags, "--rung", i)
    rows, first = {}, None
    for name, run in bench.together(jobs, at_once=2 if bench.quick else 1).items():
        rows[name] = dict(run.failure)
        if run.code == 0:
            rate, mfu, peak = run.answer
            first = first or rate
            rows[name] = {"tokens/s": rate, "times the first": rate / first}
            rows[name] |= {"MFU": mfu} if mfu else {}
            rows[name] |= {"peak MiB": peak / 2**20}
    return rows


PARTS = {  # name -> (function, most seconds)
    "ready": (ready, 60),
    "nano": (nano, 120),
    "kills": (kills, 120),
    "step": (step, 150),
    "profile": (profile, 120),
    "memory": (memory, 120),
    "retry": (retry, 60),
    "fsdp": (fsdp, 60),
    "ladder": (ladder, 300),
}

# ---------------------------------------------------------------------------------------- report


def table(report: dict) -> str:
    """The report as Markdown: a line for each part and for each of its rows."""
    facts = report["facts"]
    machine = [facts["name"], f"{facts['memory_gb']:.0f} GB", f"{facts['cores']} CPU cores"]
    cuda = [f"CUDA {facts['cuda']}", f"driver {report['driver']}"] if facts["cuda"] else []
    machine += [f"torch {facts['torch']}", *cuda, f"Python {facts['python']}"]
    machine += [facts["shape"]["dtype"], report["date"]]
    lines = [f"{', '.join(machine)}, commit {report['commit']}:", "", f"`{report['command']}`", ""]
    lines += ["| part | result | figures |", "|---|---|---|"]
    for name, part in report["parts"].items():
        lines.append(f"| **{name}** | {part['status']} | {part['seconds']:.0f} s |")
        for row, figures in part["figures"].items():
            result = next((key for key in ("failed", "skipped") if key in figures), "ok")
            text = "; ".join(f"{key} {shown(value)}" for key, value in figures.items())
            lines.append(f"| {name}: {row} | {result} | {text.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def shown(value) -> str:
    """A figure as text, four digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def write_report(report: dict, out: Path) -> None:
    """Write on_gpu.json and on_gpu.md, each whole or not at all."""
    texts = {"on_gpu.json": json.dumps(report, indent=1), "on_gpu.md": table(report)}
    for name, text in texts.items():
        new = out / f"{name}.part"
        new.write_text(text, encoding="utf-8")
        os.replace(new, out / name)


def run_part(part, bench: Bench, limit: float, deadline: float) -> dict:
    """{"status", "seconds", "figures"} of one part, whatever happens in it."""
    began = time.monotonic()
    figures = {}
    if began >= deadline:
        return {"status": "not run: out of time", "seconds": 0.0, "figures": {}}
    bench.ends = min(began + limit, deadline)
    try:
        figures = part(bench)
        failed = [f"{row}: {f['failed']}" for row, f in figures.items() if "failed" in f]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        status = f"failed: {failed[0]}{more}" if failed else "ok"
    except Skipped as e:
        status = f"skipped: {e}"
    except Exception as e:  # noqa: BLE001  the other parts run, whatever this one raised
        status = f"failed: {' '.join(str(e).split()) or type(e).__name__}"
    return {"status": status, "seconds": time.monotonic() - began, "figures": figures}


def measure(bench: Bench, names: list[str], minutes: float, command: str) -> int:
    """Run the parts, report after each; returns the exit code."""
    deadline = time.monotonic() + 60 * minutes
    parts = {}
    code = 0
    report = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "commit": output_of("git", "rev-parse", "--short", "HEAD"),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "facts": bench.facts,
        "parts": parts,
    }
    try:
        for name in names:
            part, limit = PARTS[name]
            parts[name] = {"status": "stopped", "seconds": 0.0, "figures": {}}
            parts[name] = result = run_part(part, bench, limit, deadline)
            write_report(report, bench.out)
            print(f"{name}: {result['status']} ({result['seconds']:.0f} s)", flush=True)
            code = code if result["status"].startswith(("ok", "skipped")) else 1
    except KeyboardInterrupt:
        kill_marked(bench.mark)
        code = 130
    write_report(report, bench.out)
    print(f"\n{table(report)}", flush=True)
    return code


# ------------------------------------------------------------------------------------------ main


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line. Raises ValueError for a part that does not exist."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--prepare", action="store_true", help="make the data folder only")
    parser.add_argument("--data", default="on_gpu_data", help="folder of token shards")
    parser.add_argument("--out", default="on_gpu", help="folder of the results")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--quick", action="store_true", help="nano instead of 124M")
    parser.add_argument("--only", nargs="+", default=list(PARTS), metavar="PART")
    parser.add_argument("--minutes", type=float, default=9.0, help="limit of the whole command")
    args = parser.parse_args(words)
    if unknown := [name for name in args.only if name not in PARTS]:
        names = ", ".join(PARTS)
        raise ValueError(f"--only: unknown part {', '.join(unknown)}; choose from {names}")
    if math.isnan(args.minutes):
        raise ValueError("--minutes: give a number")
    return args


def main(words: list[str]) -> int:
    """Prepare, measure, report; returns the exit code. Raises ValueError for bad arguments."""
    began = time.monotonic()
    args = arguments(words)
    out = Path(args.out).resolve()
    data = Path(args.data).resolve()
    with tempfile.TemporaryDirectory(prefix="on_gpu-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        (work / "logs").mkdir()
        bench = Bench(args.quick, data, work, work, environment(args.device, args.quick))
        if not args.prepare:
            asked = re.sub(r"^cuda:\d+$", "cuda:0", args.device)  # the one that children see
            size, T, rows = SHAPES[args.quick]
            try:
                bench.facts = bench.ask("facts", device=asked, size=size, T=T, rows=rows)
            except RuntimeError as e:
                raise ValueError(f"--device {args.device}: {e}") from e
            bench.facts["asked"] = asked
        if args.prepare or not (data / "pairs").exists():  # the last one that is made
            n_bytes = bench.ask("prepare", data=str(data))["bytes"]
            print(f"{data}: {n_bytes / 1e6:.1f} MB of token shards", flush=True)
        if args.prepare:
            return 0
        shutil.rmtree(out / "logs", ignore_errors=True)
        (out / "logs").mkdir(parents=True)
        bench.out = out
        names = [name for name in PARTS if name in args.only]
        command = shlex.join(["python", "benchmarks/on_gpu.py", *words])
        return measure(bench, names, args.minutes - (time.monotonic() - began) / 60, command)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, RuntimeError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
