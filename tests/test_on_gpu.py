"""on_gpu.py reports what works, what fails and what hangs, on a machine without a GPU, too."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

HANGS = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
print(subprocess.Popen(sleep, start_new_session=True).pid, flush=True)
time.sleep(300)
"""
CPU = ("--device", "cpu", "--quick")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder as --prepare makes it, in an environment that reaches no network."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    nowhere["TIKTOKEN_CACHE_DIR"] = str(folder.parent)
    done = run("--prepare", "--data", folder, cwd=folder.parent, **nowhere)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def modules(monkeypatch):
    """The modules on_gpu and children, imported as the script imports them."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("on_gpu"), importlib.import_module("children")


def run(*words, cwd, **env) -> subprocess.CompletedProcess:
    """The script as a person starts it: without PYTHONPATH, from another folder."""
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **env}
    command = [sys.executable, ROOT / "benchmarks/on_gpu.py", *map(str, words)]
    quiet = {"capture_output": True, "text": True, "check": False}
    return subprocess.run(command, cwd=cwd, env=env, timeout=120, **quiet)


def report(folder) -> dict:
    return json.loads((folder / "on_gpu/on_gpu.json").read_text(encoding="utf-8"))


def test_prepare_needs_no_network_and_makes_a_small_folder(data):
    files = [f for f in data.rglob("*") if f.is_file()]
    needed = {"train_000000.bin", "val_000000.bin", "index.json", "tokenizer.json"}
    assert {f.name for f in files} >= needed
    assert 1e6 < sum(f.stat().st_size for f in files) < 16e6
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8")
    assert "on_gpu" not in ignored, "the folder has to travel with the working tree"


def test_parts_are_reported_as_json_and_as_a_table(data, tmp_path):
    done = run(*CPU, "--data", data, "--only", "retry", "ready", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = report(tmp_path)["parts"]
    assert list(parts) == ["ready", "retry"], "in their own order"
    assert parts["ready"]["status"] == "ok"
    assert parts["ready"]["figures"]["start"]["first line"].startswith("cpu, 1 process, ")
    assert "--device auto is cpu" in parts["ready"]["figures"]["checks"]["devices"]
    assert parts["retry"]["status"] == "skipped: needs CUDA"
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ready: ok (") and lines[1] == "retry: skipped: needs CUDA (0 s)"
    assert "| **retry** | skipped: needs CUDA | 0 s |" in lines
    assert (tmp_path / "on_gpu/on_gpu.md").read_text(encoding="utf-8") in done.stdout


def test_a_part_that_fails_is_reported_and_the_rest_runs(tmp_path, monkeypatch, modules, capsys):
    """The data folder is damaged, and one part has a bug."""
    on_gpu, _ = modules
    (tmp_path / "broken/bytes").mkdir(parents=True)
    (tmp_path / "broken/bytes/train_000000.bin").write_bytes(b"not a shard")

    def trained(bench):
        child = bench.train("run")
        return {"run": child.figures}

    def buggy(bench):
        raise KeyError("figures")

    def fine(bench):
        return {"row": {"figure": 1.5}}

    parts = {"trained": (trained, 60), "buggy": (buggy, 60), "fine": (fine, 60)}
    monkeypatch.setattr(on_gpu, "PARTS", parts)
    monkeypatch.chdir(tmp_path)
    assert on_gpu.main([*CPU, "--data", "broken"]) == 1
    out, saved = capsys.readouterr().out, report(tmp_path)["parts"]
    assert "train_000000.bin" in saved["trained"]["status"]
    assert saved["trained"]["figures"]["run"]["exit"] == 2
    assert saved["buggy"]["status"] == "failed: 'figures'"
    assert saved["fine"]["status"] == "ok" and "| fine: row | ok | figure 1.5 |" in out
    late = on_gpu.run_part(fine, None, limit=60, deadline=time.monotonic())
    assert late == {"status": "not run: out of time", "seconds": 0.0, "figures": {}}


def test_a_part_that_hangs_is_killed_with_everything_it_started(tmp_path, modules):
    _, children = modules
    (tmp_path / "logs").mkdir()
    bench = children.Bench(True, tmp_path, tmp_path, tmp_path, dict(os.environ))
    bench.ends = time.monotonic() + 2
    child = bench.run("hangs", "-c", HANGS)
    assert child.code is None and child.failure == {"failed": "timed out after 2 s"}
    assert child.seconds < 10
    deadline = time.monotonic() + 5
    while is_running(int(child.out)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(int(child.out)), "a process in another session still runs"
    assert bench.run("late", "-c", "print(1)").code is None, "no process starts after the deadline"


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        return stat.rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--only", "nano", "memry"), "error: --only: unknown part memry; choose from ready, "),
        (("--device", "cuda:93"), "error: --device cuda:93: exit code 1: "),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, words, error):
    done = run("--data", "nowhere", *words, cwd=tmp_path, CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(error) and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir()), "nothing was written"


def test_kernels_are_counted_from_a_trace(monkeypatch):
    """Three steps, each of two kernels that overlap, one the head's, and a copy to the CPU."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    probes, events = importlib.import_module("probes"), []

    def event(cat, name, ts, dur, correlation):
        args = {"correlation": correlation}
        events.append({"cat": cat, "name": name, "ts": ts, "dur": dur, "args": args})

    for i in range(3):
        t = 1000 * i
        event("user_annotation", probes.STEP, t, 900, 0)
        event("user_annotation", probes.HEAD, t + 100, 100, 0)
        event("gpu_user_annotation", probes.HEAD, t + 200, 100, 0)
        event("cpu_op", "aten::mm", t + 110, 10, 0)
        for n, (start, kind) in enumerate([(50, "kernel"), (120, "kernel"), (300, "gpu_memcpy")]):
            event("cuda_runtime", "cudaLaunchKernel", t + start, 5, 10 * i + n)
            event(kind, "Memcpy DtoH" if n == 2 else "gemm", t + 200 + 50 * n, 100, 10 * i + n)
        event("cuda_runtime", "cudaStreamSynchronize", t + 310, 5, 10 * i + 9)
    event("cuda_runtime", "cudaDeviceSynchronize", 5000, 5, 99)
    event("kernel", "of the profiler", 5000, 100, 98)
    figures = probes.count_events(events, ms=0.4)
    assert figures == {
        "operators": 1,
        "operators of the head": 1,
        "kernels": 2,
        "kernels of the head": 1,
        "waits for the GPU": 1,
        "copies to the CPU": 1,
        "GPU busy ms": pytest.approx(0.2),
        "GPU busy share": pytest.approx(0.5),
    }
