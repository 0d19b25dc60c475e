"""
Documents from anywhere: the Hugging Face hub, a folder in its layout, parquet, jsonl(.gz), text.

All of them are streamed through the `datasets` library: memory does not grow with the corpus, a
limit reads no more than it needs, subsets are mixed by weight, several machines split the work,
and a build that was killed resumes. The network is used only if the name is not a local path.
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

# end of a file's name -> its kind; if a folder has several kinds, the first in this order is read
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
KINDS |= {".jsonl.gz": "json", ".json.gz": "json", ".txt": "text"}
EOT_LINE = EOT + "\n"
CHUNK_DOCUMENTS = 64  # most documents that one thread tokenises at once
CHUNK_CHARS = 1 << 20  # characters after which it gets no further document
PIECE_CHARS = 1 << 20  # a long document of a text file is read in pieces of this size
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


def local_files(name: str, subset: str | None) -> list[Path] | None:
    """
    The data files of a path, in order; None if there is no such path.

    A subset is a folder in it. If there are `train-*` files, other splits are left out.
    Raises ValueError if there is no data.
    """
    root = Path(name)
    if not os.path.lexists(root):
        return None
    if subset is not None:
        root = _subset_folder(root, subset)
    try:
        files = _readable_files(root)
    except OSError as e:
        raise ValueError(f"--dataset_name: {root}: {e.strerror}") from e
    kind = next((kind for kind in KINDS.values() if any(_kind(p) == kind for p in files)), None)
    if kind is None:
        what = f"{root} has no {', '.join(KINDS)} file"
        if other := next(iter(sorted(root.glob("*.bin"))), None):
            what += f", and {other.name} is not a token shard (nanoGPT's files have bare ids)"
        fix = "give a folder or file of text, or a name on the hub"
        raise ValueError(f"--dataset_name: {what}; {fix}")
    files = [p for p in files if _kind(p) == kind]
    if kind == "text":  # prep_dataset.py gutenberg keeps the raw files beside the combined ones
        files = [p for p in files if _is_combined(p)] or files
    return [p for p in files if re.match(r"train\b", p.name)] or files


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


def _readable_files(root: Path) -> list[Path]:
    """Files of a known kind in and below root: not hidden, and not written by a run or a build."""
    found = sorted(root.rglob("*")) if root.is_dir() else [root]
    files = [p for p in found if p.is_file() and _kind(p) and p.name != "report.json"]
    files = [p for p in files if not any(n.startswith(".") for n in p.relative_to(root).parts)]
    folders = {folder for p in files for folder in p.parents if folder.is_relative_to(root)}
    ours = {folder for folder in folders if _is_our_output(folder)}
    return [p for p in files if not ours & set(p.parents)]


def _is_combined(path: Path) -> bool:
    """Whether prep_dataset.py gutenberg wrote this file of cleaned books."""
    is_numbered = re.fullmatch(r"combined_\d+\.txt", path.name) is not None
    return is_numbered and (path.parent / "report.json").exists()


def _is_our_output(folder: Path) -> bool:
    """Whether a training run or a build of token shards wrote this folder."""
    if (folder / "run.json").exists():
        return True
    return (folder / "index.json").exists() and (folder / "tokenizer.json").exists()


def _kind(path: Path) -> str | None:
    return KINDS.get(path.suffix.lower()) or KINDS.get("".join(path.suffixes[-2:]).lower())


def facts_of(name, subset: str | None, text_field: str | None, max_documents: int | None) -> dict:
    """
    Everything about a source that determines its documents, as JSON values.

    Reads no data and uses no network; local files are identified by name, size and time of change.
    Raises ValueError for a path that has no data.
    """
    files = []
    for part, _ in parse_subsets(subset):
        for path in local_files(name, part) or []:
            try:
                stat = path.stat()
            except OSError as e:
                raise ValueError(f"{e.filename}: {e.strerror}") from e
            files.append([path.name, stat.st_size, stat.st_mtime_ns])
    return {
        "dataset_name": name,
        "dataset_subset": subset,
        "text_field": text_field,
        "max_documents": max_documents,
        "files": files,
    }


# ------------------------------------------------------------------------------------ the stream


class Corpus:
    """
    The documents of one source, as `chunks(state)` for shards.build.

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
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        import datasets  # takes half a second, and only a build needs it
        from datasets.distributed import split_dataset_by_node

        # if True, the first row imports torch only to ask whether it is in a DataLoader
        datasets.config.TORCH_AVAILABLE = "torch" in sys.modules
        self.name = name
        self.text_field = text_field
        self.limited = max_documents is not None
        parts = parse_subsets(subset)
        files = [local_files(name, part) for part, _ in parts]
        if len(parts) == 1 and _is_text(files[0]):
            # a row is a piece of a document, so the reader itself counts documents
            work = {"num_shards": num_shards, "shard_index": shard_index}
            self.stream = _text_stream(name, files[0], limit=max_documents, **work)
            return
        streams = []
        for (part, _), part_files in zip(parts, files, strict=True):
            streams.append(self._open(part, part_files, streaming))
        stream = streams[0]
        if len(streams) > 1:
            # Ends with the first subset that is used up: to continue would change the weights or
            # repeat documents.
            weights = [weight for _, weight in parts]
            stream = datasets.interleave_datasets(streams, probabilities=weights, seed=0)
        if self.limited:
            stream = stream.take(max_documents)
        if num_shards > 1:
            # "auto" splits by files; with a limit or a mixture that would give other documents
            strategy = "examples" if self.limited or len(streams) > 1 else "auto"
            stream = split_dataset_by_node(stream, shard_index, num_shards, strategy=strategy)
        self.stream = stream

    def _open(self, subset: str | None, files: list[Path] | None, streaming: bool):
        """One subset as a stream of {"text"}; of text files {"text", "starts", "ends"}."""
        if _is_text(files):
            return _text_stream(self.name, files, whole=True)
        if files is None:
            stream = self._open_hub(subset, streaming)
        else:
            stream = _table_stream(self.name, files)
        source = f"{self.name} ({subset})" if subset else self.name
        with _named_errors(source):
            first = next(iter(stream), None)
        if first is None:
            raise ValueError(f"{source}: holds no documents")
        columns = stream.column_names or list(first)
        field = self.text_field or next((f for f in ("text", "content") if f in columns), None)
        if field not in columns:
            what = f"no column {field!r}" if field else "neither a column 'text' nor 'content'"
            what += f"; its columns are {', '.join(columns)}"
            raise ValueError(f"{source}: has {what}; name the one with the text by --text_field")
        if not isinstance(first.get(field), str | None):
            what = f"column {field!r} holds {type(first[field]).__name__}, not text"
            raise ValueError(f"{source}: {what}; name another by --text_field")
        stream = stream.select_columns([field])
        return stream if field == "text" else stream.rename_column(field, "text")

    def _open_hub(self, subset: str | None, streaming: bool):
        """One subset of a dataset on the hub as a stream of rows."""
        import datasets
        import huggingface_hub

        try:
            # Asked first: without a network it fails at once. The revision is fixed, so that a
            # build that resumes later reads the same data.
            revision = huggingface_hub.HfApi().dataset_info(self.name, timeout=HUB_TIMEOUT_S).sha
            options = {"split": "train", "streaming": streaming, "revision": revision}
            stream = datasets.load_dataset(self.name, subset, **options)
        except ValueError as e:  # an unknown subset: the library lists the known ones
            raise ValueError(f"--dataset_subset: {subset!r} of {self.name}: {e}") from e
        except Exception as e:  # noqa: BLE001  the hub's client raises errors of its http library
            why = " ".join(str(e).split())[:150]
            what = f"{self.name} is not a local path, and the hub did not provide it ({why})"
            folder = f"./{self.name}/{subset or ''}"
            fix = f"put its files into {folder} (parquet or jsonl), or give a folder or a file"
            raise ValueError(f"--dataset_name: {what}; {fix}") from e
        if not streaming:
            return stream.to_iterable_dataset(num_shards=64)
        # reshard asks for the end of every file, which is too slow for a first look
        return stream if self.limited else stream.reshard()

    def chunks(self, state):
        """
        Yield (rows, state after them), from the beginning if state is None.

        A row is {"text"}; of a text file it is {"text", "starts", "ends"}, a piece of a document.
        """
        if state is not None:
            self.stream.load_state_dict(state)
        rows, n_chars = [], 0
        with _named_errors(self.name):
            for row in self.stream:
                text = row["text"]
                if text is not None and not isinstance(text, str):
                    what = f"a document is {type(text).__name__}, not text"
                    raise ValueError(f"{self.name}: {what}; name another column by --text_field")
                if text and (text.strip() or "ends" in row):
                    rows.append(row)
                    n_chars += len(text)
                if len(rows) >= CHUNK_DOCUMENTS or n_chars >= CHUNK_CHARS:
                    yield rows, self._state()
                    rows, n_chars = [], 0
            if rows:
                yield rows, self._state()

    def _state(self):
        """A copy of the stream's position, in JSON values."""
        return json.loads(json.dumps(self.stream.state_dict()))


