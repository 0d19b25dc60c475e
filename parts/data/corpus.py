"""
Documents from anywhere: the Hugging Face hub, a folder in its layout, parquet, jsonl(.gz), text.

All of them are streamed: memory does not grow with the corpus, a limit reads no more than it needs,
subsets are mixed by weight, several machines split the work, and a build that was killed resumes.
Local files are read by readers.py, the hub by the `datasets` library. The network is used only if
the name is not a local path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from parts.base.text import one_line, passage_pattern
from parts.data import sources
from parts.data.readers import FIELDS, FileRows, no_column
from parts.data.streams import Counts, Mixture, Selection

CHUNK_DOCUMENTS = 64  # most documents that one thread tokenises at once
CHUNK_CHARS = 1 << 20  # characters after which it gets no further document
HUB_TIMEOUT_S = 10
# errors of the file system that will be there again at the next try
LASTING_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# Books are cut into passages of 4,000 characters and more, so that validation gets passages of all
# books and not whole ones.
PASSAGE = passage_pattern(4000)
WEIGHTS_EXAMPLE = "cosmopedia-v2:0.7,fineweb-edu-dedup:0.3"


def parse_subsets(subset: str | None) -> list[tuple[str | None, float]]:
    """[(name, weight)] of "a" or "a:0.7,b:0.3"; the weights add up to 1. Raises ValueError."""
    if subset is None:
        return [(None, 1.0)]
    flag = f"--dataset_subset: {subset!r}"
    parts = [part.strip().partition(":") for part in subset.split(",")]
    try:
        weights = [float(weight) if colon else 1.0 for _, colon, weight in parts]
    except ValueError as e:
        raise ValueError(f"{flag}: a weight is not a number; write {WEIGHTS_EXAMPLE}") from e
    finite = all(w > 0 for w in weights) and sum(weights) < float("inf")
    if not finite or not all(name for name, _, _ in parts):
        raise ValueError(f"{flag}: each part needs a name and a weight above 0, such as 0.7")
    return [(name, w / sum(weights)) for (name, _, _), w in zip(parts, weights, strict=True)]


# ------------------------------------------------------------------------------------ local files


def local_source(name: str, subset: str | None, flag="--dataset_name") -> sources.Source | None:
    """
    The files of a path, or of the folder `subset` in it; None if there is no such path.

    Raises ValueError if there is no text.
    """
    root = Path(name)
    if not os.path.lexists(root):
        return None
    if subset is not None:
        root = _subset_folder(root, subset)
    try:
        return sources.find(root, flag)
    except OSError as e:
        raise ValueError(f"{flag}: {e.filename or root}: {e.strerror}") from e
    except ValueError as e:
        if other := next(iter(sorted(root.glob("*.bin"))), None):
            what = f"{other.name} is not a token shard (nanoGPT's files have bare ids)"
            raise ValueError(f"{e}; {what}") from e
        raise


def _subset_folder(root: Path, subset: str) -> Path:
    """root/subset, or the first such folder two levels down (data/VERSION/subset)."""
    if (root / subset).is_dir():
        return root / subset
    if deeper := sorted(p for p in root.glob(f"*/*/{subset}") if p.is_dir()):
        return deeper[0]
    folders = []
    if root.is_dir():
        folders = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
    what = f"{root} has no folder {subset!r}"
    raise ValueError(f"--dataset_subset: {what}; it has: {', '.join(folders) or 'no folders'}")


def facts_of(name, subset: str | None, text_field: str | None, max_documents: int | None) -> dict:
    """
    Everything about a source that determines its documents, as JSON values.

    Reads no data and uses no network; local files are identified by name, size and time of change.
    Raises ValueError for a path that has no data.
    """
    files = []
    for part, _ in parse_subsets(subset):
        source = local_source(name, part)
        for path in source.files if source else []:
            try:
                files.append(sources.identity_of(path))
            except OSError as e:
                raise ValueError(f"{e.filename}: {e.strerror}") from e
    return {
        "dataset_name": name,
        "dataset_subset": subset,
        "text_field": text_field,
        "max_documents": max_documents,
        "files": files,
    }


def notes_of(name, subset: str | None) -> list[str]:
    """A line for each subset of which not every file is read."""
    found = [local_source(name, part) for part, _ in parse_subsets(subset)]
    return [source.note for source in found if source and source.note]


def documents_of(path, flag: str) -> tuple[list[str], list[str]]:
    """
    (all documents of a file or folder, notes about what was left out), for whoever needs no shards.

    Raises FileNotFoundError if there is no such path, ValueError if it has no text.
    """
    source, counts = sources.find(path, flag), Counts()
    rows = FileRows(f"{flag}: {path}", source.files, source.kind, whole=True)
    with named_errors(str(path)):
        texts = [row["text"] for row in rows if counts.add(row)]
    if not texts:
        raise ValueError(f"{flag}: {path}: column {rows.field!r} has no text")
    notes = [source.note] if source.note else []
    return texts, notes + counts.notes(str(path), rows.n_empty)


# ------------------------------------------------------------------------------------ the stream


class Corpus:
    """
    The documents of one source, as `chunks(state)` for shard_writer.build.

    The first four arguments are those of `facts_of`. If streaming is False, a dataset on the hub is
    downloaded first. shard_index of num_shards is the part of the work for this machine.
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
    ):
        self.name, self.text_field = name, text_field
        self.columns = []  # with the text, for messages
        self.n_empty = 0  # files
        self.counts = Counts()
        self.is_whole = num_shards == 1
        limited = max_documents is not None
        parts = parse_subsets(subset)
        options = {"whole": len(parts) > 1, "hub_options": (streaming, limited)}
        streams = [self._open(part, **options) for part, _ in parts]
        self.stream = streams[0]
        if len(streams) > 1:
            self.stream = Mixture(streams, [weight for _, weight in parts])
        divided = num_shards == 1
        if not divided and not limited and len(streams) == 1:
            divided = self._divide_files(num_shards, shard_index)
        if limited or not divided:
            share = (1, 0) if divided else (num_shards, shard_index)
            self.stream = Selection(self.stream, max_documents, *share)

    def _divide_files(self, n: int, i: int) -> bool:
        """Keep every n-th file, row group or, on the hub, row; False if that is not possible."""
        if isinstance(self.stream, FileRows):
            return self.stream.share(n, i)
        from datasets.distributed import split_dataset_by_node

        self.stream = split_dataset_by_node(self.stream, i, n)
        return True

    def _open(self, subset: str | None, whole: bool, hub_options: tuple):
        """One subset as a stream of {"text"}; of text files {"text", "starts", "ends"}."""
        title = f"{self.name} ({subset})" if subset else self.name
        local = local_source(self.name, subset)
        with named_errors(title):
            if local is None:
                return self._open_hub(title, subset, *hub_options)
            rows = FileRows(title, local.files, local.kind, self.text_field, whole)
            self.n_empty += rows.n_empty
            self.columns.append(rows.field)
            return rows

    def _open_hub(self, title: str, subset: str | None, streaming: bool, limited: bool):
        """The column with the text of a dataset on the hub, as a stream of {"text"}."""
        stream = load_hub(self.name, subset, streaming)
        if streaming and not limited:
            # splits it by row groups; asks for the end of every file, too slow for a first look
            stream = stream.reshard()
        first = next(iter(stream), None)
        if first is None:
            raise ValueError(f"{title}: holds no documents")
        columns = stream.column_names or list(first)
        field = self.text_field or next((f for f in FIELDS if f in columns), None)
        if field not in columns:
            raise no_column(title, field, columns)
        if not isinstance(first.get(field), str | None):
            what = f"column {field!r} holds {type(first[field]).__name__}, not text"
            raise ValueError(f"{title}: {what}; name another by --text_field")
        self.columns.append(field)
        stream = stream.select_columns([field])
        return stream if field == "text" else stream.rename_column(field, "text")

    def chunks(self, state):
        """
        Yield (rows, state after them), from the beginning if state is None.

        A row is {"text"}; of a text file it is {"text", "starts", "ends"}, a piece of a document.
        Raises ValueError if no row has text.
        """
        if state is not None:
            self.counts = Counts(**state["counts"])
            self.stream.load_state_dict(state["stream"])
        rows, n_chars = [], 0
        with named_errors(self.name):
            for row in self.stream:
                text = row["text"]
                if text is not None and not isinstance(text, str):
                    what = f"a document is {type(text).__name__}, not text"
                    raise ValueError(f"{self.name}: {what}; name another column by --text_field")
                if self.counts.add(row):
                    rows.append(row)
                    n_chars += len(text)
                if len(rows) >= CHUNK_DOCUMENTS or n_chars >= CHUNK_CHARS:
                    yield rows, self._state()
                    rows, n_chars = [], 0
            if rows:
                yield rows, self._state()
        if self.is_whole and not self.counts.texts:
            n = self.counts.without_text
            what = f"column {self.columns[0]!r} has no text in any of {n:,} rows"
            raise ValueError(f"{self.name}: {what}; name another by --text_field")

    def _state(self):
        """A copy of the stream's position, in JSON values."""
        state = {"counts": asdict(self.counts), "stream": self.stream.state_dict()}
        return json.loads(json.dumps(state))

    def notes(self) -> list[str]:
        """Lines about rows that were not read as their author may have meant them."""
        return self.counts.notes(self.name, self.n_empty)


