"""From raw files to split lines: recipes/arabic_bert/data_preprocessing.py."""

import bz2
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run, shared

from recipes.arabic_bert.arabic_text import to_arabic, without_marks
from recipes.arabic_bert.data_preprocessing import SIDES, side_and_shard
from recipes.arabic_bert.documents import Duplicates, Keys, fingerprint, key_of
from recipes.arabic_bert.file_jobs import in_batches
from recipes.arabic_bert.segmentation import desegment

SCRIPT = "recipes/arabic_bert/data_preprocessing.py"
A = to_arabic  # of Buckwalter's transliteration
# 28 different words
WORDS = [A(c + "ktb" + d) for c in "mtnyASD" for d in "AwyE"]


def preprocess(folder, *flags, workers=1):
    return run(SCRIPT, *flags, "--output-dir", folder / "out", "--workers", workers, cwd=folder)


def done(result):
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def report(folder):
    return json.loads((folder / "out/report.json").read_text(encoding="utf-8"))


def lines(folder):
    """All lines below a folder, by file."""
    paths = sorted(path for path in Path(folder).rglob("*.txt"))
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8").splitlines()
        for path in paths
    }


def result_bytes(folder):
    """Every file of an output folder but the report."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in paths
        if path.name != "report.json"
    }


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return folder


def document(n, n_words=12):
    """A document of its own: no run of five words of another one."""
    return " ".join(f"{WORDS[(n + i) % 28]}{n}" for i in range(n_words))


def test_the_documented_commands_on_the_shared_data(tmp_path):
    raw = shared("data/arabic")
    done(preprocess(tmp_path, "--input-dir", raw, "--process-xml", workers=2))
    done(preprocess(tmp_path, "--input-dir", raw, "--process-text", workers=2))
    done(preprocess(tmp_path, "--segment", "--batch-size", 1000, workers=2))
    done(preprocess(tmp_path, "--split"))
    steps = report(tmp_path)
    counts = {name: of["documents"] for name, of in steps["process_xml"]["files"].items()}
    assert sorted(counts.values()) == [1, 1, 60, 100, 100, 121, 200]
    for step in ("process_xml", "process_text"):
        for of in [steps[step], *steps[step]["files"].values()]:
            n_dropped = sum(of["dropped"].values()) + sum(of.get("not_read", {}).values())
            assert of["documents"] == of["kept"] + n_dropped
    cleaned = {kind: lines(tmp_path / f"out/from_{kind}") for kind in ("text", "xml")}
    assert len({**cleaned["text"], **cleaned["xml"]}) == 10  # one dummy is the other one again
    texts = [text for of in cleaned.values() for of_file in of.values() for text in of_file]
    segmented = sum(lines(tmp_path / "out/segmented").values(), [])
    assert len(texts) == steps["process_xml"]["kept"] + steps["process_text"]["kept"]
    assert list(map(desegment, segmented)) == list(map(without_marks, texts))
    assert list(map(key_of, segmented)) == list(map(key_of, texts))
    sides = {side: sum(lines(tmp_path / f"out/{side}").values(), []) for side in SIDES}
    assert sorted(sum(sides.values(), [])) == sorted(segmented)
    assert 0.85 < len(sides["train"]) / len(texts) < 0.95
    assert min(len(sides["validation"]), len(sides["test"])) > 0.03 * len(texts)
    assert len(set(map(key_of, segmented))) == len(segmented)
    assert steps["segment"]["words_cut"] > 0.4 * steps["segment"]["words"]


def test_what_is_dropped_and_why(tmp_path):
    same = document(1, 40)
    near = " ".join(same.split()[:-2])  # 34 of its 36 runs of five words
    other = " ".join([*same.split()[:20], *document(2, 20).split()])
    text = [
        f"2:255: {document(3)}",
        f"\u200f{A('mdynp')} 12:3: {document(4)}",  # not at the beginning
        "Latin only, 123",
        "",
        document(5, 3),
        document(6, 41),
        same,
        same.replace(" ", "\u00a0 "),
        "\u0640".join(same),
        near,
        other,
    ]
    raw = write(tmp_path / "raw", a_txt="\n".join(text), b_txt=f"{document(3)}\n{document(7)}\n")
    write(
        raw, c_jsonl='{"text": "x"}\n{"content": ' + json.dumps(f"a\n{document(8)}\nb") + "}\n[]\n"
    )
    limits = ("--min_words", 4, "--max_words", 40)
    done(preprocess(tmp_path, "--input-dir", raw, "--process-text", *limits))
    step = report(tmp_path)["process_text"]
    assert step["files"]["a.txt"]["dropped"] == {
        "above 40 words": 1,
        "below 4 words": 1,
        "empty": 1,
        "exact duplicate": 2,
        "near duplicate": 1,
        "no Arabic letters": 1,
    }
    assert step["files"]["b.txt"]["dropped"] == {"exact duplicate": 1}
    assert step["files"]["c.jsonl"]["not_read"] == {"row without a text": 1}
    assert lines(tmp_path / "out/from_text") == {
        "a.txt": [document(3), f"{A('mdynp')} 12:3: {document(4)}", same, other],
        "b.txt": [document(7)],
        "c.jsonl.txt": [document(8)],
    }
    # nothing is near if that is turned off, and without limits nothing is too short
    flags = ("--near_duplicates", 0, "--min_words", 0)
    done(preprocess(tmp_path, "--input-dir", raw, "--process-text", *flags))
    dropped = report(tmp_path)["process_text"]["files"]["a.txt"]["dropped"]
    assert dropped == {"empty": 1, "exact duplicate": 2, "no Arabic letters": 1}


def test_text_that_an_article_has_already_is_dropped(tmp_path):
    raw = write(tmp_path / "raw", a_txt=document(1), b_txt=document(2))
    write(raw, c_xml=f"<text>{document(1)}</text><text>{document(1)}</text>")
    out = done(preprocess(tmp_path, "--input-dir", raw, "--all"))
    assert lines(tmp_path / "out/from_text") == {"b.txt": [document(2)]}
    assert lines(tmp_path / "out/from_xml") == {"c.xml.txt": [document(1)]}
    assert "no documents for validation" in out
    again = done(preprocess(tmp_path, "--input-dir", raw, "--all"))
    assert again.count("done already") == 3


@pytest.mark.parametrize("flags", (("--batch-size", 7), ("--batch-size", 7, "--segmenter", "none")))
def test_the_number_of_processes_does_not_change_the_result(tmp_path, flags):
    raw = tmp_path / "raw"
    news = shared("data/arabic/txt/news_lines.txt").read_text(encoding="utf-8").split("\n")
    write(raw, a_txt="\n".join(news[:150]), b_txt="\n".join(news[100:200]))
    found = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        done(preprocess(folder, "--input-dir", raw, "--all", *flags, workers=workers))
        found.append(result_bytes(folder / "out"))
    assert found[0] == found[1]


# saves after every batch
SLOW = """
import sys
from recipes.arabic_bert import data_preprocessing, file_jobs
file_jobs.SAVE_SECONDS = 0
from parts.cli.config import parse
data_preprocessing.main(parse(data_preprocessing.PreprocessConfig))
"""


def test_a_run_that_is_killed_ends_with_the_same_bytes(tmp_path):
    raw = tmp_path / "raw"
    news = shared("data/arabic/txt/news_lines.txt").read_text(encoding="utf-8").split("\n")
    write(raw, a_txt="\n".join(news[:300]), b_txt="\n".join(news[250:350]))
    write(raw, c_xml="".join(f"<text>{line}</text>" for line in news[340:400]))
    flags = ("--input_dir", raw, "--all", "--batch_size", 5, "--near_duplicate_window", 20)
    done(run(SCRIPT, *flags, "--output_dir", tmp_path / "straight", cwd=tmp_path))
    output = tmp_path / "killed"
    command = [sys.executable, "-c", SLOW, *map(str, flags), "--output_dir", str(output)]
    n_killed = Counter()
    for n_saves in (3, 25, 60, 100):
        process = subprocess.Popen(
            [*command, "--workers", "2"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        seen, last = 0, None
        while process.poll() is None and seen < n_saves:
            for path in output.glob(".*.part/progress.json"):
                try:
                    now = path.read_bytes()
                except OSError:
                    continue
                seen += now != last
                last = now
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        for path in output.glob(".*.part"):
            n_killed[path.name] += 1
        process.communicate()
    assert n_killed, "nothing was killed in the middle"
    done(run(SCRIPT, *flags, "--output_dir", output, cwd=tmp_path))
    assert result_bytes(output) == result_bytes(tmp_path / "straight")


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    program = """
import os, time
from recipes.arabic_bert.file_jobs import Workers
def slow(batch):
    open(f"{os.getpid()}.pid", "w").close()
    time.sleep(0.05)
    return batch
