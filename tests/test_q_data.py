"""prepare_data.py of the recipe q_lora: what it reads, keeps, splits and writes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import ROOT, one_error_line, run, shared
from test_full_disk import LIMITED

from parts.data import corpus
from recipes.q_lora.prepare_data import (
    SIDES,
    VARIANTS,
    Filter,
    PrepareConfig,
    data_files,
    normalised,
    prepare,
)
from recipes.q_lora.read_files import rows

SCRIPT = "recipes/q_lora/prepare_data.py"
REAL = "data/q_code/q_files.jsonl"
NAMES = sorted(f"{variant}_{side}.jsonl" for variant in VARIANTS for side in SIDES)


def code(n: int, n_lines: int = 12) -> str:
    """A file of q that is like no other, with a comment that describes it."""
    rng = random.Random(n)
    lines = [
        f"f{rng.randrange(10**6)}:{{[a{rng.randrange(10**6)}] x+{rng.randrange(10**6)}}}"
        for _ in range(n_lines)
    ]
    return f"/ what file {n} is for\n\n" + "\n".join(lines) + "\n"


def some_rows(n: int = 40, n_repositories: int = 20, licence="MIT") -> list[dict]:
    """Rows of several repositories."""
    return [
        {
            "repo": f"owner/r{i % n_repositories}",
            "path": f"{i}.q",
            "license": licence,
            "text": code(i),
        }
        for i in range(n)
    ]


def write_rows(path, found: list[dict]):
    """A jsonl file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def read(path) -> list[dict]:
    """The rows of a jsonl file; none if there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().decode().splitlines()]


def result(folder, variant: str) -> list[dict]:
    """The rows of a variant, of both sides."""
    return [row for side in SIDES for row in read(folder / f"{variant}_{side}.jsonl")]


def prepared(tmp_path, found: list[dict], **settings) -> dict:
    """The report on these rows, written to tmp_path/data."""
    source = write_rows(tmp_path / "rows.jsonl", found)
    return prepare(PrepareConfig(str(source), str(tmp_path / "data"), **settings))


# ------------------------------------------------------------------------------------ real files


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(folder of the result, report, rows) of the real files, with licences for two owners."""
    source = shared(REAL)
    folder = tmp_path_factory.mktemp("real")
    licences = folder / "licences"
    names = ["KxSystems/ml", "KxSystems/automl", "KxSystems/nlp", "finos/kdb"]
    licences.write_text("".join(f"{name} Apache-2.0\n" for name in names), encoding="utf-8")
    config = PrepareConfig(str(source), str(folder / "data"), licenses=str(licences))
    return folder / "data", prepare(config), read(source)


def test_real_files_are_all_accounted_for(real):
    folder, report, found = real
    assert sorted(p.name for p in folder.iterdir()) == sorted([*NAMES, "report.json"])
    assert json.loads((folder / "report.json").read_bytes()) == json.loads(json.dumps(report))
    variants = report["variants"]
    assert variants["raw"]["dropped"] == {"exact repeat": 87} and variants["raw"]["in"] == 647
    assert variants["filtered"]["dropped"] == {"below 50 bytes": 30, "near duplicate": 15}
    before = {"filtered": "raw", "described_filtered": "filtered", "licensed": "filtered"}
    for variant, counted in variants.items():
        written = result(folder, variant)
        assert counted["out"] == len(written) == counted["in"] - sum(counted["dropped"].values())
        assert variant == "raw" or counted["in"] == variants[before[variant]]["out"]
        for side in SIDES:
            of_side = read(folder / f"{variant}_{side}.jsonl")
            text = [r.get("text", r.get("prompt", "") + r.get("completion", "")) for r in of_side]
            assert counted[side]["rows"] == len(of_side) > 0
            assert counted[side]["bytes"] == sum(len(t.encode()) for t in text)
            assert counted[side]["repositories"] == sorted({r["repo"] for r in of_side})
    raw = {row["text"] for row in result(folder, "raw")}
    assert raw == {row["text"] for row in found}
    assert {r["text"] for r in result(folder, "filtered")} <= raw


