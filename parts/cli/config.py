"""
From a dataclass to a command line: `--field value` for each field, its comment as help, one line per problem.

Defaults <- one YAML file <- command line. PyYAML reads `5e-4` as text and `no` as False, so a value of the file is
converted by the type of its field.
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
    The dataclass filled from the command line (`argv`, default sys.argv[1:]); `notes` stand below its docstring in --help.

    Flags are the field names, `_` and `-` both accepted, booleans as --flag/--no-flag. A field named `config` takes a YAML
    file whose values stand under those of the line. A dict {name: dataclass} makes commands: `script.py name --flag ...`.
    A wrong line or file prints one `error:` per problem and exits with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(config_class, dict):
        if argv and argv[0] not in config_class and not argv[0].startswith("-"):
            _refuse(
                [
                    f"{argv[0]!r}: no such command{_nearest(argv[0], list(config_class))}; there are {', '.join(config_class)}"
                ]
            )
        commands = [
            Annotated[c, tyro.conf.subcommand(name, prefix_name=False)]
            for name, c in config_class.items()
        ]
        assert len(commands) > 1, (
            "tyro takes a Union of one member for that member, without a command name"
        )
        tyro_type = Union[tuple(commands)]  # noqa: UP007
        classes = config_class.values()
    else:
        tyro_type, classes = config_class, [config_class]
    default = {}
    if (
        "config" in getattr(config_class, "__dataclass_fields__", {})
        and (path := _value_of("--config", argv)) is not None
    ):
        default = {"default": from_yaml(config_class, path)}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            description = f"{config_class.__doc__}{notes}" if notes else None
            return tyro.cli(
                tyro_type, args=argv, use_underscores=True, description=description, **default
            )
    except SystemExit as e:
        if e.code:
            _refuse(_problems(printed.getvalue(), argv, classes))
        raise


def _value_of(flag: str, argv) -> str | None:
    values = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == flag]
    values += [word.partition("=")[2] for word in argv if word.startswith(f"{flag}=")]
    if len(values) > 1:
        _refuse([f"{flag}: stands {len(values)} times ({', '.join(values)}); give one file"])
    return values[0] if values else None


def from_yaml(config_class, path: str):
    """The dataclass filled from a YAML file of `field: value` lines. Prints every problem and exits with 2 if there is one."""
    import yaml  # here: only a run with --config needs it

    try:
        with open(path, encoding="utf-8") as f:
            text = f.read(MAX_YAML_CHARS + 1)
        if len(text) > MAX_YAML_CHARS:
            raise ValueError(f"longer than {MAX_YAML_CHARS:,} characters")
        values = yaml.safe_load(text)
    except OSError as e:
        _refuse([f"--config: {path or 'is empty'}: {e.strerror}"])
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as e:
        _refuse(
            [
                f"{path}: not readable as YAML ({' '.join(str(e).split())[:200]}); write lines such as max_lr: 5e-4"
            ]
        )
    if not isinstance(values, dict) and values is not None:
        _refuse(
            [
                f"{path}: holds {type(values).__name__}, not a mapping; write lines such as max_lr: 5e-4"
            ]
        )
    types, done, problems = typing.get_type_hints(config_class), {}, []
    for name, value in (values or {}).items():
        if name not in types or name == "config":
            problems.append(
                f"{path}: {str(name)[:50]!r}: no such setting{_nearest(str(name), sorted(types))}"
            )
            continue
        try:
            done[name] = _converted(value, types[name])
        except (TypeError, ValueError, OverflowError):
            shown = (
                repr(value)[:50]
                if isinstance(value, str | int | float | bool | None)
                else type(value).__name__
            )
            kind = (
                getattr(types[name], "__name__", str(types[name]))
                .replace("NoneType", "nothing")
                .replace("typing.", "")
            )
            problems.append(f"{path}: {name}: {shown} is not of type {kind}")
    if problems:
        _refuse(problems)
    return dataclasses.replace(config_class(), config=path, **done)


def _converted(value, kind):
    """A YAML value as the field's type; raises ValueError or TypeError where it is none."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        if value not in choices:
            raise ValueError
        return value
    if choices:  # T | None
        return (
            None
            if value is None and type(None) in choices
            else _converted(value, next(c for c in choices if c is not type(None)))
        )
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
    if (
        os.environ.get("RANK", "0") == "0"
    ):  # torchrun starts the same line many times: one answer is enough
        rest = [f"and {len(problems) - 3} more of this kind"] if len(problems) > 4 else []
        for problem in [*problems[: 3 if rest else 4], *rest]:
            print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def _nearest(word: str, known) -> str:
    near = difflib.get_close_matches(re.sub(r"(?<=\w)-", "_", word.lower()), known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _problems(text: str, argv, classes) -> list[str]:
    """What is wrong with the line: every unknown flag and every wrong number, else tyro's own words on one line."""
    types = {name: t for c in classes for name, t in typing.get_type_hints(c).items()}
    known = {*types, *(f"no_{f}" for f in types), "help"}
    problems = []
    for i, word in enumerate(argv):
        flag, _, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--"):
            continue
        if name not in known:
            problems.append(
                f"{flag}: no such flag{_nearest(flag, [f'--{k}' for k in sorted(known)])} (see --help)"
            )
            continue
        for kind, words in ((int, "a whole number"), (float, "a number")):
            if types.get(name) in (kind, kind | None):
                value = value or (argv[i + 1] if i + 1 < len(argv) else "")
                with contextlib.suppress(ValueError):
                    kind(value)
                    break
                if value != "None":
                    problems.append(
                        f"--{name}: {value!r} is not {words}"
                        if value
                        else f"--{name}: needs {words} behind it"
                    )
    if problems:
        return problems
    # A box has a title, rules of dashes, and the words in between; where the terminal knows no box characters, dashes stand for them.
    body = " ".join(
        line.strip("│╭╮╰╯ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))
    )
    sections = [
        section.strip()
        for section in re.split(r"[─-]{5,}|For full helptext", body)
        if section.strip()
    ]
    body = (
        " ".join(sections["╭" not in text :][0].split()).removeprefix("Error parsing ")
        if sections
        else "not understood"
    )
    if m := re.search(r"invalid choice (.*?) for argument '(--[\w-]+)'.*?\((.*)\)", body):
        return [f"{m[2]}: {m[1]} is not one of {m[3]}"]
    return [f"{body} (see --help)"]
