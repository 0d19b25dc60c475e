"""
Extend ModernBERT's tokenizer by Arabic tokens, and its model by rows for them. No id moves.

    python recipes/arabic_bert/tokenizer_extension.py --model-name answerdotai/ModernBERT-base \\
        --input-dir ./data/processed --output-dir ./Training --min-freq 20 --max-vocab-size 80000
    python recipes/arabic_bert/tokenizer_extension.py --model-name FOLDER ... --method words
    python recipes/arabic_bert/tokenizer_extension.py --model-name FOLDER ... \\
        --init translate dictionary.tsv

--model-name is a name on the hub or a folder. A folder with a tokenizer and no weights gets a small
random ModernBERT (--hidden-size, --num-layers). Writes into --output-dir

    Tokenizer/     for AutoTokenizer
    Model/         for AutoModelForMaskedLM, with as many rows as the tokenizer has ids
    report.json    before and after: tokens per word, coverage, unknown tokens, speed; the most
                   frequent new tokens, memory

A folder gets its name when it is complete. One line in a hundred of the text is not counted, but
measured. --method continued appends merges (BPE training continued on the old tokens); words adds
the most frequent words and segments whole. --init mean makes a new row the mean of the rows of the
old tokens that it consists of; random draws it; translate takes the mean of the rows of the
translations in a file of lines ARABIC<tab>TRANSLATION[<tab>WEIGHT], and for tokens of no line,
mean.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C during the imports leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import json
import os
import shutil
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from parts.base.files import (
    check_writable,
    fsync,
    make_folder,
    read_json,
    rename_durably,
    work_folder,
    write_file,
)
from parts.base.text import one_line
from parts.base.units import format_bytes
from parts.cli.launch import print_notes, run_script
from parts.cli.progress_bar import tqdm
from parts.data import sources
from parts.data.corpus import named_errors
from parts.data.readers import FileRows
from parts.storage.hub import from_hub
from parts.training.metrics import memory_gib
from recipes.arabic_bert import new_rows
from recipes.arabic_bert.bpe_continued import (
    AFFIXES,
    MAX_FED,
    MAX_PIECE_CHARS,
    PieceCounter,
    all_ids,
    check_family,
    continued,
    scale_of,
    to_text,
    whole_words,
    with_arabic_split,
)
from recipes.arabic_bert.common import parse_script

METHODS = {"continued": continued, "words": whole_words}
INITS = ("mean", "random", "translate")
WORK = ".extending.part"  # folder for what is not complete
TOKENIZER, MODEL, REPORT = "Tokenizer", "Model", "report.json"
# files beside tokenizer.json that belong to the tokenizer and stay as they are
KEPT = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SPECIAL = ("[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]")
ONE_MEASURED_IN = 100  # lines
MEASURED_CHARS = 2_000_000  # at most; lines after that are all counted
N_SHOWN = 30  # of the most frequent new tokens
SMALL_HIDDEN_SIZE, SMALL_NUM_LAYERS = 128, 4


@dataclass
class ExtendConfig:
    """Extend a tokenizer by Arabic tokens, and its model by rows for them."""

    model_name: str = "answerdotai/ModernBERT-base"  # a name on the hub, or a folder
    input_dir: str = "./data/processed"  # text, plain or segmented, as it will be trained on
    output_dir: str = "./Training"  # folder for Tokenizer/, Model/ and report.json
    min_freq: int = 20  # occurrences that a new token needs
    max_vocab_size: int = 80_000  # new tokens at most
    method: Literal["continued", "words"] = "continued"  # merges, or whole words and segments
    init: tuple[str, ...] = ("mean",)  # rows of new tokens: mean, random, or translate FILE.tsv
    max_counted_words: int = 2_000_000  # different words in memory; the rarest are dropped
    hidden_size: int | None = None  # of a random model; None: 128
    num_layers: int | None = None  # of a random model; None: 4
    seed: int = 0  # of random weights and rows
    config: str | None = None  # YAML file with lines such as min_freq: 20
    print_default_config: bool = False  # print such a file and exit
    log_file: str | None = None  # the printed lines are appended to this file too
    debug: bool = False  # show the traceback of an error


# ------------------------------------------------------------------------------------ input


def check(config: ExtendConfig) -> None:
    """Raises ValueError for settings that cannot be, or results that are there already."""
    for name in ("min_freq", "max_vocab_size", "max_counted_words"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name}: {getattr(config, name)} is below 1")
    kind = config.init[0] if config.init else ""
    if kind not in INITS or len(config.init) != 1 + (kind == "translate"):
        what = f"{' '.join(config.init)!r} is not mean, random, or translate FILE.tsv"
        raise ValueError(f"--init: {what}")
    for name in (TOKENIZER, MODEL):
        if os.path.lexists(path := Path(config.output_dir) / name):
            what = f"{path} already exists; delete it, or choose another folder"
            raise ValueError(f"--output_dir: {what}")
    check_writable(config.output_dir, "--output_dir")


def open_folder(name: str) -> Path:
    """The folder of --model_name. Raises ValueError if there is none."""
    try:
        return Path(name) if os.path.lexists(name) else from_hub(name)
    except ValueError as e:
        raise ValueError(f"--model_name: {e}") from e


def read_tokenizer(folder: Path) -> dict:
    """The tokenizer.json of a folder. Raises ValueError if it cannot be extended here."""
    path = folder / "tokenizer.json"
    try:
        spec = read_json(path, "give the folder of a ModernBERT with its tokenizer.json")
    except ValueError as e:
        raise ValueError(f"--model_name: {e}") from e
    try:
        check_family(spec)
        if missing := [token for token in SPECIAL if token not in all_ids(spec)]:
            raise ValueError(f"it has no {', '.join(missing)}")
        new_rows.library_tokenizer(spec)
    except Exception as e:  # noqa: BLE001  the library raises Exception itself
        why = one_line(e, 150)
        fix = "give a checkpoint of ModernBERT's family"
        raise ValueError(f"--model_name: {path} cannot be extended: {why}; {fix}") from e
    return spec


def random_sizes(config: ExtendConfig) -> tuple[int, int]:
    """(width, layers) of a random model."""
    width, n_layers = config.hidden_size, config.num_layers
    return (
        SMALL_HIDDEN_SIZE if width is None else width,
        SMALL_NUM_LAYERS if n_layers is None else n_layers,
    )


def check_model(folder: Path, config: ExtendConfig, n_old: int) -> bool:
    """Whether the folder has weights. Raises ValueError if they do not fit, before any work."""
    if not new_rows.has_weights(folder):
        new_rows.check_sizes(*random_sizes(config))
        return False
    for name in ("hidden_size", "num_layers"):
        if getattr(config, name) is not None:
            what = f"is for a random model, and {folder} has weights"
            raise ValueError(f"--{name}: {what}; leave it out")
    fix = "give a checkpoint of ModernBERT"
    settings = read_json(folder / "config.json", fix)
    if (kind := settings.get("model_type")) != new_rows.FAMILY:
        what = f"{folder}: its model is of type {str(kind)[:50]!r}, not {new_rows.FAMILY!r}"
        raise ValueError(f"--model_name: {what}; {fix}")
    if (n_rows := settings.get("vocab_size", 0)) < n_old:
        what = f"{folder}: its tokenizer has {n_old:,} ids, its model {n_rows:,}"
        raise ValueError(f"--model_name: {what}; give the model's own tokenizer")
    return True


def is_measured(line: str) -> bool:
    """Whether a line is for measuring: by its hash, so that equal lines are on the same side."""
    return zlib.crc32(line.encode()) % ONE_MEASURED_IN == 0


def count_text(config: ExtendConfig, spec: dict) -> tuple[PieceCounter, list[str], dict]:
    """
    (pieces of the text, the lines that are measured, what was read) of --input_dir.

    Raises ValueError or FileNotFoundError if there is no Arabic text.
    """
    source = sources.find(config.input_dir, "--input_dir")
    print_notes([source.note] if source.note else [])
    counter = PieceCounter(spec, config.max_counted_words)
    measured, first, n_chars, n_measured, n_lines = [], [], 0, 0, 0
    with named_errors(str(config.input_dir)), tqdm(unit="char", unit_scale=True) as bar:
        for row in FileRows(f"--input_dir: {config.input_dir}", source.files, source.kind):
            for line in (row["text"] or "").splitlines():
                if not line.strip():
                    continue
                n_lines += 1
                if len(first) < ONE_MEASURED_IN:
                    first.append(line)
                if n_measured < MEASURED_CHARS and is_measured(line):
                    measured.append(line)
                    n_measured += len(line)
                else:
                    counter.add(line)
                n_chars += len(line)
                bar.update(len(line))
    held_out = any(counter.pieces(line) for line in measured)
    if not held_out:  # few lines: all are counted, and the first ones measured
        for line in measured:
            counter.add(line)
        measured = first
    counter.finish()
    if not counter.counts:
        fix = "give the folder that data_preprocessing.py has written"
        raise ValueError(f"--input_dir: {config.input_dir} has no Arabic text; {fix}")
    facts = {"files": len(source.files), "lines": n_lines, "characters": n_chars}
    return counter, measured, facts | {"measured_lines": len(measured), "held_out": held_out}


# ------------------------------------------------------------------------------------ measure


def measure(tokenizer, counter: PieceCounter, lines: list[str]) -> dict:
    """
    What a tokenizer makes of lines: JSON values.

    coverage: share of the Arabic words (of segmented text: stems and affixes) that are one token.
    speed_mb_per_s: on one thread, 10^6 bytes of text.
    """
    n_words = sum(len(line.split()) for line in lines)
    n_bytes = sum(len(line.encode()) for line in lines)
    tokenizer.encode(lines[0], add_special_tokens=False)  # the first one takes much longer
    begin = time.perf_counter()
    encodings = [tokenizer.encode(line, add_special_tokens=False) for line in lines]
    elapsed_s = time.perf_counter() - begin
    n_tokens = sum(len(encoding.ids) for encoding in encodings)
    unknown = tokenizer.token_to_id("[UNK]")
    pieces = Counter(piece for line in lines for piece in counter.pieces(line))
    whole = sum(
        n
        for piece, n in pieces.items()
        if len(tokenizer.encode(piece, add_special_tokens=False).ids) == 1
    )
    return {
        "tokens_per_word": n_tokens / n_words,
        "coverage": whole / (pieces.total() or 1),
        "unknown_tokens": sum(encoding.ids.count(unknown) for encoding in encodings),
        "speed_mb_per_s": n_bytes / 1e6 / elapsed_s,
        "tokenizer_ids": max(tokenizer.get_vocab().values()) + 1,
    }


def most_frequent(tokenizer, counts, n_old: int) -> tuple[list[tuple[str, int]], int]:
    """([(text, occurrences)] of the most frequent new tokens, new tokens that occur nowhere)."""
    of_id, ordered = Counter(), sorted(counts)
    for begin in range(0, len(ordered), 10_000):
        batch = ordered[begin : begin + 10_000]
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            for i in encoding.ids:
                if i >= n_old:
                    of_id[i] += counts[piece]
    token_of = {i: token for token, i in tokenizer.get_vocab().items()}
    n_unused = sum(i >= n_old and i not in of_id for i in token_of)
    ranked = sorted(of_id.items(), key=lambda item: (-item[1], item[0]))[:N_SHOWN]
    return [(to_text(token_of[i]), n) for i, n in ranked], n_unused


# ------------------------------------------------------------------------------------ write


def weights_of(config: ExtendConfig, pairs, old_spec: dict, old, new, tokens, n_old: int):
    """(weights for new_rows.grow, None if random; number of tokens that a translation gives)."""
    kind = config.init[0]
    if kind == "random":
        return None, 0
    weights = new_rows.mean_weights(old_spec, tokens, n_old)
    if kind == "mean":
        return weights, 0
    of_pairs = new_rows.translation_weights(pairs, old, new, n_old)
    if not of_pairs:
        what = f"none of the {len(pairs):,} lines of {config.init[1]} has a new token"
        raise ValueError(f"--init: {what}; is it about the words of --input_dir?")
    return weights | of_pairs, len(of_pairs)


def write_tokenizer(folder: Path, source: Path, spec: dict) -> None:
    """A folder that AutoTokenizer loads."""
    make_folder(folder)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    for name in KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / "tokenizer_config.json").exists():
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
        write_file(folder / "tokenizer_config.json", json.dumps(settings, indent=2).encode())


def extend(config: ExtendConfig) -> dict:
    """
    Write all files; returns the report that is also in OUTPUT_DIR/report.json.

    Raises ValueError or FileNotFoundError for bad input, before anything is written.
    """
    check(config)
    folder = open_folder(config.model_name)
    old_spec = read_tokenizer(folder)
    n_old = max(all_ids(old_spec).values()) + 1
    with_weights = check_model(folder, config, n_old)
    pairs = new_rows.read_pairs(config.init[1]) if config.init[0] == "translate" else []

    # The text, and the new tokens.
    split_spec = with_arabic_split(old_spec)
    counter, measured, facts = count_text(config, split_spec)
    new_spec, tokens = METHODS[config.method](
        split_spec, counter.counts, config.max_vocab_size, config.min_freq
    )
    old, new = map(new_rows.library_tokenizer, (old_spec, new_spec))
    check_ids(old, new, tokens, n_old)
    weights, n_translated = weights_of(config, pairs, old_spec, old, new, tokens, n_old)

    # The model.
    if with_weights:
        model = new_rows.open_model(folder)
    else:
        sizes = random_sizes(config)
        print_notes(
            [f"{folder} has no weights: the model is random, {sizes[1]} layers of {sizes[0]}"]
        )
        model = new_rows.random_model(old_spec, n_old, *sizes, config.seed)
    before = {**measure(old, counter, measured), "embedding_bytes": embedding_bytes(model)}
    new_rows.grow(model, n_old + len(tokens), n_old, weights, config.seed)
    after = {**measure(new, counter, measured), "embedding_bytes": embedding_bytes(model)}

    shown, n_unused = most_frequent(new, counter.counts, n_old)
    report = {
        "settings": asdict(config),
        "text": {**facts, **facts_of_counting(counter)},
        "random_model": not with_weights,
        "first_new_id": n_old,
        "new_tokens": len(tokens),
        "affix_tokens": len(AFFIXES),
        "unused_new_tokens": n_unused,
        "tokens_with_translation": n_translated,
        "before": before,
        "after": after,
        "most_frequent_new_tokens": shown,
    }
    write(config, folder, new_spec, model, report)
    return report


def check_ids(old, new, tokens: list[str], n_old: int) -> None:
    """Raises RuntimeError if the library gives a token another id than planned."""
    found = new.get_vocab()
    expected = old.get_vocab() | {token: n_old + i for i, token in enumerate(tokens)}
    if found != expected:
        odd = [token for token in expected if found.get(token) != expected[token]]
        raise RuntimeError(f"the ids of {len(odd):,} tokens would differ, such as {odd[:3]}")


def embedding_bytes(model) -> int:
    """Bytes of the rows of the input."""
    matrix = model.get_input_embeddings().weight
    return matrix.numel() * matrix.element_size()


def facts_of_counting(counter: PieceCounter) -> dict:
    """What was counted and what was not: JSON values."""
    total = counter.counts.total()
    return {
        "arabic_words": total,
        "different_words": len(counter.counts),
        "words_too_long": counter.n_too_long,
        "rare_words_dropped": counter.n_dropped,
        "occurrences_missing_at_most": counter.n_not_counted,
        "counts_divided_by": scale_of(counter.counts),
    }


def lines_of(report: dict) -> list[str]:
    """The report as it is printed."""
    before, after, text = report["before"], report["after"], report["text"]
    ratio = after["tokens_per_word"] / before["tokens_per_word"]
    where = "held out" if text["held_out"] else "counted too: the text is short"
    rows = {
        "tokens per word": ("tokens_per_word", "{:.3f}".format),
        "words in one token": ("coverage", "{:.1%}".format),
        "unknown tokens": ("unknown_tokens", "{:,}".format),
        "speed, MB/s": ("speed_mb_per_s", "{:.2f}".format),
        "ids": ("tokenizer_ids", "{:,}".format),
        "embeddings": ("embedding_bytes", format_bytes),
    }
    what = f"{text['arabic_words']:,} Arabic words ({text['different_words']:,} different)"
    lines = [
        f"counted {what} in {text['lines']:,} lines of {text['files']:,} files",
        f"added {report['new_tokens']:,} tokens from id {report['first_new_id']:,}",
        f"measured on {text['measured_lines']:,} lines ({where}): before, after",
    ]
    for name, (key, shown) in rows.items():
        lines.append(f"  {name:20} {shown(before[key]):>10} {shown(after[key]):>10}")
    lines.append(f"  {'tokens, after/before':20} {ratio:>21.3f}")
    lines.append(f"new tokens that the text does not use: {report['unused_new_tokens']:,}")
    if report["settings"]["init"][0] == "translate":
        n = report["tokens_with_translation"]
        lines.append(f"rows by translation: {n:,}, by mean: {report['new_tokens'] - n:,}")
    words = ", ".join(f"{token!r} {n:,}" for token, n in report["most_frequent_new_tokens"][:10])
    lines.append(f"most frequent new tokens: {words}")
    lines.append(f"memory of this process: {report['peak_memory_gib']:.2f} GiB at most")
    if text["rare_words_dropped"]:
        what = f"{text['rare_words_dropped']:,} times a rare word was dropped from the count"
        lines.append(
            f"note: {what} (at most {text['occurrences_missing_at_most']:,} occurrences of each)"
        )
    if text["words_too_long"]:
        what = f"{text['words_too_long']:,} words over {MAX_PIECE_CHARS} characters"
        lines.append(f"note: {what} are not counted")
    if text["counts_divided_by"] > 1:
        what = f"more than {MAX_FED:,} words: counts and --min_freq were divided by"
        lines.append(f"note: {what} {text['counts_divided_by']} for --method continued")
    return lines


def write(config: ExtendConfig, source: Path, spec: dict, model, report: dict) -> None:
    """
    Write the two folders and the report; adds `peak_memory_gib` and prints the lines.

    Each gets its name when all are written. Raises OSError if they cannot be.
    """
    output = Path(config.output_dir)
    with work_folder(output, WORK) as work:
        write_tokenizer(work / TOKENIZER, source, spec)
        new_rows.write_model(work / MODEL, model)
        report["peak_memory_gib"] = memory_gib(torch.device("cpu"))
        data = json.dumps(report, ensure_ascii=False, indent=2) + "\n"
        write_file(work / REPORT, data.encode())
        for path in sorted(work.rglob("*")):
            fsync(path)
        for name in (REPORT, TOKENIZER, MODEL):
            rename_durably(work / name, output / name)
    lines = [*lines_of(report), f"{output}: wrote {TOKENIZER}/, {MODEL}/ and {REPORT}"]
    print("\n".join(lines), flush=True)


def main() -> None:
    """Extend as the command line says."""
    extend(parse_script(ExtendConfig))


if __name__ == "__main__":
    run_script(main)
