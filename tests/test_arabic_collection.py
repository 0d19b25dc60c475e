"""recipes/arabic_bert, collecting: resumed downloads, servers that lie, hostile archives, kills."""

import bz2
import contextlib
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run, shared

from parts.data import archives
from recipes.arabic_bert.data_collection import read_links
from recipes.arabic_bert.downloads import LinkError, Patience, drive_id, fetch, looks_like_html

SCRIPT = "recipes/arabic_bert/data_collection.py"
BODY = random.Random(0).randbytes(300_000)
FAST = ("--retries", "2", "--backoff_s", "0")


class FileServer:
    """
    One file under every address, as a server with Range and ETag sends it.

    cut: bytes after which each connection is cut; slow_s: pause after each 10,000 bytes;
    answers: {path: (status, type, body)} instead of it. `asked` has (path, Range header).
    """

    def __init__(self, body=BODY, ranges=True, etag='"1"', cut=None, slow_s=0.0, answers=None):
        self.body, self.ranges, self.etag = body, ranges, etag
        self.cut, self.slow_s, self.answers = cut, slow_s, answers or {}
        self.asked = []

    def answer(self, handler) -> None:
        wanted = handler.headers.get("Range")
        self.asked.append((handler.path, wanted))
        status, kind, body, start = 200, "application/octet-stream", self.body, 0
        if handler.path in self.answers:
            status, kind, body = self.answers[handler.path]
        elif wanted and self.ranges and handler.headers.get("If-Range", self.etag) == self.etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            status = 206 if start < len(body) else 416
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body) - start))
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if self.etag:
            handler.send_header("ETag", self.etag)
        handler.end_headers()
        end = min(len(body), start + (self.cut or len(body)))
        with contextlib.suppress(OSError):
            for at in range(start, end, 10_000):
                handler.wfile.write(body[at : min(at + 10_000, end)])
                time.sleep(self.slow_s)


