"""Names of permissive licences, and a file that says which repository has which licence."""

from __future__ import annotations

import json
import re
from pathlib import Path

# SPDX name -> how else it is written, in small letters and digits, without the word "license"
PERMISSIVE = {
    "MIT": ("mit", "expat", "mitx11"),
    "BSD-2-Clause": (
        "bsd2clause",
        "bsd2",
        "2clausebsd",
        "bsd2clausesimplified",
        "simplifiedbsd",
        "freebsd",
    ),
    "BSD-3-Clause": (
        "bsd3clause",
        "bsd3",
        "3clausebsd",
        "bsd3clauseneworrevised",
        "newbsd",
        "modifiedbsd",
    ),
    "Apache-2.0": ("apache20", "apache2", "apacheversion2", "apacheversion20", "apachesoftware20"),
    "ISC": ("isc",),
    "Unlicense": ("un",),
    "CC0-1.0": ("cc010", "cc0", "creativecommonszero10universal"),
    "0BSD": ("0bsd", "bsd0clause", "zeroclausebsd", "bsdzeroclause"),
    "Zlib": ("zlib",),
    "BSL-1.0": ("bsl10", "boostsoftware10", "boost10"),
}
_SPDX = {spelling: name for name, spellings in PERMISSIVE.items() for spelling in spellings}
WORDS = re.compile(r"\b(the)\b|licen[cs]es?|\bv(?=\d)|[^a-z0-9]+")
EXAMPLE = "write lines such as: KxSystems/ml Apache-2.0"


def permissive(licence: str | None) -> str | None:
    """
    The licence by its SPDX name if it is permissive, else None, also if it is not known.

    Of `A OR B` one must be permissive, of `A AND B` both.
    """
    choices = []
    for choice in re.split(r"\s+OR\s+", (licence or "").strip("() ")):
        names = [_SPDX.get(_plain(name)) for name in re.split(r"\s+AND\s+", choice.strip("() "))]
        if all(names):
            choices.append(" AND ".join(names))
    return " OR ".join(choices) or None


def _plain(name: str) -> str:
    return WORDS.sub("", name.lower())


def read_licences(path) -> dict[str, str]:
    """
    {repository: licence} of a file: lines `owner/name licence`, or a JSON object.

    Blank lines and what follows a # are ignored. Raises ValueError that names the line, or
    FileNotFoundError.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"--licenses: {path} is not a file; {EXAMPLE}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if text.lstrip().startswith("{"):
            pairs = list(json.loads(text).items())
        else:
            lines = [line.partition("#")[0] for line in text.splitlines()]
            pairs = [re.split(r"[:=,\s]+", line.strip(), maxsplit=1) for line in lines]
            pairs = [pair for pair in pairs if pair != [""]]
    except FileNotFoundError as e:
        raise FileNotFoundError(f"--licenses: {path} does not exist; {EXAMPLE}") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"--licenses: {path}: not readable ({e}); {EXAMPLE}") from e
    found = {}
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[1], str) or not pair[1].strip():
            raise ValueError(f"--licenses: {path}: {pair[0]!r} has no licence; {EXAMPLE}")
        repository, licence = pair[0].strip(), pair[1].strip()
        if found.setdefault(repository, licence) != licence:
            raise ValueError(f"--licenses: {path}: {repository} has two licences; keep one")
    if not found:
        raise ValueError(f"--licenses: {path} is empty; {EXAMPLE}")
    return found
