"""
Documents from wherever they are: the Hugging Face hub, a folder in the hub's layout, parquet, jsonl(.gz), or text files.

All of it goes through the `datasets` library, streamed: memory does not grow with the corpus, a limit reads no more than
it needs, several subsets are mixed by weight, several machines split the work, and a build that was killed goes on where
it was. Nothing touches the network unless the name is no folder here.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
import sysconfig
from pathlib import Path

import numpy as np

from parts.base.text import EOT, passage_pattern

KINDS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.gz": "json",
    ".json.gz": "json",
    ".txt": "text",
}
EOT_LINE = EOT + "\n"
CHUNK_DOCUMENTS, CHUNK_CHARS = 64, 1 << 20  # what one thread tokenises at once
PIECE_CHARS = 1 << 20  # a text file without separators is read in pieces of this size
HUB_TIMEOUT_S = 10
GONE = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)  # what waiting does not mend
# Books are cut here, so that validation gets passages of them and not whole ones: 4,000 characters, on to a blank line.
PASSAGE = passage_pattern(4000)


def parse_subsets(subset: str | None) -> list[tuple[str | None, float]]:
    """[(name, weight)] of "cosmopedia-v2" or "cosmopedia-v2:0.7,fineweb-edu-dedup:0.3"; weights add up to 1. Raises ValueError."""
    if subset is None:
        return [(None, 1.0)]
    parts = [part.strip().partition(":") for part in subset.split(",")]
    try:
        weights = [float(weight) if colon else 1.0 for _, colon, weight in parts]
    except ValueError as e:
        raise ValueError(
            f"--dataset_subset: {subset!r}: a weight is not a number; write cosmopedia-v2:0.7,fineweb-edu-dedup:0.3"
        ) from e
    if (
        not all(0 < w < float("inf") for w in weights)
        or sum(weights) == float("inf")
        or not all(name for name, _, _ in parts)
    ):
        raise ValueError(
            f"--dataset_subset: {subset!r}: each part needs a name and a weight above 0, such as 0.7"
        )
    return [(name, w / sum(weights)) for (name, _, _), w in zip(parts, weights, strict=True)]


def local_files(name: str, subset: str | None) -> list[Path] | None:
    """
    The data files meant by a path (and a subset, which is a folder in it), in order; None where there is no such path.

    Where the folder holds `train-*` files, other splits are left out. Raises ValueError where there are none.
    """
    root = Path(name)
    if not os.path.lexists(root):
        return None
    if subset is not None:
        folders = (
            [root / subset]
            if (root / subset).is_dir()
            else sorted(p for p in root.glob(f"*/*/{subset}") if p.is_dir())
        )
        if not folders:
            there = (
                ", ".join(
                    sorted(
                        p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")
                    )
                )
                if root.is_dir()
                else "none"
            )
            raise ValueError(
                f"--dataset_subset: {root} has no folder {subset!r}; the folders in it are: {there}"
            )
        root = folders[0]
    try:
        found = sorted(root.rglob("*")) if root.is_dir() else [root]
        files = [
            p
            for p in found
            if p.is_file()
            and _kind(p)
            and not _hidden(p.relative_to(root))
            and p.name != "report.json"
        ]
        written = {
            folder
            for p in files
            for folder in p.parents
            if folder.is_relative_to(root) and _is_ours(folder)
        }
        files = [p for p in files if not written & set(p.parents)]
    except OSError as e:
        raise ValueError(f"--dataset_name: {root}: {e.strerror}") from e
    kinds = [kind for kind in KINDS.values() if any(_kind(p) == kind for p in files)]
    if not kinds:
        raise ValueError(
            f"--dataset_name: {root} has no {', '.join(KINDS)} file; give a folder or file of text, or a name on the hub"
        )
    files = [p for p in files if _kind(p) == kinds[0]]
    if kinds[0] == "text":  # the combined books of prep_dataset.py lie beside their raw files
        files = [
            p
            for p in files
            if re.fullmatch(r"combined_\d+\.txt", p.name) and (p.parent / "report.json").exists()
        ] or files
    return [p for p in files if re.match(r"train\b", p.name)] or files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_ours(folder: Path) -> bool:
    """Whether a training run or a build of token shards wrote this folder: no text of anybody's."""
    return (folder / "run.json").exists() or (
        (folder / "index.json").exists() and (folder / "tokenizer.json").exists()
    )


