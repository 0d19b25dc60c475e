"""
tqdm, or a stand-in without a bar if tqdm is missing or broken: no script needs a progress bar.

    from parts.cli.progress_bar import tqdm
"""

from __future__ import annotations

import contextlib
import sys

from parts.cli.launch import error_line

try:
    from tqdm import tqdm
except ImportError as e:  # torch itself cannot do with a tqdm that raises anything else
    why_no_bar = error_line(e)

    class tqdm(contextlib.nullcontext):  # noqa: N801  the name it replaces
        """The part of tqdm that our scripts use, without a bar; the first one says so."""

        is_said = False

        def __init__(self, items=(), initial: int = 0, disable: bool = False, **_):
            super().__init__(self)
            self.items = items
            self.n = initial
            if not disable and not tqdm.is_said:
                tqdm.is_said = True
                what = f"note: no progress bar, tqdm cannot be imported: {why_no_bar}"
                print(f"{what}; pip install tqdm", file=sys.stderr)

        def __iter__(self):
            return iter(self.items)

        def update(self, n: int = 1) -> None:
            """Count n more."""
            self.n += n

        def set_postfix_str(self, *_, **__) -> None:
            """Nothing to show."""

        def close(self) -> None:
            """Nothing to end."""

        @staticmethod
        def write(text: str) -> None:
            """Print; there is no bar to move away."""
            print(text)

        @staticmethod
        def external_write_mode():
            """Context for a print; there is no bar to move away."""
            return contextlib.nullcontext()
