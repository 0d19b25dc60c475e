"""
How a script starts and ends: exit codes, one line per error, and Ctrl-C in every phase.

    0    finished
    1    the run failed
    2    bad arguments, configuration or data; nothing was touched
    75   stopped by SIGTERM or SIGUSR1 after saving
    130  stopped by Ctrl-C
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import platform
import shlex
import signal
import stat
import subprocess
import sys
import time
import traceback
from pathlib import Path

from parts.base.text import one_line

# The user can fix these before the run. Any other OSError and every RuntimeError means that the run
# itself failed.
BAD_INPUT = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)

ROOT = Path(__file__).resolve().parents[2]
OURS = ("__main__", "parts")  # and the scripts in ROOT


# Requests to stop; Windows has no SIGUSR1.
REQUESTS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _on_requests(handler) -> dict:
    """Set the handler of every request to stop; returns {signal: its earlier handler}."""
    return {number: signal.signal(number, handler) for number in REQUESTS}


def open_standard_streams() -> None:
    """
    Connect stdin, stdout and stderr to the null device where the caller has closed them.

    Otherwise printing fails, and the next file that is opened gets the stream's number, so that
    output of a library goes into it. A log file on a full disk loses text, and ends no run.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            mode = "r" if number == 0 else "w"
            stream = open(number, mode, encoding="utf-8", errors="replace")  # noqa: SIM115
            setattr(sys, name, stream)
        elif number and _is_log(getattr(sys, name), number):
            setattr(sys, name, _of_log(getattr(sys, name), number))


def _is_log(stream, number: int) -> bool:
    """Whether a stream is that file descriptor, and this a file."""
    with contextlib.suppress(OSError, ValueError):  # a stream in memory has no descriptor
        return stream.fileno() == number and stat.S_ISREG(os.fstat(number).st_mode)
    return False


