"""
tqdm, or a stand-in that shows nothing if tqdm is not installed: training needs no progress bar.

    from parts.cli.progress_bar import tqdm
"""

from __future__ import annotations

import contextlib

try:
    from tqdm import tqdm
except ModuleNotFoundError:

    class tqdm(contextlib.nullcontext):  # noqa: N801  the name it replaces
        """The part of tqdm that our scripts use, without a bar."""

        def __init__(self, items=(), initial: int = 0, **_):
            super().__init__(self)
            self.items = items
            self.n = initial

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
        def external_write_mode():
            """Context for a print; there is no bar to move away."""
            return contextlib.nullcontext()