def _is_text(files: list[Path] | None) -> bool:
    return files is not None and _kind(files[0]) == "text"


def _text_stream(name, files: list[Path], **options):
    """A stream of `_read_text`; see there for the options."""
    import datasets

    if next(_read_text(files), None) is None:
        raise ValueError(f"{name}: holds no documents; its {len(files)} text files are empty")
    names = [str(p) for p in files]
    if options.get("limit") or options.get("num_shards", 1) > 1:
        # The library would call the reader once for each file of a list, which cannot count on.
        names = tuple(names)
    arguments = {"files": names, **options}
    return datasets.IterableDataset.from_generator(_read_text, gen_kwargs=arguments)


def _table_stream(name, files: list[Path]):
    """The rows of parquet or json files."""
    import datasets

    files = [p for p in files if p.stat().st_size]  # the library fails on empty files
    if not files:
        raise ValueError(f"{name}: holds no documents; its files are empty")
    names = [str(p) for p in files]
    options = {"split": "train", "streaming": True}
    with _named_errors(str(files[0].parent)):
        stream = datasets.load_dataset(_kind(files[0]), data_files=names, **options)
        return stream.reshard()  # by row group: Arrow would read a whole parquet file ahead


@contextlib.contextmanager
def _named_errors(source: str):
    """
    Raise what the datasets library raises for unreadable data as ValueError with the source.

    If a connection or disk failed, raise OSError instead, after which a build can resume.
    """
    import datasets
    import pyarrow

    library_errors = (datasets.exceptions.DatasetsError, pyarrow.ArrowException)
    try:
        yield
    except datasets.table.CastError as e:
        fix = "if they are several datasets, name one by --dataset_subset"
        raise ValueError(f"{source}: its files have different columns; {fix}") from e
    except (OSError, UnicodeDecodeError, *library_errors) as e:
        cause = " ".join(str(e.__cause__ or e).split())[:200]
        if isinstance(e, OSError) and _may_pass(e):
            fix = "run the same command again, it resumes from here"
            raise OSError(f"{source}: cannot be read now ({cause}); {fix}") from e
        raise ValueError(f"{source}: cannot be read ({cause})") from e