def _kind(path: Path) -> str | None:
    return KINDS.get(path.suffix.lower()) or KINDS.get("".join(path.suffixes[-2:]).lower())


def facts_of(
    name: str, subset: str | None, text_field: str | None, max_documents: int | None
) -> dict:
    """
    Everything about the source that determines the documents, as JSON values; costs no network and reads no data.

    Local files are told apart by name, size and time of change. Raises ValueError for a path that holds no data.
    """
    files = []
    for part, _ in parse_subsets(subset):
        found = local_files(name, part)
        try:
            stats = [(str(p), p.stat()) for p in found or []]
        except OSError as e:
            raise ValueError(f"{e.filename}: {e.strerror}") from e
        files += [[Path(p).name, s.st_size, s.st_mtime_ns] for p, s in stats]
    return {
        "dataset_name": name,
        "dataset_subset": subset,
        "text_field": text_field,
        "max_documents": max_documents,
        "files": files,
    }


class Corpus:
    """
    The documents of one source, as `chunks(state)` for shards.build; see `facts_of` for the first four arguments.

    streaming False downloads a hub dataset as a whole first. shard_index of num_shards: this machine's part of the work.
    """

    def __init__(
        self,
        name,
        subset=None,
        text_field=None,
        max_documents=None,
        streaming=True,
        num_shards=1,
        shard_index=0,
        seed=0,
    ):
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        import datasets  # here: it costs half a second, and only a build needs it
        from datasets.distributed import split_dataset_by_node

        datasets.config.TORCH_AVAILABLE = (
            "torch" in sys.modules
        )  # else its first row imports torch, to ask whether it is in a DataLoader
        self.name, self.subset, self.text_field = name, subset, text_field
        parts = parse_subsets(subset)
        self.limited, self.counted = max_documents is not None, False
        # rows of text files are pieces of documents, so their reader does itself what counts documents
        self.reader = (
            {"whole": True}
            if len(parts) > 1
            else {"limit": max_documents, "num_shards": num_shards, "shard_index": shard_index}
        )
        streams = [self._open(part, streaming) for part, _ in parts]
        stream = streams[0]
        if self.counted:
            self.stream = stream
            return
        if len(streams) > 1:
            # ends with the first subset that is used up: to go on would change the weights or repeat documents
            stream = datasets.interleave_datasets(
                streams, probabilities=[w for _, w in parts], seed=seed
            )
        if max_documents is not None:
            stream = stream.take(max_documents)
        if num_shards > 1:
            # by files where that gives the same documents; a limit counts documents, so there every n-th one is taken
            strategy = "examples" if max_documents is not None or len(streams) > 1 else "auto"
            stream = split_dataset_by_node(stream, shard_index, num_shards, strategy=strategy)
        self.stream = stream

    def _open(self, subset: str | None, streaming: bool):
        """One subset as a stream of {"text"}, or {"text", "starts", "ends"} for text files."""
        import datasets

        files = local_files(self.name, subset)
        if files is None:
            stream = self._open_hub(subset, streaming)
        elif _kind(files[0]) == "text":
            if next(_read_text(files), None) is None:
                raise ValueError(
                    f"{self.name}: holds no documents; its {len(files)} text files are empty"
                )
            names, self.counted = [str(p) for p in files], "whole" not in self.reader
            # the library calls the reader anew for each file of a list; over a tuple it counts on
            files = (
                tuple(names)
                if self.reader.get("limit") or self.reader.get("num_shards", 1) > 1
                else names
            )
            return datasets.IterableDataset.from_generator(
                _read_text, gen_kwargs={"files": files, **self.reader}
            )
        else:
            files = [p for p in files if p.stat().st_size]  # the library stumbles over empty ones
            if not files:
                raise ValueError(f"{self.name}: holds no documents; its files are empty")
            with _as_one_line(str(files[0].parent)):
                stream = datasets.load_dataset(
                    _kind(files[0]),
                    data_files=[str(p) for p in files],
                    split="train",
                    streaming=True,
                )
                stream = (
                    stream.reshard()
                )  # row group by row group: Arrow otherwise reads a whole parquet file ahead
        where = f"{self.name}{f' ({subset})' if subset else ''}"
        with _as_one_line(where):
            first = next(iter(stream), None)
        if first is None:
            raise ValueError(f"{where}: holds no documents")
        columns = stream.column_names or list(first)
        field = self.text_field or next((f for f in ("text", "content") if f in columns), None)
        if field not in columns:
            what = f"no column {field!r}" if field else "neither a column 'text' nor 'content'"
            raise ValueError(
                f"{where}: has {what}; its columns are {', '.join(columns)}; name the one with the text by --text_field"
            )
        if not isinstance(first.get(field), str | None):
            raise ValueError(
                f"{where}: column {field!r} holds {type(first[field]).__name__}, not text; name another by --text_field"
            )
        stream = stream.select_columns([field])
        return stream if field == "text" else stream.rename_column(field, "text")

    def _open_hub(self, subset: str | None, streaming: bool):
        import datasets
        import huggingface_hub

        way_out = f"put its files into ./{self.name}/{subset or ''} (parquet or jsonl), or give another --dataset_name: a folder or a file"
        try:
            # asked first, because it fails at once without a network, and fixes the version for a build that goes on later
            revision = huggingface_hub.HfApi().dataset_info(self.name, timeout=HUB_TIMEOUT_S).sha
            stream = datasets.load_dataset(
                self.name, subset, split="train", streaming=streaming, revision=revision
            )
        except ValueError as e:  # unknown subset: the library lists those that are there
            raise ValueError(f"--dataset_subset: {subset!r} of {self.name}: {e}") from e
        except Exception as e:  # noqa: BLE001  the hub's client raises errors of whatever http library it uses
            why = " ".join(str(e).split())[:150]
            raise ValueError(
                f"--dataset_name: {self.name} is no path here, and the hub gives nothing ({why}); {way_out}"
            ) from e
        if not streaming:
            return stream.to_iterable_dataset(num_shards=64)
        return (
            stream if self.limited else stream.reshard()
        )  # which asks for the end of every file: too slow for a first look

    def chunks(self, state):
        """Lists of rows {"text"} or {"text", "starts", "ends"} with the state behind them, from the beginning or an earlier state."""
        if state is not None:
            self.stream.load_state_dict(state)
        rows, n_chars = [], 0
        with _as_one_line(self.name):
            for row in self.stream:
                text = row["text"]
                if text is not None and not isinstance(text, str):
                    raise ValueError(
                        f"{self.name}: a document is {type(text).__name__}, not text; name another column by --text_field"
                    )
                if text and (text.strip() or "ends" in row):
                    rows.append(row)
                    n_chars += len(text)
                if len(rows) >= CHUNK_DOCUMENTS or n_chars >= CHUNK_CHARS:
                    yield rows, json.loads(json.dumps(self.stream.state_dict()))
                    rows, n_chars = [], 0
            if rows:
                yield rows, json.loads(json.dumps(self.stream.state_dict()))