with Workers(slow, 2) as workers:
    for _ in workers.map([["a"]] * 10_000):
        pass
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment)
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as f:
        return f.read().rpartition(")")[2].split()[0] != "Z"


def test_a_word_list_of_another_corpus_decides_and_its_changes_count(tmp_path):
    raw = write(tmp_path / "raw", a_txt=" ".join([A("lmdrs")] * 6))
    words = ("--word_list", "words.tsv")
    for counts, expected in ((f"{A('mdrs')}\t5\n", "l+mdrs"), (f"{A('lmdrs')}\t5\n", "lmdrs")):
        (tmp_path / "words.tsv").write_text(counts, encoding="utf-8")
        done(preprocess(tmp_path, "--input-dir", raw, "--process-text", "--segment", *words))
        assert lines(tmp_path / "out/segmented")["from_text/a.txt"] == [" ".join([A(expected)] * 6)]


# ---------------------------------------------------------------------------------- split


def test_a_split_is_stable_when_files_are_added_and_when_text_is_segmented(tmp_path):
    raw = write(tmp_path / "raw", a_txt="\n".join(document(n) for n in range(300)))
    shares = ("--shards", 7, "--validation_share", 0.1, "--test_share", 0.2)
    done(preprocess(tmp_path, "--input-dir", raw, "--process-text", "--split", *shares))
    first = {side: lines(tmp_path / f"out/{side}") for side in SIDES}
    assert len(first["train"]) == len(first["test"]) == 7
    write(raw, A_txt="\n".join(document(n) for n in range(300, 400)))
    steps = ("--process-text", "--segment", "--split")
    done(preprocess(tmp_path, "--input-dir", raw, *steps, *shares))
    second = {side: lines(tmp_path / f"out/{side}") for side in SIDES}
    for side in SIDES:
        for shard, texts in first[side].items():
            assert set(texts) <= {desegment(line) for line in second[side][shard]}
    assert sum(len(texts) for of in second.values() for texts in of.values()) == 400


