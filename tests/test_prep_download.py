"""Downloads: books are fetched once, and servers that lie, drip or are gone."""

import json
import re
import socket
import threading

import pytest
from conftest import one_error_line
from prep_cases import END, HEADER, PROSE, START, book_server, prepare

import prep_dataset


def a_book(n) -> bytes:
    words = " ".join(f"word{i * n}" for i in range(300))
    return (HEADER + START + PROSE * 9 + words + "\n\n" + END).encode()


def test_books_are_fetched_once_kept_and_prepared(tmp_path):
    def answer(path):
        n = int(re.search(r"(\d+)", path)[1])
        if n == 99 or (n == 2 and "cache" in path):
            return 404, 0, b""
        return 200, len(a_book(n)), a_book(n)

    with book_server(answer) as (url, asked, agents):
        flags = ("--mirror", url, "--pause_s", "0", "--output_dir", "out")
        command = ("--book_ids", "1", "2", "99", *flags)
        line = one_error_line(prepare(tmp_path, *command), 1)
        assert "1 of 3 books could not be downloaded" in line
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
        prepare(tmp_path, *command)
        assert asked == ["/cache/epub/99/pg99.txt", "/files/99/99-0.txt"]  # only what is missing


@pytest.mark.parametrize("lie", ["cut", "empty", "error"])
def test_a_server_that_lies_leaves_no_file(tmp_path, lie):
    answers = {
        "cut": (200, 10_000, a_book(1)[:500]),
        "empty": (200, 0, b""),
        "error": (503, 3, b"no!"),
    }
    with book_server(lambda _: answers[lie]) as (url, *_):
        result = prepare(tmp_path, "--book_ids", "1", "--mirror", url, "--pause_s", "0")
    line = one_error_line(result, 2)
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


@pytest.mark.parametrize("mirror", ["nonsense", "http://a b", "ftp://127.0.0.1:9"])
def test_an_address_that_cannot_be_used_is_one_line(tmp_path, mirror):
    line = one_error_line(prepare(tmp_path, "--book_ids", "1", "--mirror", mirror), 2)
    assert mirror in line and "pg1.txt" in line


def test_a_server_that_does_not_speak_http_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail server\r\n")

        threading.Thread(target=answer, daemon=True).start()
        mirror = f"http://127.0.0.1:{server.getsockname()[1]}"
        line = one_error_line(prepare(tmp_path, "--book_ids", "1", "--mirror", mirror), 2)
    assert "220 mail server" in line


def test_no_server_at_all_is_one_line(tmp_path):
    result = prepare(tmp_path, "--book_ids", "1", "2", "--mirror", "http://127.0.0.1:9")
    line = one_error_line(result, 2)
    assert "pg1.txt" in line and "refused" in line


def test_a_missing_data_dir_is_reported_before_any_download(tmp_path):
    with book_server(lambda path: (200, None, a_book(1))) as (url, asked, _):
        flags = ("--book_ids", "1", "--data_dir", "nowhere", "--mirror", url)
        line = one_error_line(prepare(tmp_path, *flags), 2)
    assert "--data_dir: nowhere does not exist" in line and not asked
    assert not list(tmp_path.iterdir())
