"""
Unpacking an archive from a stranger: all of it, or nothing.

Every name is checked before the first byte is written, what is written is counted while it is written, and the
archive is refused whole if any entry leaves the folder, is a link, a device or set-id, or if the total is too large.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path

from parts.base.files import add_file_name

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".rar")
BLOCK = 4096  # bytes that even an empty entry costs on a disk: bounds the number of entries as well
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
    """Whether the name says that it is one."""
    return str(path).lower().endswith(SUFFIXES)


def extract_archive(path, dest, max_mb: float) -> int:
    """
    Unpack a .zip, .tar(.gz/.bz2/.xz) or (with the package rarfile) .rar into the folder `dest`; returns the number of files.

    Nothing in dest is overwritten, and modes and owners in the archive are ignored. Raises ValueError naming the
    archive and the entry, and then nothing was extracted; OSError where dest cannot be written.
    """
    path, dest = Path(path), Path(dest)
    part = dest.parent / f".{dest.name}.part"
    shutil.rmtree(part, ignore_errors=True)  # of an attempt that was killed
    part.mkdir(parents=True)
    try:
        with _open(path) as archive:
            entries = _checked(path, archive, max_mb)
            left = max_mb * 2**20
            for name, entry in entries:
                target = part / name
                target.parent.mkdir(parents=True, exist_ok=True)
                left = _copy(path, archive, entry, target, left - BLOCK, max_mb)
        dest.mkdir(parents=True, exist_ok=True)
        for top in sorted(part.iterdir()):
            if (dest / top.name).exists():
                raise ValueError(
                    f"{path}: {dest / top.name} is there already; nothing was extracted, choose an empty folder"
                )
        for top in sorted(part.iterdir()):
            os.rename(top, dest / top.name)
        return len(entries)
    except OSError as e:
        add_file_name(e, dest)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _refuse(path, what) -> ValueError:
    return ValueError(f"{path}: {what}; the archive is refused whole and nothing was extracted")


def _open(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such archive")
    try:
        if path.suffix.lower() == ".rar":
            try:
                import rarfile  # only for .rar
            except ImportError as e:
                raise ValueError(
                    f"{path}: .rar needs the package rarfile; pip install rarfile, or unpack it by hand"
                ) from e
            if not rarfile.is_rarfile(path):
                raise _refuse(path, "not a .rar archive, whatever its name says")
            return rarfile.RarFile(path)
        if zipfile.is_zipfile(path):
            return zipfile.ZipFile(path)
        return tarfile.open(path, "r:*")
    except DAMAGED as e:
        raise _refuse(path, f"not a readable .zip or .tar archive ({e})") from e


def _checked(path: Path, archive, max_mb: float) -> list:
    """(name, entry) of each file, after every name, kind and announced size was looked at."""
    found, folders, total = {}, set(), 0.0
    try:
        for entry in archive if isinstance(archive, tarfile.TarFile) else archive.infolist():
            name, size, kind = _describe(entry)
            shown = repr(name[:80])
            pieces = name.rstrip("/").split("/")
            if (
                re.search(r"[\\\x00-\x1f\x7f]", name)
                or re.match(r"[A-Za-z]:", name)
                or name.startswith("/")
            ):
                raise _refuse(path, f"entry {shown} has a name that is not a plain relative path")
            if ".." in pieces or "" in pieces:
                raise _refuse(path, f"entry {shown} would leave the folder")
            if kind not in ("file", "folder"):
                raise _refuse(path, f"entry {shown} is {kind}")
            total += size + BLOCK
            if total > max_mb * 2**20:
                raise _refuse(path, f"it unpacks to more than {max_mb:g} MB (--max_extract_mb)")
            folders.update("/".join(pieces[:i]) for i in range(1, len(pieces)))
            if kind == "folder":
                folders.add("/".join(pieces))
            elif "/".join(pieces) in found:
                raise _refuse(path, f"entry {shown} is there twice")
            else:
                found["/".join(pieces)] = entry
    except DAMAGED as e:
        raise _refuse(path, f"damaged ({e})") from e
    if clash := folders & found.keys():
        raise _refuse(path, f"entry {min(clash)!r} is both a file and a folder")
    return list(found.items())


def _describe(entry) -> tuple[str, int, str]:
    """(name, announced bytes, "file", "folder" or what is wrong with it) of a tar, zip or rar entry."""
    if isinstance(entry, tarfile.TarInfo):
        if entry.isreg():
            return entry.name, entry.size, "set-id" if entry.mode & 0o6000 else "file"
        kind = (
            "folder"
            if entry.isdir()
            else "a link"
            if entry.islnk() or entry.issym()
            else "a device or fifo"
        )
        return entry.name, 0, kind
    mode = entry.external_attr >> 16 if isinstance(entry, zipfile.ZipInfo) else 0
    is_link = mode & 0o170000 == 0o120000 if mode else getattr(entry, "is_symlink", bool)()
    kind = (
        "a link"
        if is_link
        else "set-id"
        if mode & 0o6000
        else "folder"
        if entry.is_dir()
        else "file"
    )
    return entry.filename, entry.file_size, kind


def _copy(path: Path, archive, entry, target: Path, left: float, max_mb: float) -> float:
    """Write one entry; returns the bytes still allowed. Announced sizes may lie: what arrives is counted."""
    try:
        source = (
            archive.extractfile(entry)
            if isinstance(archive, tarfile.TarFile)
            else archive.open(entry)
        )
    except DAMAGED as e:
        raise _refuse(path, f"entry {target.name!r} cannot be read ({e})") from e
    with source, open(target, "wb") as out:
        while True:
            try:
                block = source.read(1 << 20)
            except DAMAGED as e:
                raise _refuse(path, f"entry {target.name!r} is damaged ({e})") from e
            if not block:
                return left
            left -= len(block)
            if left < 0:
                raise _refuse(path, f"it unpacks to more than {max_mb:g} MB (--max_extract_mb)")
            out.write(block)