def in_validation(text: str, share: float) -> bool:
    """Whether this text is held out: by its hash, so never by its position, and in every build alike."""
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def tokenise(rows, tokenizer, val_share: float) -> dict:
    """
    {"train" and "val": (ids (T,) uint32, number of documents, bytes of text)} of rows of `Corpus.chunks`.

    A row of a table is a document and goes to one side; a book is cut into passages and each goes to its own. End-of-text
    stands exactly once after each document.
    """
    if not any("ends" in row for row in rows):
        texts = {"train": [], "val": []}
        for row in rows:
            texts["val" if in_validation(row["text"], val_share) else "train"].append(row["text"])
        sizes = {
            split: sum(len(text.encode(errors="replace")) for text in chosen)
            for split, chosen in texts.items()
        }
        return {
            split: (tokenizer.encode_documents(chosen), len(chosen), sizes[split])
            for split, chosen in texts.items()
        }
    ids, counts, eot = (
        {"train": [], "val": []},
        {"train": [0, 0], "val": [0, 0]},
        np.array([tokenizer.eot], dtype=np.uint32),
    )
    for row in rows:
        passages = PASSAGE.findall(row["text"]) if "ends" in row else [row["text"]]
        held_out = [in_validation(p, val_share) for p in passages]
        for split in ("train", "val"):
            chosen = "".join(
                p for p, held in zip(passages, held_out, strict=True) if held == (split == "val")
            )
            if chosen:
                ids[split].append(tokenizer.encode(chosen))
                counts[split][1] += len(chosen.encode(errors="replace"))
            ends, starts = row.get("ends", True), row.get("starts", True)
            if (chosen and (ends or split == "val")) or (ends and not starts and split == "train"):
                ids[split].append(eot)
                counts[split][0] += 1
    return {
        split: (np.concatenate(i) if i else eot[:0], *counts[split]) for split, i in ids.items()
    }


