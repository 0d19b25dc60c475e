"""
Unpack an untrusted archive, or one compressed file: all of it, or nothing.

Every name is checked before the first byte is written, and bytes are counted while they are
written. The archive is refused as a whole if an entry leaves the folder, is a link, a device or
set-id, or if the total is too large.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

from parts.base.files import add_file_name, rename_durably

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".rar")
COMPRESSED = (".bz2", ".gz", ".xz")  # one file each
# Bytes that even an empty entry costs on a disk; counting them bounds the number of entries, too.
BLOCK = 4096
READ_BYTES = 1 << 20  # at a time
# What the libraries raise for a damaged archive.
DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    OSError,
)


def is_archive(path) -> bool:
    """Whether the name is that of an archive."""
    return str(path).lower().endswith(SUFFIXES)


def is_compressed(path) -> bool:
    """Whether the name is that of one compressed file, no archive."""
    return str(path).lower().endswith(COMPRESSED) and not is_archive(path)


def extract_archive(path, dest, max_mb: float) -> int:
    """
    Unpack a .zip, .tar(.gz/.bz2/.xz) or .rar into the folder `dest`; returns the number of files.

    Nothing in dest is overwritten; modes and owners in the archive are ignored. A .rar needs the
    package rarfile, and if it is compressed the program unar. Raises ValueError naming the archive
    and the entry if it is refused, and then nothing was extracted; OSError if dest cannot be
    written.
    """
    path, dest = Path(path), Path(dest)
    part = dest.parent / f".{dest.name}.part"
    shutil.rmtree(part, ignore_errors=True)  # left by a kill
    part.mkdir(parents=True)
    try:
        with contextlib.ExitStack() as stack:
            archive = stack.enter_context(_open(path, stack))
            entries = _checked(path, archive, max_mb)
            left = max_mb * 2**20
            for name, entry in entries:
                target = part / name
                target.parent.mkdir(parents=True, exist_ok=True)
                left = _copy(path, archive, entry, target, left - BLOCK, max_mb)
        dest.mkdir(parents=True, exist_ok=True)
        tops = sorted(part.iterdir())
        for top in tops:
            if (dest / top.name).exists():
                what = f"{dest / top.name} already exists, so nothing was extracted"
                raise ValueError(f"{path}: {what}; choose an empty folder")
        for top in tops:
            os.rename(top, dest / top.name)
        return len(entries)
    except OSError as e:
        add_file_name(e, dest)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def extract_compressed(path, target, max_mb: float) -> int:
    """
    Unpack a .bz2, .gz or .xz into the file `target`, through `.part` beside it; returns its bytes.

    All streams in the file are read: a dump of Wikipedia has thousands. Raises ValueError naming
    the file if it is damaged, cut off or too large, and then there is no target; OSError if target
    cannot be written.
    """
    path, target = Path(path), Path(target)
    part = target.with_name(target.name + ".part")
    n_bytes = 0
    try:
        with open(path, "rb") as source, open(part, "wb") as out:
            blocks = _unpacked(source, path.suffix.lower())
            while True:
                with _refused_if_damaged(path, "damaged"):
                    block = next(blocks, None)
                if block is None:
                    break
                n_bytes += len(block)
                if n_bytes > max_mb * 2**20:
                    what = f"it unpacks to more than {max_mb:g} MB (--max_extract_mb)"
                    raise _refusal(path, what)
                out.write(block)
        rename_durably(part, target)
    except OSError as e:
        add_file_name(e, target)
        raise
    finally:
        part.unlink(missing_ok=True)
    return n_bytes


def _unpacked(source, suffix: str):
    """
    Yield the bytes of a compressed file in blocks; raises one of DAMAGED.

    bz2.open and lzma.open take a damaged stream that is not the first for the end of the file.
    """
    if suffix == ".gz":
        with gzip.open(source) as unpacked:
            while block := unpacked.read(READ_BYTES):
                yield block
        return
    new = {".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}[suffix]
    decoder = new()
    data = source.read(READ_BYTES)
    if not data:
        raise EOFError("it is empty")
    while True:
        block = decoder.decompress(data, READ_BYTES)
        data = b""
        if block:
            yield block
        if decoder.eof:
            data = decoder.unused_data or source.read(READ_BYTES)
            while suffix == ".xz" and data and not data.strip(b"\0"):  # padding
                data = source.read(READ_BYTES)
            if not data:
                return
            data = data.lstrip(b"\0") if suffix == ".xz" else data
            decoder = new()
        elif decoder.needs_input:
            data = source.read(READ_BYTES)
            if not data:
                raise EOFError("it is cut off")


def _refusal(path, what) -> ValueError:
    return ValueError(f"{path}: {what}; the whole archive is refused, nothing was extracted")


@contextlib.contextmanager
def _refused_if_damaged(path, what: str):
    """Raise what a library raises for a damaged archive as a refusal, with `what` in front."""
    try:
        yield
    except Exception as e:
        if isinstance(e, DAMAGED) or type(e).__module__ == "rarfile":
            raise _refusal(path, f"{what} ({e})") from e
        raise


def _open(path: Path, stack: contextlib.ExitStack):
    """The archive as an object of tarfile, zipfile or rarfile; `stack` cleans up after it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such archive")
    with _refused_if_damaged(path, "not a readable archive"):
        if path.suffix.lower() == ".rar":
            return _open_rar(path, stack)
        if zipfile.is_zipfile(path):
            return zipfile.ZipFile(path)
        return tarfile.open(path, "r:*")


