"""
Which files of a path are text to train on, and what is left out and why.

The trainers, `prep_dataset.py` and `gpt_train.py --eval` all ask here, so that they agree on names,
links, splits and folders. Nothing is left out silently: `Source.note` says what was.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# end of a file's name -> how it is read; of several kinds in a folder, that with the most bytes is
KINDS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json"}
KINDS |= {".jsonl.gz": "json", ".json.gz": "json", ".txt": "text"}
# Names, without their end, of files that describe data, models or projects.
METADATA = {
    "tables": set(
        """
        metadata report dataset_info dataset_infos dataset_dict state index manifest run config
        generation_config preprocessor_config tokenizer tokenizer_config special_tokens_map
        added_tokens vocab trainer_state model.safetensors.index package package-lock
        """.split()
    ),
    "text": set(
        """
        merges vocab requirements readme license licence copying notice authors contributing
        changelog robots citation sha256sums md5sums
        """.split()
    ),
}
# Words that mark a split if they stand by themselves in a file's or folder's name.
TRAIN_WORDS = {"train", "training"}
OTHER_WORDS = {"valid", "validation", "val", "dev", "test", "testing"}
# What a file named directly is not read as, and what would make text of it.
NOT_TEXT = {
    (".csv", ".tsv", ".xlsx"): "save the column with the text as .jsonl or .parquet",
    (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"): (
        "unpack it first (prep_dataset.py extract)"
    ),
    (".html", ".htm", ".xml", ".pdf", ".epub", ".docx", ".doc"): "convert it to .txt first",
    (".bin", ".pt", ".pth", ".safetensors", ".gguf", ".npy", ".pkl"): "give text, not numbers",
}


@dataclass
class Source:
    """The files of a path that are read, in order, all of one kind of KINDS."""

    root: Path
    files: list[Path]
    kind: str
    left_out: Counter = field(default_factory=Counter)  # reason -> number of files
    remarks: list[str] = field(default_factory=list)

    @property
    def note(self) -> str | None:
        """One line about what is read and what is left out; None if everything is read."""
        parts = list(self.remarks)
        if self.left_out:
            counts = ", ".join(f"{n:,} {reason}" for reason, n in sorted(self.left_out.items()))
            parts.append(f"left out: {counts}")
        if not parts:
            return None
        ends = Counter(end_of(path) for path in self.files)
        read = ", ".join(f"{n:,} {end}" for end, n in sorted(ends.items()))
        return f"{self.root}: reading {read}; {'; '.join(parts)}"


def find(path, flag: str) -> Source:
    """
    The files to read of a file or folder; `flag` is where the path comes from, for messages.

    Hidden files, metadata, what runs and builds wrote and other splits than `train` are left out;
    links are followed once. A file that is named directly is read whatever its name.
    Raises FileNotFoundError if there is no such path, ValueError if it has no text.
    """
    root = Path(path)
    if not os.path.lexists(root):
        fix = "give a file or folder of text"
        raise FileNotFoundError(f"{flag}: {root} does not exist; {fix}")
    if not root.is_dir():
        return _single_file(root, flag)
    readable, left_out = [], Counter()
    for entry, reason in entries(root, flag):
        if reason is None and kind_of(entry):
            readable.append(entry)
        else:
            left_out[reason or end_of(entry)] += 1
    if not readable:
        has = ", ".join(f"{n:,} {reason}" for reason, n in sorted(left_out.items()))
        what = f"{root} has no {', '.join(KINDS)} file" + (f" (it has {has})" if has else "")
        raise ValueError(f"{flag}: {what}; give a folder or file of text, or a name on the hub")
    source = Source(root, readable, "", left_out)
    _leave_out_kinds(source)
    _leave_out_splits(source)
    return source


def _single_file(root: Path, flag: str) -> Source:
    if why := why_unreadable(root):
        raise ValueError(f"{flag}: {root} is a {why}; give a file or folder of text")
    if kind := kind_of(root):
        return Source(root, [root], kind)
    for ends, fix in NOT_TEXT.items():
        if root.suffix.lower() in ends:
            raise ValueError(f"{flag}: {root}: {root.suffix} is not read as text; {fix}")
    return Source(root, [root], "text", remarks=["as plain text"])


def _leave_out_kinds(source: Source) -> None:
    """Keep the kind with the most bytes, and of text the prepared books if there are any."""
    n_bytes = Counter()
    for path in source.files:
        n_bytes[kind_of(path)] += path.stat().st_size
    order = list(KINDS.values())
    source.kind = max(n_bytes, key=lambda kind: (n_bytes[kind], -order.index(kind)))
    kept = [path for path in source.files if kind_of(path) == source.kind]
    source.left_out.update(end_of(path) for path in source.files if path not in set(kept))
    source.files = kept
    if source.kind == "text" and any(map(_is_combined, kept)):
        # prep_dataset.py gutenberg keeps the raw files beside the combined ones
        source.files = [path for path in kept if _is_combined(path)]
        if n := len(kept) - len(source.files):
            source.left_out[".txt beside the prepared combined_1.txt"] += n


def _leave_out_splits(source: Source) -> None:
    """Leave out validation and test files if there are files for training."""
    names = {path.relative_to(source.root): path for path in source.files}
    others = other_splits(names)
    source.files = [path for name, path in names.items() if name not in others]
    source.left_out.update(f"of the split {split}" for split in others.values())
    if not others and (splits := {split_of(name) for name in names} - {None, "train"}):
        what = "no file is named train, so all are read, also those of"
        source.remarks.append(f"{what} {', '.join(sorted(splits))}")


def other_splits(names) -> dict[Path, str]:
    """{name: split} of the files that are not for training; none if no file is named train."""
    splits = {name: split_of(name) for name in names}
    if "train" not in splits.values():
        return {}
    return {name: split for name, split in splits.items() if split not in (None, "train")}


def split_of(relative: Path) -> str | None:
    """ "train", "val", ... if a name below the given folder has such a word; the last name wins."""
    for name in reversed(relative.parts):
        words = re.split(r"[^a-z]+", name.lower())
        if TRAIN_WORDS & set(words):
            return "train"
        if found := [word for word in words if word in OTHER_WORDS]:
            return found[-1]
    return None


# ------------------------------------------------------------------------------------ one folder


def entries(root: Path, flag: str) -> list[tuple[Path, str | None]]:
    """
    (path, why it is left out or None) of everything below `root` that is no folder, in order.

    Links are followed, and nothing is listed twice: what a link into `root` names is there already.
    A hidden folder counts as one entry. Raises ValueError for a folder that cannot be listed.
    """
    real_root = Path(os.path.realpath(root))
    found, seen = [], set()  # seen: real paths of folders, and of linked files

    def fail(e: OSError) -> None:
        raise ValueError(f"{flag}: {e.filename}: {e.strerror}") from e

    def is_elsewhere(link: Path) -> bool:
        return not Path(os.path.realpath(link)).is_relative_to(real_root)

    for name, folders, files in os.walk(root, followlinks=True, onerror=fail):
        folder, real = Path(name), os.path.realpath(name)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        ours = "written by a run or build" if _is_our_output(folder) else None
        found += [(folder / f, "hidden folder") for f in folders if f.startswith(".")]
        folders[:] = [f for f in folders if not f.startswith(".") and not ours]
        folders[:] = [
            f for f in folders if not (folder / f).is_symlink() or is_elsewhere(folder / f)
        ]
        for path in (folder / file for file in files):
            if path.is_symlink() and path.exists():
                real = os.path.realpath(path)
                if real in seen or not is_elsewhere(path):
                    continue
                seen.add(real)
            found.append((path, ours or _why_not(path)))
    return sorted(found)


def _why_not(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if why := why_unreadable(path):
        return why
    names = METADATA["text" if kind_of(path) == "text" else "tables"]
    is_metadata = path.name.lower().removesuffix(end_of(path)) in names
    return "metadata" if is_metadata and kind_of(path) else None


def why_unreadable(path: Path) -> str | None:
    """What a path is, if it is no regular file: "broken link", "named pipe", ..."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "broken link" if path.is_symlink() else "file that cannot be read"
    kinds = {"named pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK, "device": stat.S_ISCHR}
    kinds |= {"block device": stat.S_ISBLK, "folder": stat.S_ISDIR}
    return next((name for name, is_it in kinds.items() if is_it(mode)), None)


def identity_of(path: Path) -> list:
    """[name, bytes, time of change] of a file, by which its contents are known without reading."""
    stat_of = path.stat()
    return [path.name, stat_of.st_size, stat_of.st_mtime_ns]


def kind_of(path: Path) -> str | None:
    """How a file is read, by the end of its name; None for any other file."""
    return KINDS.get(end_of(path))


def end_of(path: Path) -> str:
    """The end of a file's name in lower case: ".jsonl.gz", ".txt", or "without an end"."""
    both = "".join(path.suffixes[-2:]).lower()
    return both if both in KINDS else path.suffix.lower() or "without an ending"


def _is_combined(path: Path) -> bool:
    """Whether prep_dataset.py gutenberg wrote this file of cleaned books."""
    is_numbered = re.fullmatch(r"combined_\d+\.txt", path.name) is not None
    return is_numbered and (path.parent / "report.json").exists()


def _is_our_output(folder: Path) -> bool:
    """Whether a training run or a build of token shards wrote this folder."""
    if (folder / "run.json").exists():
        return True
    return (folder / "index.json").exists() and (folder / "tokenizer.json").exists()