@contextlib.contextmanager
def _as_one_line(where: str):
    """
    What the datasets library raises for unreadable data, as a ValueError that names the source; for a connection or a disk
    that gave up, as an OSError, after which a build goes on.
    """
    import datasets
    import pyarrow

    try:
        yield
    except (
        OSError,
        UnicodeDecodeError,
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
    ) as e:
        cause = " ".join(str(e.__cause__ or e).split())[:200]
        # Arrow's word for a damaged file is an OSError without a number
        if (
            isinstance(e, OSError)
            and (e.errno or isinstance(e, ConnectionError | TimeoutError))
            and not isinstance(e, GONE)
        ):
            raise OSError(
                f"{where}: cannot be read now ({cause}); run the same line again, it goes on from here"
            ) from e
        raise ValueError(f"{where}: cannot be read ({cause})") from e


def _read_text(files, limit=None, num_shards: int = 1, shard_index: int = 0, whole: bool = False):
    """
    {"text", "starts", "ends"} of text files: documents stand between lines `<|endoftext|>`, else each file is one.

    A long document comes in pieces, cut behind a blank line where there is one, or `whole`. Of the first `limit` documents
    every num_shards-th is taken. Raises ValueError naming a file that is no UTF-8 text.
    """
    n, longest = 0, float("inf") if whole else PIECE_CHARS
    for name in files:
        try:
            with open(name, encoding="utf-8-sig") as f:
                for piece in _pieces(f, name, longest):
                    if limit is not None and n >= limit:
                        return
                    if n % num_shards == shard_index:
                        yield piece
                    n += piece["ends"]
        except UnicodeDecodeError as e:
            raise ValueError(
                f"{name}: not UTF-8 text ({e.reason}); convert it, or let prep_dataset.py gutenberg find its encoding"
            ) from e


def _pieces(f, name, longest: float):
    kept, n_chars, starts = [], 0, True
    while line := f.readline(PIECE_CHARS):
        if "\0" in line:
            raise ValueError(f"{name}: a binary file (it has NUL bytes); take it out")
        if line == EOT_LINE or line + "\n" == EOT_LINE:
            yield from _last_piece(kept, starts)
            kept, n_chars, starts = [], 0, True
            continue
        if n_chars >= longest and (not kept[-1].strip() or n_chars >= 2 * longest):
            yield {"text": "".join(kept), "starts": starts, "ends": False}
            kept, n_chars, starts = [], 0, False
        kept.append(line)
        n_chars += len(line)
    yield from _last_piece(kept, starts)


def _last_piece(kept: list[str], starts: bool):
    text = "".join(kept)
    text = text.strip("\n") if starts else text.rstrip("\n")
    if text.strip() or not starts:
        yield {"text": text or "\n", "starts": starts, "ends": True}


def python_docs() -> list[str]:
    """
    About 1 MB of English that every Python carries: the prose of pydoc's topics and of the standard library's docstrings.

    Paragraphs that are code, tables or repeated are left out. The same Python gives the same documents.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    texts = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test", "lib2to3"} & set(
            file.relative_to(library).parts
        ):
            continue
        try:
            nodes = [
                n
                for n in ast.walk(ast.parse(file.read_bytes()))
                if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
            ]
        except (
            SyntaxError,
            ValueError,
            OSError,
        ):  # a file of the library that is no Python of this version
            continue
        texts.append(
            "\n\n".join(docstring for node in nodes if (docstring := ast.get_docstring(node)))
        )
    documents, seen = [], set()
    for text in texts:
        prose = []
        for paragraph in text.split("\n\n"):
            flat = "".join(paragraph.split())
            is_prose = (
                len(flat) > 50
                and sum(map(str.isalpha, flat)) > 0.85 * len(flat)
                and ">>>" not in flat
            )
            if is_prose and flat not in seen:
                seen.add(flat)
                prose.append(inspect.cleandoc(paragraph))
        if prose:
            documents.append("\n\n".join(prose))
    return documents