def test_shares_and_shards_are_those_asked_for():
    keys = [key_of(document(n)) for n in range(20_000)]
    sides = Counter(side_and_shard(key, 0.05, 0.05, 11) for key in keys)
    assert abs(sum(n for (side, _), n in sides.items() if side == "test") - 1000) < 150
    assert abs(sum(n for (side, _), n in sides.items() if side == "validation") - 1000) < 150
    assert {shard for _, shard in sides} == set(range(11))
    assert {side_and_shard(key, 0.0, 0.0, 1) for key in keys} == {("train", 0)}
    # a larger test share takes documents from training only
    for key in keys:
        before = side_and_shard(key, 0.05, 0.05, 1)[0]
        after = side_and_shard(key, 0.05, 0.5, 1)[0]
        assert before == after or (before, after) == ("train", "test")


def test_a_segmentation_of_other_text_is_not_split(tmp_path):
    raw = write(tmp_path / "raw", a_txt=document(1))
    done(preprocess(tmp_path, "--input-dir", raw, "--process-text", "--segment"))
    write(raw, b_txt=document(2))
    done(preprocess(tmp_path, "--input-dir", raw, "--process-text"))
    assert "run --segment again" in one_error_line(preprocess(tmp_path, "--split"), 2)


# ---------------------------------------------------------------------------------- duplicates


