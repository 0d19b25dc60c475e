"""Downloads: books are fetched once, and servers that lie, drip or are gone."""

import contextlib
import http.server
import json
import re
import threading
import time

import pytest
from conftest import one_error_line
from prep_cases import END, HEADER, PROSE, START, prepare

import prep_dataset


@contextlib.contextmanager
def book_server(answer):
    """A server on the loopback address; answer(path) -> (status, announced length or None, body; a list is sent slowly)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            agents.add(self.headers["User-Agent"])
            status, length, body = answer(self.path)
            self.send_response(status)
            self.send_header("Content-Type", "text/plain")
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            with contextlib.suppress(OSError):
                for piece in body if isinstance(body, list) else [body]:
                    self.wfile.write(piece)
                    time.sleep(0.1 * isinstance(body, list))

        def log_message(self, *_):
            pass

    asked, agents = [], set()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked, agents
    finally:
        server.shutdown()
        server.server_close()


def a_book(n):
    return (
        HEADER + START + PROSE * 9 + " ".join(f"word{i * n}" for i in range(300)) + "\n\n" + END
    ).encode()


def test_books_are_fetched_once_kept_and_prepared(tmp_path):
    def answer(path):
        n = int(re.search(r"(\d+)", path)[1])
        return (
            (404, 0, b"")
            if n == 99 or (n == 2 and "cache" in path)
            else (200, len(a_book(n)), a_book(n))
        )

    with book_server(answer) as (url, asked, agents):
        line = (
            "--book_ids",
            "1",
            "2",
            "99",
            "--mirror",
            url,
            "--pause_s",
            "0",
            "--output_dir",
            "out",
        )
        assert "1 of 3 books could not be downloaded" in one_error_line(prepare(tmp_path, *line), 1)
        assert asked == [
            "/cache/epub/1/pg1.txt",
            "/cache/epub/2/pg2.txt",
            "/files/2/2-0.txt",
            "/cache/epub/99/pg99.txt",
            "/files/99/99-0.txt",
        ]
        assert all("pretraining" in agent for agent in agents)
        report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
        assert report["counts"] == {"kept": 2, "not downloaded": 1}
        asked.clear()
        prepare(tmp_path, *line)
        assert asked == [
            "/cache/epub/99/pg99.txt",
            "/files/99/99-0.txt",
        ]  # what is there is not asked for again


@pytest.mark.parametrize("lie", ["cut", "empty", "error"])
def test_a_server_that_lies_leaves_no_file(tmp_path, lie):
    answers = {
        "cut": (200, 10_000, a_book(1)[:500]),
        "empty": (200, 0, b""),
        "error": (503, 3, b"no!"),
    }
    with book_server(lambda _: answers[lie]) as (url, *_):
        line = one_error_line(
            prepare(tmp_path, "--book_ids", "1", "--mirror", url, "--pause_s", "0"), 2
        )
    assert {"cut": "cut off after 500", "empty": "empty", "error": "503"}[lie] in line
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_server_that_drips_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(prep_dataset, "DEADLINE_S", 0.5)
    with (
        book_server(lambda _: (200, 100, [b"x"] * 100)) as (url, *_),
        pytest.raises(OSError, match="not complete after"),
    ):
        prep_dataset.fetch(f"{url}/x", tmp_path / "x.txt")
    assert not list(tmp_path.iterdir())


def test_no_server_at_all_is_one_line(tmp_path):
    line = one_error_line(
        prepare(tmp_path, "--book_ids", "1", "2", "--mirror", "http://127.0.0.1:9"), 2
    )
    assert "pg1.txt" in line and "refused" in line
