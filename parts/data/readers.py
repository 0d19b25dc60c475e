"""
The texts of local files, read in order and resumable: parquet, Arrow, jsonl, json, plain text.

    for row in FileRows(files, "json", "text"): row["text"]

Only the column with the text is read, so other columns may hold anything. What cannot be read is a
ValueError that names the file and the row in it.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from pathlib import Path

from parts.base.text import EOT, one_line

EOT_LINE = EOT + "\n"
PIECE_CHARS = 1 << 20  # a long document of a text file is read in pieces of this size
FIELDS = ("text", "content")  # columns that hold the text, the first that there is
BATCH_ROWS = 1000  # rows of a parquet file that are decoded at once
# first bytes of files that are no text
MAGIC = {
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip data",
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"SQLite": "a database",
    b"\x28\xb5\x2f\xfd": "zstandard data",
    b"BZh": "bzip2 data",
}
JSON_TYPES = {dict: "an object", list: "a list", float: "a number", bool: "true or false"}
_decode_json = json.JSONDecoder(parse_int=float).decode  # other columns may have any number


class FileRows:
    """
    Rows {"text"} of files; of text files {"text", "starts", "ends"}, parts of documents.

    `field` is the column with the text, None to take the first of FIELDS. Iteration begins at the
    state that was loaded. `whole`: each document of a text file in one row. `n_empty` files have no
    rows. Raises ValueError if none has, or one with rows lacks the column.
    """

    def __init__(self, name: str, files: list[Path], kind: str, field=None, whole=False):
        self.kind, self.whole = kind, whole
        self._start = {"unit": 0, "row": 0}
        # what is read in one go: a row group of a parquet file, or else a whole file
        self.units = [unit for path in files for unit in _units(path, kind)]
        having_rows = list(dict.fromkeys(path for path, _ in self.units))
        self.n_empty = len(files) - len(having_rows)
        self.field = None if kind == "text" else _field_of(having_rows, kind, field)
        if not having_rows or next(iter(self), None) is None:
            raise ValueError(f"{name}: holds no documents; its {len(files)} files are empty")

    def share(self, n: int, i: int) -> bool:
        """Keep every n-th file or row group from number i; False if that does not divide them."""
        if self.kind == "text" or len(self.units) % n:
            return False
        self.units = self.units[i::n]
        return True

    def __iter__(self):
        self._at = dict(self._start)
        return self._rows(self._start)

    def _rows(self, start: dict):
        for i in range(start["unit"], len(self.units)):
            skip = start["row"] if i == start["unit"] else 0
            for n, row in self._read(*self.units[i], skip):
                self._at = {"unit": i, "row": n}
                yield row
            self._at = {"unit": i + 1, "row": 0}

    def _read(self, path: Path, row_group: int | None, skip: int):
        """Yield (number of rows read so far, row) of a unit, without its first `skip` rows."""
        if self.kind == "text":
            return read_pieces(path, skip, self.whole)
        texts = {"json": _read_json, "parquet": _read_parquet, "arrow": _read_arrow}[self.kind]
        return ((n, {"text": text}) for n, text in texts(path, row_group, self.field, skip))

    def state_dict(self) -> dict:
        """The position after the row that was yielded last."""
        return dict(self._at)

    def load_state_dict(self, state: dict) -> None:
        """Begin the next iteration at a position."""
        self._start = dict(state)


def _units(path: Path, kind: str) -> list[tuple]:
    """[(path, row group or None)]; none of a file that is empty."""
    if not path.stat().st_size:
        return []
    return _row_groups(path) if kind == "parquet" else [(path, None)]


def _field_of(files: list[Path], kind: str, field: str | None) -> str:
    """The column with the text, which every file must have. Raises ValueError."""
    columns_of = {"json": _json_columns, "parquet": _parquet_columns, "arrow": _arrow_columns}[kind]
    wanted = (field,) if field else FIELDS
    columns = {path: columns_of(path, wanted) for path in files}
    if field is None:
        having = [name for name in FIELDS if any(name in found for found in columns.values())]
        field = having[0] if having else None
    for path, found in columns.items():
        if field not in found:
            raise no_column(str(path), field, found)
    return field


def no_column(source: str, field: str | None, columns) -> ValueError:
    """The error about a source that lacks the column with the text."""
    what = f"no column {field!r}" if field else "neither a column 'text' nor 'content'"
    what += f"; its columns are {', '.join(columns) or 'none'}"
    return ValueError(f"{source}: has {what}; name the one with the text by --text_field")


def _no_text(path: Path, where: str, field: str, what: str) -> ValueError:
    fix = "name another by --text_field"
    return ValueError(f"{path}: {where}column {field!r} holds {what}, not text; {fix}")


# ----------------------------------------------------------------------------------------- json


def _open(path: Path):
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")


def _json_columns(path: Path, wanted: tuple) -> dict:
    """The columns of the rows up to the first that has a wanted one."""
    columns = {}
    for n, row in json_rows(path, 0):
        columns |= dict.fromkeys(row)
        for name in wanted:
            if name in row:
                _check_type(path, n, name, row[name])
                return columns
    return columns


def _check_type(path: Path, n: int, field: str, value) -> None:
    if value is not None and not isinstance(value, str):
        raise _no_text(path, f"{_row_name(path)} {n:,}: ", field, JSON_TYPES[type(value)])


def _read_json(path: Path, _, field: str, skip: int):
    """Yield (number of rows so far, text or None)."""
    for n, row in json_rows(path, skip):
        text = row.get(field)
        if text is not None and type(text) is not str:
            _check_type(path, n, field, text)
        yield n, text


def json_rows(path: Path, skip: int = 0):
    """
    Yield (n, row as a dict) after the first `skip`: of lines, n is the line; of an array, the
    element. Numbers are floats. Raises ValueError that names the file and n.
    """
    n = 0
    try:
        with _open(path) as f:
            if _is_lines(f, path):
                for n, line in enumerate(f, 1):
                    if n > skip and not line.isspace():
                        yield n, _json_object(line.decode(), path, n)
                return
            rows = _decode_json(f.read().decode("utf-8-sig"))
        for n, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
            if n > skip:
                if not isinstance(row, dict):
                    raise _not_an_object(path, n, row)
                yield n, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        what = f"the gzip data is damaged after {_row_name(path)} {n:,} ({e})"
        raise ValueError(f"{path}: {what}; fetch or compress the file again") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: {_row_name(path)} {n:,}: {_not_utf8(e)}") from e
    except json.JSONDecodeError as e:  # of a file that is one JSON value
        what = f"not JSON, neither as one value nor line by line ({e.msg} in line {e.lineno:,})"
        raise ValueError(f"{path}: {what}") from e
    except RecursionError as e:
        raise ValueError(f"{path}: {_row_name(path)} {n:,}: nested too deeply") from e


def _is_lines(f, path: Path) -> bool:
    """Whether an open file has one object per line; leaves it at its first byte, after any mark."""
    if f.read(3) != b"\xef\xbb\xbf":
        f.seek(0)
    start = f.tell()
    first = f.readline()
    while first.isspace():
        first = f.readline()
    is_lines = not first.lstrip().startswith(b"[")
    if _row_name(path) == "row":  # .json: perhaps one object over several lines
        try:
            _decode_json(first.decode("utf-8", "replace"))
        except ValueError:
            is_lines = False
    f.seek(start)
    return is_lines


def _json_object(line: str, path: Path, n: int) -> dict:
    try:
        row = _decode_json(line)
    except json.JSONDecodeError as e:
        if "\0" in line:
            raise ValueError(f"{path}: line {n:,}: {why_binary(line.encode())}") from e
        what = f"not JSON ({e.msg}, column {e.colno:,})"
        raise ValueError(f"{path}: line {n:,}: {what}; each line must be one JSON object") from e
    if type(row) is not dict:
        raise _not_an_object(path, n, row)
    return row


def _not_an_object(path: Path, n: int, row) -> ValueError:
    what = JSON_TYPES.get(type(row), "a string" if isinstance(row, str) else "null")
    fix = 'write objects such as {"text": "..."}'
    return ValueError(f"{path}: {_row_name(path)} {n:,}: {what} is not an object; {fix}")


def _row_name(path: Path) -> str:
    return "row" if ".json" in [suffix.lower() for suffix in path.suffixes[-2:]] else "line"


# ----------------------------------------------------------------------------------------- arrow


def _pyarrow():
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except Exception as e:  # noqa: BLE001  a broken package may raise anything
        what = f"parquet and Arrow files need the package pyarrow ({one_line(e, 150)})"
        raise ValueError(f"{what}; pip install pyarrow, or give jsonl or text") from e
    return pyarrow


def _parquet_columns(path: Path, wanted: tuple) -> list[str]:
    pa = _pyarrow()
    try:
        schema = pa.parquet.read_schema(path)
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, "as parquet", e) from e
    _check_column(path, schema, wanted)
    return schema.names


def _arrow_columns(path: Path, wanted: tuple) -> list[str]:
    with _open_arrow(path) as reader:
        _check_column(path, reader.schema, wanted)
        return reader.schema.names


def _check_column(path: Path, schema, wanted: tuple) -> None:
    """Raise ValueError if the column with the text has another type."""
    types = _pyarrow().types
    name = next((name for name in wanted if name in schema.names), None)
    if name is None:
        return
    kind = schema.field(name).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(is_text(kind) for is_text in texts):
        raise _no_text(path, "", name, f"{kind}")


def _row_groups(path: Path) -> list[tuple[Path, int]]:
    """The units of a parquet file: its row groups that have rows."""
    pa = _pyarrow()
    try:
        metadata = pa.parquet.read_metadata(path)
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, "as parquet", e) from e
    groups = range(metadata.num_row_groups)
    return [(path, g) for g in groups if metadata.row_group(g).num_rows]


def _read_parquet(path: Path, row_group: int, field: str, skip: int):
    """Yield (number of rows of the row group so far, text or None)."""
    pa, n = _pyarrow(), 0
    try:
        with pa.parquet.ParquetFile(path) as f:
            # without threads, which abort the process if it ends while they read
            options = {"row_groups": [row_group], "columns": [field], "use_threads": False}
            for batch in f.iter_batches(BATCH_ROWS, **options):
                yield from _texts_of(batch.column(field), path, n, skip)
                n += len(batch)
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, f"after row {n:,} of row group {row_group}", e) from e


def _read_arrow(path: Path, _, field: str, skip: int):
    """Yield (number of rows so far, text or None)."""
    pa, n = _pyarrow(), 0
    try:
        with _open_arrow(path, field) as reader:
            batches = reader
            if hasattr(reader, "num_record_batches"):
                batches = map(reader.get_batch, range(reader.num_record_batches))
            for batch in batches:
                yield from _texts_of(batch.column(field), path, n, skip)
                n += len(batch)
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, f"after row {n:,}", e) from e


def _open_arrow(path: Path, field: str | None = None):
    """A reader of a stream, which `datasets` writes, or of a file; only of one column if given."""
    pa = _pyarrow()
    try:
        with open(path, "rb") as f:
            is_file = f.read(6) == b"ARROW1"
        opened = pa.ipc.open_file if is_file else pa.ipc.open_stream
        reader = opened(pa.memory_map(str(path)))
        if field is None:
            return reader
        number = reader.schema.get_field_index(field)
        options = pa.ipc.IpcReadOptions(included_fields=[number], use_threads=False)
        return opened(pa.memory_map(str(path)), options=options)
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, "as Arrow data", e) from e


def _texts_of(column, path: Path, n: int, skip: int):
    """Yield (row number, text or None) of a column whose first row is number n + 1."""
    first = max(0, skip - n)
    column = column.slice(first)
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError as e:
        bad = next(i for i, one in enumerate(column) if _is_bad(one))
        raise ValueError(f"{path}: row {n + first + bad + 1:,}: {_not_utf8(e)}") from e
    yield from enumerate(texts, n + first + 1)


def _is_bad(scalar) -> bool:
    try:
        scalar.as_py()
    except UnicodeDecodeError:
        return True
    return False


def _unreadable(path: Path, where: str, e: Exception) -> Exception:
    """An error that names the file; one of the disk stays an OSError: then a build can resume."""
    if isinstance(e, OSError) and e.errno:
        e.filename = e.filename or str(path)
        return e
    cause = one_line(e, 150)
    return ValueError(f"{path}: cannot be read {where} ({cause})")


# ----------------------------------------------------------------------------------------- text


def read_pieces(path: Path, skip: int = 0, whole: bool = False):
    """
    Yield (n, {"text", "starts", "ends"}): piece number n of the documents of a text file.

    Lines `<|endoftext|>` separate documents; a file without them is one document. A long document
    is cut after a blank line if there is one, unless `whole`. Raises ValueError if it is not UTF-8.
    """
    max_chars = float("inf") if whole else PIECE_CHARS
    try:
        with open(path, encoding="utf-8-sig") as f:
            for n, piece in enumerate(_pieces(f, path, max_chars), 1):
                if n > skip:
                    yield n, piece
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: {_not_utf8(e, path)}") from e


def _pieces(f, path: Path, max_chars: float):
    lines, n_chars, starts = [], 0, True
    while line := f.readline(PIECE_CHARS):
        if "\0" in line:
            raise ValueError(f"{path}: {why_binary(_first_bytes(path))}")
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


# ----------------------------------------------------------------------------------------- no text


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as f:
        return f.read(4096)


def _not_utf8(e: UnicodeDecodeError, path: Path | None = None) -> str:
    """Why bytes are not UTF-8 text, what they look like, and what to do; of a file or a row."""
    if looks := _looks_like(_first_bytes(path) if path else e.object[:4096]):
        return f"not UTF-8 text; {looks}"
    byte = f"not UTF-8 text: byte {e.object[e.start]:#04x} at"
    if path is None:
        return f"{byte} column {e.start + 1:,} of it; convert the file to UTF-8"
    fix = "convert it, or let prep_dataset.py gutenberg detect its encoding"
    return f"{byte} offset {_offset(path):,}; {fix}"


def _offset(path: Path) -> int:
    """Where in a file the first bytes are that are not UTF-8."""
    decoder, n_read = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            n_waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as e:
                return n_read - n_waiting + e.start
            n_read += len(block)
    return n_read - len(decoder.getstate()[0])


def why_binary(data: bytes) -> str:
    """Why bytes with NULs are no text, what they look like, and what to do."""
    looks = _looks_like(data) or "it looks like a binary file; move it out of the folder"
    return f"not text, it has NUL bytes; {looks}"


def _looks_like(data: bytes) -> str | None:
    """What the first bytes of a file look like, and what to do; None if nothing is known."""
    for magic, name in MAGIC.items():
        if data.startswith(magic):
            return f"it looks like {name}; convert it to text, or move it out of the folder"
    data = data[: len(data) // 4 * 4]
    names = ["utf-32-le", "utf-32-be"]
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        names.append("utf-16")
    n_even, n_odd = data[::2].count(0), data[1::2].count(0)  # zero is half of most letters
    if n_odd > 10 * n_even:
        names.append("utf-16-le")
    elif n_even > 10 * n_odd:
        names.append("utf-16-be")
    for name in names:
        text = data.decode(name, "replace")
        n_printable = sum(c.isprintable() or c.isspace() for c in text if c != "\ufffd")
        if len(text) > 4 and n_printable > 0.95 * len(text):
            return f"it looks like {name.upper()}; convert it (iconv -f {name} -t utf-8)"
    return None