def _open_rar(path: Path, stack: contextlib.ExitStack):
    try:
        import rarfile  # optional, only for .rar
    except ImportError as e:
        what = ".rar needs the package rarfile"
        raise ValueError(f"{path}: {what}; pip install rarfile, or unpack it by hand") from e
    if not rarfile.is_rarfile(path):
        raise _refusal(path, "not a .rar archive, in spite of its name")
    archive = rarfile.RarFile(path, errors="strict")  # else what follows damage is left out
    if archive.needs_password() and not archive.infolist():
        raise _refusal(path, "its list of files is encrypted")
    if any(entry.compress_type != rarfile.RAR_M0 for entry in archive.infolist()):
        # unar takes other archives with a similar name for volumes of this one
        alone = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for volume in map(Path, archive.volumelist()):
            (alone / volume.name).symlink_to(volume.absolute())
        archive = rarfile.RarFile(alone / path.name, errors="strict")
        try:  # bsdtar and 7-Zip, which rarfile would use too, fail on RAR5 and on solid archives
            rarfile.tool_setup(bsdtar=False, sevenzip=False, sevenzip2=False, force=True)
        except rarfile.RarCannotExec as e:
            what = "a compressed .rar needs the program unar"
            raise ValueError(f"{path}: {what}; apt install unar, or unpack it by hand") from e
    return archive


def _checked(path: Path, archive, max_mb: float) -> list:
    """[(name, entry)] of all files, after a check of every name, kind and announced size."""
    files, folders, total = {}, set(), 0.0
    with _refused_if_damaged(path, "damaged"):
        for entry in archive if isinstance(archive, tarfile.TarFile) else archive.infolist():
            name, size, kind = _describe(entry)
            shown = repr(name[:80])
            pieces = name.rstrip("/").split("/")
            if re.search(r"[\\\x00-\x1f\x7f]", name) or re.match(r"[A-Za-z]:|/", name):
                raise _refusal(path, f"the name of entry {shown} is not a plain relative path")
            if ".." in pieces or "" in pieces:
                raise _refusal(path, f"entry {shown} would leave the folder")
            if kind not in ("file", "folder"):
                raise _refusal(path, f"entry {shown} is {kind}")
            total += size + BLOCK
            if total > max_mb * 2**20:
                raise _refusal(path, f"it unpacks to more than {max_mb:g} MB (--max_extract_mb)")
            folders.update("/".join(pieces[:i]) for i in range(1, len(pieces)))
            plain_name = "/".join(pieces)
            if kind == "folder":
                folders.add(plain_name)
            elif plain_name in files:
                raise _refusal(path, f"entry {shown} is in it twice")
            else:
                files[plain_name] = entry
    if clash := folders & files.keys():
        raise _refusal(path, f"entry {min(clash)!r} is both a file and a folder")
    return list(files.items())


def _describe(entry) -> tuple[str, int, str]:
    """(name, announced bytes, "file", "folder" or what is wrong with it) of an entry."""
    if isinstance(entry, tarfile.TarInfo):
        if entry.isreg():
            return entry.name, entry.size, "set-id" if entry.mode & 0o6000 else "file"
        if entry.isdir():
            return entry.name, 0, "folder"
        is_link = entry.islnk() or entry.issym()
        return entry.name, 0, "a link" if is_link else "a device or fifo"
    # a zip or rar entry; only a zip entry made on Unix has a mode
    mode = entry.external_attr >> 16 if isinstance(entry, zipfile.ZipInfo) else 0
    is_link = mode & 0o170000 == 0o120000 if mode else getattr(entry, "is_symlink", bool)()
    if is_link:
        kind = "a link"
    elif mode & 0o6000:
        kind = "set-id"
    else:
        kind = "folder" if entry.is_dir() else "file"
    return entry.filename, entry.file_size, kind


def _copy(path: Path, archive, entry, target: Path, left: float, max_mb: float) -> float:
    """Write one entry; returns the bytes that remain. Counts bytes, as announced sizes may lie."""
    is_tar = isinstance(archive, tarfile.TarFile)
    with _refused_if_damaged(path, f"entry {target.name!r} cannot be read"):
        source = archive.extractfile(entry) if is_tar else archive.open(entry)
    with source, open(target, "wb") as out:
        while True:
            with _refused_if_damaged(path, f"entry {target.name!r} is damaged"):
                block = source.read(READ_BYTES)
            if not block:
                return left
            left -= len(block)
            if left < 0:
                raise _refusal(path, f"it unpacks to more than {max_mb:g} MB (--max_extract_mb)")
            out.write(block)
