"""Command lines and endings: flags, one line per problem, exit codes."""

import dataclasses
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from parts.cli.config import parse
from parts.cli.launch import StopRequest, error_line


@dataclasses.dataclass
class Config:
    """A test."""

    max_steps: int | None = None  # steps
    lr: float = 0.001  # rate
    fast: bool = False  # yes or no
    book_ids: tuple[int, ...] = ()  # numbers
    name: str = "x"  # text


@dataclasses.dataclass
class Other:
    """Another test."""

    depth: int = 1  # layers


def test_flags_take_both_spellings_and_booleans_both_ways():
    assert parse(Config, []) == Config()
    assert parse(Config, ["--max-steps", "3", "--lr=1e-4", "--fast"]) == Config(
        max_steps=3, lr=1e-4, fast=True
    )
    assert parse(Config, ["--max_steps", "None", "--no-fast", "--book_ids", "1", "2"]) == Config(
        book_ids=(1, 2)
    )
    assert parse({"one": Config, "two": Other}, ["two", "--depth", "4"]) == Other(4)


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (["--max_step", "3"], ["--max_step: no such flag; did you mean --max_steps? (see --help)"]),
        (["--max_steps", "3.5"], ["--max_steps: '3.5' is not a whole number"]),
        (
            ["--max_steps", "a", "--lr", "b"],
            ["--max_steps: 'a' is not a whole number", "--lr: 'b' is not a number"],
        ),
        (["--lr"], ["--lr: needs a number after it"]),
        (["--zzz", "--lr=x"], ["--zzz: no such flag (see --help)", "--lr: 'x' is not a number"]),
        (["--fast", "False"], ["Unrecognized options: False (see --help)"]),
        (["--book_ids", "x"], None),
        (["word"], None),
    ],
)
def test_each_problem_is_one_line_and_the_exit_code_is_two(argv, lines, capsys):
    with pytest.raises(SystemExit) as e:
        parse(Config, argv)
    err = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and all(line.startswith("error: ") for line in err)
    assert (
        lines is None and len(err) == 1 or [line.removeprefix("error: ") for line in err] == lines
    )


def test_commands_are_suggested(capsys):
    for argv, words in ((["tow"], "did you mean two?"), ([], "one, two")):
        with pytest.raises(SystemExit) as e:
            parse({"one": Config, "two": Other}, argv)
        assert e.value.code == 2 and words in capsys.readouterr().err


def test_an_os_error_is_told_as_file_and_what():
    assert (
        error_line(FileNotFoundError(2, "No such file or directory", "a.txt"))
        == "a.txt: No such file or directory"
    )
    assert (
        error_line(OSError(28, "No space left on device", "b"))
        == "b: No space left on device; free some space and run the same line again"
    )
    assert error_line(ValueError("two\n lines")) == "two lines"


ENDINGS = {
    "return 3": (3, ""),
    "return None": (0, ""),
    "raise ValueError('bad flag')": (2, "error: bad flag\n"),
    "raise RuntimeError('out of memory')": (1, "error: out of memory\n"),
    "raise OSError(28, 'No space left', 'x')": (
        1,
        "error: x: No space left; free some space and run the same line again\n",
    ),
    "open('nowhere')": (2, "error: nowhere: No such file or directory\n"),
    "raise KeyboardInterrupt": (130, "stopped\n"),
}


@pytest.mark.parametrize("body", ENDINGS)
def test_endings(body):
    code = f"from parts.cli.launch import run_script\ndef main():\n    {body}\nrun_script(main)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == ENDINGS[body]


def test_a_bug_of_ours_keeps_its_traceback():
    code = "from parts.cli.launch import run_script\nrun_script(lambda: {}['x'])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1 and "KeyError" in result.stderr and "Traceback" in result.stderr


def test_a_reader_that_has_enough_is_no_error():
    code = "from parts.cli.launch import run_script\nrun_script(lambda: [print(i) for i in range(10**6)] and None)"
    command = f'{sys.executable} -c "{code}" | head -1'
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout == "0\n" and result.stderr == ""


def test_a_signal_is_a_flag_until_the_loop_reads_it():
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)):
        before = signal.getsignal(number)
        with StopRequest() as stop:
            assert not stop and stop.exit_code is None
            os.kill(os.getpid(), number)
            assert stop and stop.exit_code == code
        assert signal.getsignal(number) == before


def test_the_memory_of_a_gpu_grows_in_place_unless_the_environment_says_otherwise():
    program = "import os; from parts.cli.launch import quiet_ctrl_c; quiet_ctrl_c(); print(os.environ.get('PYTORCH_CUDA_ALLOC_CONF'))"
    clean = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    for more, expected in (
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "None"),
    ):
        command = [sys.executable, "-c", program]
        out = subprocess.run(
            command, cwd=ROOT, env=clean | more, capture_output=True, text=True, check=True
        ).stdout
        assert out.strip() == expected
