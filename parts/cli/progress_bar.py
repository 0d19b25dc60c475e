"""
tqdm, or where it is not installed something that shows nothing: a month of training does not hang on its progress bar.

    from parts.cli.progress_bar import tqdm
"""

from __future__ import annotations

import contextlib

try:
    from tqdm import tqdm
except ModuleNotFoundError:

    class tqdm(contextlib.nullcontext):  # noqa: N801  stands in for it
        """What our scripts use of tqdm, without a bar."""

        def __init__(self, items=(), initial: int = 0, **_):
            super().__init__(self)
            self.items, self.n = items, initial

        def __iter__(self):
            return iter(self.items)

        def update(self, n: int = 1) -> None:
            """Count on."""
            self.n += n

        def set_postfix_str(self, *_, **__) -> None:
            """Nothing to show."""

        def close(self) -> None:
            """Nothing to end."""

        @staticmethod
        def external_write_mode():
            """Around a print: there is no bar to move out of the way."""
            return contextlib.nullcontext()