def test_no_text_of_training_is_in_testing_and_repositories_stay_together(real):
    folder, report, found = real
    for variant in ("raw", "filtered", "licensed"):
        texts = [
            {normalised(r["text"]) for r in read(folder / f"{variant}_{side}.jsonl")}
            for side in SIDES
        ]
        assert not texts[0] & texts[1]
    for counted in report["variants"].values():
        assert not {*counted["train"]["repositories"]} & {*counted["test"]["repositories"]}
    raw = report["variants"]["raw"]
    assert 0.1 <= raw["test"]["bytes"] / (raw["test"]["bytes"] + raw["train"]["bytes"]) <= 0.2
    several = Counter(text for text, _ in {(r["text"], r["repo"]) for r in found})
    assert sum(n > 1 for n in several.values()) == 81
    for_testing = {*raw["test"]["repositories"]}
    for row in read(folder / "raw_test.jsonl"):
        having = {r["repo"] for r in found if r["text"] == row["text"]}
        assert having <= for_testing


def test_near_duplicates_of_real_files_are_those_of_all_pairs(real):
    def runs(text):
        words = re.findall(r"[^\W_]+", text.lower())
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    folder, _, found = real
    kept = []
    for text in dict.fromkeys(row["text"] for row in found):
        if len(text.encode()) < 50:
            continue
        ours = runs(text)
        if not any(len(ours & other) >= 0.8 * len(ours | other) for _, other in kept):
            kept.append((text, ours))
    assert {text for text, _ in kept} == {row["text"] for row in result(folder, "filtered")}


def test_licensed_rows_have_the_licence_of_their_repository(real):
    folder, report, _ = real
    licensed = result(folder, "licensed")
    assert {r["license"] for r in licensed} == {"Apache-2.0"}
    assert {r["repo"] for r in licensed} <= {
        "KxSystems/ml",
        "KxSystems/automl",
        "KxSystems/nlp",
        "finos/kdb",
    }
    ((reason, n),) = report["variants"]["licensed"]["dropped"].items()
    assert reason == "licence not permissive, or unknown: see LICENSES" and n > 200


