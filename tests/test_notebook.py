"""The notebook: its functions, its run from top to bottom without a page, and the page itself in a real browser."""

import contextlib
import html
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run
from test_gpt import tiny_model

from gpt_train import GPTConfig
from parts.base.files import append_lines
from parts.data.tokenizers import byte_tokenizer
from parts.report import figures, interpret
from parts.storage.checkpoint import save_checkpoint
from parts.training.metrics import Journal

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def notebook():
    """notebook.py as a module, by its path: the name may be another module's, such as Jupyter's."""
    spec = importlib.util.spec_from_file_location("notebook_of_this_project", ROOT / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_metrics(folder: Path, records) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records), encoding="utf-8"
    )
    return folder


def advanced(n: int, first: int = 1) -> list[dict]:
    """Records as the production trainer writes them: 100 tokens a step, 50 tokens a second."""
    figures_of = {
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_s": 50.0,
        "mfu": None,
        "memory_gib": 0.25,
    }
    return [
        {"step": i, "tokens": 100 * i, "train_loss": 5 - i / 100, **figures_of}
        for i in range(first, first + n)
    ]


def text_of(shown) -> str:
    """What a page's object says: markup inside JSON inside an attribute."""
    return html.unescape(html.unescape(shown.text))


# ------------------------------------------------------------------------------------------------ runs, their curves


def test_records_of_one_step_become_one_row():
    simple = [
        {"step": 0, "val_loss": 6.0},
        {"step": 1, "tokens": 64, "train_loss": 5.5, "lr": 0.1},
        {"step": 1, "val_loss": 5.0},
    ]
    run = figures.columns(simple)
    assert (
        run["step"].tolist() == [0, 1]
        and run["val_loss"].tolist() == [6.0, 5.0]
        and run["train_loss"][1] == 5.5
    )
    assert np.isnan(run["tokens"][0]) and np.isnan(run["tokens_per_s"]).all()


def test_what_is_no_number_is_a_gap_and_no_record_at_all_is_said():
    run = figures.columns(
        [{"step": 1, "train_loss": None, "lr": 10**400, "tokens_per_s": "fast", "memory_gib": 1}]
    )
    assert (
        np.isnan([run["train_loss"][0], run["lr"][0], run["tokens_per_s"][0]]).all()
        and run["memory_gib"][0] == 1
    )
    with pytest.raises(ValueError, match="no record of a step"):
        figures.columns([])


def test_the_three_axes_by_hand():
    run = figures.columns([{"step": 0, "val_loss": 6.0}, *advanced(2)])
    assert figures.place(run, "steps").tolist() == [0, 1, 2]
    assert figures.place(run, "tokens").tolist() == [0, 100, 200]
    assert figures.place(run, "time").tolist() == [0, 2, 4]  # 100 tokens at 50 a second, twice
    simple = figures.columns([{"step": 1, "tokens": 64, "train_loss": 5.5}])
    with pytest.raises(ValueError, match="no tokens/s"):
        figures.place(simple, "time")


def test_smoothing_by_hand():
    assert figures.smoothed([4.0, 4.0, 4.0], 10).tolist() == pytest.approx([4, 4, 4])
    assert figures.smoothed([1.0, 4.0], 2).tolist() == pytest.approx([1, (0.5 * 1 + 4) / 1.5])
    assert figures.smoothed([1.0, 4.0], 1).tolist() == [1, 4]


def test_samples_are_found_by_their_steps():
    assert figures.samples_of("--- step 5\nonce\n--- or twice\n\n--- step 10\nmore\n") == {
        5: "once\n--- or twice",
        10: "more",
    }
    assert figures.samples_of("") == {} == figures.samples_of("--- step")


def test_curves_carry_every_step_once_and_their_labels_have_units():
    """Also after a kill: lines behind the checkpoint are written again, and the plot has one point per step."""
    figure = figures.draw_runs(
        {"$_a b$": figures.columns(advanced(40)), "_b": figures.columns(advanced(1))},
        "steps",
        10,
        mark=7,
    )
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert (
        len(labels) == 6
        and labels[0] == "training loss (nats per token)"
        and "tokens/s" in labels[4]
        and "GiB" in labels[5]
    )
    assert {axes.get_xlabel() for axes in figure.axes} == {"optimizer steps"}
    raw = figure.axes[0].lines[0]
    assert raw.get_xdata().tolist() == list(range(1, 41)) and raw.get_ydata()[6] == pytest.approx(
        4.93
    )
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "\\$_a b\\$",
        " _b",
    ]
    assert figures.as_html(figure, "a & b").startswith(
        '<img alt="a &amp; b" src="data:image/png;base64,'
    )


