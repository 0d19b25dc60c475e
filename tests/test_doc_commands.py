"""Every command in README.md and docs/ runs; the examples of how-to-extend.md train and resume."""

import itertools
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest
from conftest import GPT2_CACHE, ROOT, shared
from documents import DOCS, PARTS, blocks, commands
from test_scoring import raw_item
from test_tf_bundle import save as save_bundle
from test_wt_load import as_run, gpt

import wt_load
from gpt_train import GPT, GPTConfig
from parts.data import corpus
from parts.data.tokenizers import byte_tokenizer, gpt2_tokenizer
from parts.training.metrics import read_metrics

INSTALL = "pip install -r requirements.txt"
RUN_ELSEWHERE = {  # command -> the test, or CI script, that runs it word for word
    f"{INSTALL} && python pretraining_simple.py": "tests/test_readme.py",
    f"{INSTALL} && python -m pytest": ".ci/run",
}


def elsewhere(line: str) -> str | None:
    """Where a command runs, if not in this file: the page of notebook.py needs a browser."""
    if "notebook.py" in line.split():
        return "tests/test_notebook.py"
    return RUN_ELSEWHERE.get(line)


def to_run() -> dict[str, list[tuple[str, str | None]]]:
    """
    Name of a section -> its commands that run here, in order.

    A command that several sections have runs with the first of them.
    """
    found, seen = {}, set()
    for part, body in PARTS.items():
        mine = [
            (line, needs)
            for line, needs in commands(body)
            if line not in seen and needs in (None, "GPUs") and not elsewhere(line)
        ]
        seen |= {line for line, _ in mine}
        if mine:
            found[part] = mine
    return found


TO_RUN = to_run()

# ------------------------------------------------------------------ what a reader has on the disk

WORDS = """the old man and a small dog went down to the sea where ships of every kind lay still in
the morning light""".split()


def prose(n: int, lines: int) -> str:
    """A text of that many paragraphs; another n is another text."""
    paragraphs = []
    for i in range(lines):
        words = [WORDS[(i * (n + 2) + j * (i % 7 + 3)) % len(WORDS)] for j in range(9)]
        paragraphs.append(" ".join([*words, f"{n}.{i}"]))
    return "\n\n".join(paragraphs)


def prose_with_validation(lines: int) -> str:
    """A short text of which a passage is held out, as of a long one."""
    for n in itertools.count():
        text = prose(n, lines)
        if any(corpus.in_validation(passage, 0.01) for passage in corpus.PASSAGE.findall(text)):
            return text


def write(path, text: str) -> None:
    """A text file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def prepared(folder, text: str, monkeypatch) -> None:
    """
    Everything that a reader of these commands has: the project, texts, books, weights from other
    projects, and runs that earlier commands made.
    """
    folders = [ROOT / name for name in ("parts", "configs", "benchmarks", "docs", "tests")]
    for path in [*ROOT.glob("*.py"), *folders]:
        (folder / path.name).symlink_to(path)
    write(folder / "my_texts/text_0.txt", prose_with_validation(1000))
    for n in range(3):
        write(folder / f"my_texts/text_{n + 1}.txt", prose(n, 300))
        write(folder / f"RAW/book_{n}.txt", f"THE SEA, VOLUME {n}\n\n{prose(n, 100)}")
    for number in (11, 84, 1342):  # books downloaded earlier are not downloaded again
        write(folder / f"gutenberg_preprocessed/raw/pg{number}.txt", prose(number, 200))
    with zipfile.ZipFile(folder / "books.zip", "w") as archive:
        archive.writestr("more/book_9.txt", prose(9, 100))
    write(folder / "opening.txt", "It was a dark and stormy night.")
    write(folder / "book.txt", prose(5, 30))
    for subset in ("cosmopedia-v2", "fineweb-edu-dedup"):
        rows = [{"text": f"{subset} {n}. {prose(n, 5)}"} for n in range(400)]
        path = folder / f"HuggingFaceTB/smollm-corpus/{subset}/train.jsonl"
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    items = "".join(json.dumps(raw_item(n)) + "\n" for n in range(4))
    write(folder / "hellaswag_val.jsonl", items)
    if "--config configs/laptop.yaml" not in text:  # else these commands make the runs
        for n, name in enumerate(("laptop", "muon")):
            as_run(gpt(seed=n), folder / "runs" / name)
    if "models/124M" in text:
        openais_files(folder / "models/124M")
    if "hf:gpt2" in text:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("data/gpt2/tiktoken_cache")))
        gpt2_in_the_hubs_cache(folder)


def gpt2_in_the_hubs_cache(folder) -> None:
    """GPT-2's vocabulary and context with a tiny model, as a download from the hub leaves it."""
    small = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16))
    run = as_run(small, folder / "small", gpt2_tokenizer())
    target = folder / "hub/models--gpt2/snapshots/abc"
    wt_load.main(wt_load.ExportConfig(str(run), ("hf", str(target))))
    write(folder / "hub/models--gpt2/refs/main", "abc")