def test_near_duplicates_are_those_of_all_pairs_of_the_window():
    texts = shared("data/arabic/xml_wikipedia/arwiki-sample-pages-articles.xml")
    words = without_marks(texts.read_text(encoding="utf-8")).split()
    # windows of 60 words, each a few words after another one
    found, kept, runs_of = [], [], []
    duplicates = Duplicates(0.8, 1000)
    for start in range(0, 6000, 3):
        text = " ".join(words[start * 7 % 5000 :][:60])
        tokens = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        runs = {tuple(tokens[i : i + 5]) for i in range(len(tokens) - 4)}
        near = any(len(runs & other) >= 0.8 * len(runs | other) for other in runs_of)
        key, sketched = fingerprint(text)
        why = duplicates.why_dropped(key, sketched)
        found.append((why is not None) == near)
        if why is None:
            duplicates.add(key, sketched)
            kept.append(text)
            runs_of.append(runs)
    assert len(kept) < 1000
    assert sum(found) >= 0.99 * len(found)


def test_keys_are_a_set(monkeypatch):
    monkeypatch.setattr(Keys, "LOOSE", 10)
    keys = Keys()
    numbers = [key_of(str(n)) for n in range(95)]
    for n in numbers[:-1]:
        assert n not in keys
        keys.add(n)
    assert all(n in keys for n in numbers[:-1])
    assert numbers[-1] not in keys


def test_near_duplicates_are_remembered_by_window_and_after_a_resume():
    texts = [document(n, 30) for n in range(50)]
    whole = Duplicates(0.8, 10)
    for text in texts:
        whole.add(*fingerprint(text))
    resumed = Duplicates(0.8, 10)
    resumed.add_known(texts, len(texts))
    near = [" ".join(text.split()[1:]) for text in texts]
    why = [whole.why_dropped(*fingerprint(text)) for text in near]
    assert why == [resumed.why_dropped(*fingerprint(text)) for text in near]
    assert why == [None] * 30 + ["near duplicate"] * 20
    assert whole.why_dropped(*fingerprint(texts[0])) == "exact duplicate"


def test_batches_are_bounded_by_characters_too(monkeypatch):
    monkeypatch.setattr("recipes.arabic_bert.file_jobs.BATCH_CHARS", 10)
    assert list(in_batches(["a" * 4] * 7, 5)) == [["a" * 4] * 3] * 2 + [["a" * 4]]
    assert list(in_batches(["a"] * 3, 2)) == [["a"] * 2, ["a"]]


# ---------------------------------------------------------------------------------- Farasa


