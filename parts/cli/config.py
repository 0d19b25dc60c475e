"""
From a dataclass to a command line: `--field value` for each field, its comment as help text.

Defaults <- one YAML file <- command line. PyYAML reads `5e-4` as text and `no` as False, so a value
in the file is converted by the type of its field. A wrong line or file prints one `error:` per
problem.

A class may have a class variable OTHER_NAMES, {"learning_rate": "max_lr"}: other names of its
fields, understood on the command line and in the file. --help lists the fields' own names.
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

MAX_YAML_CHARS = 1 << 20


def parse(config_class, argv=None, notes: str = ""):
    """
    The dataclass filled from the command line (`argv`, default sys.argv[1:]).

    Flags are the field names, `_` and `-` both accepted, booleans as --flag/--no-flag. A field
    named `config` takes a YAML file whose values the command line overrides. A dict {name:
    dataclass} makes commands: `script.py name --flag ...`. `notes` follow its docstring in --help.
    Prints an error and exits with 2 if the line or the file is wrong.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(config_class, dict):
        tyro_type, classes = _commands(config_class, argv), list(config_class.values())
    else:
        tyro_type, classes = config_class, [config_class]
    typed = argv
    argv = _own_flags(argv, _other_names(classes))
    default = {}
    if "config" in _types(classes[:1]) and (path := _value_of("--config", argv)) is not None:
        default = {"default": from_yaml(config_class, path)}
    description = f"{config_class.__doc__}{notes}" if notes else None
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                tyro_type, args=argv, use_underscores=True, description=description, **default
            )
    except SystemExit as e:
        if e.code:
            _refuse(_problems(printed.getvalue(), typed, classes))
        raise


def _commands(commands: dict, argv: list):
    """tyro's type of {name: dataclass}, after a look at the command that was given."""
    if argv and argv[0] not in commands and not argv[0].startswith("-"):
        nearest = _nearest(argv[0], list(commands))
        _refuse([f"{argv[0]!r}: no such command{nearest}; there are {', '.join(commands)}"])
    assert len(commands) > 1, "tyro takes a Union of one member for that member, without its name"
    members = [
        Annotated[c, tyro.conf.subcommand(name, prefix_name=False)] for name, c in commands.items()
    ]
    return Union[tuple(members)]  # noqa: UP007


def _types(classes) -> dict:
    """{field: type} of all these dataclasses."""
    types = {}
    for c in classes:
        hints = typing.get_type_hints(c)
        types |= {field.name: hints[field.name] for field in dataclasses.fields(c)}
    return types


def _other_names(classes) -> dict[str, str]:
    """{other name: field} of all these dataclasses."""
    return {k: v for c in classes for k, v in getattr(c, "OTHER_NAMES", {}).items()}


