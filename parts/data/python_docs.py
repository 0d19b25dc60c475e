"""
Text without data and without a network: the English that comes with Python.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sysconfig
from pathlib import Path


def python_docs() -> list[str]:
    """
    About 1 MB of English that comes with Python: pydoc's topics and the library's docstrings.

    Paragraphs of code, tables and repetitions are left out. The same Python gives the same texts.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    texts = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    not_library = {"site-packages", "test", "tests", "idle_test", "lib2to3"}
    for file in sorted(library.rglob("*.py")):
        if not not_library & set(file.relative_to(library).parts):
            texts.append("\n\n".join(_docstrings(file)))
    documents, seen = [], set()
    for text in texts:
        prose = []
        for paragraph in text.split("\n\n"):
            letters = "".join(paragraph.split())
            if _is_prose(letters) and letters not in seen:
                seen.add(letters)
                prose.append(inspect.cleandoc(paragraph))
        if prose:
            documents.append("\n\n".join(prose))
    return documents


def _docstrings(file: Path) -> list[str]:
    """The docstrings of a module, its classes and functions; none if it is not valid Python."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):  # some files of the library are wrong on purpose
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]


def _is_prose(chars: str) -> bool:
    """Whether a paragraph without its white space is prose: long enough, letters, no doctest."""
    n_letters = sum(map(str.isalpha, chars))
    return len(chars) > 50 and n_letters > 0.85 * len(chars) and ">>>" not in chars
