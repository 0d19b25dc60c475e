"""A headless chromium driven over the DevTools protocol, and helpers for marimo's controls."""

import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--remote-debugging-port=0",
    "--window-size=1300,1000",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-dev-shm-usage",
)


class Browser:
    """One page. `problems`: the errors in its console; `hosts`: whom it asked."""

    def __init__(self, folder: Path):
        from websockets.sync.client import connect

        self.n, self.problems, self.hosts = 0, [], set()
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def read_port():
            return (folder / "DevToolsActivePort").read_text(encoding="utf-8").split()[0]

        port = wait_for(read_port, "chromium to start")
        targets = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list"))
        url = next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")
        self.open = contextlib.ExitStack()
        self.socket = self.open.enter_context(connect(url, max_size=None, ping_interval=None))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters) -> dict:
        """The result of a command of the protocol."""
        self.n += 1
        self.socket.send(json.dumps({"id": self.n, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            self._note(message.get("method"), message.get("params", {}))
            if message.get("id") == self.n:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    def _note(self, method, event) -> None:
        problem = None
        if method == "Runtime.exceptionThrown":
            problem = event["exceptionDetails"].get("exception", {}).get("description", "exception")
        if method == "Log.entryAdded" and event["entry"]["level"] == "error":
            problem = f"{event['entry']['text']} {event['entry'].get('url', '')}"
        if method == "Runtime.consoleAPICalled" and event["type"] == "error":
            problem = " ".join(str(a.get("value", a.get("description"))) for a in event["args"])
        if problem is not None:
            self.problems.append(problem[:300])
        if method == "Network.requestWillBeSent":
            url = event["request"]["url"]
            self.hosts.add(url.split("/")[2].split(":")[0] if "://" in url else "")

    def js(self, expression: str):
        """The value of a JavaScript expression; a promise is awaited."""
        result = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, (expression, result["exceptionDetails"])
        return result["result"].get("value")

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        self.process.wait(timeout=20)
        self.open.close()


def wait_for(ask, what: str, seconds: float = 90):
    """The first answer of ask() that is true; a file that does not exist yet is no answer."""
    not_yet = (FileNotFoundError, IndexError, ConnectionError, urllib.error.URLError)
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        with contextlib.suppress(*not_yet):
            if last := ask():
                return last
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}; the last answer was {last!r}")


# A plain query does not see the shadow trees that the page's controls are made of.
HELPERS = """
window.all = function* (root = document) {
  for (const e of root.querySelectorAll('*')) {
    yield e;
    if (e.shadowRoot) yield* all(e.shadowRoot);
  }
};
window.find = (ask) => { for (const e of all()) if (ask(e)) return e };
window.said = () => {
  const texts = [...all()].flatMap(e => [...e.childNodes]).filter(n => n.nodeType == 3);
  return texts.map(n => n.data).join(' ');
};
window.control = (label, role) => {
  const has_label = (root) =>
    [...root.querySelectorAll('label, button')].some(l => l.innerText.trim() == label);
  const holder = find(e => e.shadowRoot && has_label(e.shadowRoot));
  return holder && holder.shadowRoot.querySelector(role);
};
window.drawn = (alt) => {
  const image = find(e => e.tagName == 'IMG' && e.alt == alt);
  return image && image.complete && image.naturalWidth > 100 ? image.src : '';
};
"""


def press(page: Browser, label: str, key: str) -> None:
    """A key on the slider with this label."""
    code = {"ArrowRight": 39, "Home": 36}[key]
    wait_for(lambda: page.js(f"!!control({label!r}, '[role=slider]')"), f"the slider {label}")
    page.js(f"control({label!r}, '[role=slider]').focus()")
    for kind in ("keyDown", "keyUp"):
        page.send(
            "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
        )


def write(page: Browser, label: str, role: str, text: str) -> None:
    """Replace the text in the field with this label."""
    page.js(f"control({label!r}, '{role}').focus(), control({label!r}, '{role}').select()")
    page.send("Input.insertText", text=text)