def test_the_shared_rows_without_licences_are_one_line_and_the_others_are_written(tmp_path):
    source = shared(REAL)
    done = run(SCRIPT, "--input", source, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == sorted(
        [*(name for name in NAMES if not name.startswith("licensed")), "report.json"]
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert "licensed: no rows for train and test" in line and "see LICENSES" in line
    assert "--licenses FILE" in line
    for side in SIDES:
        assert data_files("filtered", tmp_path / "data")[side].is_file()
    with pytest.raises(FileNotFoundError, match=r"licensed_train\.jsonl.*--licenses FILE"):
        data_files("licensed", tmp_path / "data")


# ------------------------------------------------------------------------------------ reading


def test_a_folder_of_repositories(tmp_path):
    files = {
        "one/src/a.q": "f:{x}",
        "one/b.K": "g:{y}",
        "two/.git/config": "",
        "two/deep/c.q": "h:{z}",
        "owner/three/.git/config": "",
        "owner/three/d.q": "\ufeffi:{z}",
        "e.q": "j:1",
        "one/notes.txt": "no code",
        "one/.hidden.q": "k:1",
        "one/empty.q": " \n",
        "one/binary.q": "a\0b",
    }
    for name, text in files.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "in/one/latin.q").write_bytes(b"/ caf\xe9\na:1")
    os.mkfifo(tmp_path / "in/one/pipe.q")
    (tmp_path / "in/one/link.q").symlink_to("nowhere.q")
    not_read = Counter()
    found = {
        (r["repo"], r["path"]): r["text"] for r in rows(str(tmp_path / "in"), not_read=not_read)
    }
    assert found == {
        ("one", "src/a.q"): "f:{x}",
        ("one", "b.K"): "g:{y}",
        ("two", "deep/c.q"): "h:{z}",
        ("owner/three", "d.q"): "i:{z}",
        (None, "e.q"): "j:1",
    }
    assert not_read == {
        **{"hidden folder": 2, "hidden": 1, ".txt": 1, "named pipe": 1, "broken link": 1},
        **{"rows without text": 1, "not text, it has NUL bytes": 1, "not UTF-8 text": 1},
    }


def test_one_repository_and_other_endings(tmp_path):
    (tmp_path / "mine/.git").mkdir(parents=True)
    (tmp_path / "mine/src").mkdir()
    (tmp_path / "mine/src/a.quke").write_text("feature", encoding="utf-8")
    (tmp_path / "mine/src/b.q").write_text("a:1", encoding="utf-8")
    found = list(rows(str(tmp_path / "mine"), extensions=("quke",)))
    assert [(r["repo"], r["path"]) for r in found] == [("mine", "src/a.quke")]


COLUMNS = [
    {"repo": "a/b", "path": "c.q", "license": "MIT", "text": "x:1"},
    {"repo_name": "a/b", "path": "c.q", "licenses": ["MIT"], "content": "x:1"},
    {
        **{"max_stars_repo_name": "a/b", "max_stars_repo_path": "c.q"},
        **{"max_stars_repo_licenses": ["MIT"], "code": "x:1", "size": 3},
    },
]


@pytest.mark.parametrize("row", COLUMNS)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "hub"])
def test_tables_with_their_own_names_of_columns(tmp_path, row, kind, monkeypatch):
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow.parquet")
        pa.write_table(pytest.importorskip("pyarrow").Table.from_pylist([row]), path)
    elif kind == "json":
        path.write_text(json.dumps([row]), encoding="utf-8")
    elif kind == "hub":
        path = "owner/data"
        monkeypatch.setattr(corpus, "load_hub", lambda *_, **__: iter([row]))
    else:
        import gzip

        data = json.dumps(row).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    assert list(rows(str(path))) == [COLUMNS[0]]


def test_a_row_may_have_nothing_but_its_text_and_odd_letters(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "x:1"}\n{"text": null}\n{"text": "\\ud800"}\n', encoding="utf-8")
    not_read = Counter()
    found = list(rows(str(source), not_read=not_read))
    assert found == [{"repo": None, "path": None, "license": None, "text": "x:1"}]
    assert not_read == {"rows without text": 1, "not UTF-8 text": 1}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"repo": "a"}', "line 2: has no column text or content or code; its columns are repo"),
        ("{}", "line 2: has no column text or content or code; its columns are none"),
        ('{"text": 1}', "line 2: text holds float, not text"),
        ('{"text": "a:1", "repo": ["a"]}', "line 2: repo holds list, not text"),
        ('{"text": "a:1"', "line 2: not JSON"),
        ("[1]", "line 2: a list is not an object"),
    ],
)
def test_a_wrong_row_is_named_and_nothing_is_written(tmp_path, line, words):
    good = json.dumps({"text": code(1)})
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{line}\n", encoding="utf-8")
    done = run(SCRIPT, "--input", "rows.jsonl", cwd=tmp_path)
    assert words in one_error_line(done, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "no.jsonl"], "--input: no.jsonl does not exist; give a folder"),
        (["--input", "./no"], "--input: ./no does not exist"),
        (["--input", "a/b/c"], "--input: a/b/c does not exist"),
        (["--input", "a.q"], "--input: a.q does not exist"),
        (["--input", ""], "--input: is empty; give a folder"),
        (["--input", "owner/none"], "the hub did not provide it"),
        (["--input", "pipe"], "it has 1 named pipe"),
        (["--input", "text.txt"], "it has 1 .txt"),
        (["--input", "empty"], "--input: empty has no .k, .q, .jsonl or .parquet file"),
        (["--input", "one.jsonl"], "has one text, which cannot be"),
        (["--input", "none.jsonl"], "none.jsonl has no text (1 rows without text)"),
        (["--input", "data/raw_train.jsonl"], "would be replaced by the result"),
        (["--input", "one.jsonl", "--test-share", "0"], "--test_share: 0.0 must be above 0"),
        (["--input", "one.jsonl", "--test_share", "nan"], "--test_share: nan must be above 0"),
        (["--input", "one.jsonl", "--licenses", "no"], "--licenses: no does not exist"),
        (["--input", "one.jsonl", "--licences", "no"], "--licences: no such flag"),
        (["--input", "one.jsonl", "--output_dir", "text.txt"], "text.txt"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, words):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    write_rows(tmp_path / "one.jsonl", [{"text": code(1)}, {"text": code(1)}])
    write_rows(tmp_path / "none.jsonl", [{"text": ""}])
    done = run(SCRIPT, *arguments, cwd=tmp_path)
    assert words in one_error_line(done, 2)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("subset", [None, "b"])
