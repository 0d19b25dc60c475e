"""
Turn a dataclass into a command line: `--field value` for each field, with its comment as help.

Values come from the defaults, then from one YAML file, then from the command line. PyYAML reads
`5e-4` as text and `no` as False, so a value of the file is converted to the type of its field.
Every problem is reported in one line.

A setting may have other names, given by a class variable; --help shows only the field's own:

    OTHER_NAMES: ClassVar[dict[str, str]] = {"learning_rate": "max_lr"}

Another class variable names mappings of the YAML file whose lines count as its own:

    SECTIONS: ClassVar[tuple] = ("model",)
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import math
import os
import re
import sys
import typing
from typing import Annotated, NoReturn, Union

import tyro

from parts.base.text import one_line
from parts.cli.foreign_names import name_here

MAX_YAML_CHARS = 1 << 20
MAX_PROBLEMS = 4  # more are counted, not printed
NUMBERS = {int: "a whole number", float: "a number"}


# --- the command line


def positional(name: str, kind: type = str):
    """The type of a field that is given without a flag, under this name in --help."""
    return Annotated[kind, tyro.conf.Positional, tyro.conf.arg(metavar=name)]


def parse(config_class, argv=None, notes: str = ""):
    """
    Return the dataclass filled from the command line `argv` (default: sys.argv[1:]).

    Flags are the field names and those in OTHER_NAMES, `_` and `-` both accepted, booleans as
    --flag/--no-flag. A field named `config` takes a YAML file, which the command line overrides.
    A dict {name: dataclass} makes commands: `script.py name --flag ...`. `notes` are printed below
    the docstring of the class in --help.
    A wrong line or file prints one `error:` per problem and exits with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    tyro_type = config_class
    classes = [config_class]
    if isinstance(config_class, dict):
        tyro_type, classes = _commands(config_class, argv)
    own_argv, typed = _with_own_names(argv, classes)
    options = {"description": f"{config_class.__doc__}{notes}" if notes else None}
    if "config" in getattr(config_class, "__dataclass_fields__", {}):
        path = _value_of("--config", own_argv)
        if path is not None:
            options["default"] = from_yaml(config_class, path)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(tyro_type, args=own_argv, use_underscores=True, **options)
    except SystemExit as e:
        if e.code:
            _refuse(_problems(printed.getvalue(), argv, typed, classes))
        raise


def _commands(config_classes: dict, argv) -> tuple[object, list]:
    """(type for tyro, classes whose flags the line may have) of the commands {name: dataclass}."""
    assert len(config_classes) > 1, "tyro gives a Union of one member no command name"
    names = list(config_classes)
    word = argv[0] if argv else ""
    if word and word not in names and not word.startswith("-"):
        nearest = nearest_name(word, names)
        _refuse([f"{word!r}: no such command{nearest}; the commands are {', '.join(names)}"])
    members = [
        Annotated[c, tyro.conf.subcommand(name, prefix_name=False)]
        for name, c in config_classes.items()
    ]
    classes = [config_classes[word]] if word in names else list(config_classes.values())
    return Union[tuple(members)], classes  # noqa: UP007


def _types(classes) -> dict:
    """{field: its type} of dataclasses. Class variables are no fields."""
    types = {}
    for c in classes:
        hints = typing.get_type_hints(c)
        types |= {field.name: hints[field.name] for field in dataclasses.fields(c)}
    return types


def _other_names(classes) -> dict[str, str]:
    """{other name: field} of dataclasses."""
    others = {}
    for c in classes:
        of_class = getattr(c, "OTHER_NAMES", {})
        fields = {field.name for field in dataclasses.fields(c)}
        assert fields.issuperset(of_class.values()), f"{c.__name__}: other name of no field"
        assert fields.isdisjoint(of_class), f"{c.__name__}: other name is a field already"
        others |= of_class
    return others


def _split_flag(word: str) -> tuple[str, str, str]:
    """(flag as typed, name with underscores, value after `=`); no name if it is not a flag."""
    flag, _, value = word.partition("=")
    name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
    return flag, name, value


