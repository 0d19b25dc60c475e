"""Archives are read like folders, unpacked whole or not at all, and refused if they attack."""

import json
import subprocess
import sys
import zipfile

from conftest import ROOT, one_error_line, run, shared
from prep_cases import PROSE, prepare


def test_archives_in_the_folder_are_read_like_folders(tmp_path):
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in/books.zip", "w") as z:
        z.writestr("a/one.txt", PROSE * 9)
        z.writestr("cover.jpg", b"\xff\xd8")
    for data_dir in ("in", "in/books.zip"):
        result = prepare(tmp_path, "--data_dir", data_dir, "--output_dir", "out")
        assert result.returncode == 0, result.stderr
        report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
        assert {r["file"]: r["status"] for r in report["files"]} == {
            "books.zip/a/one.txt": "kept",
            "books.zip/cover.jpg": "ignored",
        }
        assert {p.name for p in (tmp_path / "out").iterdir()} == {"combined_1.txt", "report.json"}


def test_extraction_never_overwrites(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("x.txt", "new")
        z.writestr("y.txt", "new")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/y.txt").write_text("old", encoding="utf-8")
    words = ("extract", "--archive", "a.zip", "--output_dir", "out")
    line = one_error_line(run("prep_dataset.py", *words, cwd=tmp_path), 2)
    assert "a.zip" in line and [p.name for p in (tmp_path / "out").iterdir()] == ["y.txt"]
    assert (tmp_path / "out/y.txt").read_text(encoding="utf-8") == "old"


# name and command of our extractor, in the words of the fault harness
TARGET = """
name = "prep"
python = "{exe}"
train = ""
hash = ""
ckpt_glob = "x"
max_error_lines = 1
extract = "{python} ROOT/prep_dataset.py extract --archive {archive} --output_dir {dest} LIMIT"
"""
ARCHIVES_SUITE = """
import sys
from faultlib import Bench, Target

bench = Bench(Target.load(sys.argv[1]))
report = bench.archives()
bench.close()
print(report)
sys.exit(bool(report.problems) or report.trials != 33)
"""


def test_hostile_archives(tmp_path):
    """The archives suite of the fault harness: links, devices, bombs, traversal, lies."""
    harness = shared("faults/run_faults.py")
    target = TARGET.replace("ROOT", str(ROOT)).replace("LIMIT", "--max_extract_mb 50")
    (tmp_path / "target.toml").write_text(target, encoding="utf-8")
    command = [sys.executable, "-c", ARCHIVES_SUITE, str(tmp_path / "target.toml")]
    options = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    result = subprocess.run(command, cwd=harness.parent, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
