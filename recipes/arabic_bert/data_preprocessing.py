"""
From raw Arabic files to cleaned, segmented lines for training, validation and testing.

    python recipes/arabic_bert/data_preprocessing.py --input-dir ./data/raw/xml \\
        --output-dir ./data/processed --process-xml
    python recipes/arabic_bert/data_preprocessing.py --input-dir ./data/raw/text \\
        --output-dir ./data/processed --process-text
    python recipes/arabic_bert/data_preprocessing.py --output-dir ./data/processed \\
        --segment --batch-size 1000
    python recipes/arabic_bert/data_preprocessing.py --output-dir ./data/processed --split

or all at once with --all. Each step writes into --output_dir

    --process-xml    from_xml/     the articles of .xml, .xml.bz2 and .xml.gz files
    --process-text   from_text/    the lines of .txt files, the texts of .jsonl files
    --segment        segmented/    their words cut into prefix+stem+suffix, without diacritics
    --split          train/, validation/, test/   one document a line, what the trainer reads

and into report.json what was dropped and why; word_list.tsv is what the rules segmenter counted. A
document is a line. Dropped are documents without Arabic letters, below --min_words or above
--max_words, exact and near duplicates (in text files also of articles in from_xml/, so run
--process-text after --process-xml); in a document, lines without Arabic letters and numbers of
verses (2:255:) at the beginning of a line. After a kill, the same command resumes, and the result
has the same bytes; a step that is done is not repeated. A new result replaces the earlier one when
it is complete.

--split goes by the hash of a document without diacritics and segments, so that a document stays on
its side whatever is added or segmented anew. --segmenter farasa runs a jar that you have (its
licence allows research only) and needs Java.

The shared test data, 4,283 documents (11 MB), take 13 s for all steps on two cores that others use
as well (2026-11-26). 60 MB of XML take 56 MB of memory and 42 MB in each further process; for near
duplicates, 5 KB are added for each document of two windows (--near_duplicate_window).
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C during the imports leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from parts.base.files import (
    check_writable,
    make_folder,
    read_json,
    rename_durably,
    sha256_of,
    write_file,
)
from parts.base.text import one_line
from parts.cli.launch import print_notes, run_script
from parts.cli.progress_bar import tqdm
from recipes.arabic_bert.arabic_text import letter_table, normalise, without_marks
from recipes.arabic_bert.common import parse_script
from recipes.arabic_bert.documents import (
    Cleaning,
    Duplicates,
    FileCounts,
    find_files,
    fingerprint,
    key_of,
    read_documents,
)
from recipes.arabic_bert.file_jobs import FileJob, Workers, in_batches
from recipes.arabic_bert.segmentation import (
    Farasa,
    RulesSegmenter,
    WordList,
    count_words,
    uncut,
)

FOLDERS = {"xml": "from_xml", "text": "from_text"}
SEGMENTED = "segmented"
SIDES = ("train", "validation", "test")
REPORT = "report.json"
WORD_LIST = "word_list.tsv"
STEPS = ("process_xml", "process_text", "segment", "split")
BUFFER_CHARS = 1 << 24  # lines of the split that wait in memory
MOST_NOTES = 5  # lines about single files


@dataclass
class PreprocessConfig:
    """Clean, segment and split Arabic text."""

    input_dir: str | None = None  # folder with the files; --segment and --split need none
    output_dir: str = "./data/processed"  # folder for the results of all steps
    process_xml: bool = False  # read the articles of XML files
    process_text: bool = False  # read the lines of text files
    segment: bool = False  # cut words into affixes and stem
    split: bool = False  # write training, validation and test files
    all: bool = False  # all four steps
    batch_size: int = 1000  # documents that a process is given at once
    workers: int = 0  # processes; 0 is one for each core
    min_words: int = 5  # documents with fewer words are dropped
    max_words: int | None = None  # documents with more words are dropped
    unify_alef: bool = False  # alef with hamza, madda or wasla becomes alef
    unify_yeh: bool = False  # alef maqsura becomes yeh
    unify_teh_marbuta: bool = False  # teh marbuta becomes heh
    unify_farsi: bool = False  # Farsi yeh and keheh become yeh and kaf
    near_duplicates: float = 0.8  # share of runs of 5 words in common to be one; 0: keep them
    near_duplicate_window: int = 50_000  # how far back they are looked for, at least
    segmenter: Literal["rules", "farasa", "pyfarasa", "none"] = "rules"  # what cuts words
    word_list: str | None = None  # word_list.tsv of another corpus instead of counting words
    max_counted_words: int = 2_000_000  # different words of the word list; bounds the memory
    farasa_jar: str | None = None  # Farasa's jar, for --segmenter farasa
    java: str = "java"  # program that runs the jar
    farasa_timeout_s: float = 60.0  # seconds for one line, after which the jar is restarted
    shards: int = 1  # files of each side of the split
    validation_share: float = 0.05  # share of the documents for validation
    test_share: float = 0.05  # share of the documents for testing
    config: str | None = None  # YAML file with settings
    print_default_config: bool = False  # print such a file and exit
    log_file: str | None = None  # append what is printed to this file
    debug: bool = False  # show the traceback of an error


def check(config: PreprocessConfig) -> list[str]:
    """The steps to do. Raises ValueError or FileNotFoundError before anything is read."""
    steps = [step for step in STEPS if config.all or getattr(config, step)]
    if not steps:
        flags = ", ".join(f"--{step}" for step in STEPS)
        raise ValueError(f"no step is named; give one or more of {flags}, or --all")
    if config.input_dir is None and not {"process_xml", "process_text"}.isdisjoint(steps):
        raise ValueError(f"--{steps[0]}: needs --input_dir, the folder with the files")
    at_least = {"batch_size": 1, "workers": 0, "min_words": 0, "shards": 1}
    at_least |= {"near_duplicate_window": 1, "max_counted_words": 1000}
    for name, least in at_least.items():
        if getattr(config, name) < least:
            raise ValueError(f"--{name}: {getattr(config, name)} must be at least {least}")
    if config.max_words is not None and config.max_words < max(config.min_words, 1):
        raise ValueError(f"--max_words: {config.max_words} is below --min_words, nothing is left")
    if not 0 <= config.near_duplicates <= 1:
        raise ValueError(f"--near_duplicates: {config.near_duplicates} must be 0 to 1")
    for name in ("validation_share", "test_share"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"--{name}: {getattr(config, name)} must be 0 or above, and below 1")
    if config.validation_share + config.test_share >= 1:
        raise ValueError("--validation_share, --test_share: leave nothing for training")
    if config.farasa_timeout_s <= 0:
        raise ValueError(f"--farasa_timeout_s: {config.farasa_timeout_s} must be above 0")
    if "segment" in steps:
        _check_segmenter(config)
    check_writable(config.output_dir, "--output_dir")
    return steps


def _check_segmenter(config: PreprocessConfig) -> None:
    if config.segmenter == "pyfarasa":
        what = "is not run here: its licence allows research only, and it is slow"
        where = "pip install pyfarasa, or a jar from farasa.qcri.org for --segmenter farasa"
        raise ValueError(f"--segmenter pyfarasa: {what}; to use it yourself: {where}")
    if config.segmenter == "farasa":
        if config.farasa_jar is None:
            what = "needs --farasa_jar, a jar that you have (from farasa.qcri.org"
            raise ValueError(f"--segmenter farasa: {what}; its licence allows research only)")
        Farasa(config.farasa_jar, config.java)  # raises
    if config.word_list is not None:
        read_word_list(config.word_list)


# ---------------------------------------------------------------------------------- report


class Report:
    """report.json of an output folder: {step: what it did}."""

    def __init__(self, output: Path):
        self.path = output / REPORT

    def read(self) -> dict:
        """All steps so far; {} if there is no report."""
        if not self.path.exists():
            return {}
        return read_json(self.path, "delete it, and the steps are done again")

    def is_done(self, step: str, fingerprint_: str, folder: Path) -> bool:
        """Whether a step has this result already."""
        return self.read().get(step, {}).get("fingerprint") == fingerprint_ and folder.exists()

    def add(self, step: str, facts: dict) -> None:
        """Write what a step did."""
        text = json.dumps({**self.read(), step: facts}, indent=1, ensure_ascii=False)
        write_file(self.path, (text + "\n").encode())


# ---------------------------------------------------------------------------------- process


class CleanBatch:
    """Documents -> [((line, key, sketch) or None, why it is dropped)]."""

    def __init__(self, cleaning: Cleaning):
        self.cleaning = cleaning

    def __call__(self, documents: list[str]) -> list:
        results = []
        for document in documents:
            line, reason = self.cleaning.clean(document)
            results.append((None if line is None else (line, *fingerprint(line)), reason))
        return results


def process(config: PreprocessConfig, kind: str) -> dict:
    """Write OUTPUT/from_xml or from_text; returns the part of the report."""
    output = Path(config.output_dir)
    step = f"process_{kind}"
    files, others = find_files(config.input_dir, kind, skip=[output])
    if not files:
        endings = {"xml": ".xml, .xml.bz2 or .xml.gz", "text": ".txt or .jsonl"}[kind]
        found = ", ".join(f"{n:,} {ending}" for ending, n in others.most_common(5)) or "nothing"
        what = f"{config.input_dir} has no {endings} file, but {found}"
        raise ValueError(f"--{step}: {what}; choose another --input_dir")
    names = ("min_words", "max_words", "near_duplicates", "near_duplicate_window")
    names += tuple(name for name in asdict(config) if name.startswith("unify_"))
    settings = {name: getattr(config, name) for name in names}
    table = letter_table(**{n: value for n, value in settings.items() if n.startswith("unify_")})
    cleaning = Cleaning(table, config.min_words, config.max_words)
    # not the other way round too: each would be done again whenever the other has changed
    other_lines = _text_files([output / FOLDERS["xml"]]) if kind == "text" else []
    facts = {**settings, "besides": [(str(path), path.stat().st_size) for path in other_lines]}
    sources = {path.relative_to(config.input_dir).as_posix(): path for path in files}
    job = FileJob(output, FOLDERS[kind], facts, sources)
    report = Report(output)
    if report.is_done(step, job.fingerprint, job.target):
        print(f"{step}: done already, nothing has changed")
        return report.read()[step]
    if job.resume():
        print(f"{step}: resumes what an earlier run began")
    duplicates = Duplicates(config.near_duplicates, config.near_duplicate_window)
    _remember(duplicates, {path: path.stat().st_size for path in other_lines})
    _remember(duplicates, job.written())

    def accept(result):
        found, reason = result
        if found is None:
            return None, reason
        line, key, runs = found
        if reason := duplicates.why_dropped(key, runs):
            return None, reason
        duplicates.add(key, runs)
        return line, None

    def read(path, facts):
        counts = FileCounts()
        yield from read_documents(path, kind, counts)
        facts |= {"documents": counts.documents, "not_read": dict(counts.not_read)}
        facts |= {"problems": counts.problems}

    n_workers = _n_workers(config)
    job.run(read, CleanBatch(cleaning), accept, n_workers, config.batch_size, step)
    of_files = job.files()
    totals = {"documents": sum(of["documents"] for of in of_files.values())}
    totals["kept"] = sum(of["kept"] for of in of_files.values())
    reasons = Counter()
    for of in of_files.values():
        reasons.update(of["dropped"])
        reasons.update(of["not_read"])
    facts = {"fingerprint": job.fingerprint, "settings": settings, **totals}
    facts |= {"dropped": dict(reasons.most_common()), "files": of_files}
    facts |= {"other_files": dict(others)}
    if not totals["kept"]:
        job.discard()
        problems = [f"{name} {p}" for name, of in of_files.items() for p in of["problems"]]
        why = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common(4))
        why = "; ".join([why, *problems[:2]] if why else problems[:2]) or "no document"
        raise ValueError(f"--{step}: nothing is left of {config.input_dir} ({one_line(why, 300)})")
    job.finish()
    report.add(step, facts)
    job.discard()
    return facts


def _remember(duplicates: Duplicates, sizes: dict[Path, int]) -> None:
    """Add the documents in the first bytes of files."""
    n_lines = sum(1 for path, size in sizes.items() for _ in _lines_within(path, size))
    lines = (line for path, size in sizes.items() for line in _lines_within(path, size))
    duplicates.add_known(lines, n_lines)


def _lines_within(path: Path, n_bytes: int):
    with open(path, "rb") as f:
        for line in f:
            n_bytes -= len(line)
            if n_bytes < 0:
                return
            yield line.decode().rstrip("\n")


def _text_files(folders) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.rglob("*.txt"))]


def _n_workers(config: PreprocessConfig) -> int:
    if config.workers:
        return config.workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------- segment


class SegmentBatch:
    """Lines -> [(segmented line, why it is not segmented or None)]."""

    def __init__(self, segmenter, letters: dict):
        self.segmenter = segmenter
        self.letters = letters

    def __call__(self, lines: list[str]) -> list:
        results = []
        for line in lines:
            line = normalise(line.rstrip("\n"), self.letters)
            if self.segmenter is None:
                results.append((uncut(line), None))
                continue
            n_failed = getattr(self.segmenter, "n_failed", 0)
            segmented = self.segmenter.segment(line)
            has_failed = getattr(self.segmenter, "n_failed", 0) > n_failed
            results.append((segmented, "left whole, the jar failed" if has_failed else None))
        return results


def segment(config: PreprocessConfig, is_own_text: bool) -> dict:
    """Write OUTPUT/segmented; returns the part of the report."""
    output = Path(config.output_dir)
    sources = _sources_of_segment(config, is_own_text)
    names = ("segmenter", "word_list", "max_counted_words", "farasa_jar")
    names += tuple(name for name in asdict(config) if name.startswith("unify_"))
    settings = {name: getattr(config, name) for name in names}
    contents = sha256_of(config.word_list) if config.word_list is not None else None
    job = FileJob(output, SEGMENTED, {**settings, "word_list_sha256": contents}, sources)
    report = Report(output)
    if report.is_done("segment", job.fingerprint, job.target):
        print("segment: done already, nothing has changed")
        return report.read()["segment"]
    is_resumed = job.resume()
    if is_resumed:
        print("segment: resumes what an earlier run began")
    letters = letter_table(**{n: value for n, value in settings.items() if n.startswith("unify_")})
    segmenter = None
    n_workers = _n_workers(config)
    if config.segmenter == "rules":
        words = _word_list(config, sources, job.work / WORD_LIST, n_workers)
        segmenter = RulesSegmenter(words)
    elif config.segmenter == "farasa":
        segmenter = Farasa(config.farasa_jar, config.java, config.farasa_timeout_s)
        print_notes([f"{config.farasa_jar}: Farasa's licence allows research only"])
    n_words = Counter()

    def read(path, facts):
        with open(path, encoding="utf-8", newline="\n") as f:
            yield from f

    def accept(result):
        line, reason = result
        return line, reason

    job.run(read, SegmentBatch(segmenter, letters), accept, n_workers, config.batch_size, "segment")
    if isinstance(segmenter, Farasa):
        segmenter.close()
    of_files = job.files()
    reasons = Counter()
    for of in of_files.values():
        reasons.update(of["dropped"])
    facts = {"fingerprint": job.fingerprint, "settings": settings}
    facts |= {"documents": sum(of["read"] for of in of_files.values())}
    facts |= {"not_segmented": dict(reasons)}
    if not facts["documents"]:
        job.discard()
        raise ValueError("--segment: the text files are empty; run --process_text first")
    word_list = job.work / WORD_LIST
    if word_list.exists():
        shutil.copyfile(word_list, output / f"{WORD_LIST}.part")
        rename_durably(output / f"{WORD_LIST}.part", output / WORD_LIST)
    job.finish()
    for path in _text_files([job.target]):
        n_words += _words_cut(path)
    facts |= {"words": n_words["words"], "words_cut": n_words["cut"]}
    facts |= {"of": {name: path.stat().st_size for name, path in sources.items()}}
    report.add("segment", facts)
    job.discard()
    return facts


def _words_cut(path: Path) -> Counter:
    n = Counter()
    with open(path, encoding="utf-8", newline="\n") as f:
        for line in f:
            n["words"] += line.count(" ") + 1
            n["cut"] += sum("+" in word for word in line.split(" "))
    return n


def _sources_of_segment(config: PreprocessConfig, is_own_text: bool) -> dict[str, Path]:
    """{name: file} of what is to be segmented. Raises ValueError if there is nothing."""
    output = Path(config.output_dir)
    if is_own_text or config.input_dir is None:
        roots = [output / folder for folder in FOLDERS.values()]
        base = output
    else:
        base = Path(config.input_dir)
        if not base.is_dir():
            raise FileNotFoundError(f"--input_dir: {base}: no such folder")
        roots = [base]
    files = _text_files(roots)
    if not files:
        where = " and ".join(map(str, roots))
        what = f"there is no text in {where}"
        raise ValueError(f"--segment: {what}; run --process_xml or --process_text first")
    return {path.relative_to(base).as_posix(): path for path in files}


def _word_list(config: PreprocessConfig, sources, path: Path, n_workers: int) -> WordList:
    """The word list to segment by: given, counted by a killed run, or counted now."""
    given = config.word_list if config.word_list is not None else path
    if Path(given).exists():
        return WordList(read_word_list(given), most=config.max_counted_words)
    words = WordList(most=config.max_counted_words)
    lines = (line for source in sources.values() for line in _text_lines(source))
    bar = tqdm(desc="count words", unit=" documents", mininterval=1)
    with bar, Workers(_count_batch, n_workers) as pool:
        for n_lines, counts in pool.map(in_batches(lines, config.batch_size)):
            words.add(counts)
            bar.update(n_lines)
    rows = sorted(words.counts.items(), key=lambda pair: (-pair[1], pair[0]))
    write_file(path, "".join(f"{word}\t{n}\n" for word, n in rows).encode())
    return words


def _text_lines(path: Path):
    with open(path, encoding="utf-8", newline="\n") as f:
        yield from f


def _count_batch(lines: list[str]) -> tuple[int, Counter]:
    counts = Counter()
    for line in lines:
        counts.update(count_words(normalise(line)))
    return len(lines), counts


def read_word_list(path) -> dict[str, int]:
    """{word: how often} of a file of lines WORD, tab, NUMBER. Raises ValueError naming the line."""
    counts = {}
    with open(path, encoding="utf-8") as f:
        for i, line in enumerate(f, 1):
            word, _, n = line.rstrip("\n").partition("\t")
            if not n.isdecimal():
                what = f"line {i} is not a word, a tab and a number: {one_line(line, 40)!r}"
                raise ValueError(f"--word_list: {path}: {what}")
            counts[word] = int(n)
    return counts


# ---------------------------------------------------------------------------------- split


def side_and_shard(key: int, validation_share: float, test_share: float, shards: int):
    """(side, shard) of a document from the 64 bits of its hash."""
    place = (key >> 32) / 2**32
    shard = (key & 0xFFFFFFFF) % shards
    if place < validation_share:
        return "validation", shard
    # from the other end, so that a change of one share moves nothing between the other two
    return ("test" if place >= 1 - test_share else "train"), shard


def split(config: PreprocessConfig) -> dict:
    """Write OUTPUT/train, validation and test; returns the part of the report."""
    output = Path(config.output_dir)
    files = _sources_of_split(output)
    work = output / ".split.part"
    shutil.rmtree(work, ignore_errors=True)  # left by a kill
    for side in SIDES:
        make_folder(work / side)
    counted = {side: {"documents": 0, "words": 0, "bytes": 0} for side in SIDES}
    waiting, n_waiting = {}, 0
    shares = config.validation_share, config.test_share, config.shards
    with tqdm(desc="split", unit=" documents", mininterval=1) as bar:
        for line in (line for path in files for line in _text_lines(path)):
            line = without_marks(line.rstrip("\n"))
            side, shard = side_and_shard(key_of(line), *shares)
            waiting.setdefault((side, shard), []).append(line + "\n")
            n_waiting += len(line)
            counted[side]["documents"] += 1
            counted[side]["words"] += line.count(" ") + 1
            counted[side]["bytes"] += len(line.encode()) + 1
            bar.update()
            if n_waiting > BUFFER_CHARS:
                _append(work, waiting)
                n_waiting = 0
        _append(work, waiting)
    if not any(of["documents"] for of in counted.values()):
        shutil.rmtree(work)
        raise ValueError("--split: the text files are empty; run --process_text first")
    for side in SIDES:
        shutil.rmtree(output / side, ignore_errors=True)
        rename_durably(work / side, output / side)
    names = ("shards", "validation_share", "test_share")
    facts = {"settings": {name: getattr(config, name) for name in names}, **counted}
    Report(output).add("split", facts)
    shutil.rmtree(work)
    return facts


def _append(work: Path, waiting: dict) -> None:
    """Append the lines that wait to their files; so the number of open files does not matter."""
    for (side, shard), lines in waiting.items():
        with open(work / side / f"shard_{shard:05d}.txt", "ab") as f:
            f.write("".join(lines).encode())
    waiting.clear()


def _sources_of_split(output: Path) -> list[Path]:
    """The segmented text, or what is not segmented. Raises ValueError if there is none."""
    texts = _text_files([output / folder for folder in FOLDERS.values()])
    segmented = _text_files([output / SEGMENTED])
    if not segmented and not texts:
        what = f"there is no text in {output}"
        raise ValueError(f"--split: {what}; run --process_xml or --process_text first")
    if not segmented:
        print_notes(["the text is not segmented (no --segment)"])
        return texts
    known = Report(output).read().get("segment", {}).get("of", {})
    sizes = {path.relative_to(output).as_posix(): path.stat().st_size for path in texts}
    if texts and known != sizes and not known.keys().isdisjoint(sizes):
        what = f"{output / SEGMENTED} was made of other text than there is now"
        raise ValueError(f"--split: {what}; run --segment again")
    return segmented


# ---------------------------------------------------------------------------------- command line


def _print_process(step: str, facts: dict) -> None:
    notes = [f"{name}: {p}" for name, of in facts["files"].items() for p in of["problems"]]
    if len(notes) > MOST_NOTES:
        notes = [*notes[:MOST_NOTES], f"and {len(notes) - MOST_NOTES} more, in {REPORT}"]
    if facts["other_files"]:
        others = ", ".join(f"{n:,} {ending}" for ending, n in facts["other_files"].items())
        notes.append(f"files of other kinds, not read: {others}")
    print_notes([one_line(note, 300) for note in notes])
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in facts["dropped"].items())
    what = f"{facts['documents']:,} documents in {len(facts['files']):,} files"
    print(f"{step}: {what}, {facts['kept']:,} kept; dropped: {reasons or 'nothing'}")


def _print_segment(facts: dict) -> None:
    cut = facts["words_cut"] / max(facts["words"], 1)
    what = f"{facts['documents']:,} documents, {facts['words']:,} words, {cut:.1%} of them cut"
    print(f"segment: {what}")
    print_notes([f"{n:,} documents {reason}" for reason, n in facts["not_segmented"].items()])


def _print_split(config: PreprocessConfig, facts: dict) -> None:
    sides = [f"{side} {facts[side]['documents']:,}" for side in SIDES]
    print(f"split: {', '.join(sides)} documents in {config.output_dir}")
    shares = {"validation": config.validation_share, "test": config.test_share}
    empty = [side for side, share in shares.items() if share and not facts[side]["documents"]]
    if empty:
        what = f"no documents for {' and '.join(empty)}: there are too few for these shares"
        print_notes([what])


def main(config: PreprocessConfig) -> None:
    """Do the steps and print what became of the documents."""
    steps = check(config)
    make_folder(Path(config.output_dir))
    kinds = [kind for kind in FOLDERS if f"process_{kind}" in steps]
    if config.all:  # a folder may have one kind of files only
        has_files = {k: find_files(config.input_dir, k, [config.output_dir])[0] for k in kinds}
        kinds = [kind for kind in kinds if has_files[kind]] or kinds
    for kind in kinds:
        _print_process(f"process_{kind}", process(config, kind))
    if "segment" in steps:
        _print_segment(segment(config, is_own_text=bool(kinds)))
    if "split" in steps:
        _print_split(config, split(config))


if __name__ == "__main__":
    run_script(lambda: main(parse_script(PreprocessConfig)))