def openais_files(folder) -> None:
    """A small GPT in the names, shapes and files of OpenAI's GPT-2."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, t in gpt().state_dict().items():
        *place, kind = re.sub(r"^h\.", "h", name).split(".")
        embedding = place[0] in ("wte", "wpe")
        matrix = not embedding and t.ndim == 2
        if matrix:
            t = t.t()[None].contiguous()
        if not embedding:
            place.append("b" if kind == "bias" else "w" if matrix else "g")
        tensors["/".join(["model", *place])] = t
    save_bundle(folder / "model.ckpt", tensors)
    sizes = {"n_vocab": 257, "n_ctx": 32, "n_embd": 32, "n_head": 4, "n_layer": 2}
    write(folder / "hparams.json", json.dumps(sizes))
    (folder / "tokenizer.json").write_bytes(byte_tokenizer().to_json())


# -------------------------------------------------------------------- the commands, as they stand

# Flags that make a command shorter and change nothing else in what it does.
SHORTER = {
    "pretraining_simple.py": "--max_steps 3 --device cpu",
    "pretraining_advanced.py": "--max_steps 4 --save_ckpt_freq 2 --eval_tokens 2000 --device cpu",
    "gpt_train.py": "--max_new_tokens 5 --device cpu",
}


def shortened(command: str) -> str:
    """The command with flags that make it shorter. A script in the docs is a production trainer."""
    script = next((word for word in command.split() if word.endswith(".py")), "")
    if not (ROOT / script).exists():
        script = "pretraining_advanced.py" if "--" in command.partition(".py")[2] else ""
    return f"{command} {SHORTER.get(script, '')}"


def on_two_processes(command: str) -> str:
    """A command for many GPUs as it can run here: two processes on the CPU, the laptop's model."""
    command = command.replace("--nproc_per_node 8", "--nproc_per_node 2")
    return re.sub(r"configs/\S+", "configs/laptop.yaml", command) + " --run_name two"


def shell(line: str, folder) -> subprocess.CompletedProcess:
    """Run the line in a shell, without a network, with this interpreter as `python`."""
    environment = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(folder / "hub"),
        "TIKTOKEN_CACHE_DIR": str(GPT2_CACHE),
        "https_proxy": "http://127.0.0.1:9",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        input="The sea\n",
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.mark.parametrize("part", TO_RUN)
def test_every_command_runs_as_it_stands(part, tmp_path, monkeypatch, capsys):
    text = PARTS[part]
    if re.search(r"hf:gpt2|prep_dataset.py tokenize", text):
        shared("data/gpt2/tiktoken_cache")  # GPT-2's vocabulary
    prepared(tmp_path, text, monkeypatch)
    for block in blocks(DOCS[part.partition(":")[0]], "python"):
        write(tmp_path / block.split()[1], block)
    lines = [line for line, needs in TO_RUN[part] if not needs]
    for_many = [on_two_processes(line) for line, needs in TO_RUN[part] if needs]
    # one of those for many GPUs: it takes as long as five others
    for line in map(shortened, lines + for_many[-1:]):
        result = shell(line, tmp_path)
        output = f"{line}\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}"
        assert result.returncode == 0 and "Traceback" not in result.stderr, output
    if part == "docs/how-to-extend.md: Pipeline parallelism":
        error = re.search(r"one process the same to (\S+)\n", result.stdout)
        assert float(error[1]) < 1e-5, result.stdout
    elif part.startswith("docs/how-to-extend.md"):
        check_example(part, tmp_path, shortened(lines[-1]), monkeypatch, capsys)


