"""docs/reading-guide.md is what its script writes, and each of its lines and figures is true."""

import importlib.util
import re

import pytest
from conftest import ROOT
from documents import DOCS

GUIDE = DOCS["docs/reading-guide.md"]


def guide_maker():
    """docs/make_reading_guide.py as a module."""
    path = ROOT / "docs/make_reading_guide.py"
    spec = importlib.util.spec_from_file_location("make_reading_guide", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reading_guide_is_what_its_script_writes():
    assert guide_maker().guide() == GUIDE, "run python docs/make_reading_guide.py"


def test_the_guide_has_every_line_of_the_simple_trainer_in_one_row():
    rows = re.findall(r"^\| \[(\d+)(?:-(\d+))?\]", GUIDE, flags=re.MULTILINE)
    covered = [n for first, last in rows for n in range(int(first), int(last or first) + 1)]
    lines = (ROOT / "pretraining_simple.py").read_text(encoding="utf-8").splitlines()
    code = [n for n, line in enumerate(lines, 1) if line.strip() and not line.startswith("# ---")]
    assert covered == sorted(set(covered)) and set(code) <= set(covered)


def test_the_figures_of_the_guide_are_in_readme_or_benchmarks():
    measured = (DOCS["README.md"] + DOCS["docs/benchmarks.md"]).replace(" | ", ": ")
    measured = " ".join(measured.split())
    table = GUIDE.split("## Words")[0]
    figures = re.findall(r"^\| \[.*\| ([^|]+) \|$", table, flags=re.MULTILINE)
    assert all(figure == "-" or figure in measured for figure in figures)
    assert sum(figure != "-" for figure in figures) > 5


def test_the_words_of_the_guide_are_sorted_and_occur_in_the_files_it_names():
    words = GUIDE.split("## Words")[1]
    entries = re.findall(r"^- \*\*(.*?)\*\* \((.*?)\)", words, flags=re.MULTILINE)
    in_order = [word.lower() for word, _ in entries]
    assert len(entries) > 40 and in_order == sorted(in_order)
    for word, file in entries:
        text = re.sub(r"[-_\s]+", " ", (ROOT / file).read_text(encoding="utf-8").lower())
        for one in word.lower().split(", "):
            assert one.replace("-", " ") in text, f"{one} in {file}"


def test_a_guide_with_a_text_that_is_missing_or_ambiguous_is_not_written(monkeypatch):
    maker = guide_maker()
    with pytest.raises(ValueError, match="occurs 0 times in pretraining_simple.py"):
        maker.line_of("pretraining_simple.py", "no such text")
    with pytest.raises(ValueError, match="choose another text"):
        maker.line_of("pretraining_simple.py", "import")
    with pytest.raises(ValueError, match="does not match exactly once in"):
        maker.figure("no such figure")
    monkeypatch.setattr(maker, "ROWS", maker.ROWS[1:])
    with pytest.raises(ValueError, match="not in the order of pretraining_simple.py"):
        maker.stretches()
    monkeypatch.setattr(maker, "WORDS", [("unicorn", "a word", "README.md")])
    with pytest.raises(ValueError, match="'unicorn' does not occur in README.md"):
        maker.glossary()