def test_a_dataset_that_refuses_a_subset_is_one_line_with_the_flag(monkeypatch, subset):
    def refuse(*_, **__):
        raise ValueError("Config name is missing.\nPick one among: a, b")

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", refuse)
    info = SimpleNamespace(sha="0")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: info)
    where = "--dataset_subset: 'b' of owner/data: " if subset else "--input: owner/data: "
    with pytest.raises(ValueError) as e:
        corpus.load_hub("owner/data", subset, True, "--input")
    assert str(e.value) == where + "Config name is missing. Pick one among: a, b"


# ------------------------------------------------------------------------------------ filters


LONG = "/ " + "word " * 12 + "\n"
FILTERED = {
    "49 bytes": ("a:" + "1" * 46 + "\n", "below 50 bytes"),
    "50 bytes": ("a:" + "1" * 47 + "\n", None),
    "50 bytes of 25 letters": ("/" + "\u00e9" * 24 + "\n", None),
    "a line of 1,000": (LONG + "a" * 1000 + "\n", None),
    "a line of 1,001": (LONG + "a" * 1001 + "\n", "a line over 1,000 characters"),
    "an open bracket": (LONG + "f:{x\n", "brackets or quotes that are not paired"),
    "a bracket in a comment": (LONG + "f:1 / {x\n", None),
}


@pytest.mark.parametrize("name", FILTERED)
def test_what_is_filtered(name):
    text, why = FILTERED[name]
    assert Filter().why_dropped(text) == why


def test_near_duplicates_are_dropped_and_short_texts_only_if_they_are_equal():
    keep, words = Filter(), [f"w{i}" for i in range(200)]
    changed = words[:100] + ["new"] + words[101:]
    different = words[:100] + ["new"] * 30 + words[130:]
    symbols = "(" + "+/" * 30 + ")"
    for text, why in [
        (" ".join(words), None),
        ("\n".join(words).upper(), "near duplicate"),
        (" ".join(changed), "near duplicate"),
        (" ".join(different), None),
        (symbols, None),
        (symbols.replace("+", "-"), None),
        (symbols + "  \n", "near duplicate"),
    ]:
        assert keep.why_dropped(text) == why, text


# ------------------------------------------------------------------------------------ the split