@contextlib.contextmanager
def serving(server: FileServer):
    """Yields the address of a server on this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.answer(self)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()


def get(url, path, size=None, sha256=None, retries=2):
    fetch(url, path, {"size": size, "sha256": sha256}, Patience(retries, 0, 5), lambda _: None)


def collect(tmp_path, links, *words, **options):
    """Run data_collection.py on links in tmp_path, offline."""
    text = links if isinstance(links, str) else json.dumps(links)
    (tmp_path / "links.json").write_text(text, encoding="utf-8")
    flags = ("--links-json", "links.json", "--output-dir", "./raw", *FAST)
    return run(SCRIPT, *flags, *words, cwd=tmp_path, **options)


def rows_of(tmp_path) -> dict[str, dict]:
    report = json.loads((tmp_path / "raw/collection_report.json").read_text(encoding="utf-8"))
    return {row["name"]: row for row in report["links"]}


def leftovers(folder) -> list[str]:
    """Names of incomplete files."""
    return sorted(p.name for p in folder.rglob("*") if ".part" in p.name or "extracting" in p.name)


# ------------------------------------------------------------------------------ resumed downloads


def test_a_connection_that_is_cut_again_and_again_is_resumed_by_range(tmp_path):
    with serving(FileServer(cut=70_000)) as url:
        server_file = tmp_path / "a.bin"
        get(f"{url}/a.bin", server_file, retries=1)
    assert server_file.read_bytes() == BODY and not leftovers(tmp_path)


def test_what_an_earlier_start_left_is_not_asked_for_again(tmp_path):
    server = FileServer(cut=70_000)
    with serving(server) as url:
        with pytest.raises(LinkError, match="cut off after 70,000 of 300,000.*70,000 bytes are ke"):
            get(f"{url}/a.bin", tmp_path / "a.bin", retries=0)
        assert leftovers(tmp_path) == ["a.bin.part", "a.bin.part.json"]
        assert (tmp_path / "a.bin.part").read_bytes() == BODY[:70_000]
        server.cut = None
        get(f"{url}/a.bin", tmp_path / "a.bin")
    assert server.asked[1:] == [("/a.bin", "bytes=70000-")]
    assert (tmp_path / "a.bin").read_bytes() == BODY and not leftovers(tmp_path)


@pytest.mark.parametrize("change", ["no Range", "ETag", "no validator", "length", "shorter"])
def test_two_versions_of_a_file_are_never_put_together(tmp_path, change):
    server = FileServer(cut=70_000, etag=None if change == "no validator" else '"1"')
    newer = bytes(reversed(BODY))
    if change in ("length", "shorter"):  # under the same ETag, which is wrong of a server
        newer = newer[: 200_000 if change == "length" else 60_000]
    with serving(server) as url:
        with pytest.raises(LinkError):
            get(f"{url}/a.bin", tmp_path / "a.bin", retries=0)
        server.cut, server.body = None, newer
        server.ranges = change != "no Range"
        if change == "ETag":
            server.etag = '"2"'
        get(f"{url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == newer and not leftovers(tmp_path)


def test_a_part_of_another_address_or_without_facts_is_not_continued(tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"something else")
    server = FileServer(cut=70_000)
    with serving(server) as url:
        with pytest.raises(LinkError):
            get(f"{url}/a.bin", tmp_path / "a.bin", retries=0)
        assert (tmp_path / "a.bin.part").read_bytes() == BODY[:70_000]
        server.cut, server.body = None, bytes(reversed(BODY))
        get(f"{url}/b.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == bytes(reversed(BODY))


def test_a_resumed_file_with_a_wrong_hash_is_fetched_once_more_from_the_beginning(tmp_path):
    server = FileServer(cut=70_000)
    sha256 = hashlib.sha256(BODY).hexdigest()
    with serving(server) as url:
        with pytest.raises(LinkError):
            get(f"{url}/a.bin", tmp_path / "a.bin", retries=0)
        part = tmp_path / "a.bin.part"
        part.write_bytes(bytes(len(part.read_bytes())))  # a power cut
        server.cut = None
        get(f"{url}/a.bin", tmp_path / "a.bin", sha256=sha256)
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert [asked for _, asked in server.asked] == [None, "bytes=70000-", None]


def test_a_wrong_hash_or_size_leaves_nothing(tmp_path):
    with serving(FileServer()) as url:
        with pytest.raises(LinkError, match="its sha256 is .*, the links file says 000"):
            get(f"{url}/a.bin", tmp_path / "a.bin", sha256="0" * 64)
        with pytest.raises(LinkError, match="has 300,000 bytes, the links file says 5"):
            get(f"{url}/a.bin", tmp_path / "a.bin", size=5)
    assert not list(tmp_path.iterdir())


def test_a_busy_server_is_tried_again_and_a_missing_file_is_not(tmp_path):
    answers = {"/busy": (503, "text/plain", b"no"), "/gone": (404, "text/plain", b"no")}
    server = FileServer(answers=answers)
    with serving(server) as url:
        for name, why in (("busy", "HTTP 503"), ("gone", "HTTP 404")):
            with pytest.raises(LinkError, match=why):
                get(f"{url}/{name}", tmp_path / name)
    assert [path for path, _ in server.asked] == ["/busy"] * 3 + ["/gone"]


def test_a_file_address_is_resumed_too_and_begun_again_if_the_file_has_changed(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(BODY)
    url, path = source.as_uri(), tmp_path / "copy.bin"
    facts = {"url": url, "total": len(BODY), "validator": str(source.stat().st_mtime_ns)}
    for validator, expected in ((facts["validator"], b"x" * 1000 + BODY[1000:]), ("1", BODY)):
        (tmp_path / "copy.bin.part").write_bytes(b"x" * 1000)
        text = json.dumps({**facts, "validator": validator})
        (tmp_path / "copy.bin.part.json").write_text(text, encoding="utf-8")
        get(url, path)
        assert path.read_bytes() == expected  # the x show where it was resumed
        assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    "page, expected",
    [
        (b"<!DOCTYPE html><title>Quota</title>", True),
        (b"\xef\xbb\xbf\n <HTML lang=ar>", True),
        (b"<?xml version='1.0'?><mediawiki>", False),
        (b"BZh91AY&SY", False),
        (b"", False),
    ],
)
def test_web_pages_are_told_from_files(page, expected):
    assert looks_like_html(page) == expected


# ------------------------------------------------------------------------------ the command


def real_links() -> dict:
    arabic = shared("data/arabic")
    bz2_file = arabic / "xml_wikipedia/arwiki-sample-pages-articles-multistream.xml.bz2"
    xml = sorted((arabic / "xml_abuelkhair").iterdir())
    return {
        "xml_links": [path.as_uri() for path in (bz2_file, *xml)],
        "text_links": {
            "news": (arabic / "txt/news_lines.txt").as_uri(),
            "saudi": (arabic / "saudinewsnet/2015-08-01.zip").as_uri(),
        },
    }


def test_real_corpora_are_copied_and_all_streams_of_the_dump_unpacked(tmp_path):
    result = collect(tmp_path, real_links(), "--extract", "--log-file", "logs/a.txt")
    assert result.returncode == 0, result.stderr
    arabic = shared("data/arabic")
    raw = tmp_path / "raw"
    for path in (arabic / "xml_abuelkhair").iterdir():
        assert (raw / "xml" / path.name).read_bytes() == path.read_bytes()
    dump = (raw / "xml/arwiki-sample-pages-articles-multistream.xml").read_bytes()
    assert dump.startswith(b"<mediawiki") and dump.rstrip().endswith(b"</mediawiki>")
    assert len(dump) == 223_240  # the first stream has 244
    assert (raw / "text/2015-08-01/2015-08-01.json").stat().st_size == 4_368_114
    rows = rows_of(tmp_path)
    assert {row["status"] for row in rows.values()} == {"fetched"}
    news = (arabic / "txt/news_lines.txt").read_bytes()
    assert rows["news"]["sha256"] == hashlib.sha256(news).hexdigest()
    assert "news_lines.txt: 100%" in result.stderr  # a bar for each file
    log = (tmp_path / "logs/a.txt").read_text(encoding="utf-8")
    assert "--extract" in log and "news: fetched, 2.18 MB" in log and "%" not in log
    before = {p: p.stat().st_mtime_ns for p in raw.rglob("*") if p.suffix != ".json"}
    assert collect(tmp_path, real_links(), "--extract").returncode == 0
    assert {row["status"] for row in rows_of(tmp_path).values()} == {"there already"}
    assert {p: p.stat().st_mtime_ns for p in raw.rglob("*") if p.suffix != ".json"} == before


def test_links_that_fail_are_told_and_the_rest_is_fetched(tmp_path):
    quota = b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title>"
    answers = {
        "/gone.rar": (404, "text/plain", b"no"),
        "/page.rar": (200, "text/html; charset=utf-8", quota),
        "/page.txt": (200, "text/plain", quota),
        "/empty.txt": (200, "text/plain", b""),
        "/dump.txt": (200, "text/plain", b"<mediawiki></mediawiki>"),
    }
    with serving(FileServer(answers=answers)) as url:
        links = {
            "xml_links": [f"{url}/gone.rar", f"{url}/page.rar", "http://127.0.0.1:9/a.xml"],
            "text_links": {
                "page": f"{url}/page.txt",
                "hash": {"url": f"{url}/hash.txt", "sha256": "0" * 64},
                "empty": f"{url}/empty.txt",
                "no file": "file:///nowhere.txt",
                "dump": f"{url}/dump.txt",
                "good": f"{url}/good.txt",
            },
            "google_drive": {"drive.zip": "1234567890abcdef"},
        }
        result = collect(tmp_path, links, "--extract", env=without(tmp_path, "gdown"), fresh=True)
    line = one_error_line(result, 1)
    assert "8 of 10 links failed" in line and "collection_report.json says why" in line
    rows = rows_of(tmp_path)
    whys = {
        "gone.rar": "HTTP 404",
        "page.rar": "a web page came instead of the file: 'Google Drive - Quota exceeded'",
        "a.xml": "refused",
        "page": "a web page came instead",
        "hash": "its sha256 is",
        "empty": "is empty",
        "no file": "/nowhere.txt: no such file",
        "drive.zip": "pip install gdown",
    }
    for name, why in whys.items():
        assert rows[name]["status"] == "failed" and why in rows[name]["why"], rows[name]
        assert f"failed: {name}: " in result.stderr
    assert (tmp_path / "raw/text/good.txt").read_bytes() == BODY
    assert rows["dump"]["notes"] == ["it is XML, not text; move it to xml_links"]
    files = {p.name for p in (tmp_path / "raw").rglob("*") if p.is_file()}
    assert files == {"good.txt", "dump.txt", "collection_report.json", ".lock"}


def without(tmp_path, *packages) -> dict:
    """An environment in which these packages are not installed."""
    folder = tmp_path / "missing"
    folder.mkdir(exist_ok=True)
    for name in packages:
        text = f"raise ModuleNotFoundError(\"No module named '{name}'\", name={name!r})"
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return packages_in(folder)


def packages_in(folder) -> dict:
    """An environment in which python finds the packages of a folder first."""
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=["KILL", "INT", "TERM"]
)
def test_a_run_that_is_stopped_in_the_middle_of_a_file_resumes_there(tmp_path, number):
    server = FileServer(slow_s=0.3)
    sha256 = hashlib.sha256(BODY).hexdigest()
    with serving(server) as url:
        links = {"text_links": [f"{url}/a.txt", {"url": f"{url}/b.txt", "sha256": sha256}]}
        (tmp_path / "links.json").write_text(json.dumps(links), encoding="utf-8")
        words = ("--links-json", "links.json", "--output-dir", "raw", *FAST)
        process = subprocess.Popen(
            [sys.executable, str(ROOT / SCRIPT), *words], cwd=tmp_path, stderr=subprocess.PIPE
        )
        part, deadline = tmp_path / "raw/text/a.txt.part", time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > 50_000):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        line = one_error_line(collect(tmp_path, links), 2)
        assert "raw is in use by another data_collection.py" in line
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1].decode()
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 75}.get(number, -9)
        assert "Traceback" not in errors
        assert leftovers(tmp_path) == ["a.txt.part", "a.txt.part.json"]
        assert rows_of(tmp_path)["b.txt"]["status"] == "not tried"
        n_kept = part.stat().st_size
        server.slow_s = 0
        server.asked.clear()
        assert collect(tmp_path, links).returncode == 0
    assert 0 < n_kept < len(BODY)
    assert server.asked == [("/a.txt", f"bytes={n_kept}-"), ("/b.txt", None)]
    assert (tmp_path / "raw/text/a.txt").read_bytes() == BODY
    assert (tmp_path / "raw/text/b.txt").read_bytes() == BODY and not leftovers(tmp_path)


def test_a_file_that_is_not_the_one_of_the_links_file_is_fetched_and_unpacked_again(tmp_path):
    source = tmp_path / "a.txt.gz"
    for text in (b"old", b"new and longer"):
        source.write_bytes(gzip.compress(text))
        link = {"url": source.as_uri(), "size": source.stat().st_size}
        assert collect(tmp_path, {"text_links": [link]}, "--extract").returncode == 0
        assert (tmp_path / "raw/text/a.txt").read_bytes() == text


def test_pieces_of_a_dump_become_xml_files_and_archives_folders(tmp_path):
    piece = "arwiki-20250520-pages-articles-multistream1.xml-p1p340838"
    names = {
        f"{piece}.bz2": f"{piece}.xml",
        "a.xml.bz2": "a.xml",
        "Youm7_XML_utf_8.rar": "Youm7_XML_utf_8",
        "b.TAR.bz2": "b",
        "c.xml": None,
    }
    links = {"xml_links": [f"http://a/{name}" for name in names]}
    (tmp_path / "links.json").write_text(json.dumps(links), encoding="utf-8")
    targets = [link.target for link in read_links(tmp_path / "links.json", tmp_path)]
    assert [target and target.name for target in targets] == list(names.values())


BAD_LINKS = {
    "[]": "holds no JSON object",
    "{": "not readable as JSON",
    "{}": "names no link",
    '{"xml_link": []}': "did you mean xml_links?",
    '{"xml_links": "http://a/b.xml"}': "must hold a list of links",
    '{"xml_links": [7]}': "link 1: must be text",
    '{"xml_links": [{"ulr": "http://a/b.xml"}]}': "did you mean url?",
    '{"xml_links": [{"file": "b.xml"}]}': 'has no "url"',
    '{"xml_links": ["ftp://a/b.xml"]}': "must begin with https://",
    '{"xml_links": ["http://a b/c.xml"]}': "is no address",
    '{"xml_links": ["http:///c.xml"]}': "names no server",
    '{"xml_links": ["http://a/"]}': "is no name for a file",
    '{"xml_links": ["http://a/..%2fevil"]}': "is no name for a file",
    '{"xml_links": [{"url": "http://a/b", "file": "../b"}]}': "is no name for a file",
    '{"xml_links": [{"url": "http://a/b", "size": "9"}]}': "size: must be a number of bytes",
    '{"xml_links": [{"url": "http://a/b", "sha256": "12"}]}': "must be 64 hexadecimal digits",
    '{"xml_links": ["http://a/b.xml", "http://c/b.xml"]}': 'give one of them another "file"',
    '{"xml_links": ["http://a/b.xml", "http://c/b.xml.bz2"]}': 'give one of them another "file"',
    '{"xml_links": [{"url": "http://a/b.xml", "keep": "*.txt"}]}': "b.xml is no archive",
    '{"google_drive": ["https://example.com/x"]}': "neither the id of a file nor its address",
    '{"huggingface_datasets": [{"dataset": "a/b", "data_files": "x.bin"}]}': "does not end with",
}


@pytest.mark.parametrize("text", BAD_LINKS)
def test_a_wrong_links_file_is_one_line_and_nothing_is_fetched(tmp_path, text):
    path = tmp_path / "links.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="links.json") as e:
        read_links(path, tmp_path / "raw")
    assert BAD_LINKS[text] in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "words, expected",
    [
        (("--links-json", "nowhere.json"), "--links_json: nowhere.json does not exist"),
        (("--retries", "-1"), "--retries: -1 must not be below 0"),
        (("--max-extract-mb", "0"), "--max_extract_mb"),
        (("--output-dir", "links.json"), "--output_dir: links.json"),
        (("--log-file", "links.json/a"), "--log_file: "),
        (("--config", "nowhere.yaml"), "--config: nowhere.yaml"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, words, expected):
    line = one_error_line(collect(tmp_path, {"xml_links": ["file:///x/a.xml"]}, *words), 2)
    assert expected in line and not (tmp_path / "raw").exists()


def test_the_printed_configuration_is_one_that_is_read(tmp_path):
    result = run(SCRIPT, "--print-default-config", cwd=tmp_path)
    assert result.returncode == 0 and "links_json: data/links.json" in result.stdout
    text = result.stdout.replace("extract: false", "extract: true")
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"text"))
    links = {"text_links": [(tmp_path / "a.txt.xz").as_uri()]}
    assert collect(tmp_path, links, "--config", "c.yaml").returncode == 0
    assert (tmp_path / "raw/text/a.txt").read_bytes() == b"text"


def test_our_links_file_names_the_four_corpora_and_is_valid(tmp_path):
    links = read_links(ROOT / "recipes/arabic_bert/links.json", tmp_path)
    sources = [link.entry.get("url") or link.entry["dataset"] for link in links]
    for corpus in ("abuelkhair.net", "dumps.wikimedia.org/arwiki", "OSIAN", "oscar-corpus/OSCAR"):
        assert any(corpus in source for source in sources), corpus
    assert not any("titles" in source or "multistream-index" in source for source in sources)


# ------------------------------------------------------------------------------ unpacking


def tar_of(*entries: tarfile.TarInfo) -> bytes:
    """A tar.gz of entries, the files among them with the text "text"."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for entry in entries:
            entry.size = 4 if entry.isreg() else 0
            archive.addfile(entry, io.BytesIO(b"text") if entry.isreg() else None)
    return out.getvalue()


