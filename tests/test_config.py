"""A dataclass as a command line: flags, other names of a setting, one line per problem."""

import dataclasses
from typing import ClassVar, Literal

import pytest

from gpt_train import SampleConfig
from parts.cli.config import from_yaml, parse
from parts.cli.foreign_names import FOREIGN_NAMES
from prep_dataset import TokenizeConfig
from pretraining_advanced import RunConfig, TrainConfig
from pretraining_simple import SimpleConfig
from wt_load import AverageConfig


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

    OTHER_NAMES: ClassVar[dict[str, str]] = {"lr": "depth"}

    depth: int = 1  # layers


@dataclasses.dataclass
class Base:
    """Settings."""

    OTHER_NAMES: ClassVar[dict[str, str]] = {"learning_rate": "max_lr", "half": "compile"}

    config: str | None = None  # YAML file
    max_lr: float = 1e-3  # learning rate
    batch_size: int = 8  # rows
    compile: bool = False  # compile


@dataclasses.dataclass
class Recipe(Base):
    """More settings."""

    OTHER_NAMES: ClassVar[dict[str, str]] = {
        **Base.OTHER_NAMES,
        "max_length": "context_length",
        "scheduler": "schedule",
    }

    context_length: int = 128  # tokens
    schedule: Literal["cosine", "linear"] = "cosine"  # shape


def refused(capsys, argv, config_class=Recipe) -> list[str]:
    """The errors of a line that must be refused with exit code 2."""
    with pytest.raises(SystemExit) as end:
        parse(config_class, argv)
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines]


@pytest.fixture
def yaml_refused(capsys, tmp_path):
    """Function: the errors, without the file's name, of a YAML file that must be refused."""

    def errors(text: str, config_class=Recipe) -> list[str]:
        path = tmp_path / "a.yaml"
        path.write_text(text, encoding="utf-8")
        lines = refused(capsys, ["--config", str(path)], config_class)
        return [line.removeprefix(f"{path}: ") for line in lines]

    return errors


# ------------------------------------------------------------------------------------- flags


def test_flags_take_both_spellings_and_booleans_both_ways():
    assert parse(Config, []) == Config()
    fast = Config(max_steps=3, lr=1e-4, fast=True)
    assert parse(Config, ["--max-steps", "3", "--lr=1e-4", "--fast"]) == fast
    argv = ["--max_steps", "None", "--no-fast", "--book_ids", "1", "2"]
    assert parse(Config, argv) == Config(book_ids=(1, 2))
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
        (["--lr", "--fast"], ["--lr: needs a number after it"]),
        (["--zzz", "--lr=x"], ["--zzz: no such flag (see --help)", "--lr: 'x' is not a number"]),
        (["--no_lr"], ["--no_lr: no such flag; did you mean --lr? (see --help)"]),
        (["--fast", "False"], ["--fast: takes no value; write --fast or --no_fast"]),
        (["--no-fast", "true"], ["--no-fast: takes no value; write --fast or --no_fast"]),
        (["--book_ids", "x"], None),
        (["word"], None),
    ],
)
def test_each_problem_is_one_line_and_the_exit_code_is_two(argv, lines, capsys):
    errors = refused(capsys, argv, Config)
    assert errors == lines or (lines is None and len(errors) == 1)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--learning_rate", "; here it is --max_lr"),
        ("--train_ratio", "; here it is --val_share"),
        ("--num_workers", "; leave it out, a thread reads batches ahead"),
        ("--use_galore", "; here it is --optimizer galore"),
        ("--use_compile", "; here it is --compile"),
        ("--resume_from", "; here it is --resume"),
        ("--dataset", "; here it is --dataset_name"),
        ("--use_ddp", "; here it is --parallel ddp"),
        ("--max-samples", "; here it is --max_documents"),
        ("--no_galore_rank", "; did you mean --galore_rank?"),
        ("--batch_sise", "; did you mean --batch_size?"),
        ("--use_something", ""),
    ],
)
def test_names_of_other_trainers_are_translated(flag, words, capsys):
    assert refused(capsys, [flag, "1"], TrainConfig) == [
        f"{flag}: no such flag{words} (see --help)"
    ]