def test_long_times_are_minutes_and_figures_leave_nothing_behind():
    import matplotlib.pyplot as plt

    figure = figures.draw_runs({"a": figures.columns(advanced(200))}, "time", 1, ["train_loss"])
    assert figure.axes[0].get_xlabel() == "time in training (min)" and figure.axes[0].lines[
        0
    ].get_xdata()[-1] == pytest.approx(400 / 60)
    assert plt.get_fignums() == []


def test_stacked_bars_are_as_long_as_their_parts():
    figure = figures.draw_bars(
        {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0, "y": 0.5}}, "memory (GB)"
    )
    boxes = [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches]
    assert (
        boxes == [(0, 1), (0, 3), (1, 2), (3, 0.5)] and figure.axes[0].get_xlabel() == "memory (GB)"
    )


def test_text_of_any_script_is_drawn_without_a_warning(recwarn):
    maps = np.full((3, 2, 2), 0.5)
    figures.as_html(figures.draw_attention(maps, ["\u4eba$x", "\u0627_{"], 0, 2), "attention")
    assert not recwarn.list


def test_tables_and_texts_escape_what_they_show():
    shown = (
        figures.table(["<a>"], [["<script>"]])
        + figures.paragraph("<script>")
        + figures.surprise([("<script>", '"><b', 1.5)])
    )
    assert (
        "<script>" not in shown
        and shown.count("&lt;script&gt;") == 3
        and '"><b' not in shown
        and "1.50 nats" in shown
    )
    assert "<b>" not in figures.progress("<b>", 10, 5, "<b>")


def test_runs_are_listed_newest_first_and_a_folder_without_any_is_a_sentence(notebook, tmp_path):
    for n, name in enumerate(("b", "a")):
        os.utime(write_metrics(tmp_path / name, advanced(1)) / "metrics.jsonl", (2e9 + n, 2e9 + n))
    (tmp_path / "no run").mkdir()
    assert notebook.runs_in(tmp_path) == ["a", "b"]
    for folder in (tmp_path / "no run", tmp_path / "missing", tmp_path / "a/metrics.jsonl"):
        assert "no run here" in text_of(
            notebook.or_why_not(lambda folder=folder: notebook.runs_in(folder))
        )


def test_damaged_runs_are_told_and_the_others_drawn(notebook, tmp_path):
    write_metrics(tmp_path / "good", advanced(3))
    write_metrics(tmp_path / "simple", [{"step": 1, "tokens": 5, "train_loss": 2.0}])
    (tmp_path / "starting").mkdir()
    (tmp_path / "folder/metrics.jsonl").mkdir(parents=True)
    (write_metrics(tmp_path / "torn", []) / "metrics.jsonl").write_bytes(
        b'{"step": 1, "train\xff\x00\n[3]\n'
    )
    runs, said = notebook.read_runs(
        tmp_path, ["good", "simple", "starting", "folder", "torn", "gone"], "time"
    )
    assert list(runs) == ["good"] and [line.split(":")[0] for line in said] == [
        "simple",
        "starting",
        "folder",
        "torn",
        "gone",
    ]
    assert "no tokens/s" in said[0] and all("no record" in said[i] for i in (1, 3, 4))


def test_a_torn_last_line_of_a_run_that_is_being_written_is_left_out(notebook, tmp_path):
    with open(
        write_metrics(tmp_path / "live", advanced(3)) / "metrics.jsonl", "a", encoding="utf-8"
    ) as f:
        f.write('{"step": 4, "trai')
    runs, said = notebook.read_runs(tmp_path, ["live"], "steps")
    assert runs["live"]["step"].tolist() == [1, 2, 3] and not said


