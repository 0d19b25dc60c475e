"""From a dataclass to a command line: `--field value` for each field, its comment as help, one line per problem."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
import typing
from typing import Annotated, Union

import tyro


def parse(config_class, argv=None, notes: str = ""):
    """
    The dataclass filled from the command line (`argv`, default sys.argv[1:]); `notes` stand below its docstring in --help.

    Flags are the field names, `_` and `-` both accepted, booleans as --flag/--no-flag. A dict {name: dataclass} makes
    commands: `script.py name --flag ...`. A wrong line prints one `error:` per problem and exits with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(config_class, dict):
        if argv and argv[0] not in config_class and not argv[0].startswith("-"):
            _refuse([f"{argv[0]!r}: no such command{_nearest(argv[0], list(config_class))}; there are {', '.join(config_class)}"])
        commands = [Annotated[c, tyro.conf.subcommand(name, prefix_name=False)] for name, c in config_class.items()]
        # tyro takes a Union of one member for that member, without a command name
        tyro_type = Union[tuple(commands)]  # noqa: UP007
        classes = config_class.values()
    else:
        tyro_type, classes = config_class, [config_class]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(tyro_type, args=argv, use_underscores=True, description=f"{config_class.__doc__}{notes}" if notes else None)
    except SystemExit as e:
        if e.code:
            _refuse(_problems(printed.getvalue(), argv, classes))
        raise


def _refuse(problems) -> None:
    for problem in problems:
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
            problems.append(f"{flag}: no such flag{_nearest(flag, [f'--{k}' for k in sorted(known)])} (see --help)")
            continue
        for kind, words in ((int, "a whole number"), (float, "a number")):
            if types.get(name) in (kind, kind | None):
                value = value or (argv[i + 1] if i + 1 < len(argv) else "")
                with contextlib.suppress(ValueError):
                    kind(value)
                    break
                if value != "None":
                    problems.append(f"--{name}: {value!r} is not {words}" if value else f"--{name}: needs {words} behind it")
    if problems:
        return problems
    # A box has a title, rules of dashes, and the words in between; where the terminal knows no box characters, dashes stand for them.
    body = " ".join(line.strip("│╭╮╰╯ ") for line in text.splitlines() if not line.startswith(("╭", "╰")))
    sections = [section.strip() for section in re.split(r"[─-]{5,}|For full helptext", body) if section.strip()]
    body = " ".join(sections["╭" not in text :][0].split()).removeprefix("Error parsing ") if sections else "not understood"
    if m := re.search(r"invalid choice (.*?) for argument '(--[\w-]+)'.*?\((.*)\)", body):
        return [f"{m[2]}: {m[1]} is not one of {m[3]}"]
    return [f"{body} (see --help)"]
