"""The first two commands of README.md run word for word; test_doc_commands.py runs the rest."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from documents import blocks

from parts.cli.config import from_yaml
from parts.training.run_settings import check_settings
from pretraining_advanced import TrainConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = "".join(blocks(README, "bash")).splitlines()
COMMANDS = [line.split(" #")[0].strip() for line in LINES if line and not line.startswith("#")]


def test_the_two_commands_are_there_word_for_word():
    assert COMMANDS[:2] == [
        "pip install -r requirements.txt && python pretraining_simple.py",
        "pip install -r requirements.txt && python -m pytest",
    ]


def as_here(command: str) -> list[str]:
    """The part after `&&` with this interpreter: the requirements are not installed again."""
    words = shlex.split(command.split("&&")[-1])
    assert words[0] == "python"
    return [sys.executable, *words[1:]]


def test_the_first_command_trains(tmp_path):
    words = as_here(COMMANDS[0])
    words[1] = str(ROOT / words[1])
    # A test must not download a dozen books from a charity each time.
    no_network = {**os.environ, "https_proxy": "http://127.0.0.1:9"}
    result = subprocess.run(
        [*words, "--max_steps", "20"],
        cwd=tmp_path,
        env=no_network,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    losses = [float(x) for x in re.findall(r"validation loss ([\d.]+)", result.stdout)]
    assert abs(losses[0] - 8.32) < 0.3  # ln(4096)
    assert losses[-1] < losses[0] - 0.5
    assert (tmp_path / "runs/simple/loss.png").exists()


def test_the_second_command_finds_the_tests():
    result = subprocess.run(
        [*as_here(COMMANDS[1]), "--collect-only"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:]
    assert "test_the_second_command_finds_the_tests" in result.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_opens_with_its_command_and_holds_known_settings(path):
    head = path.read_text(encoding="utf-8").split("\ndataset_name")[0]
    assert f"pretraining_advanced.py --config configs/{path.name}" in head
    cost_is_known = "not yet measured" in head or re.search(r"20\d\d-\d\d-\d\d", head)
    assert cost_is_known, "give its cost with the date, or write: not yet measured"
    config = from_yaml(TrainConfig, str(path))
    check_settings(config)
    assert config.run_name == path.stem


def test_the_file_map_names_every_script_and_part():
    for path in [*ROOT.glob("*.py"), *(ROOT / "parts").glob("*/[a-z]*.py")]:
        assert f"`{path.relative_to(ROOT).as_posix()}`" in README, path.name


def test_requirements_end_with_the_project_itself_and_pin_torch():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines if line.strip()]
    assert lines[-1] == "-e ." and "torch==2.13.0" in lines