def a_link(name: str, to: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, to
    return entry


def zip_of(**files) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name.replace("_", "."), data)
    return out.getvalue()


def test_hostile_and_damaged_archives_are_refused_whole_and_the_rest_is_unpacked(tmp_path):
    text = b"streams " * 50_000
    stream = bz2.compress(text)
    bad_second = stream + b"BZh9" + stream[4:-40] + bytes(40)
    bodies = {
        "up.tar.gz": tar_of(tarfile.TarInfo("ok.txt"), tarfile.TarInfo("../up.txt")),
        "link.tar.gz": tar_of(a_link("l", "/etc"), tarfile.TarInfo("l/passwd")),
        "bomb.zip": zip_of(big_txt=bytes(30 << 20)),
        "bomb.bz2": bz2.compress(bytes(30 << 20)),
        "cut.bz2": stream[:-9],
        "tail.bz2": stream + b"not a stream",
        "second.bz2": bad_second,
        "fake.zip": b"PK no archive",
        "fake.rar": b"no archive",
        "many.bz2": stream * 5,
        "many.xz": lzma.compress(text) + bytes(8) + lzma.compress(text),
        "good.zip": zip_of(a_txt=b"1", b_xml=b"2"),
    }
    for name, body in bodies.items():
        (tmp_path / name).write_bytes(body)
    links = [
        {"url": (tmp_path / name).as_uri(), "file": f"{i}-{name}"} for i, name in enumerate(bodies)
    ]
    links[-1]["keep"] = "*.xml"
    result = collect(tmp_path, {"text_links": links}, "--extract", "--max-extract-mb", "8")
    assert "9 of 12 links failed" in one_error_line(result, 1)
    whys = {name: row.get("why", "") for name, row in rows_of(tmp_path).items()}
    expected = {
        "0-up.tar.gz": "would leave the folder",
        "1-link.tar.gz": "is a link",
        "2-bomb.zip": "--max_extract_mb",
        "3-bomb.bz2": "--max_extract_mb",
        "4-cut.bz2": "cut off",
        "5-tail.bz2": "damaged",
        "6-second.bz2": "damaged",
        "7-fake.zip": "not a readable archive",
        "8-fake.rar": "not a .rar archive",
    }
    for name, why in expected.items():
        assert why in whys[name] and f"{name} to fetch it again" in whys[name]
    folder = tmp_path / "raw/text"
    unpacked = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    archives_there = {f"{i}-{name}" for i, name in enumerate(bodies)}
    assert unpacked - archives_there == {"9-many", "10-many", "11-good/b.xml"}
    assert (folder / "9-many").read_bytes() == text * 5
    assert (folder / "10-many").read_bytes() == text * 2
    assert not leftovers(tmp_path) and not (tmp_path / "raw/up.txt").exists()


