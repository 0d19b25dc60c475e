"""How a script starts and ends: exit codes, one line per error, and Ctrl-C in every phase.

Exit codes: 0 finished; 1 the run failed; 2 bad arguments, configuration or data, nothing was touched;
75 stopped by SIGTERM or SIGUSR1 after saving; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

# A person can mend these before the run; any other OSError and every RuntimeError means that the run itself failed.
BAD_INPUT = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


def _on_requests(handler) -> dict:
    numbers = [
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
    ]  # Windows has no SIGUSR1
    return {
        number: signal.signal(number, handler) for number in numbers
    }  # the handlers that were there


def quiet_ctrl_c() -> None:
    """
    Exit at once on a request to stop, with its exit code and no traceback.

    For the seconds in which torch is imported. A missing package is reported in one line, then and
    later. Also sets what torch reads from the environment.
    """
    _on_requests(lambda number, _: os._exit(130 if number == signal.SIGINT else 75))
    sys.excepthook = _tell
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # warns of find_unused_parameters, which is wanted for its order of adding
    if sys.platform == "linux" and "PYTORCH_ALLOC_CONF" not in os.environ:
        # segments of GPU memory that can grow: micro-batches of another size leave no holes
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def _tell(kind, e, trace) -> None:
    if kind is ModuleNotFoundError and "--debug" not in sys.argv:
        print(
            f"error: needs the package {e.name}, which is not installed; pip install -r requirements.txt",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, e, trace)


def error_line(e: BaseException) -> str:
    """The error as one line. An OSError is told as `file: what`, as every other message of ours is."""
    if isinstance(e, OSError) and e.strerror:
        way_out = "; free some space and run the same line again" if e.errno == errno.ENOSPC else ""
        return (f"{e.filename}: {e.strerror}" if e.filename else e.strerror) + way_out
    if isinstance(e, MemoryError):
        return "out of memory; lower --batch_size or --context_length, or take a smaller model"
    return " ".join(str(e).split()) or type(e).__name__


def run_script(main) -> None:
    """
    Call main() and leave with its exit code (None is 0).

    What people can cause is printed as one line, `error: ...`, with exit code 2 (bad input) or 1 (the run failed);
    --debug on the command line adds the traceback. Other exceptions are bugs of ours and keep theirs.
    """
    _on_requests(
        lambda *_: sys.exit(75)
    )  # an exception, so that whatever is half done is cleaned up
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="replace")  # a sample may hold what the console cannot show
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
        print(f"error: {'' if rank == '0' else f'[rank {rank}] '}{error_line(e)}", file=sys.stderr)
        if "--debug" in sys.argv:
            raise
        code = 2 if isinstance(e, BAD_INPUT) else 1
    quiet_ctrl_c()
    if (
        "RANK" in os.environ
    ):  # one of several: gloo's threads abort the orderly end of about one process in twenty
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


class StopRequest:
    """
    Turns the first Ctrl-C, SIGTERM or SIGUSR1 into a flag that the loop reads between steps, so that nothing is
    left half done; a second Ctrl-C leaves at once.

        with StopRequest() as stop:
            while not stop: ...
        return stop.exit_code        # None if nobody asked, else 130 or 75
    """

    def __init__(self):
        self.exit_code = None
        self._before, self._first = {}, 0.0

    def __bool__(self) -> bool:
        return self.exit_code is not None

    def __enter__(self) -> StopRequest:
        self._before = _on_requests(self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number, _frame) -> None:
        # torchrun passes on the Ctrl-C that the terminal has sent to every process already: the same wish, not a second one
        if number == signal.SIGINT and self and time.monotonic() - self._first > 1:
            os._exit(130)
        self._first = self._first or time.monotonic()
        self.exit_code = 130 if number == signal.SIGINT else 75
        # os.write, not print: a handler may interrupt a print, and the stream refuses to be entered twice
        os.write(2, b"\nstopping after this step and saving; Ctrl-C again leaves at once\n")


def launch_facts(n_processes: int, device) -> dict:
    """What a run folder tells about how a run was started, and where: JSON values. Secrets stand in the environment, so none is in it."""
    import torch

    start = [Path(sys.executable).name]
    if "RANK" in os.environ:
        start = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    line = shlex.join([*start, *sys.argv])
    commit = None
    with contextlib.suppress(OSError):  # no git here
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        commit = git.stdout.strip() or None
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }
    facts = {"git_commit": commit, "versions": versions, "device": name, "processes": n_processes}
    return facts | {"launch": line, "resume": line, "folder": str(Path.cwd())}