def test_names_of_other_trainers_in_a_file_too(tmp_path, capsys):
    path = tmp_path / "theirs.yaml"
    path.write_text("learning_rate: 1\nuse_ddp: true\n", encoding="utf-8")
    errors = refused(capsys, ["--config", str(path)], TrainConfig)
    assert errors == [
        f"{path}: 'learning_rate': no such setting; here it is --max_lr",
        f"{path}: 'use_ddp': no such setting; here it is --parallel ddp",
    ]


def test_every_translation_is_a_setting_of_a_script_and_no_name_is_taken():
    configs = [TrainConfig, SimpleConfig, SampleConfig, TokenizeConfig, AverageConfig]
    fields = [{field.name for field in dataclasses.fields(c)} for c in configs]
    for name, candidates in FOREIGN_NAMES.items():
        for words in candidates:
            field = words.split()[0]
            assert any(field in known for known in fields), field
            # a script that has both names would never suggest the other
            assert any(field in known and name not in known for known in fields), (name, field)


def test_many_problems_are_counted(capsys):
    errors = refused(capsys, ["--aa", "--bb", "--cc", "--dd", "--ee"], Config)
    assert len(errors) == 4 and errors[-1] == "and 2 more of this kind"


def test_commands_are_suggested(capsys):
    commands = {"one": Config, "two": Other}
    for argv, words in ((["tow"], "did you mean two?"), ([], "one, two")):
        assert words in " ".join(refused(capsys, argv, commands))


# ------------------------------------------------------------------ other names of a setting


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


def test_another_name_of_a_switch_can_be_negated(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("half: true\n", encoding="utf-8")
    assert parse(Recipe, ["--half"]).compile
    for flag in ("--no-half", "--no_half"):
        assert not parse(Recipe, ["--config", str(path), flag]).compile


def test_another_name_is_understood_in_a_file_and_overridden_by_the_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("learning_rate: 5e-4\nmax_length: 64\nhalf: true\n", encoding="utf-8")
    for flag in ("--learning_rate", "--max_lr"):
        config = parse(Recipe, ["--config", str(path), flag, "1e-4"])
        assert (config.max_lr, config.context_length, config.compile) == (1e-4, 64, True)
    assert from_yaml(Recipe, str(path)).max_lr == 5e-4


def test_another_name_belongs_to_its_command():
    commands = {"one": Config, "two": Other}
    assert parse(commands, ["one", "--lr", "2"]) == Config(lr=2.0)
    assert parse(commands, ["two", "--lr", "2"]) == Other(depth=2)


def test_help_lists_the_settings_own_names_only(capsys):
    with pytest.raises(SystemExit):
        parse(Recipe, ["--help"])
    text = capsys.readouterr().out
    assert "--max_lr" in text and "learning_rate" not in text and "OTHER_NAMES" not in text


@pytest.mark.parametrize(
    ("argv", "flags"),
    [
        (["--learning_rate", "1", "--max_lr", "2"], "--learning_rate, --max_lr"),
        (["--max-lr=1", "--learning-rate=1"], "--max-lr, --learning-rate"),
        (["--half", "--no-compile"], "--half, --no-compile"),
    ],
)
def test_one_setting_under_two_names_is_refused_on_the_line(argv, flags, capsys):
    assert refused(capsys, argv) == [f"{flags}: are the same setting; give one of them"]


def test_one_setting_under_two_names_is_refused_in_a_file(yaml_refused):
    line = "learning_rate, max_lr: are the same setting; give one of them"
    assert yaml_refused("learning_rate: 5e-4\nmax_lr: 1e-3\n") == [line]


def test_a_switch_given_twice_under_one_name_is_the_last_one():
    for name in ("half", "compile"):
        assert parse(Recipe, [f"--no-{name}", f"--{name}"]).compile
        assert not parse(Recipe, [f"--{name}", f"--no-{name}"]).compile


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--learning_rat", "1"], "--learning_rat: no such flag; did you mean --learning_rate?"),
        (["--context_len", "1"], "--context_len: no such flag; did you mean --context_length?"),
        (["--no-learning-rate"], "--no-learning-rate: no such flag; did you mean --learning_rate?"),
        (["--max_length", "many"], "--max_length: 'many' is not a whole number"),
        (["--max-length=many"], "--max-length: 'many' is not a whole number"),
        (["--learning_rate"], "--learning_rate: needs a number after it"),
        (["--scheduler", "wsd"], "--scheduler: 'wsd' is not one of 'cosine', 'linear'"),
        (["--scheduler"], "Missing value for argument '--scheduler'"),
    ],
)
def test_a_wrong_line_names_the_flag_that_was_typed(argv, line, capsys):
    (error,) = refused(capsys, argv)
    assert error.startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("learning_rat: 1\n", "'learning_rat': no such setting; did you mean learning_rate?"),
        ("learning_rate: [1]\n", "learning_rate: list is not of type float"),
        ("max_length: 1.5\n", "max_length: 1.5 is not of type int"),
        ("scheduler: wsd\n", "scheduler: 'wsd' is not one of 'cosine', 'linear'"),
        ("OTHER_NAMES: {}\n", "'OTHER_NAMES': no such setting"),
        ("config: b.yaml\n", "'config': no such setting"),
    ],
)
def test_a_wrong_file_names_the_setting_that_was_typed(text, line, yaml_refused):
    (error,) = yaml_refused(text)
    assert error.startswith(line)