def _with_own_names(argv, classes) -> tuple[list[str], dict[str, str]]:
    """
    (argv with the fields' own names, {field: flag as typed} of those that had another name).

    Refuses a setting that is given under two names.
    """
    types = _types(classes)
    others = _other_names(classes)
    own_argv = []
    given = {}  # field -> (its name on the line, the flag as typed)
    problems = []
    for word in argv:
        flag, name, _ = _split_flag(word)
        no = ""
        if name not in {**types, **others} and name.startswith("no_"):
            no = "no_"
            name = name.removeprefix(no)
        own = others.get(name, name)
        if no and types.get(own) is not bool:
            own = None  # an unknown flag
        if own in types:
            first_name, first_flag = given.setdefault(own, (name, flag))
            if first_name != name:
                problems.append(f"{first_flag}, {flag}: are the same setting; give one of them")
            if name != own:
                word = f"--{no}{own}{word.removeprefix(flag)}"
        own_argv.append(word)
    if problems:
        _refuse(problems)
    typed = {own: flag for own, (name, flag) in given.items() if name != own}
    return own_argv, typed


def _value_of(flag: str, argv) -> str | None:
    values = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == flag]
    values += [word.partition("=")[2] for word in argv if word.startswith(f"{flag}=")]
    if len(values) > 1:
        _refuse([f"{flag}: is given {len(values)} times ({', '.join(values)}); give one file"])
    return values[0] if values else None


# --- the YAML file


def from_yaml(config_class, path: str):
    """
    Return the dataclass filled from a YAML file of `field: value` lines.

    Names in OTHER_NAMES are accepted, and mappings named in SECTIONS. Prints every problem and
    exits with 2 if there is one.
    """
    types = _types([config_class])
    others = _other_names([config_class])
    names = {}  # field -> its name in the file
    values = {}
    problems = []
    for name, value in _without_sections(_read_yaml(path), config_class):
        own = others.get(name, name)
        if own not in types or own == "config":
            known = sorted({*types, *others})
            nearest = name_here(str(name), types) or nearest_name(str(name), known)
            problems.append(f"{path}: {str(name)[:50]!r}: no such setting{nearest}")
        elif own in names:
            problems.append(f"{path}: {names[own]}, {name}: are the same setting; give one of them")
        else:
            names[own] = name
            try:
                values[own] = converted(value, types[own])
            except (TypeError, ValueError, OverflowError):
                problems.append(f"{path}: {name}: {shown(value)} is not {words_of(types[own])}")
    if problems:
        _refuse(problems)
    return dataclasses.replace(config_class(), config=path, **values)


def _without_sections(lines: dict, config_class):
    """Yield (name, value) of the lines of a file, and of its sections."""
    for name, value in lines.items():
        if name in getattr(config_class, "SECTIONS", ()) and isinstance(value, dict):
            yield from value.items()
        else:
            yield name, value


def _read_yaml(path: str) -> dict:
    """As read_yaml; prints the problem and exits with 2."""
    try:
        return read_yaml(path)
    except OSError as e:
        _refuse([f"--config: {path or 'is empty'}: {e.strerror}"])
    except ValueError as e:
        _refuse([f"{path}: {e}"])


def read_yaml(path, example: str = "write lines such as max_lr: 5e-4") -> dict:
    """
    The mapping in a YAML file; {} if the file is empty.

    Plain values, lists and mappings only. Raises OSError, or ValueError with what is wrong with the
    contents: no mapping, a tag, a name that is given twice, or an alias, which makes a file of a
    few lines as large as one likes.
    """
    import yaml  # here: only a run with a file needs it

    with open(path, encoding="utf-8") as f:
        try:
            text = f.read(MAX_YAML_CHARS + 1)
            if len(text) > MAX_YAML_CHARS:
                raise ValueError(f"longer than {MAX_YAML_CHARS:,} characters")
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                if isinstance(event, yaml.AliasEvent):
                    line = event.start_mark.line + 1
                    raise ValueError(f"line {line}: the alias *{event.anchor[:50]}; write it out")
            _refuse_repeated(yaml.compose(text, Loader=yaml.SafeLoader))
            values = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as e:
            reason = one_line(e, 200)
            raise ValueError(f"not readable as YAML ({reason}); {example}") from e
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"holds {type(values).__name__}, not a mapping; {example}")
    return values


def _refuse_repeated(node) -> None:
    """Raise ValueError if a mapping in a tree of YAML nodes has a name twice."""
    if isinstance(getattr(node, "value", None), str | None):
        return
    names = set()
    for part in node.value:
        name, value = part if isinstance(part, tuple) else (None, part)
        if name is not None and isinstance(name.value, str):
            if name.value in names:
                line = name.start_mark.line + 1
                raise ValueError(f"line {line}: {name.value[:50]} is given twice; keep one")
            names.add(name.value)
        _refuse_repeated(value)


