"""
Code files of q and k in, training and test rows out: what run_pretraining.py reads.

    python recipes/q_lora/prepare_data.py --input q_files.jsonl      # {repo, path, license, text}
    python recipes/q_lora/prepare_data.py --input FOLDER             # of repositories with code
    python recipes/q_lora/prepare_data.py --input OWNER/DATASET      # of the Hugging Face hub
    python recipes/q_lora/prepare_data.py --input FOLDER --licenses licences.txt

writes into --output_dir, each as VARIANT_train.jsonl and VARIANT_test.jsonl,

    raw                   {repo, path, license, text}: everything but exact repeats;
                          near duplicates may be on both sides
    filtered              of raw: at least 50 bytes, no line over 1,000 characters, paired brackets,
                          and no near duplicate of an earlier row
    described_filtered    of filtered: {repo, path, license, prompt, completion}; the prompt is the
                          comment that the file begins with, or else its path and functions
    licensed              of filtered: permissive licences only, by their SPDX names

and report.json, which says what was dropped and why. All variants have the same split: whole
repositories are for testing, in the order of a hash, until they have --test_share of the bytes. One
that would make it more than twice as much is passed over. A text that several repositories have is
for testing if all of them are. Rows without a repository, or all of one, are split by the hash of
the text. Two runs on the same input write the same bytes. A run that fails leaves the earlier
result as it was; a file that would be empty is not written, and a note says so.

In a folder, a repository is a folder with .git, or else the first folder below --input. Train on a
prompt and its completion by joining them as they are: a prompt ends with a line break.
647 files (2.4 MB) take 1 s on one CPU core; memory grows by at most 8 KB per file.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C during the imports leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import contextlib
import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from parts.base.files import add_file_name, rename_durably, work_folder
from parts.base.text import one_line
from parts.base.units import format_bytes
from parts.cli.config import parse
from parts.cli.launch import print_notes, run_script
from parts.data.near_duplicates import NearDuplicates, sketch
from recipes.q_lora.licences import permissive, read_licences
from recipes.q_lora.q_code import describe, is_balanced
from recipes.q_lora.read_files import EXTENSIONS, rows

DATA_DIR = "data"  # where this script writes and run_pretraining.py looks
VARIANTS = ("raw", "filtered", "described_filtered", "licensed")
SIDES = ("train", "test")
WORK = ".preparing.part"  # folder for what is not complete
MIN_BYTES = 50
MAX_LINE_CHARS = 1000
ALIKE = 0.8  # share of runs of five words in common from which a file is a near duplicate
SKETCH_SIZE = 1024  # files with fewer runs of words, 90 % of real ones, are compared exactly


@dataclass
class PrepareConfig:
    """Turn code files into training and test rows."""

    input: str  # a folder of code files, a jsonl or parquet file, or a name on the hub
    output_dir: str = DATA_DIR  # folder for the result
    licenses: str | None = None  # file of lines: owner/name licence; overrides those of the rows
    extensions: tuple[str, ...] = EXTENSIONS  # endings of code files in a folder
    test_share: float = 0.1  # share of the bytes for testing
    debug: bool = False  # show the traceback of an error


def data_files(variant: str, folder=DATA_DIR) -> dict[str, Path]:
    """
    {"train": path, "test": path} of a variant.

    Raises ValueError for an unknown variant, FileNotFoundError that lists the missing files and
    gives the command that makes them.
    """
    if variant not in VARIANTS:
        raise ValueError(f"{variant!r}: no such data; the variants are {', '.join(VARIANTS)}")
    paths = {side: Path(folder) / f"{variant}_{side}.jsonl" for side in SIDES}
    if missing := [str(path) for path in paths.values() if not path.is_file()]:
        command = "python recipes/q_lora/prepare_data.py --input FILE_OR_FOLDER"
        command += f" --output_dir {folder}"
        command += " --licenses FILE" if variant == "licensed" else ""
        raise FileNotFoundError(f"{', '.join(missing)}: not found; make them: {command}")
    return paths


# ------------------------------------------------------------------------------------ choose


def normalised(text: str) -> str:
    """The text without blanks at the end of lines and blank lines at its ends."""
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


class Filter:
    """Why a row is not among the filtered ones; remembers the sketches of those that are."""

    def __init__(self):
        self._kept = NearDuplicates(ALIKE, SKETCH_SIZE)
        self._n_kept = 0
        self._short = set()  # digests of texts that are too short for a sketch

    def why_dropped(self, text: str) -> str | None:
        """The first reason that holds, None if the row is kept."""
        if len(text.encode()) < MIN_BYTES:
            return f"below {MIN_BYTES} bytes"
        if max(map(len, text.split("\n"))) > MAX_LINE_CHARS:
            return f"a line over {MAX_LINE_CHARS:,} characters"
        if not is_balanced(text):
            return "brackets or quotes that are not paired"
        runs = sketch(text, SKETCH_SIZE)
        if not len(runs):
            digest = _digest(normalised(text))
            if digest in self._short:
                return "near duplicate"
            self._short.add(digest)
            return None
        if self._kept.twin_of(runs):
            return "near duplicate"
        self._kept.add(str(self._n_kept), runs)
        self._n_kept += 1
        return None


def split(texts: dict[bytes, tuple[set[str], int]], test_share: float) -> set[bytes]:
    """
    The texts for testing, of {hash of a text: (repositories that have it, bytes)}.

    Repositories are taken in the order of a hash of their names, a text without one by its own,
    until they have test_share of the bytes. One that would make it more than twice as much, or
    leave nothing for training, is passed over; if all would, the smallest is taken. A text is for
    testing if all of its repositories are. Raises ValueError if there is only one text.
    """
    if len(texts) < 2:
        raise ValueError("--input: has one text, which cannot be for training and for testing")
    # a text counts for the last of its repositories in that order, the first with which it is taken
    of_unit = Counter()
    for key, (repositories, n_bytes) in texts.items():
        of_unit[max(repositories or {key.hex()}, key=_order)] += n_bytes
    total = of_unit.total()
    chosen, size = set(), 0
    for unit in sorted(of_unit, key=_order):
        if size >= test_share * total:
            break
        if size + of_unit[unit] <= min(2 * test_share * total, total - 1):
            chosen.add(unit)
            size += of_unit[unit]
    if not chosen and len(of_unit) > 1:
        chosen = {min(of_unit, key=lambda unit: (of_unit[unit], _order(unit)))}
    test = {key for key, (units, _) in texts.items() if (units or {key.hex()}) <= chosen}
    if not test:  # one repository, or they share their texts
        return split({key: (set(), n_bytes) for key, (_, n_bytes) in texts.items()}, test_share)
    return test


def _order(unit: str) -> bytes:
    return hashlib.sha256(unit.encode()).digest()


# ------------------------------------------------------------------------------------ write


def variants_of(row: dict, why_not_filtered: str | None) -> dict[str, dict | str]:
    """{variant: its row, or the reason why it has none} of a row of `raw`."""
    if why_not_filtered:
        return {"raw": row, "filtered": why_not_filtered}
    about = {name: row[name] for name in ("repo", "path", "license")}
    described = described_row = describe(row)
    if described:
        described_row = {**about, "prompt": described[0], "completion": described[1]}
    licence = permissive(row["license"])
    licensed_row = {**row, "license": licence}
    if licence is None:
        name = one_line(row["license"] or "", 60)
        licensed_row = f"licence not permissive, or unknown: {name}" if name else "no licence"
    return {
        "raw": row,
        "filtered": row,
        "described_filtered": described_row or "no code, or neither comment nor path nor function",
        "licensed": licensed_row,
    }


def prepare(config: PrepareConfig) -> dict:
    """
    Write all files; returns the report that is also written to OUTPUT_DIR/report.json.

    The files get their names only after all are written; if it fails, an earlier result is intact.
    Raises ValueError or FileNotFoundError for bad input, OSError if the output cannot be written.
    """
    if not 0 < config.test_share < 1:
        raise ValueError(f"--test_share: {config.test_share} must be above 0 and below 1")
    licences = read_licences(config.licenses) if config.licenses is not None else {}
    output = Path(config.output_dir)
    try:
        with work_folder(output, WORK) as work:
            report = _write_all(config, licences, work)
            for variant in VARIANTS:
                for side in SIDES:
                    name = f"{variant}_{side}.jsonl"
                    if (work / name).exists():
                        rename_durably(work / name, output / name)
                    else:  # of an earlier result
                        (output / name).unlink(missing_ok=True)
            rename_durably(work / "report.json", output / "report.json")
    except OSError as e:
        add_file_name(e, output)
        raise
    return report


def _write_all(config: PrepareConfig, licences: dict, work: Path) -> dict:
    """Write the files of all variants and report.json into a folder; returns the report."""
    kept, texts, counts = _write_raw(config, licences, work / "rows.jsonl")
    test = split(texts, config.test_share)
    settings = asdict(config)
    settings = {name: settings[name] for name in ("input", "licenses", "extensions", "test_share")}
    report = {"version": 1, "settings": settings, "read": counts, "variants": {}}
    for variant in VARIANTS:
        sides = {side: {"rows": 0, "bytes": 0, "repositories": set()} for side in SIDES}
        report["variants"][variant] = {"in": 0, "out": 0, "dropped": Counter(), **sides}
    report["variants"]["raw"] |= {"in": counts["rows"], "dropped": counts.pop("dropped")}
    with contextlib.ExitStack() as stack:
        files = {
            (variant, side): stack.enter_context(_open(work / f"{variant}_{side}.jsonl"))
            for variant in VARIANTS
            for side in SIDES
        }
        lines = stack.enter_context(open(work / "rows.jsonl", encoding="utf-8", newline="\n"))
        for (key, why), line in zip(kept, lines, strict=True):
            side = "test" if key in test else "train"
            for variant, row in variants_of(json.loads(line), why).items():
                counted = report["variants"][variant]
                counted["in"] += variant != "raw"
                if isinstance(row, str):
                    counted["dropped"][row] += 1
                    continue
                files[variant, side].write(_line(row))
                counted["out"] += 1
                counted[side]["rows"] += 1
                counted[side]["bytes"] += sum(
                    len(row.get(name, "").encode()) for name in ("text", "prompt", "completion")
                )
                counted[side]["repositories"].add(row["repo"] or "")
    for variant, side in files:
        counted = report["variants"][variant][side]
        counted["repositories"] = sorted(counted["repositories"] - {""})
        if not counted["rows"]:
            (work / f"{variant}_{side}.jsonl").unlink()
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (work / "report.json").write_text(text + "\n", encoding="utf-8")
    return report


def _write_raw(config: PrepareConfig, licences: dict, path: Path) -> tuple[list, dict, dict]:
    """
    Write the rows of `raw` to a file.

    Returns [(hash of its normalised text, why it is not filtered or None)] of each row, the texts
    for `split`, and what was read and dropped.
    """
    kept, texts, seen, filtered = [], {}, set(), Filter()
    not_read, dropped, n_rows = Counter(), Counter(), 0
    with _open(path) as out:
        for row in rows(config.input, config.extensions, _own_paths(config), not_read):
            n_rows += 1
            text = row["text"]
            row["license"] = licences.get(row["repo"], row["license"])
            key = _digest(normalised(text))
            repositories, n_bytes = texts.setdefault(key, (set(), 0))
            if row["repo"]:
                repositories.add(row["repo"])
            if _digest(text) in seen:
                dropped["exact repeat"] += 1
                continue
            seen.add(_digest(text))
            texts[key] = repositories, n_bytes + len(text.encode())
            kept.append((key, filtered.why_dropped(text)))
            out.write(_line(row))
    if not n_rows:
        why = ", ".join(f"{n:,} {reason}" for reason, n in sorted(not_read.items()))
        raise ValueError(f"--input: {config.input} has no text" + (f" ({why})" if why else ""))
    return kept, texts, {"rows": n_rows, "not_read": not_read, "dropped": dropped}


def _own_paths(config: PrepareConfig) -> set[Path]:
    """Absolute paths of what is written. Raises ValueError if --input is one of them."""
    names = [f"{variant}_{side}.jsonl" for variant in VARIANTS for side in SIDES]
    folder = Path(config.output_dir).absolute()
    paths = {folder / name for name in (*names, "report.json", WORK)}
    if Path(config.input).absolute() in paths:
        what = f"{config.input} would be replaced by the result"
        raise ValueError(f"--input: {what}; choose another --output_dir")
    return paths


def _open(path: Path):
    return open(path, "w", encoding="utf-8", newline="\n")


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------------------------ command line


def notes_of(report: dict) -> list[str]:
    """Lines about what the user may not expect."""
    notes = []
    if not_read := report["read"]["not_read"]:
        counts = ", ".join(f"{n:,} {reason}" for reason, n in sorted(not_read.items()))
        notes.append(f"not read: {counts}")
    for variant, counted in report["variants"].items():
        if empty := [side for side in SIDES if not counted[side]["rows"]]:
            what = f"{variant}: no rows for {' and '.join(empty)}, so there is no such file"
            if reasons := counted["dropped"].most_common(3):
                what += f" ({', '.join(f'{n:,} {reason}' for reason, n in reasons)})"
            if variant == "licensed":
                what += "; give the licences of the repositories with --licenses FILE"
            notes.append(what)
    return notes


def table(report: dict) -> str:
    """Rows and bytes of each variant, in lines for people."""
    lines = [f"{'':20}{'rows':>8}{'train':>20}{'test':>20}  dropped"]
    for variant, counted in report["variants"].items():
        line = f"{variant:20}{counted['out']:>8,}"
        for side in SIDES:
            of_side = f"{counted[side]['rows']:,}, {format_bytes(counted[side]['bytes'])}"
            line += f"{of_side:>20}"
        reasons = [f"{n:,} {reason}" for reason, n in counted["dropped"].most_common()]
        lines.append(f"{line}  {', '.join(reasons) or 'nothing'}")
    return "\n".join(lines)


def main(config: PrepareConfig) -> None:
    """Prepare the data and print what became of it."""
    report = prepare(config)
    print_notes(notes_of(report))
    print(table(report))
    raw = report["variants"]["raw"]
    share = raw["test"]["bytes"] / (raw["train"]["bytes"] + raw["test"]["bytes"])
    repositories = ", ".join(raw["test"]["repositories"]) or "single texts"
    print(f"test: {share:.1%} of the bytes ({repositories}); details in report.json")


if __name__ == "__main__":
    run_script(lambda: main(parse(PrepareConfig)))