def _may_pass(e: OSError) -> bool:
    """Whether another try may succeed. (Arrow reports a damaged file as OSError without errno.)"""
    if isinstance(e, LASTING_ERRORS):
        return False
    return bool(e.errno) or isinstance(e, ConnectionError | TimeoutError)


def _read_text(files, limit=None, num_shards: int = 1, shard_index: int = 0, whole: bool = False):
    """
    Yield {"text", "starts", "ends"}: pieces of the documents of text files.

    Lines `<|endoftext|>` separate documents; a file without them is one document. A long document
    is cut after a blank line if there is one, unless `whole`. Of the first `limit` documents every
    num_shards-th is taken. Raises ValueError naming a file that is not UTF-8 text.
    """
    n_documents = 0
    max_chars = float("inf") if whole else PIECE_CHARS
    for name in files:
        try:
            with open(name, encoding="utf-8-sig") as f:
                for piece in _pieces(f, name, max_chars):
                    if limit is not None and n_documents >= limit:
                        return
                    if n_documents % num_shards == shard_index:
                        yield piece
                    n_documents += piece["ends"]
        except UnicodeDecodeError as e:
            fix = "convert it, or let prep_dataset.py gutenberg detect its encoding"
            raise ValueError(f"{name}: not UTF-8 text ({e.reason}); {fix}") from e