def load_hub(name: str, subset: str | None, streaming: bool, flag: str = "--dataset_name"):
    """
    The split `train` of a dataset on the hub as a stream of rows; `flag` is for messages.

    Raises ValueError if it is not there, or there is no network.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        import datasets
        import huggingface_hub
    except Exception as e:  # noqa: BLE001  a broken package may raise anything
        what = f"{name} is not a local path, and the hub needs the package datasets"
        raise ValueError(f"{flag}: {what} ({one_line(e, 150)}); pip install datasets") from e
    # if True, the first row imports torch only to ask whether it is in a DataLoader
    datasets.config.TORCH_AVAILABLE = "torch" in sys.modules
    try:
        # Asked first: without a network it fails at once. The revision is fixed, so that a
        # build that resumes later reads the same data.
        revision = huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S).sha
        options = {"split": "train", "streaming": streaming, "revision": revision}
        stream = datasets.load_dataset(name, subset, **options)
    except ValueError as e:  # an unknown subset: the library lists the known ones
        where = f"--dataset_subset: {subset!r} of {name}" if subset else f"{flag}: {name}"
        raise ValueError(f"{where}: {one_line(e, 300)}") from e
    except Exception as e:  # noqa: BLE001  the hub's client raises errors of its http library
        why = one_line(e, 150)
        what = f"{name} is not a local path, and the hub did not provide it ({why})"
        folder = f"./{name}/{subset or ''}"
        fix = f"put its files into {folder} (parquet or jsonl), or give a folder or a file"
        raise ValueError(f"{flag}: {what}; {fix}") from e
    return stream if streaming else stream.to_iterable_dataset(num_shards=64)


@contextlib.contextmanager
def named_errors(source: str):
    """
    Raise what a library raises for unreadable data as ValueError with the source.

    If a connection or disk failed, raise OSError instead, after which a build can resume.
    """
    library_errors = ()
    if "datasets" in sys.modules:
        import datasets
        import pyarrow

        library_errors = (datasets.exceptions.DatasetsError, pyarrow.ArrowException)
    try:
        yield
    except (OSError, UnicodeDecodeError, *library_errors) as e:
        cause = one_line(e.__cause__ or e, 200)
        if isinstance(e, OSError) and _may_pass(e):
            fix = "run the same command again, it resumes from here"
            raise OSError(f"{source}: cannot be read now ({cause}); {fix}") from e
        raise ValueError(f"{source}: cannot be read ({cause})") from e


def _may_pass(e: OSError) -> bool:
    """Whether another try may succeed. (Arrow reports a damaged file as OSError without errno.)"""
    if isinstance(e, LASTING_ERRORS):
        return False
    return bool(e.errno) or isinstance(e, ConnectionError | TimeoutError)


# ------------------------------------------------------------------------------------ text to ids


def in_validation(text: str, share: float) -> bool:
    """Whether a text is held out: decided by its hash, so it is the same in every build."""
    return _hash(text) < share * 2**64


def divide(rows, val_share: float) -> tuple[float, re.Pattern]:
    """
    (val_share or the nearest share, pattern of passages) with text on both sides.

    A small corpus would otherwise have no training or no validation text by chance. If all of it is
    one passage, passages are shorter. Reads rows only until both sides have text. Raises ValueError
    if a single document is all there is.
    """
    lowest, highest, passage, first = 2**64, -1, PASSAGE, None
    for row in rows:
        first = first or row
        hashes = [_hash(text) for text in _divided(row, passage)]
        lowest, highest = min(lowest, *hashes), max(highest, *hashes)
        if lowest < val_share * 2**64 <= highest:
            return val_share, passage
    if lowest == highest:
        passage = passage_pattern(max(1, len(first["text"]) // 100))
        hashes = [_hash(text) for text in _divided(first, passage)]
        lowest, highest = min(hashes), max(hashes)
    if lowest >= highest:
        what = "there is one document, which cannot be both for training and for validation"
        raise ValueError(f"{what}; give more text")
    # The bound is a float, and a text below it is for validation.
    if lowest < val_share * 2**64:
        bound = float(highest)
        bound = bound if bound <= highest else math.nextafter(bound, 0)
    else:
        bound = float(lowest)
        bound = bound if bound > lowest else math.nextafter(bound, math.inf)
    return bound / 2**64, passage


def _hash(text: str) -> int:
    """64 bits that decide the split of a text."""
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _divided(row: dict, passage: re.Pattern) -> list[str]:
    """The texts of a row that each belong to one split: passages of a text file, else documents."""
    return passage.findall(row["text"]) if "ends" in row else [row["text"]]


def tokenise(rows, tokenizer, val_share: float, passage: re.Pattern = PASSAGE) -> dict:
    """
    Token ids of rows of `Corpus.chunks`, end-of-text exactly once after each document.

    Returns, for "train" and "val", (ids (T,) uint32, number of documents, bytes of text). A row of
    a table is a document of one split; a text file is cut into passages, each of one split.
    """
    if any("ends" in row for row in rows):
        return _tokenise_pieces(rows, tokenizer, val_share, passage)
    texts = {"train": [], "val": []}
    for row in rows:
        texts["val" if in_validation(row["text"], val_share) else "train"].append(row["text"])
    result = {}
    for split, chosen in texts.items():
        n_bytes = sum(len(text.encode(errors="replace")) for text in chosen)
        result[split] = (tokenizer.encode_documents(chosen), len(chosen), n_bytes)
    return result


def _tokenise_pieces(rows, tokenizer, val_share: float, pattern: re.Pattern) -> dict:
    """The same for pieces of documents of text files."""
    eot = np.array([tokenizer.eot], dtype=np.uint32)
    ids = {"train": [], "val": []}
    n_documents = {"train": 0, "val": 0}
    n_bytes = {"train": 0, "val": 0}
    for row in rows:
        starts, ends = row.get("starts", True), row.get("ends", True)
        texts = {"train": [], "val": []}
        for passage in _divided(row, pattern):
            texts["val" if in_validation(passage, val_share) else "train"].append(passage)
        for split, passages in texts.items():
            if passages:
                text = "".join(passages)
                ids[split].append(tokenizer.encode(text))
                n_bytes[split] += len(text.encode(errors="replace"))
            # the last piece ends the train text of its document, even if it adds nothing to it
            ends_here = passages if split == "val" else ends and (passages or not starts)
            if ends_here:
                ids[split].append(eot)
                n_documents[split] += 1
    joined = {split: np.concatenate(parts or [eot[:0]]) for split, parts in ids.items()}
    return {split: (joined[split], n_documents[split], n_bytes[split]) for split in joined}
