"""The page of the notebook in a real browser, served from a clean copy of the project."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from browser import CHROMIUM, HELPERS, Browser, press, wait_for, write
from conftest import ROOT

FLAGS = (
    "--model_size nano --context_length 32 --batch_size 8 --tokenizer bytes --max_steps 99999 "
    "--eval_freq 500 --eval_tokens 512 --val_share 0.05 --print_sample_iter 500 "
    "--save_ckpt_freq 50 --device cpu --output_dir runs/live --dataset_name ../text.txt"
)
# alternative texts of the page's images
CURVES = "curves of the chosen runs"
SCHEDULE = "learning rate over the steps"
SMALL_RUNS = "losses of the small runs"
MEMORY = "memory by part for several micro-batches"
ATTENTION = "attention of the heads"
SECTIONS = (
    "1. Training dynamics",
    "2. Hyperparameters",
    "3. What the model does",
    "4. Scaling",
    "Sampling",
    "Surprise",
)


def n_lines(path: Path) -> int:
    """Whole lines of a file."""
    return path.read_bytes().count(b"\n")


def copy_of_the_project(folder: Path) -> Path:
    for file in (*ROOT.glob("*.py"), *ROOT.glob("parts/*/*.py")):
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")
def test_the_page_in_a_browser(tmp_path):
    """
    One server, one browser and one run that is written meanwhile.

    Sections, sliders, a kill and a resume of the run, bad input, a training of the page's own.
    """
    clean, work = copy_of_the_project(tmp_path / "clean"), tmp_path / "work"
    (work / "runs").mkdir(parents=True)
    text = "\n\n".join(f"The value of {i} is the name of the file {i * i}." for i in range(3000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment |= {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
    environment.pop("PYTHONPATH", None)
    line = [sys.executable, str(clean / "pretraining_advanced.py"), *FLAGS.split()]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    quiet |= {"cwd": work, "env": environment}
    port = free_port()
    server = [sys.executable, "-m", "marimo", "run", str(clean / "notebook.py"), "--headless"]
    server += ["--no-token", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/"
    metrics = work / "runs/live/metrics.jsonl"
    with contextlib.ExitStack() as stack:
        trainer = subprocess.Popen(line, **quiet)
        stack.callback(lambda: (trainer.kill(), trainer.wait()))
        serving = subprocess.Popen(server, **quiet)
        stack.callback(lambda: (serving.terminate(), serving.wait()))
        page = Browser(tmp_path / "profile")
        stack.callback(page.close)

        def drawn(image):
            return page.js(f"drawn('{image}')")

        def wait_for_change(image, before):
            what = f"another image: {image}"
            return wait_for(lambda: (src := drawn(image)) not in ("", before) and src, what)

        def wait_for_text(text):
            wait_for(lambda: page.js(f"said().includes('{text}')"), f"the text: {text}")

        wait_for(lambda: metrics.stat().st_size, "the run to begin")
        wait_for(lambda: urllib.request.urlopen(url).status == 200, "the server")
        second_log = stack.enter_context(open(tmp_path / "second.log", "w+", encoding="utf-8"))
        second = subprocess.Popen(server, **quiet | {"stderr": second_log})  # on the same port
        stack.callback(lambda: (second.kill(), second.wait()))
        page.send("Page.addScriptToEvaluateOnNewDocument", source=HELPERS)
        page.send("Page.navigate", url=url)

        # it opens, and the curve of the live run moves without a reload
        before = wait_for(lambda: drawn(CURVES), "the curves of the live run")
        page.js("window.kept = 'no reload'")
        after = wait_for_change(CURVES, before)
        wait_for_change(CURVES, after)
        wait_for(lambda: n_lines(metrics) > 60, "60 steps")

        # killed and resumed, the run has one line per step, and its plot moves again by itself
        trainer.kill()
        trainer.wait()
        killed_at, before = n_lines(metrics), drawn(CURVES)
        trainer = subprocess.Popen(line, **quiet)
        wait_for(lambda: n_lines(metrics) > killed_at + 20, "the run to be further than it was")
        wait_for_change(CURVES, before)
        trainer.terminate()
        assert trainer.wait(timeout=60) == 75
        records = metrics.read_text(encoding="utf-8").splitlines()
        steps = [json.loads(record)["step"] for record in records]
        assert steps == list(range(steps[-1] + 1)) and steps[-1] > killed_at
        for section in SECTIONS:
            wait_for_text(section)

        # a slider changes a plot
        before = drawn(SCHEDULE)
        press(page, "warmup (steps)", "ArrowRight")
        wait_for_change(SCHEDULE, before)
        before = drawn(MEMORY)
        switch = "find(e => e.tagName == 'MARIMO-SWITCH').shadowRoot.querySelector('[role=switch]')"
        page.js(f"{switch}.click()")  # activation checkpointing
        wait_for_change(MEMORY, before)

        # next tokens as one types, and a text longer than the context of 32
        wait_for(lambda: drawn(ATTENTION), "attention")
        write(page, "text, read as you type", "textarea", "The value of the name of the file")
        wait_for_text("The text has 34 tokens and the model reads 32 at most")

        # a folder without a checkpoint is a sentence, and the page still works
        write(page, "or a folder elsewhere", "input", "nowhere")
        page.js("control('or a folder elsewhere', 'input').blur()")
        wait_for_text("nowhere: no checkpoint here")
        write(page, "or a folder elsewhere", "input", "runs/live")
        page.js("control('or a folder elsewhere', 'input').blur()")
        wait_for(lambda: drawn(ATTENTION), "attention again")

        # the button trains, and the curve appears
        for label in ("length (steps)", "width", "depth (blocks)"):
            press(page, label, "Home")
        assert not drawn(SMALL_RUNS)
        page.js("control('train it', 'button').click()")
        wait_for_text("finished, step 50 of 50")
        wait_for(lambda: drawn(SMALL_RUNS), "its curve")

        # the port in use is an error of the second server only
        assert second.wait(timeout=60) == 3
        second_log.seek(0)
        assert "address already in use" in second_log.read()
        text = page.js("said()")
        assert "internal error" not in text and "Traceback" not in text
        assert page.js("window.kept") == "no reload" and page.problems == []
        assert page.hosts <= {"", "127.0.0.1"}, "the page asks another host"
        (facts,) = (work / "runs").glob("notebook-*/run.json")
        assert str(clean) in json.loads(facts.read_text(encoding="utf-8"))["launch"]