def test_a_bz2_file_is_unpacked_in_little_memory(tmp_path):
    with bz2.open(tmp_path / "a.bz2", "wb", compresslevel=1) as f:
        for _ in range(60):
            f.write(bytes(1 << 20))
    code = (
        "import resource, sys; from parts.data.archives import extract_compressed;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "n = extract_compressed('a.bz2', 'a', 100);"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=True)
    n_bytes, grown_kib = map(int, result.stdout.split())
    assert n_bytes == 60 << 20 and grown_kib < 20_000


def rar_of(name: bytes, text: bytes, method: int) -> bytes:
    """A RAR5 archive of one file; 0 is stored, another method is only said to be used."""
    vint = lambda n: bytes([n & 127 | 128, n >> 7]) if n > 127 else bytes([n])  # noqa: E731

    def block(body: bytes) -> bytes:
        head = vint(len(body)) + body
        return zlib_crc(head) + head

    kind = vint(method << 7)
    file = b"\2\2" + vint(len(text)) + b"\4" + vint(len(text)) + vint(0o644)
    file += zlib_crc(text) + kind + b"\1" + vint(len(name)) + name
    return b"Rar!\x1a\x07\x01\x00" + block(b"\1\0\0") + block(file) + text + block(b"\5\0\0")


def zlib_crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


def test_a_stored_rar_is_read_and_a_compressed_one_names_unar_if_it_is_not_there(tmp_path):
    pytest.importorskip("rarfile")
    (tmp_path / "a.rar").write_bytes(rar_of(b"a.xml", b"<Text>", 0))
    (tmp_path / "b.rar").write_bytes(rar_of(b"b.xml", b"<Text>", 3))
    links = {"xml_links": [(tmp_path / name).as_uri() for name in ("a.rar", "b.rar")]}
    result = collect(tmp_path, links, "--extract", env={"PATH": str(tmp_path)}, fresh=True)
    one_error_line(result, 1)
    rows = rows_of(tmp_path)
    assert (tmp_path / "raw/xml/a/a.xml").read_bytes() == b"<Text>"
    assert "needs the program unar; apt install unar" in rows["b.rar"]["why"]
    missing = without(tmp_path, "rarfile")
    shutil.rmtree(tmp_path / "raw")
    one_error_line(collect(tmp_path, links, "--extract", env=missing, fresh=True), 1)
    assert "pip install rarfile" in rows_of(tmp_path)["a.rar"]["why"]


@pytest.mark.skipif(not shutil.which("unar"), reason="needs the program unar")
def test_damage_in_a_compressed_rar_is_refused(tmp_path):
    pytest.importorskip("rarfile")
    (tmp_path / "b.rar").write_bytes(rar_of(b"b.xml", b"<Text>", 3))  # no data of that method
    with pytest.raises(ValueError, match="refused"):
        archives.extract_archive(tmp_path / "b.rar", tmp_path / "b", 10)
    assert not (tmp_path / "b").exists()


# ------------------------------------------------------------------------------ hub and Drive


def test_a_dataset_becomes_lines_of_text_and_a_missing_column_is_named(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"content": t, "n": 1} for t in ("\u0646\u0635 1", "", "two\nlines", " ")]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (data / "train.jsonl").write_text(lines, encoding="utf-8")
    links = {
        "huggingface_datasets": {
            "all": {"dataset": str(data), "text_column": "content"},
            "files": {"dataset": str(data), "data_files": "t*.jsonl", "text_column": "content"},
            "column": str(data),
            "zst": {"dataset": str(data), "data_files": "*.jsonl.zst"},
            "none": {"dataset": str(data), "data_files": "*.parquet"},
        }
    }
    result = collect(tmp_path, links, env={"HF_HOME": str(tmp_path / "hf")})
    assert "3 of 5 links failed: column, zst, none" in one_error_line(result, 1)
    found = rows_of(tmp_path)
    assert "its rows have no column text, only content, n" in found["column"]["why"]
    assert f"{data} cannot be read (" in found["none"]["why"]
    if not importlib.util.find_spec("zstandard"):
        assert "pip install zstandard" in found["zst"]["why"]
    for name in ("all", "files"):
        text = (tmp_path / f"raw/huggingface/{name}.jsonl").read_text(encoding="utf-8")
        texts = [json.loads(line)["text"] for line in text.splitlines()]
        assert texts == ["\u0646\u0635 1", "two\nlines"]
        assert (found[name]["rows"], found[name]["empty_rows"]) == (4, 2)
    assert not leftovers(tmp_path)


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    one_error_line(collect(tmp_path, {"huggingface_datasets": {"hub": "nobody/nothing"}}), 1)
    assert "the hub did not provide nobody/nothing" in rows_of(tmp_path)["hub"]["why"]
    assert not leftovers(tmp_path)


