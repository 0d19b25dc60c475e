"""What the scripts of this recipe have in common: --print_default_config and --log_file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path

from parts.base.files import make_folder
from parts.cli.config import parse

NOT_IN_A_FILE = ("config", "print_default_config")


def parse_script(config_class):
    """
    The dataclass filled from the command line; from then on --log_file gets what is printed.

    The class has the fields config, print_default_config and log_file. --print_default_config
    prints a file for --config and exits with 0. Raises ValueError if the log cannot be written.
    """
    if any(word.replace("-", "_") == "__print_default_config" for word in sys.argv[1:]):
        print(default_config(config_class), end="")
        sys.exit(0)
    config = parse(config_class)
    if config.log_file is not None:
        start_log(config.log_file)
    return config


def default_config(config_class) -> str:
    """The defaults of a dataclass as a YAML file for --config."""
    import yaml  # here: only this flag needs it

    values = {}
    for field in dataclasses.fields(config_class):
        if field.name not in NOT_IN_A_FILE and field.default is not dataclasses.MISSING:
            value = field.default
            values[field.name] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(values, sort_keys=False)


def start_log(path) -> None:
    """
    Append all that is printed from now on to a file, after a line with the time and the command.

    Progress bars are left out. Raises ValueError, naming the flag, if the file cannot be written.
    """
    try:
        make_folder(Path(path).parent)
        log = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  open until the exit
    except OSError as e:
        what = f"--log_file: {e.filename or path}: {e.strerror}"
        raise ValueError(f"{what}; choose a file that can be written") from e
    command = shlex.join([os.path.basename(sys.executable), *sys.argv])
    log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {command}\n")
    sys.stdout = _Copied(sys.stdout, log)
    sys.stderr = _Copied(sys.stderr, log)


class _Copied:
    """A text stream whose text also goes to a log, but for the bars that overwrite their line."""

    def __init__(self, stream, log):
        self._stream = stream
        self._log = log
        self._after_bar = False

    def write(self, text: str) -> int:
        """Write to both; a full disk under the log loses text there and does not end the run."""
        ends_bar = self._after_bar and text == "\n"
        self._after_bar = "\r" in text
        if not self._after_bar and not ends_bar:
            with contextlib.suppress(OSError):
                self._log.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
