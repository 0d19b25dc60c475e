"""Where the real data is, if it is here at all, and how to start a script as a person does."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # of torch, here and in every process started from here: two tests run at a time
)

ROOT = Path(__file__).resolve().parent.parent
# Real books, vocabularies and the fault harness; tests that need them skip by name where the folder is not beside us.
SHARED = ROOT.parent / "shared"
GPT2_CACHE = SHARED / "data/gpt2/tiktoken_cache"


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the tests marked full: 14 minutes")
    parser.addoption("--nightly", action="store_true", help="thirty faults of each kind, not two")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: runs with --all, or if its file is named")
    explicit = config.args_source != pytest.Config.ArgsSource.TESTPATHS
    if not hasattr(config, "workerinput") and (explicit or config.option.nightly):
        config.option.all = True  # the processes of xdist get this option, too


def pytest_collection_modifyitems(config, items):
    if config.option.all:
        return
    full = {item for item in items if item.get_closest_marker("full")}
    config.hook.pytest_deselected(items=list(full))
    items[:] = [item for item in items if item not in full]


def shared(path: str) -> Path:
    """A file or folder of the test data; skips the test, naming it, where it is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs ../shared/{path}")
    return SHARED / path


def run(
    script: str, *arguments, cwd, timeout=120, env=None, fresh=False
) -> subprocess.CompletedProcess:
    """
    Start a script of the project in the folder `cwd`, offline, one thread.

    In a process forked from one that has torch imported (warm.py). `fresh`: by python itself, as where `env` is for python.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})}
    if fresh or any(name.startswith(("PYTHON", "MALLOC")) for name in env or {}):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
    return Warm(script, *arguments, cwd=cwd, environments=[environment]).wait(timeout)[0]


class Warm:
    """A script in one process for each environment, all at once, forked from tests/warm.py; one such group at a time."""

    server = None

    def __init__(self, script: str, *arguments, cwd, environments: list[dict]):
        self.folder, self.command = (
            tempfile.TemporaryDirectory(),
            [str(ROOT / script), *map(str, arguments)],
        )
        self.out, self.err = (
            [Path(self.folder.name, f"{kind}{n}") for n in range(len(environments))]
            for kind in ("out", "err")
        )
        for path in (*self.out, *self.err):
            path.touch()
        request = {
            "script": self.command[0],
            "arguments": self.command[1:],
            "cwd": str(cwd),
            "env": environments,
        }
        request |= {"out": list(map(str, self.out)), "err": list(map(str, self.err))}
        if Warm.server is None:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
            line = [sys.executable, str(ROOT / "tests/warm.py")]
            Warm.server = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        print(json.dumps(request), file=Warm.server.stdin, flush=True)
        self.pids = json.loads(Warm.server.stdout.readline())

    def kill(self, number=signal.SIGKILL) -> None:
        """Send each process a signal."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, timeout: float) -> list[subprocess.CompletedProcess]:
        """What came of each, as from subprocess.run."""
        late = threading.Timer(timeout, self.kill)
        late.start()
        codes = json.loads(Warm.server.stdout.readline())
        in_time = late.is_alive()
        late.cancel()
        out, err = (
            [path.read_text(encoding="utf-8") for path in paths] for paths in (self.out, self.err)
        )
        self.folder.cleanup()
        if not in_time:
            raise subprocess.TimeoutExpired(self.command, timeout, "".join(out), "".join(err))
        return [
            subprocess.CompletedProcess(self.command, *result)
            for result in zip(codes, out, err, strict=True)
        ]


def ranks(script, *arguments, world: int, cwd) -> Warm:
    """The script on `world` processes that find each other as those of torchrun do, without torchrun."""
    numbers = [{}]
    if world > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            group = {
                "WORLD_SIZE": world,
                "LOCAL_WORLD_SIZE": world,
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": free.getsockname()[1],
            }
        numbers = [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
    common = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environments = [
        {**common, **{name: str(value) for name, value in each.items()}} for each in numbers
    ]
    return Warm(script, *arguments, cwd=cwd, environments=environments)


def pytest_unconfigure():
    """The end of the process that scripts are started from."""
    if Warm.server:
        Warm.server.communicate()  # ends with its input


def one_error_line(result: subprocess.CompletedProcess, code: int) -> str:
    """The single `error:` line of a command that had to fail cleanly with this exit code."""
    assert result.returncode == code, (result.returncode, result.stderr[-2000:])
    assert "Traceback" not in result.stderr + result.stdout, result.stderr[-2000:]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr[-2000:]
    return errors[0]


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder with three small English texts."""
    folder = tmp_path_factory.mktemp("texts")
    words = "the old man and a small dog went down to the sea where ships of every kind lay still in the morning light".split()
    for n in range(3):
        lines = [
            " ".join(words[(i * (n + 2) + j * 7) % len(words)] for j in range(9)) + f" {i}."
            for i in range(400)
        ]
        (folder / f"text_{n}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return folder


TINY = (
    "--model_size",
    "nano",
    "--context_length",
    "16",
    "--batch_size",
    "4",
    "--device",
    "cpu",
    "--tokenizer",
    "bytes",
)