def test_a_name_given_twice_and_an_alias_are_refused_in_a_file(yaml_refused):
    (line,) = yaml_refused("max_lr: 1\nbatch_size: 2\nmax_lr: 2\n")
    assert "line 3: max_lr is given twice" in line
    bomb = "a: &a [x, x]\n" + "".join(
        f"{n}: &{n} [{', '.join(['*' + before] * 9)}]\n"
        for before, n in zip("abcdefgh", "bcdefghi", strict=True)
    )
    (line,) = yaml_refused(bomb)
    assert "line 2: the alias *a; write it out" in line


def test_all_problems_of_a_file_are_reported_at_once(yaml_refused):
    assert len(yaml_refused("max_lr: fast\nbatch_size: many\ncontext_len: 1\n")) == 3


def test_class_variables_are_no_settings(capsys):
    (error,) = refused(capsys, ["--MAY_CHANGE", "x"], TrainConfig)
    assert "no such flag" in error


def test_every_name_of_a_class_variable_is_a_setting():
    for config_class in (RunConfig, TrainConfig):
        config = config_class()
        names = {*config.MAY_CHANGE, *config.IN_DATA, *config.OTHER_NAMES.values()}
        assert names <= set(vars(config)), names - set(vars(config))


@pytest.mark.parametrize("other_names", [{"rate": "no_field"}, {"name": "lr"}])
def test_another_name_that_cannot_be_one_is_a_bug(other_names):
    @dataclasses.dataclass
    class Wrong(Config):
        """A test."""

        OTHER_NAMES: ClassVar[dict[str, str]] = other_names

    with pytest.raises(AssertionError, match="other name"):
        parse(Wrong, [])


@dataclasses.dataclass
class Sectioned(Base):
    """Settings with a section."""

    SECTIONS: ClassVar[tuple] = ("model",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  batch_sise: 7\n", "'batch_sise': no such setting; did you mean batch_size?"),
        ("batch_size: 5\nmodel:\n  batch_size: 7\n", "are the same setting"),
        ("modl:\n  batch_size: 7\n", "'modl': no such setting"),
        ("model: 7\n", "'model': no such setting"),
    ],
)
def test_a_section_of_the_file_counts_as_its_lines(tmp_path, capsys, text, said):
    path = tmp_path / "a.yaml"
    path.write_text("model:\n  batch_size: 7\n  learning_rate: 1e-2\n", encoding="utf-8")
    assert from_yaml(Sectioned, str(path)) == Sectioned(str(path), 1e-2, 7)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        from_yaml(Sectioned, str(path))
    assert said in capsys.readouterr().err
