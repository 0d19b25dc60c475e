"""Pieces of a Project Gutenberg book, a server of books, and the command that prepares them."""

import contextlib
import http.server
import threading
import time

from conftest import run

PROSE = (
    "It was a bright cold day in April, and the old clock of the tower struck thirteen "
    "over the quiet roofs of the town.\n\n"
)
HEADER = "The Project Gutenberg EBook of A Day, by Nobody\n\nTitle: A Day\n\nLanguage: English\n\n"
START = "*** START OF THE PROJECT GUTENBERG EBOOK A DAY ***\n\n"
END = "*** END OF THE PROJECT GUTENBERG EBOOK A DAY ***\n\n"


def prepare(tmp_path, *arguments, **options):
    """Run `prep_dataset.py gutenberg` with these arguments in tmp_path."""
    return run("prep_dataset.py", "gutenberg", *arguments, cwd=tmp_path, **options)


@contextlib.contextmanager
def book_server(answer):
    """
    A server on the loopback address; yields (its URL, paths asked for, user agents).

    answer(path) returns (status, announced length or None, body); a body in a list is sent slowly.
    """

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