def _pieces(f, name, max_chars: float):
    lines, n_chars, starts = [], 0, True
    while line := f.readline(PIECE_CHARS):
        if "\0" in line:
            raise ValueError(f"{name}: a binary file (it has NUL bytes); remove it")
        if line == EOT_LINE or line + "\n" == EOT_LINE:
            yield from _last_piece(lines, starts)
            lines, n_chars, starts = [], 0, True
            continue
        if n_chars >= max_chars and (not lines[-1].strip() or n_chars >= 2 * max_chars):
            yield {"text": "".join(lines), "starts": starts, "ends": False}
            lines, n_chars, starts = [], 0, False
        lines.append(line)
        n_chars += len(line)
    yield from _last_piece(lines, starts)


def _last_piece(lines: list[str], starts: bool):
    text = "".join(lines)
    text = text.strip("\n") if starts else text.rstrip("\n")
    if text.strip() or not starts:
        yield {"text": text or "\n", "starts": starts, "ends": True}


# ------------------------------------------------------------------------------------ text to ids


def in_validation(text: str, share: float) -> bool:
    """Whether a text is held out: decided by its hash, so it is the same in every build."""
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def tokenise(rows, tokenizer, val_share: float) -> dict:
    """
    Token ids of rows of `Corpus.chunks`, end-of-text exactly once after each document.

    Returns, for "train" and "val", (ids (T,) uint32, number of documents, bytes of text). A row of
    a table is a document of one split; a text file is cut into passages, each of one split.
    """
    if any("ends" in row for row in rows):
        return _tokenise_pieces(rows, tokenizer, val_share)
    texts = {"train": [], "val": []}
    for row in rows:
        texts["val" if in_validation(row["text"], val_share) else "train"].append(row["text"])
    result = {}
    for split, chosen in texts.items():
        n_bytes = sum(len(text.encode(errors="replace")) for text in chosen)
        result[split] = (tokenizer.encode_documents(chosen), len(chosen), n_bytes)
    return result


def _tokenise_pieces(rows, tokenizer, val_share: float) -> dict:
    """The same for pieces of documents of text files."""
    eot = np.array([tokenizer.eot], dtype=np.uint32)
    ids = {"train": [], "val": []}
    n_documents = {"train": 0, "val": 0}
    n_bytes = {"train": 0, "val": 0}
    for row in rows:
        starts, ends = row.get("starts", True), row.get("ends", True)
        texts = {"train": [], "val": []}
        for passage in PASSAGE.findall(row["text"]) if "ends" in row else [row["text"]]:
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


# ------------------------------------------------------------------------------------ without data


def python_docs() -> list[str]:
    """
    About 1 MB of English that comes with Python: pydoc's topics and the library's docstrings.

    Paragraphs of code, tables and repetitions are left out. The same Python gives the same texts.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    texts = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    not_library = {"site-packages", "test", "tests", "idle_test", "lib2to3"}
    for file in sorted(library.rglob("*.py")):
        if not not_library & set(file.relative_to(library).parts):
            texts.append("\n\n".join(_docstrings(file)))
    documents, seen = [], set()
    for text in texts:
        prose = []
        for paragraph in text.split("\n\n"):
            letters = "".join(paragraph.split())
            if _is_prose(letters) and letters not in seen:
                seen.add(letters)
                prose.append(inspect.cleandoc(paragraph))
        if prose:
            documents.append("\n\n".join(prose))
    return documents


def _docstrings(file: Path) -> list[str]:
    """The docstrings of a module, its classes and functions; none if it is not valid Python."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):  # some files of the library are wrong on purpose
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]


def _is_prose(chars: str) -> bool:
    """Whether a paragraph without its white space is prose: long enough, letters, no doctest."""
    n_letters = sum(map(str.isalpha, chars))
    return len(chars) > 50 and n_letters > 0.85 * len(chars) and ">>>" not in chars