class Hub:
    """Stands in for the hub, which tests cannot reach: rows of one revision, failing at one."""

    def __init__(self, revision="1", fails_at=None):
        self.revision, self.fails_at, self.first = revision, fails_at, 0

    def skip(self, n):
        self.first = n
        return self

    def __iter__(self):
        for n in range(self.first, 50):
            if n == self.fails_at:
                raise ConnectionError("lost")
            yield {"text": f"{self.revision}: row {n}"}


@pytest.mark.parametrize("second", ["1", "2"])
def test_a_dataset_is_resumed_at_its_revision_and_begun_again_at_another(
    tmp_path, monkeypatch, second
):
    from recipes.arabic_bert import downloads

    monkeypatch.setattr(downloads, "ROWS_PER_NOTE", 10)
    link = {"dataset": "a/b"}
    for hub, rows in ((Hub(fails_at=27), None), (Hub(second), 50)):
        monkeypatch.setattr(downloads, "_open_dataset", lambda _, hub=hub: (hub, hub.revision))
        if rows is None:
            with pytest.raises(LinkError, match="lost"):
                downloads.fetch_dataset(link, tmp_path / "a.jsonl")
        else:
            assert downloads.fetch_dataset(link, tmp_path / "a.jsonl")["rows"] == rows
    assert hub.first == (20 if second == "1" else 0)
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == [f"{second}: row {n}" for n in range(50)]
    assert not leftovers(tmp_path)


