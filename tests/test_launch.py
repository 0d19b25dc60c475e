"""How scripts end: exit codes, one line per error, requests to stop."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from parts.cli.launch import StopRequest, error_line


def python(code: str, **options) -> subprocess.CompletedProcess:
    """Run a program in the folder of the project."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def test_an_os_error_is_reported_as_file_and_what():
    missing = FileNotFoundError(2, "No such file or directory", "a.txt")
    assert error_line(missing) == "a.txt: No such file or directory"
    full = "b: No space left on device; free some space and run the same command again"
    assert error_line(OSError(28, "No space left on device", "b")) == full
    assert error_line(ValueError("two\n lines")) == "two lines"


ENDINGS = {
    "return 3": (3, ""),
    "return None": (0, ""),
    "raise ValueError('bad flag')": (2, "error: bad flag\n"),
    "raise RuntimeError('out of memory')": (1, "error: out of memory\n"),
    "raise OSError(28, 'No space left', 'x')": (
        1,
        "error: x: No space left; free some space and run the same command again\n",
    ),
    "open('nowhere')": (2, "error: nowhere: No such file or directory\n"),
    "raise KeyboardInterrupt": (130, "stopped\n"),
}


@pytest.mark.parametrize("body", ENDINGS)
def test_endings(body):
    code = f"from parts.cli.launch import run_script\ndef main():\n    {body}\nrun_script(main)"
    result = python(code)
    assert (result.returncode, result.stderr) == ENDINGS[body]


def test_a_bug_of_ours_keeps_its_traceback():
    code = "from parts.cli.launch import run_script\nrun_script(lambda: {}['x'])"
    result = python(code)
    assert result.returncode == 1 and "KeyError" in result.stderr and "Traceback" in result.stderr


def test_a_reader_that_has_enough_is_no_error():
    code = """
from parts.cli.launch import run_script
run_script(lambda: [print(i) for i in range(10**6)] and None)
"""
    command = ["bash", "-c", f"{sys.executable} -c '{code}' | head -1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "0\n" and result.stderr == ""


def test_a_missing_package_is_one_line():
    code = """
from parts.cli.launch import quiet_ctrl_c
quiet_ctrl_c()
import no_such_package
"""
    line = "error: needs the package no_such_package, which is not installed; "
    result = python(code)
    assert result.stderr == line + "pip install -r requirements.txt\n" and result.returncode == 1


def test_a_signal_is_a_flag_until_the_loop_reads_it():
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)):
        before = signal.getsignal(number)
        with StopRequest() as stop:
            assert not stop and stop.exit_code is None
            os.kill(os.getpid(), number)
            assert stop and stop.exit_code == code
        assert signal.getsignal(number) == before


def test_the_memory_of_a_gpu_grows_in_place_unless_the_environment_says_otherwise():
    program = """
import os
from parts.cli.launch import quiet_ctrl_c
quiet_ctrl_c()
print(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
"""
    clean = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    for more, expected in (
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "None"),
    ):
        result = python(program, env=clean | more)
        assert result.returncode == 0 and result.stdout.strip() == expected


LOGGED = """
import os, resource, signal, sys
from parts.cli.launch import StopRequest, quiet_ctrl_c, run_script
quiet_ctrl_c()
def main():
    with StopRequest() as stop:
        for i in range(3000):
            print("a line of a log", file=(sys.stdout, sys.stderr)[i % 2], flush=i % 3 == 0)
            if i == 2000:
                os.kill(os.getpid(), signal.SIGTERM)
        open("done", "w").write(f"{i} {stop.exit_code}")
    return 3
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
run_script(main)
"""


@pytest.mark.parametrize("options", [[], ["-u"], ["-X", "utf8"]], ids=str)
def test_a_log_file_on_a_full_disk_loses_text_and_ends_no_run(tmp_path, options):
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        command = [sys.executable, *options, "-c", LOGGED]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            command, cwd=tmp_path, stdout=out, stderr=err, env=env, timeout=60, check=False
        )
    assert result.returncode == 3, (tmp_path / "err").read_text(encoding="utf-8")
    assert (tmp_path / "done").read_text(encoding="utf-8") == "2999 75"
    for name in ("out", "err"):
        text = (tmp_path / name).read_bytes()
        assert 900 < len(text) <= 1000 and text.startswith(b"a line of a log\n" * 50)


def test_a_pipe_without_a_reader_still_ends_a_script_that_logs_to_a_file(tmp_path):
    code = "from parts.cli.launch import run_script\nrun_script(lambda: print(1, flush=True))"
    command = ["bash", "-c", f"{sys.executable} -c '{code}' 2> {tmp_path}/log | true; exit $?"]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True)
    assert result.returncode == 0 and (tmp_path / "log").read_bytes() == b""