class _LogFile(io.FileIO):
    """A file whose text is dropped while the disk is full: nobody can be told about it there."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as e:
            if e.errno not in DISK_FULL:
                raise
            return len(data)


def _of_log(stream: io.TextIOWrapper, number: int) -> io.TextIOWrapper:
    """The same text stream, which writes to that file descriptor through a _LogFile."""
    stream.flush()
    file = _LogFile(number, "w", closefd=False)
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def quiet_ctrl_c() -> None:
    """
    Exit at once on a request to stop, with its exit code and no traceback.

    For the seconds in which torch is imported. From then on a missing or broken package is reported
    in one line. Also opens standard streams that are closed, and sets what torch reads from the
    environment.
    """
    open_standard_streams()
    _on_requests(lambda number, _: os._exit(130 if number == signal.SIGINT else 75))
    sys.excepthook = _report
    # silences a warning about find_unused_parameters, which fixes the order in which DDP adds
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if sys.platform == "linux" and "PYTORCH_ALLOC_CONF" not in os.environ:
        # segments of GPU memory that can grow: micro-batches of another size leave no holes
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def _report(kind, e, trace) -> None:
    """Print an exception that nobody caught: a missing or broken package in one line."""
    line = _package_line(e)
    if line and "--debug" not in sys.argv:
        print(f"error: {line}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, e, trace)


def _package_line(e: BaseException) -> str | None:
    """What is wrong with a package that is missing or cannot be imported; None for other errors."""
    if isinstance(e, ModuleNotFoundError) and e.name and "." not in e.name:
        what = f"needs the package {e.name}, which is not installed"
        return f"{what}; pip install -r requirements.txt"
    package = _package_of(e)
    if package is None or package in OURS or (ROOT / f"{package}.py").exists():
        return None
    cause = error_line(e)[:300]
    return f"the package {package} is broken, importing it fails ({cause}); install it again"


def _package_of(e: BaseException) -> str | None:
    """
    The package in whose import an exception was raised, None if it was not raised in one.

    A library that is missing raises ImportError or OSError, a wrong version almost anything.
    """
    if isinstance(e, ImportError) and e.name:
        return e.name.partition(".")[0]
    frames = [frame for frame, _ in traceback.walk_tb(e.__traceback__)]
    modules = [f.f_globals.get("__name__") for f in frames if f.f_code.co_name == "<module>"]
    return modules[-1].partition(".")[0] if modules and isinstance(e, Exception) else None


def error_line(e: BaseException) -> str:
    """The error in one line, safe for a terminal; an OSError as `file: what is wrong`."""
    if isinstance(e, OSError) and e.strerror:
        line = one_line(f"{e.filename}: {e.strerror}" if e.filename else e.strerror)
        if e.errno == errno.ENOSPC:
            line += "; free some space and run the same command again"
        return line
    if isinstance(e, MemoryError):
        return "out of memory; lower --batch_size or --context_length, or take a smaller model"
    return one_line(e) or type(e).__name__


def print_notes(notes: list[str]) -> None:
    """Print lines that the user should know of, once in a run of several processes."""
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"note: {note}", flush=True)


def run_script(main) -> None:
    """
    Call main() and exit with its exit code (None is 0).

    An error that the user can cause is printed in one line, `error: ...`, with exit code 2 (bad
    input) or 1 (the run failed); --debug on the command line adds the traceback. Any other
    exception is a bug of ours and keeps its traceback.
    """
    open_standard_streams()
    _on_requests(lambda *_: sys.exit(75))  # an exception, so that unfinished work is cleaned up
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="replace")  # a sample may have what the console cannot show
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `| head` has read enough
        os._exit(141)
    except (*BAD_INPUT, OSError, RuntimeError, MemoryError) as e:
        rank = os.environ.get("RANK", "0")  # of several processes, set by torchrun
        of_rank = "" if rank == "0" else f"[rank {rank}] "
        print(f"error: {of_rank}{_package_line(e) or error_line(e)}", file=sys.stderr)
        if "--debug" in sys.argv:
            raise
        code = 2 if isinstance(e, BAD_INPUT) else 1
    quiet_ctrl_c()
    if "RANK" in os.environ:
        # gloo's threads abort about one process in twenty that exits in the orderly way
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


class StopRequest:
    """
    Turns the first Ctrl-C, SIGTERM or SIGUSR1 into a flag that the loop reads between steps.

    So nothing is left half done. A second Ctrl-C exits at once.

        with StopRequest() as stop:
            while not stop: ...
        return stop.exit_code        # None if nobody asked, else 130 or 75
    """

    def __init__(self):
        self.exit_code = None
        self._before = {}  # handlers to put back
        self._first = 0.0  # time of the first request

    def __bool__(self) -> bool:
        return self.exit_code is not None

    def __enter__(self) -> StopRequest:
        self._before = _on_requests(self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number, _frame) -> None:
        # the terminal sends Ctrl-C to every process, and torchrun passes it on: one request
        if number == signal.SIGINT and self and time.monotonic() - self._first > 1:
            os._exit(130)
        self._first = self._first or time.monotonic()
        self.exit_code = 130 if number == signal.SIGINT else 75
        # not print: a handler may interrupt a print, and the stream refuses to be entered twice
        with contextlib.suppress(OSError):  # a log file on a full disk
            os.write(2, b"\nstopping after this step and saving; Ctrl-C again exits at once\n")


def launch_facts(n_processes: int, device) -> dict:
    """
    How and where a run was started, for its run folder: JSON values.

    Nothing is read from the environment but torchrun's variables: secrets are kept there.
    """
    import torch

    program = [Path(sys.executable).name]
    if "RANK" in os.environ:
        program = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    command = shlex.join([*program, *sys.argv])
    device_name = platform.processor() or platform.machine()
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    return {
        "git_commit": _git_commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
        },
        "device": device_name,
        "processes": n_processes,
        "launch": command,
        "resume": command,
        "folder": str(Path.cwd()),
    }


def _git_commit() -> str | None:
    """Commit of this code; None without git or a repository."""
    command = ["git", "rev-parse", "HEAD"]
    folder = Path(__file__).parent
    with contextlib.suppress(OSError):
        git = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        return git.stdout.strip() or None
    return None