def test_the_signature_changes_with_a_record_and_with_a_checkpoint(notebook, tmp_path):
    write_metrics(tmp_path / "a", advanced(1))
    first = notebook.signature(tmp_path)
    assert notebook.signature(tmp_path) == first
    write_metrics(tmp_path / "a", advanced(2))
    second = notebook.signature(tmp_path)
    (tmp_path / "a/checkpoints/step_000001").mkdir(parents=True)
    third = notebook.signature(tmp_path)
    assert second[0] == first[0] and second[1] != first[1] and third[0] != second[0]


def test_after_a_kill_and_a_resume_a_run_has_one_point_per_step(notebook, tmp_path):
    for at, upto in (
        (0, 9),
        (5, 12),
    ):  # the first attempt was killed at step 9, its last checkpoint is of step 5
        journal = Journal(
            write_metrics(tmp_path / "a", advanced(9)) if not at else tmp_path / "a",
            at,
            append_lines,
        )
        for record in advanced(upto - at, at + 1):
            journal.write(record)
        journal.close()
    runs, _ = notebook.read_runs(tmp_path, ["a"], "tokens")
    assert runs["a"]["step"].tolist() == list(range(1, 13))


def test_the_speed_of_a_run_is_that_of_its_records(notebook, tmp_path):
    config = GPTConfig(vocab_size=97, block_size=16, n_layer=2, n_head=2, n_embd=32)
    write_metrics(tmp_path / "a", advanced(3))
    (tmp_path / "a/run.json").write_text(
        json.dumps({"model_config": vars(config)}), encoding="utf-8"
    )
    assert notebook.reached(tmp_path, ["a"]) == pytest.approx(50 * notebook.flops_per_token(config))
    write_metrics(tmp_path / "b", advanced(3))
    for names, why in ((["b"], "b: does not tell"), ([], "no run is chosen")):
        with pytest.raises(ValueError, match=why):
            notebook.reached(tmp_path, names)


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_of_another_vocabulary_and_a_damaged_one_are_sentences(notebook, tmp_path):
    model, tokenizer = tiny_model(vocab_size=100), byte_tokenizer()  # 257 ids
    state = {"script": "x", "step": 1, "tokens": 1, "model_config": vars(model.config)}
    save = (
        tmp_path / "other",
        1,
        {"model.safetensors": model.state_dict()},
        state,
        {"tokenizer.json": tokenizer.to_json()},
        1,
    )
    save_checkpoint(*save)
    told = text_of(notebook.or_why_not(lambda: notebook.load(str(tmp_path / "other"), ())))
    assert "its tokenizer has 257 ids, the model a vocabulary of 100" in told
    weights = tmp_path / "other/checkpoints/step_000001/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "damaged" in text_of(
        notebook.or_why_not(lambda: notebook.load(str(tmp_path / "other"), (1,)))
    )
    assert "no checkpoint here" in text_of(
        notebook.or_why_not(lambda: notebook.load(str(tmp_path / "gone"), ()))
    )


def test_a_text_longer_than_the_context_is_cut_and_said():
    tokenizer = byte_tokenizer()
    ids, note = interpret.ids_of("abc", tokenizer, 4, last=True)
    assert ids.tolist() == [256, 97, 98, 99] and note == ""
    ids, note = interpret.ids_of("abcd", tokenizer, 4, last=True)
    assert (
        ids.tolist() == [97, 98, 99, 100]
        and note == "The text has 5 tokens and the model reads 4 at most: these are its last ones."
    )
    ids, note = interpret.ids_of("abcd", tokenizer, 4, last=False)
    assert ids.tolist() == [256, 97, 98, 99] and "its first ones" in note


def test_tokens_are_shown_so_that_blanks_and_half_characters_can_be_seen():
    tokenizer = byte_tokenizer()
    assert [interpret.shown(tokenizer, i) for i in (32, 10, 0xC3, 256, 97)] == [
        "\u00b7",
        "\\n",
        "\\xc3",
        "<|endoftext|>",
        "a",
    ]


# ------------------------------------------------------------------------------------------------ small runs