def test_texts_that_differ_in_blanks_stay_on_one_side(tmp_path):
    found = some_rows(60)
    copies = [
        {**row, "repo": f"owner/r{(i + 7) % 20}", "text": row["text"].replace("\n", " \r\n") + "\n"}
        for i, row in enumerate(found)
    ]
    report = prepared(tmp_path, found + copies)
    assert report["variants"]["raw"]["out"] == 120
    assert report["variants"]["filtered"]["out"] == 60
    sides = [
        {normalised(row["text"]) for row in read(tmp_path / f"data/raw_{side}.jsonl")}
        for side in SIDES
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_rows_without_repositories_are_split_by_their_text(tmp_path):
    found = [{"text": code(i)} for i in range(100)]
    report = prepared(tmp_path, found)
    assert 8 <= report["variants"]["raw"]["test"]["rows"] <= 12
    before = {row["text"] for row in read(tmp_path / "data/raw_test.jsonl")}
    prepared(tmp_path, found[::-1])
    assert {row["text"] for row in read(tmp_path / "data/raw_test.jsonl")} == before


# ------------------------------------------------------------------------------------ the result


def test_the_same_input_gives_the_same_bytes_also_with_the_result_inside_it(tmp_path):
    write_rows(tmp_path / "rows.jsonl", some_rows())
    found = []
    for output in ("one", ".", "data"):
        for _ in range(2):
            done = run(SCRIPT, "--input", ".", "--output-dir", output, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            paths = [tmp_path / output / name for name in (*NAMES, "report.json")]
            found.append([path.read_bytes() for path in paths])
        for path in paths:
            path.unlink()
    assert all(one == found[0] for one in found)


def test_a_result_without_licensed_rows_removes_the_earlier_ones(tmp_path):
    prepared(tmp_path, some_rows())
    (tmp_path / "data/notes.txt").write_text("mine", encoding="utf-8")
    assert len(result(tmp_path / "data", "licensed")) == 40
    report = prepared(tmp_path, some_rows(licence="GPL-3.0"))
    assert report["variants"]["licensed"]["dropped"] == {
        "licence not permissive, or unknown: GPL-3.0": 40
    }
    assert not list((tmp_path / "data").glob("licensed_*"))
    assert (tmp_path / "data/notes.txt").exists()


def test_missing_files_are_listed_with_the_command(tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        data_files("filtered", tmp_path)
    for words in ("filtered_train.jsonl", "filtered_test.jsonl", "prepare_data.py --input", "data"):
        assert words in str(e.value)
    with pytest.raises(ValueError, match="the variants are raw, filtered"):
        data_files("filterd")


def test_a_full_disk_leaves_the_earlier_result_and_nothing_else(tmp_path):
    write_rows(tmp_path / "rows.jsonl", some_rows())
    for before in ([], NAMES):
        if before:
            prepare(PrepareConfig(str(tmp_path / "rows.jsonl"), str(tmp_path / "new/data")))
        old = {p: p.read_bytes() for p in (tmp_path / "new").rglob("*") if p.is_file()}
        command = [sys.executable, "-c", LIMITED, "5000", ROOT / SCRIPT]
        command += ["--input", "rows.jsonl", "--output_dir", "new/data"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=env, check=False
        )
        assert "new/data" in one_error_line(done, 1)
        assert {p: p.read_bytes() for p in (tmp_path / "new").rglob("*") if p.is_file()} == old
        assert (tmp_path / "new").exists() == bool(before)


def test_ctrl_c_leaves_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in/a.jsonl", some_rows(3000, 20))
    command = [sys.executable, ROOT / SCRIPT, "--input", "in", "--output_dir", "new/data"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, **pipes)
    while not (tmp_path / "new/data/.preparing.part/rows.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "stopped\n"
    assert not (tmp_path / "new").exists()


def test_memory_does_not_grow_with_the_texts(tmp_path):
    with open(tmp_path / "rows.jsonl", "w", encoding="utf-8") as f:
        for i in range(100):
            text = code(i) + "".join(f"v{i}_{j}:{j}\n" for j in range(9000))
            f.write(json.dumps({"text": text}) + "\n")
    size = os.path.getsize(tmp_path / "rows.jsonl")
    program = (
        "import resource, sys; from recipes.q_lora.prepare_data import *;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "prepare(PrepareConfig('rows.jsonl'));"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < size / 2, (int(done.stdout), size)