def converted(value, kind):
    """A YAML value as the field's type. Raises ValueError or TypeError if it does not fit."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        if value not in choices:
            raise ValueError
        return value
    if typing.get_origin(kind) is tuple:  # tuple[T, ...]: a list, or one value
        values = value if isinstance(value, list) else [value]
        return tuple(converted(each, choices[0]) for each in values)
    if choices:  # T | None
        if value is None and type(None) in choices:
            return None
        return converted(value, next(c for c in choices if c is not type(None)))
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    if kind in (int, float) and not math.isfinite(float(value)):
        raise ValueError
    return kind(value)


def shown(value) -> str:
    """A YAML value in an error message."""
    if isinstance(value, str | int | float | bool | None):
        return repr(value)[:50]
    return type(value).__name__


def words_of(kind) -> str:
    """What a value of this type is, for an error message."""
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(kind)))}"
    name = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)
    return f"of type {name.replace('typing.', '')}"


# --- what is wrong


def _refuse(problems) -> NoReturn:
    """Print the problems, one per line, and exit with 2."""
    if os.environ.get("RANK", "0") == "0":  # torchrun starts the same command many times
        lines = list(problems)
        if len(lines) > MAX_PROBLEMS:
            n_more = len(lines) - MAX_PROBLEMS + 1
            lines = [*lines[: MAX_PROBLEMS - 1], f"and {n_more} more of this kind"]
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def nearest_name(word: str, known) -> str:
    """A question with the name in `known` that is most similar, else nothing."""
    near = difflib.get_close_matches(re.sub(r"(?<=\w)-", "_", word.lower()), known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _suggestion(flag: str, name: str, known: list[str]) -> str:
    """What an unknown flag may mean: a field of another program's name, or of a similar one."""
    bare = name.removeprefix("no_")
    if bare not in known and (words := name_here(bare, known)):
        return words
    # what all flags of a kind begin with does not make them similar
    similar = nearest_name(bare.removeprefix("use_"), [k.removeprefix("use_") for k in known])
    return nearest_name(flag, [f"--{k}" for k in known]) if similar else ""


def _problems(tyro_output: str, argv, typed: dict[str, str], classes) -> list[str]:
    """Every unknown flag and every wrong number on the line, else tyro's own words in one line."""
    types = _types(classes)
    types |= {other: types[own] for other, own in _other_names(classes).items()}
    booleans = {f"no_{name}" for name, kind in types.items() if kind is bool}
    known = sorted({*types, *booleans, "help"})
    problems = []
    for i, word in enumerate(argv):
        flag, name, value = _split_flag(word)
        if not name:
            continue
        if name not in known:
            problems.append(f"{flag}: no such flag{_suggestion(flag, name, known)} (see --help)")
            continue
        if not value and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            value = argv[i + 1]
        if types.get(name.removeprefix("no_")) is bool and value:
            own = name.removeprefix("no_")
            problems.append(f"{flag}: takes no value; write --{own} or --no_{own}")
        problems += _wrong_number(flag, value, types.get(name))
    return problems or [_tyro_words(tyro_output, typed)]


def _wrong_number(flag: str, value: str, kind) -> list[str]:
    """What is wrong with the value of a flag whose type is a number, or a number or None."""
    for number, words in NUMBERS.items():
        if kind in (number, number | None):
            if not value:
                return [f"{flag}: needs {words} after it"]
            try:
                number(value)
            except ValueError:
                return [f"{flag}: {value!r} is not {words}"] if value != "None" else []
    return []


def _tyro_words(text: str, typed: dict[str, str]) -> str:
    """
    The message inside tyro's box, in one line, with the flags as they were typed.

    A box has a title, rules of dashes, and the message between two rules. Dashes take the place of
    box characters if the terminal has none.
    """
    lines = [line for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    message = " ".join(line.strip("│╭╮╰╯ ") for line in lines)
    sections = re.split(r"[─-]{5,}|For full helptext", message)
    sections = [" ".join(section.split()) for section in sections if section.strip()]
    sections = sections["╭" not in text :]
    body = sections[0].removeprefix("Error parsing ") if sections else "not understood"
    for own, flag in typed.items():
        body = re.sub(rf"--{own}\b", flag, body)
    if m := re.search(r"invalid choice (.*?) for argument '(--[\w-]+)'.*?\((.*)\)", body):
        return f"{m[2]}: {m[1]} is not one of {m[3]}"
    return f"{body} (see --help)"