GDOWN = """
def download(url=None, output=None, quiet=False, *, id=None, resume=False):
    if id.startswith("private"):
        return None
    page = b"<!DOCTYPE html><title>Quota exceeded</title>"
    open(output, "wb").write(page if id.startswith("quota") else id.encode())
    return output
"""


def test_drive_files_come_through_gdown_and_its_pages_are_recognised(tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/gdown.py").write_text(GDOWN, encoding="utf-8")
    drive = {"good.txt": "good-67890", "page.txt": "quota-67890", "none.txt": "private-67890"}
    environment = packages_in(tmp_path / "packages")
    result = collect(tmp_path, {"google_drive": drive}, env=environment, fresh=True)
    assert "2 of 3 links failed" in one_error_line(result, 1)
    assert "Quota exceeded" in rows_of(tmp_path)["page.txt"]["why"]
    files = {p.name: p.read_bytes() for p in (tmp_path / "raw/google_drive").iterdir()}
    assert files == {"good.txt": b"good-67890"}


@pytest.mark.skipif(not importlib.util.find_spec("gdown"), reason="needs the package gdown")
def test_gdown_takes_the_arguments_that_we_give():
    import inspect

    import gdown

    assert {"id", "output", "resume"} <= inspect.signature(gdown.download).parameters.keys()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1aB_c-567890", "1aB_c-567890"),
        ("https://drive.google.com/file/d/1aB_c-567890/view?usp=sharing", "1aB_c-567890"),
        ("https://drive.google.com/uc?export=download&id=1aB_c-567890", "1aB_c-567890"),
        ("https://drive.google.com/drive/my", None),
        ("https://example.com/d/1aB_c-567890", None),
        ("short", None),
    ],
)
def test_the_id_of_a_drive_file(text, expected):
    assert drive_id(text) == expected


def test_the_commands_of_the_readme_are_those_that_are_tested():
    readme = Path(ROOT / "recipes/arabic_bert/README.md").read_text(encoding="utf-8")
    assert f"python {SCRIPT} --links-json data/links.json --output-dir ./data/raw" in readme