def test_farasa_runs_in_every_process_and_failed_lines_are_counted(tmp_path, monkeypatch):
    program = tmp_path / "bin/java"
    program.parent.mkdir()
    code = f"""#!{sys.executable}
import sys
sys.stdin.reconfigure(encoding="utf-8")
sys.stdout.reconfigure(encoding="utf-8")
for line in sys.stdin:
    if {A("mwt")!r} in line:
        sys.exit(1)
    print(" ".join(w[0] + "+" + w[1:] for w in line.split()), flush=True)
"""
    program.write_text(code, encoding="utf-8")
    program.chmod(0o755)
    (tmp_path / "farasa.jar").write_bytes(b"")
    death = f"{A('mwt')} {document(0)}"
    write(tmp_path / "raw", a_txt="\n".join([*map(document, range(1, 30)), death]))
    steps = ("--input-dir", tmp_path / "raw", "--process-text", "--segment", "--split")
    jar = ("--segmenter", "farasa", "--farasa_jar", "farasa.jar", "--batch_size", 3)
    out = done(preprocess(tmp_path, *steps, *jar, "--java", program, workers=2))
    assert "1 documents left whole, the jar failed" in out
    segmented = lines(tmp_path / "out/segmented/from_text")["a.txt"]
    for n in range(1, 30):
        assert segmented[n - 1] == " ".join(w[0] + "+" + w[1:] for w in document(n).split())
    assert segmented[-1] == death
    program.write_text(f"#!{sys.executable}\nprint('no Farasa')\n", encoding="utf-8")
    result = preprocess(tmp_path, *steps, *jar, "--java", program, "--unify_alef", workers=2)
    assert "gave no segments for 3 lines" in one_error_line(result, 2)
    assert lines(tmp_path / "out/segmented/from_text")["a.txt"] == segmented


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, words",
    (
        ((), "no step is named"),
        (("--process-xml",), "needs --input_dir"),
        (("--process-xml", "--input-dir", "none"), "--input_dir: none: no such folder"),
        (("--process-xml", "--input-dir", "raw"), "has no .xml"),
        (("--process-text", "--input-dir", "latin"), "nothing is left of latin (1 no Arabic"),
        (("--process-xml", "--input-dir", "no_text"), "a.xml has no <text> element"),
        (("--segment",), "run --process_xml or --process_text first"),
        (("--split",), "run --process_xml or --process_text first"),
        (("--split", "--test_share", "0.97"), "leave nothing for training"),
        (("--split", "--shards", "0"), "--shards: 0 must be at least 1"),
        (("--split", "--min_words", "9", "--max_words", "8"), "--max_words: 8 is below"),
        (("--segment", "--segmenter", "farasa"), "needs --farasa_jar"),
        (("--segment", "--segmenter", "pyfarasa"), "pip install"),
        (
            ("--segment", "--segmenter", "farasa", "--farasa_jar", "x.jar", "--java", "no-java"),
            "default-jre-headless",
        ),
        (("--segment", "--word_list", "raw/a.txt"), "line 1 is not a word, a tab and a number"),
        (("--proces-xml",), "did you mean"),
    ),
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, flags, words):
    write(tmp_path / "raw", a_txt=document(1))
    write(tmp_path / "latin", a_txt="Latin only")
    write(tmp_path / "no_text", a_xml="<a><b>c</b></a>")
    line = one_error_line(preprocess(tmp_path, *flags), 2)
    assert words in line
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_what_is_wrong_with_a_file_is_a_note_and_the_rest_is_read(tmp_path):
    raw = write(tmp_path / "raw", a_xml="<a/>", b_xml=f"<text>{document(1)}</text>")
    declared = f'<?xml version="1.0" encoding="utf-8"?><text>{" ".join(WORDS)}</text>'
    (raw / "c.xml").write_bytes(declared.encode("cp1256"))
    pages = [f"<text>{document(n)}</text>" for n in range(2, 302)]
    streams = [bz2.compress("".join(pages[n : n + 100]).encode()) for n in (0, 100, 200)]
    (raw / "d.xml.bz2").write_bytes(b"".join(streams)[:-100])
    (raw / "e.xml.gz").write_bytes(b"no gzip")
    out = done(preprocess(tmp_path, "--input-dir", raw, "--process-xml"))
    assert "note: a.xml: has no <text> element" in out
    assert "note: c.xml: declares utf-8, but is cp1256" in out
    assert "note: d.xml.bz2: damaged after " in out
    assert "note: e.xml.gz: damaged after 0 documents" in out
    kept = lines(tmp_path / "out/from_xml")
    assert kept["b.xml.txt"] == [document(1)]
    assert kept["c.xml.txt"] == [" ".join(WORDS)]
    assert kept["d.xml.bz2.txt"] == [document(n) for n in range(2, 202)]


def test_settings_come_from_a_file_and_the_output_goes_to_a_log(tmp_path):
    write(tmp_path / "raw", a_txt=document(1))
    defaults = done(run(SCRIPT, "--print-default-config", cwd=tmp_path))
    (tmp_path / "c.yaml").write_text(defaults.replace("min_words: 5", "min_words: 13"), "utf-8")
    flags = ("--config", "c.yaml", "--log-file", "log.txt", "--input-dir", "raw", "--process-text")
    assert "below 13 words" in one_error_line(preprocess(tmp_path, *flags), 2)
    assert "below 13 words" in (tmp_path / "log.txt").read_text(encoding="utf-8")