def test_the_commands_that_do_not_run_here_are_these():
    everything = [command for body in PARTS.values() for command in commands(body)]
    assert [command.split()[:2] + [needs] for command, needs in everything if needs] == [
        ["pip", "install", "the network"],
        ["torchrun", "--nproc_per_node", "GPUs"],
        ["torchrun", "--nproc_per_node", "GPUs"],
        ["pip", "install", "the network"],
        ["HF_HUB_OFFLINE=1", "lm_eval", "the network"],
    ]
    run_elsewhere = [command for command, _ in everything if elsewhere(command)]
    assert set(RUN_ELSEWHERE) <= set(run_elsewhere)
    assert all((ROOT / elsewhere(command)).exists() for command in run_elsewhere)
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert f"'^{INSTALL} && python -m pytest$'" in ci and "$install" in ci


# ------------------------------------------------------------ the examples of how-to-extend.md


def losses(run_dir) -> list[float]:
    """The training loss of each step."""
    return [record["train_loss"] for record in read_metrics(run_dir) if "train_loss" in record]


def run_here(line: str, folder, monkeypatch, capsys) -> str:
    """What `python script.py flags` prints, run in this process, which has torch imported."""
    capsys.readouterr()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setattr(sys, "argv", shlex.split(line)[1:])
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            sys.modules.pop("start", None)
    assert end.value.code in (0, None), line
    return capsys.readouterr().out


def check_example(part: str, folder, line: str, monkeypatch, capsys) -> None:
    """It starts at ln V, it learns, and a run that was stopped ends with the same losses."""
    run_dir = folder / "runs" / re.search(r"--run_name (\w+)", line)[1]
    uninterrupted = losses(run_dir)
    first = next(read_metrics(run_dir))
    assert abs(first["val_loss"] - math.log(byte_tokenizer().vocab_size)) < 0.2, part
    assert len(uninterrupted) == 4 and uninterrupted[-1] < uninterrupted[0], part

    back_to_step_2(run_dir)
    if line.startswith("torchrun"):
        again = shell(line, folder).stdout
    else:
        again = run_here(line, folder, monkeypatch, capsys)
    assert "resumed from step 2" in again
    assert losses(run_dir) == uninterrupted
    assert (run_dir / "loss.png").exists()

    if line.startswith("torchrun"):  # the gradients are the mean of both ranks'
        alone = line.replace("torchrun --nproc_per_node 2", "python")
        alone = alone.replace("--parallel short", "--parallel none")
        alone = alone.replace("--batch_size 4", "--batch_size 8") + " --run_name alone"
        run_here(alone, folder, monkeypatch, capsys)
        assert uninterrupted == pytest.approx(losses(folder / "runs/alone"), rel=1e-3)


def back_to_step_2(run_dir) -> None:
    """The run of 4 steps as if it had been killed after step 2."""
    shutil.rmtree(run_dir / "checkpoints/step_000004")
    (run_dir / "loss.png").unlink()


EXAMPLES = [
    part
    for part, lines in TO_RUN.items()
    if part.startswith("docs/how-to-extend.md") and lines[-1][0].startswith("python")
]


@pytest.mark.parametrize("part", EXAMPLES)
def test_every_example_runs_and_resumes_under_torchrun(part, tmp_path):
    write(tmp_path / "my_texts/text.txt", prose_with_validation(1000))
    for block in blocks(DOCS["docs/how-to-extend.md"], "python"):
        write(tmp_path / block.split()[1], block)
    *before, line = [line for line, _ in TO_RUN[part]]
    line = shortened(line).replace("python ", "torchrun --standalone --nproc_per_node 2 ")
    for name in ("pretraining_advanced.py", "prep_dataset.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in before:
        assert shell(command, tmp_path).returncode == 0, command
    results = [shell(line, tmp_path)]
    assert results[0].returncode == 0, results[0].stderr[-3000:]
    run_dir = tmp_path / "runs" / re.search(r"--run_name (\w+)", line)[1]
    uninterrupted = losses(run_dir)
    back_to_step_2(run_dir)
    results.append(shell(line, tmp_path))
    for result in results:
        assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert "resumed from step 2" in results[1].stdout
    assert len(uninterrupted) == 4 and losses(run_dir) == uninterrupted
