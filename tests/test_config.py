"""A dataclass as a command line: other names of a setting, and what is refused in one line."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from parts.cli.config import from_yaml, parse
from pretraining_advanced import RunConfig, TrainConfig


@dataclass
class Base:
    """Settings."""

    OTHER_NAMES: ClassVar[dict] = {"learning_rate": "max_lr", "half": "compile"}

    config: str | None = None  # YAML file
    max_lr: float = 1e-3  # learning rate
    batch_size: int = 8  # rows
    compile: bool = False  # compile


@dataclass
class Recipe(Base):
    """More settings."""

    OTHER_NAMES: ClassVar[dict] = {**Base.OTHER_NAMES, "max_length": "context_length"}

    context_length: int = 128  # tokens


def refused(capsys, argv, config_class=Recipe) -> str:
    with pytest.raises(SystemExit) as end:
        parse(config_class, argv)
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    "argv",
    [
        ["--learning_rate", "5e-4", "--max_length", "64"],
        ["--learning-rate=5e-4", "--max-length=64"],
        ["--max_lr", "5e-4", "--context-length", "64"],
    ],
)
def test_another_name_of_a_setting_is_understood_on_the_line(argv):
    config = parse(Recipe, argv)
    assert (config.max_lr, config.context_length) == (5e-4, 64)


def test_another_name_of_a_switch_can_be_negated():
    assert parse(Recipe, ["--half"]).compile and not parse(Recipe, ["--no-half"]).compile


def test_another_name_is_understood_in_a_file_and_overridden_by_the_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("learning_rate: 5e-4\nmax_length: 64\nhalf: true\n", encoding="utf-8")
    config = parse(Recipe, ["--config", str(path), "--learning_rate", "1e-4"])
    assert (config.max_lr, config.context_length, config.compile) == (1e-4, 64, True)
    assert from_yaml(Recipe, str(path)).max_lr == 5e-4


def test_help_lists_the_settings_own_names_only(capsys):
    with pytest.raises(SystemExit):
        parse(Recipe, ["--help"])
    text = capsys.readouterr().out
    assert "--max_lr" in text and "learning_rate" not in text and "OTHER_NAMES" not in text


def test_one_setting_under_two_names_is_refused(capsys, tmp_path):
    line = refused(capsys, ["--learning_rate", "1", "--max_lr", "2"])
    assert "--learning_rate, --max_lr: are the same setting" in line
    path = tmp_path / "a.yaml"
    path.write_text("learning_rate: 5e-4\nmax_lr: 1e-3\n", encoding="utf-8")
    assert "max_lr is set twice, under two names" in refused(capsys, ["--config", str(path)])


def test_a_wrong_name_or_value_names_what_was_typed_and_the_nearest(capsys, tmp_path):
    assert "did you mean --learning_rate?" in refused(capsys, ["--learning_rat", "1"])
    assert "did you mean --context_length?" in refused(capsys, ["--context_len", "1"])
    line = refused(capsys, ["--max_length", "many"])
    assert "--max_length: 'many' is not a whole number" in line
    path = tmp_path / "a.yaml"
    path.write_text("learning_rat: 1\n", encoding="utf-8")
    line = refused(capsys, ["--config", str(path)])
    assert "did you mean learning_rate?" in line
    path.write_text("learning_rate: [1]\n", encoding="utf-8")
    assert "learning_rate: list is not of type float" in refused(capsys, ["--config", str(path)])


def test_class_variables_are_no_settings(capsys, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("OTHER_NAMES: {}\n", encoding="utf-8")
    assert "no such setting" in refused(capsys, ["--config", str(path)])
    assert "no such flag" in refused(capsys, ["--MAY_CHANGE", "x"], TrainConfig)


def test_every_name_of_a_class_variable_is_a_setting():
    for config_class in (RunConfig, TrainConfig):
        config = config_class()
        names = {*config.MAY_CHANGE, *config.IN_DATA, *config.OTHER_NAMES.values()}
        assert names <= set(vars(config)), names - set(vars(config))
