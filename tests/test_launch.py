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