def _name_of(word: str) -> str:
    """The setting that a word such as --max-lr=1e-3 names: max_lr."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def _own_flags(argv: list, other_names: dict) -> list:
    """
    The words with each flag under its field's own name.

    Exits with 2 if a setting is given under two of its names.
    """
    out, seen, problems = [], {}, []
    for word in argv:
        name = _name_of(word)
        no = "no_" if name.startswith("no_") and name[3:] in other_names else ""
        field = other_names.get(name[len(no) :])
        if word.startswith("--") and field:
            _, equals, value = word.partition("=")
            out.append(f"--{no}{field}{equals}{value}")
        else:
            out.append(word)
        if word.startswith("--"):
            field = field or name
            flag = word.partition("=")[0]
            earlier = seen.setdefault(field, flag)
            if _name_of(earlier) != _name_of(flag) and field in other_names.values():
                problems.append(f"{earlier}, {flag}: are the same setting; give one of them")
    if problems:
        _refuse(problems)
    return out


def _value_of(flag: str, argv) -> str | None:
    values = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == flag]
    values += [word.partition("=")[2] for word in argv if word.startswith(f"{flag}=")]
    if len(values) > 1:
        _refuse([f"{flag}: is given {len(values)} times ({', '.join(values)}); give one file"])
    return values[0] if values else None


def from_yaml(config_class, path: str):
    """The dataclass filled from a YAML file of `field: value` lines; exits with 2 on a problem."""
    values = _read_yaml(path)
    types, other_names = _types([config_class]), _other_names([config_class])
    known = sorted({*types, *other_names})
    done, problems = {}, []
    for key, value in values.items():
        name = other_names.get(key, key)
        if name not in types or name == "config":
            nearest = _nearest(str(key), known)
            problems.append(f"{path}: {str(key)[:50]!r}: no such setting{nearest}")
            continue
        if name in done:
            problems.append(f"{path}: {key}: {name} is set twice, under two names")
        try:
            done[name] = _converted(value, types[name])
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{path}: {key}: {_shown(value)} is not of type {_kind(types[name])}")
    if problems:
        _refuse(problems)
    return dataclasses.replace(config_class(), config=path, **done)


def _read_yaml(path: str) -> dict:
    import yaml  # here: only a run with --config needs it

    example = "write lines such as max_lr: 5e-4"
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read(MAX_YAML_CHARS + 1)
        if len(text) > MAX_YAML_CHARS:
            raise ValueError(f"longer than {MAX_YAML_CHARS:,} characters")
        values = yaml.safe_load(text)
    except OSError as e:
        _refuse([f"--config: {path or 'is empty'}: {e.strerror}"])
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as e:
        reason = " ".join(str(e).split())[:200]
        _refuse([f"{path}: not readable as YAML ({reason}); {example}"])
    if values is None:
        return {}
    if not isinstance(values, dict):
        _refuse([f"{path}: holds {type(values).__name__}, not a mapping; {example}"])
    return values


def _shown(value) -> str:
    if isinstance(value, str | int | float | bool | None):
        return repr(value)[:50]
    return type(value).__name__


def _kind(kind) -> str:
    name = getattr(kind, "__name__", str(kind))
    return name.replace("NoneType", "nothing").replace("typing.", "")


def _converted(value, kind):
    """A YAML value as the field's type; raises ValueError or TypeError if it is not of that type."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        if value not in choices:
            raise ValueError
        return value
    if choices:  # T | None
        if value is None and type(None) in choices:
            return None
        return _converted(value, next(c for c in choices if c is not type(None)))
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


def _refuse(problems) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":  # torchrun starts the same command many times
        rest = [f"and {len(problems) - 3} more of this kind"] if len(problems) > 4 else []
        for problem in [*problems[: 3 if rest else 4], *rest]:
            print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def _nearest(word: str, known) -> str:
    word = re.sub(r"(?<=\w)-", "_", word.lower())
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _problems(text: str, argv, classes) -> list[str]:
    """
    What is wrong with the line: every unknown flag and every wrong number.

    text: what tyro printed; its own words, on one line, if nothing else is found.
    """
    types, other_names = _types(classes), _other_names(classes)
    types |= {other: types[name] for other, name in other_names.items() if name in types}
    known = {*types, *(f"no_{name}" for name in types), "help"}
    flags = [f"--{name}" for name in sorted(known)]
    problems = []
    for i, word in enumerate(argv):
        flag, _, value = word.partition("=")
        name = _name_of(word)
        if not flag.startswith("--"):
            continue
        if name not in known:
            problems.append(f"{flag}: no such flag{_nearest(flag, flags)} (see --help)")
            continue
        for kind, words in ((int, "a whole number"), (float, "a number")):
            if types.get(name) not in (kind, kind | None):
                continue
            value = value or (argv[i + 1] if i + 1 < len(argv) else "")
            with contextlib.suppress(ValueError):
                kind(value)
                break
            if not value:
                problems.append(f"--{name}: needs {words} after it")
            elif value != "None":
                problems.append(f"--{name}: {value!r} is not {words}")
    return problems or [_words_of_tyro(text)]


def _words_of_tyro(text: str) -> str:
    """The message of tyro's error box, on one line."""
    # A box has a title, rulers, and the words in between. A terminal without box characters gets
    # dashes in their place.
    lines = [line for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    body = " ".join(line.strip("│╭╮╰╯ ") for line in lines)
    sections = [part.strip() for part in re.split(r"[─-]{5,}|For full helptext", body)]
    sections = [part for part in sections if part]
    body = "not understood"
    if sections:
        body = " ".join(sections["╭" not in text :][0].split()).removeprefix("Error parsing ")
    if m := re.search(r"invalid choice (.*?) for argument '(--[\w-]+)'.*?\((.*)\)", body):
        return f"{m[2]}: {m[1]} is not one of {m[3]}"
    return f"{body} (see --help)"