def test_settings_name_the_run_and_a_training_that_fails_tells_its_error_line(
    notebook, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebook, "RUNS", Path("runs"))
    (tmp_path / "runs/notebook-text").mkdir(parents=True)
    (tmp_path / "runs/notebook-text/python.txt").write_text("too short", encoding="utf-8")
    run_dir, flags = notebook.small_run(max_lr=0.01, steps=5)
    assert (
        run_dir.name
        == "notebook-lr0.01-warmup20-batch16-2x64-cosine-5"
        != notebook.small_run(steps=5)[0].name
    )
    training = notebook.Training(run_dir, flags)
    training.process.wait(timeout=60)
    step, told = training.told()
    assert step == 0 and told.startswith("error: ") and "\n" not in told
    training.stop()  # has ended already


def test_the_readme_names_the_commands_that_are_tested_here():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(
        f"\n{command} " in readme
        for command in ("marimo run notebook.py", "marimo edit notebook.py", "python notebook.py")
    )


def test_marimo_finds_nothing_to_say_about_the_notebook():
    checked = subprocess.run(
        [sys.executable, "-m", "marimo", "check", "--strict", "notebook.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0 and checked.stdout + checked.stderr == ""


def test_the_whole_notebook_runs_without_a_page_and_makes_a_run_where_there_is_none(tmp_path):
    result = run(
        "notebook.py",
        cwd=tmp_path,
        timeout=300,
        env={"PYTHONPATH": "", "PYTHONWARNINGS": "default"},
    )
    assert (
        result.returncode == 0 and "Warning" not in result.stderr and "rror" not in result.stderr
    ), result.stderr[-2000:]
    assert list((tmp_path / "runs/notebook-first/checkpoints").glob("step_*"))


# ------------------------------------------------------------------------------------------------ the page


class Browser:
    """One page of a headless chromium, driven over the DevTools protocol; `problems` are the errors that its console told."""

    def __init__(self, folder: Path, dark: bool = False):
        from websockets.sync.client import connect

        flags = [
            "--headless=new",
            "--no-sandbox",
            "--remote-debugging-port=0",
            f"--user-data-dir={folder}",
            "--window-size=1300,1000",
        ]
        quiet = [
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            "--disable-component-update",
            "--disable-dev-shm-usage",
        ]
        self.process = subprocess.Popen(
            [CHROMIUM, *flags, *quiet, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port = wait_for(
            lambda: (folder / "DevToolsActivePort").read_text(encoding="utf-8").split()[0],
            "chromium to start",
        )
        targets = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list"))
        self.open = contextlib.ExitStack()
        self.socket = self.open.enter_context(
            connect(
                next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page"),
                max_size=None,
                ping_interval=None,
            )
        )
        self.n, self.problems, self.hosts = 0, [], set()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        if dark:
            self.send(
                "Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": "dark"}],
            )

    def send(self, method: str, **parameters) -> dict:
        self.n += 1
        self.socket.send(json.dumps({"id": self.n, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            self._note(message.get("method"), message.get("params", {}))
            if message.get("id") == self.n:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    def _note(self, method, event) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(
                event["exceptionDetails"].get("exception", {}).get("description", "exception")[:300]
            )
        if method == "Log.entryAdded" and event["entry"]["level"] == "error":
            self.problems.append(f"{event['entry']['text']} {event['entry'].get('url', '')}"[:300])
        if method == "Runtime.consoleAPICalled" and event["type"] == "error":
            self.problems.append(
                " ".join(str(a.get("value", a.get("description"))) for a in event["args"])[:300]
            )
        if method == "Network.requestWillBeSent":
            self.hosts.add(
                event["request"]["url"].split("/")[2].split(":")[0]
                if "://" in event["request"]["url"]
                else ""
            )

    def js(self, expression: str):
        """The value of a JavaScript expression; a promise is awaited."""
        result = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, (expression, result["exceptionDetails"])
        return result["result"].get("value")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
        self.open.close()


def wait_for(ask, what: str, seconds: float = 90):
    """The first answer of ask() that is true; what it raises for files that are not there yet is no answer."""
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        with contextlib.suppress(
            FileNotFoundError, IndexError, ConnectionError, urllib.error.URLError
        ):
            if last := ask():
                return last
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}; the last answer was {last!r}")


# What the page's controls are made of lies in shadow trees, which a plain query does not see.
HELPERS = """
window.all = function* (root = document) { for (const e of root.querySelectorAll('*')) { yield e; if (e.shadowRoot) yield* all(e.shadowRoot) } };
window.find = (ask) => { for (const e of all()) if (ask(e)) return e };
window.said = () => [...all()].flatMap(e => [...e.childNodes]).filter(n => n.nodeType == 3).map(n => n.data).join(' ');
window.control = (label, role) => {
  const holder = find(e => e.shadowRoot && [...e.shadowRoot.querySelectorAll('label, button')].some(l => l.innerText.trim() == label));
  return holder && holder.shadowRoot.querySelector(role);
};
window.drawn = (alt) => { const i = find(e => e.tagName == 'IMG' && e.alt == alt); return i && i.complete && i.naturalWidth > 100 ? i.src : '' };
"""


def n_lines(path: Path) -> int:
    """Whole lines of a file."""
    return path.read_bytes().count(b"\n")


def press(page: Browser, label: str, key: str) -> None:
    """A key on the slider with this label."""
    wait_for(lambda: page.js(f"!!control({label!r}, '[role=slider]')"), f"the slider {label}")
    page.js(f"control({label!r}, '[role=slider]').focus()")
    for kind in ("keyDown", "keyUp"):
        page.send(
            "Input.dispatchKeyEvent",
            type=kind,
            key=key,
            code=key,
            windowsVirtualKeyCode={"ArrowRight": 39, "Home": 36}[key],
        )


def write(page: Browser, label: str, role: str, text: str) -> None:
    """Text in place of what stands in the field with this label."""
    page.js(f"control({label!r}, '{role}').focus(), control({label!r}, '{role}').select()")
    page.send("Input.insertText", text=text)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")
def test_the_page_in_a_browser(tmp_path):
    """One server, one browser, a clean copy of the project: sections, sliders, a live run that is killed and resumed, bad input, a training."""
    clean, work = tmp_path / "clean", tmp_path / "work"
    for file in (*ROOT.glob("*.py"), *ROOT.glob("parts/*/*.py")):
        target = clean / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (work / "runs").mkdir(parents=True)
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"The value of {i} is the name of the file {i * i}." for i in range(3000)),
        encoding="utf-8",
    )
    flags = "--model_size nano --context_length 32 --batch_size 8 --tokenizer bytes --max_steps 99999 --eval_freq 500 --eval_tokens 512"
    flags += " --val_share 0.05 --print_sample_iter 500 --save_ckpt_freq 50 --device cpu --output_dir runs/live --dataset_name ../text.txt"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "XDG_CONFIG_HOME": str(tmp_path),
        "HOME": str(tmp_path),
    }
    environment.pop("PYTHONPATH", None)
    line, quiet = (
        [sys.executable, str(clean / "pretraining_advanced.py"), *flags.split()],
        {"cwd": work, "env": environment},
    )
    quiet |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = [
        sys.executable,
        "-m",
        "marimo",
        "run",
        str(clean / "notebook.py"),
        "--headless",
        "--no-token",
        "--port",
        str(port),
    ]
    metrics = work / "runs/live/metrics.jsonl"
    with contextlib.ExitStack() as stack:
        trainer = subprocess.Popen(line, **quiet)
        stack.callback(lambda: (trainer.kill(), trainer.wait()))
        serving = subprocess.Popen(server, **quiet)
        stack.callback(lambda: (serving.terminate(), serving.wait()))
        page = Browser(tmp_path / "profile")
        stack.callback(page.close)
        wait_for(lambda: metrics.stat().st_size, "the run to begin")
        wait_for(
            lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/").status == 200, "the server"
        )
        told_by_second = stack.enter_context(open(tmp_path / "second.log", "w+", encoding="utf-8"))
        second = subprocess.Popen(server, **quiet | {"stderr": told_by_second})  # on the same port
        stack.callback(lambda: (second.kill(), second.wait()))
        page.send("Page.addScriptToEvaluateOnNewDocument", source=HELPERS)
        page.send("Page.navigate", url=f"http://127.0.0.1:{port}/")
        curves, schedule, small = (
            "curves of the chosen runs",
            "learning rate over the steps",
            "losses of the small runs",
        )
        memory = "memory by part for several micro-batches"

        # it opens, and the curve of the run that goes on moves without a reload
        before = wait_for(lambda: page.js(f"drawn('{curves}')"), "the curves of the live run")
        page.js("window.kept = 'no reload'")
        after = wait_for(
            lambda: (src := page.js(f"drawn('{curves}')")) != before and src, "the curve to move"
        )
        wait_for(lambda: page.js(f"drawn('{curves}')") != after, "the curve to move again")
        wait_for(lambda: n_lines(metrics) > 60, "60 steps")

        # killed and resumed, the run has one line per step, and so has the plot, which goes on by itself
        trainer.kill()
        trainer.wait()
        killed_at, before = n_lines(metrics), page.js(f"drawn('{curves}')")
        trainer = subprocess.Popen(line, **quiet)
        wait_for(lambda: n_lines(metrics) > killed_at + 20, "the run to be further than it was")
        wait_for(
            lambda: page.js(f"drawn('{curves}')") not in ("", before),
            "the curve to move after the kill",
        )
        trainer.terminate()
        assert trainer.wait(timeout=60) == 75
        steps = [
            json.loads(row)["step"] for row in metrics.read_text(encoding="utf-8").splitlines()
        ]
        assert steps == list(range(steps[-1] + 1)) and steps[-1] > killed_at
        for section in (
            "1. Training dynamics",
            "2. Hyperparameters",
            "3. What the model does",
            "4. Scaling",
            "Sampling",
            "Surprise",
        ):
            wait_for(lambda section=section: page.js(f"said().includes('{section}')"), section)

        # a slider changes a plot
        before = page.js(f"drawn('{schedule}')")
        press(page, "warmup (steps)", "ArrowRight")
        wait_for(
            lambda: page.js(f"drawn('{schedule}')") not in ("", before), "the schedule to change"
        )
        before = page.js(f"drawn('{memory}')")
        page.js(
            "find(e => e.tagName == 'MARIMO-SWITCH').shadowRoot.querySelector('[role=switch]').click()"
        )
        wait_for(
            lambda: page.js(f"drawn('{memory}')") not in ("", before),
            "the memory to change with activation checkpointing",
        )
        # next tokens as one types, and a text longer than the context of 32
        wait_for(lambda: page.js("!!drawn('attention of the heads')"), "attention")
        write(page, "text, read as you type", "textarea", "The value of the name of the file")
        wait_for(
            lambda: page.js(
                "said().includes('The text has 34 tokens and the model reads 32 at most')"
            ),
            "the sentence about the context",
        )
        # a folder without a checkpoint is a sentence, and the page goes on working
        write(page, "or a folder elsewhere", "input", "nowhere")
        page.js("control('or a folder elsewhere', 'input').blur()")
        wait_for(
            lambda: page.js("said().includes('nowhere: no checkpoint here')"),
            "the sentence about nowhere",
        )
        write(page, "or a folder elsewhere", "input", "runs/live")
        page.js("control('or a folder elsewhere', 'input').blur()")
        wait_for(lambda: page.js("!!drawn('attention of the heads')"), "attention again")

        # the button trains, and the curve appears
        for label in ("length (steps)", "width", "depth (blocks)"):
            press(page, label, "Home")
        assert not page.js(f"drawn('{small}')")
        page.js("control('train it', 'button').click()")
        wait_for(
            lambda: page.js("said().includes('finished, step 50 of 50')"), "the training to finish"
        )
        wait_for(lambda: page.js(f"!!drawn('{small}')"), "its curve")

        # the port in use is an error of the second server, and none of the first
        assert second.wait(timeout=60) == 3
        told_by_second.seek(0)
        assert "address already in use" in told_by_second.read()
        told = page.js("said()")
        assert "internal error" not in told and "Traceback" not in told
        assert page.js("window.kept") == "no reload" and page.problems == []
        assert page.hosts <= {"", "127.0.0.1"}, "the page asks another host"
        launched = [
            json.loads(f.read_text(encoding="utf-8"))["launch"]
            for f in (work / "runs").glob("notebook-*/run.json")
        ]
        assert len(launched) == 1 and str(clean) in launched[0]
