"""Every command and code block of README.md and docs/ runs, every flag and message they name is there, every link leads somewhere."""

import ast
import importlib.util
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
import torch
from conftest import GPT2_CACHE, ROOT, shared
from test_scoring import raw_item
from test_tf_bundle import save as save_bundle
from test_wt_load import as_run, gpt

import gpt_train
import prep_dataset
import pretraining_advanced
import pretraining_simple
import wt_load
from gpt_train import GPT, GPTConfig
from parts.data import corpus
from parts.data.tokenizers import byte_tokenizer, gpt2_tokenizer
from parts.training.metrics import read_metrics

DOCS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
MARK = re.compile(
    r"# .*?\bneeds (GPUs|a GPU|the network)"
)  # behind a command, or in the comment above it: not run as it stands
INSTALL = "pip install -r requirements.txt"


def sections(text: str) -> dict[str, str]:
    """Heading -> text of each part of a document; what stands before the first heading is under its title."""
    parts = re.split(
        r"^##? (.*)\n",
        re.sub(r"(?ms)^```.*?^```", lambda m: m[0].replace("\n#", "\n\0"), text),
        flags=re.MULTILINE,
    )[1:]
    return {
        heading: body.replace("\n\0", "\n#")
        for heading, body in zip(parts[::2], parts[1::2], strict=True)
    }


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[tuple[str, str | None]]:
    """(command, what it needs that is not here) of each line of the bash blocks, and of any other block that has commands."""
    others = [
        block
        for block in blocks(text, "")
        if re.search(r"^(python|pip|torchrun|marimo) ", block, flags=re.MULTILINE)
    ]
    found, above = [], None
    for line in "\n".join(blocks(text, "bash") + others).splitlines():
        mark = MARK.search(line)
        if line.startswith("#"):
            above = mark
        elif line.strip():
            found.append((line.split("  #")[0].strip(), (mark or above) and (mark or above)[1]))
            above = None
    return found


PARTS = {
    f"{name}: {heading}": body
    for name, text in DOCS.items()
    for heading, body in sections(text).items()
}
ALL = [command for body in PARTS.values() for command in commands(body)]
RUN_ELSEWHERE = {  # word for word in a test, or in .ci/run, of its own
    f"{INSTALL} && python pretraining_simple.py": "tests/test_readme.py",
    f"{INSTALL} && python -m pytest": ".ci/run",
}


def elsewhere(line: str) -> str | None:
    """Where a command runs, if not in this file: the page of notebook.py wants a browser."""
    return RUN_ELSEWHERE.get(line) or (
        "tests/test_notebook.py" if "notebook.py" in line.split() else None
    )


def to_run() -> dict[str, list[tuple[str, str | None]]]:
    """Name of a part -> its commands that run here, in order; one that stands in several parts runs with the first of them."""
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


# ------------------------------------------------------------------------------------------- the commands, as they stand

# Flags that make a command shorter and change nothing else in what it does.
SHORTER = {
    "pretraining_simple.py": "--max_steps 3 --device cpu",
    "pretraining_advanced.py": "--max_steps 4 --save_ckpt_freq 2 --eval_tokens 2000 --device cpu",
    "gpt_train.py": "--max_new_tokens 5 --device cpu",
}
WORDS = "the old man and a small dog went down to the sea where ships of every kind lay still in the morning light".split()


def prose(n: int, lines: int) -> str:
    return "\n\n".join(
        " ".join(WORDS[(i * (n + 2) + j * (i % 7 + 3)) % len(WORDS)] for j in range(9))
        + f" {n}.{i}"
        for i in range(lines)
    )


def prose_with_validation(lines: int) -> str:
    """A short text of which a passage is held out, as it would be of a long one."""
    texts = (prose(n, lines) for n in itertools.count())
    return next(
        text
        for text in texts
        if any(corpus.in_validation(passage, 0.01) for passage in corpus.PASSAGE.findall(text))
    )


def prepared(folder, text: str, monkeypatch) -> None:
    """Everything that a reader of these lines has: the project, texts, books, weights of others, and runs that earlier lines made."""
    for path in [
        *ROOT.glob("*.py"),
        *(ROOT / name for name in ("parts", "configs", "benchmarks", "docs", "tests")),
    ]:
        (folder / path.name).symlink_to(path)
    for name in ("my_texts", "RAW", "gutenberg_preprocessed/raw"):
        (folder / name).mkdir(parents=True)
    (folder / "my_texts/text_0.txt").write_text(prose_with_validation(1000), encoding="utf-8")
    for n in range(3):
        (folder / f"my_texts/text_{n + 1}.txt").write_text(prose(n, 300), encoding="utf-8")
        (folder / f"RAW/book_{n}.txt").write_text(
            f"THE SEA, VOLUME {n}\n\n{prose(n, 100)}", encoding="utf-8"
        )
    for number in (11, 84, 1342):  # downloaded before: what is there is not fetched again
        (folder / f"gutenberg_preprocessed/raw/pg{number}.txt").write_text(
            prose(number, 200), encoding="utf-8"
        )
    with zipfile.ZipFile(folder / "books.zip", "w") as archive:
        archive.writestr("more/book_9.txt", prose(9, 100))
    (folder / "opening.txt").write_text("It was a dark and stormy night.", encoding="utf-8")
    (folder / "book.txt").write_text(prose(5, 30), encoding="utf-8")
    for subset in ("cosmopedia-v2", "fineweb-edu-dedup"):
        file = folder / f"HuggingFaceTB/smollm-corpus/{subset}/train.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(
            "".join(
                json.dumps({"text": f"{subset} {n}. {prose(n, 5)}"}) + "\n" for n in range(400)
            ),
            encoding="utf-8",
        )
    (folder / "hellaswag_val.jsonl").write_text(
        "".join(json.dumps(raw_item(n)) + "\n" for n in range(4)), encoding="utf-8"
    )
    for n, name in enumerate(("laptop", "muon")):
        if "--config configs/laptop.yaml" not in text:  # else these lines make them
            as_run(gpt(seed=n), folder / "runs" / name)
    if "models/124M" in text:
        openais_files(folder / "models/124M")
    if "hf:gpt2" in text:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("data/gpt2/tiktoken_cache")))
        small = GPT(
            GPTConfig(n_layer=1, n_head=2, n_embd=16)
        )  # GPT-2's vocabulary and context, and little else
        run = as_run(small, folder / "small", gpt2_tokenizer())
        wt_load.main(
            wt_load.ExportConfig(str(run), ("hf", str(folder / "hub/models--gpt2/snapshots/abc")))
        )
        (folder / "hub/models--gpt2/refs").mkdir()
        (folder / "hub/models--gpt2/refs/main").write_text("abc", encoding="utf-8")


def openais_files(folder) -> None:
    """A small GPT in the names, shapes and files of OpenAI's GPT-2."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, t in gpt().state_dict().items():
        *place, kind = re.sub(r"^h\.", "h", name).split(".")
        matrix = place[0] not in ("wte", "wpe") and t.ndim == 2
        kind = (
            []
            if place[0] in ("wte", "wpe")
            else ["b"]
            if kind == "bias"
            else ["w"]
            if matrix
            else ["g"]
        )
        tensors["/".join(["model", *place, *kind])] = t.t()[None].contiguous() if matrix else t
    save_bundle(folder / "model.ckpt", tensors)
    (folder / "hparams.json").write_text(
        json.dumps({"n_vocab": 257, "n_ctx": 32, "n_embd": 32, "n_head": 4, "n_layer": 2}),
        encoding="utf-8",
    )
    (folder / "tokenizer.json").write_bytes(byte_tokenizer().to_json())


def shell(line: str, folder, **more) -> subprocess.CompletedProcess:
    """The line as a shell runs it, without a network, with this interpreter as `python`."""
    environment = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(folder / "hub"),
        "TIKTOKEN_CACHE_DIR": str(GPT2_CACHE),
    }
    environment |= {"https_proxy": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1", **more}
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


def shortened(command: str) -> str:
    """The command with the flags that make it shorter behind it; a script of the documents has the production trainer's flags."""
    script = next((word for word in command.split() if word.endswith(".py")), "")
    own = (ROOT / script).exists()
    return f"{command} {SHORTER.get(script, '') if own else SHORTER['pretraining_advanced.py'] if '--' in command else ''}"


def on_two_processes(command: str) -> str:
    """A line for many GPUs as it can be tried here: two processes on the CPU, and the laptop's model."""
    return (
        re.sub(
            r"configs/\S+",
            "configs/laptop.yaml",
            command.replace("--nproc_per_node 8", "--nproc_per_node 2"),
        )
        + " --run_name two"
    )


@pytest.mark.parametrize("part", TO_RUN)
def test_every_command_runs_as_it_stands(part, tmp_path, monkeypatch, capsys):
    text = PARTS[part]
    if re.search(r"hf:gpt2|prep_dataset.py smollm", text):
        shared("data/gpt2/tiktoken_cache")  # GPT-2's vocabulary
    prepared(tmp_path, text, monkeypatch)
    for block in blocks(DOCS[part.partition(":")[0]], "python"):
        (tmp_path / block.split()[1]).write_text(block, encoding="utf-8")
    lines = [line for line, needs in TO_RUN[part] if not needs]
    for_many = [on_two_processes(line) for line, needs in TO_RUN[part] if needs][
        -1:
    ]  # one of them costs as much as five others
    for line in map(shortened, lines + for_many):
        result = shell(line, tmp_path)
        assert result.returncode == 0 and "Traceback" not in result.stderr, (
            f"{line}\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}"
        )
    if part.startswith("docs/how-to-extend.md"):
        check_example(part, tmp_path, shortened(lines[-1]), monkeypatch, capsys)


def test_the_commands_that_do_not_run_here_are_these():
    assert [command.split()[:2] + [needs] for command, needs in ALL if needs] == [
        ["pip", "install", "the network"],
        ["torchrun", "--nproc_per_node", "GPUs"],
        ["torchrun", "--nproc_per_node", "GPUs"],
        ["pip", "install", "the network"],
        ["HF_HUB_OFFLINE=1", "lm_eval", "the network"],
    ]
    there = {command: elsewhere(command) for command, _ in ALL if elsewhere(command)}
    assert list(there)[: len(RUN_ELSEWHERE)] == list(RUN_ELSEWHERE) and all(
        (ROOT / file).exists() for file in there.values()
    )
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert f"'^{INSTALL} && python -m pytest$'" in ci and "$install" in ci


# ------------------------------------------------------------------------------------------------------- the examples


def losses(run_dir) -> list[float]:
    return [record["train_loss"] for record in read_metrics(run_dir) if "train_loss" in record]


def in_here(line: str, folder, monkeypatch, capsys) -> str:
    """What `python script.py flags` prints, run in this process, where torch need not be started anew."""
    capsys.readouterr()
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
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
    """It begins at ln V, it learns, and a run that was stopped ends with the losses of the one left alone."""
    run_dir = folder / "runs" / re.search(r"--run_name (\w+)", line)[1]
    straight, first = losses(run_dir), next(read_metrics(run_dir))
    V = byte_tokenizer().vocab_size
    assert (
        len(straight) == 4
        and abs(first["val_loss"] - math.log(V)) < 0.2
        and straight[-1] < straight[0]
    ), part
    shutil.rmtree(run_dir / "checkpoints/step_000004")  # as if it had been killed after step 2
    (run_dir / "loss.png").unlink()
    again = (
        shell(line, folder).stdout
        if line.startswith("torchrun")
        else in_here(line, folder, monkeypatch, capsys)
    )
    assert (
        "resumed from step 2" in again
        and losses(run_dir) == straight
        and (run_dir / "loss.png").exists()
    )
    if part.endswith("A parallel strategy"):
        alone = (
            line.replace("torchrun --nproc_per_node 2", "python").replace(
                "--batch_size 4", "--batch_size 8"
            )
            + " --run_name alone"
        )
        in_here(alone, folder, monkeypatch, capsys)
        assert straight == pytest.approx(losses(folder / "runs/alone"), rel=1e-3), (
            "the gradients are the mean of both ranks'"
        )


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """name -> module of that file of docs/how-to-extend.md."""
    folder = tmp_path_factory.mktemp("examples")
    for block in blocks(DOCS["docs/how-to-extend.md"], "python"):
        (folder / block.split()[1]).write_text(block, encoding="utf-8")

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield load


def test_the_decoder_turns_by_distance_and_never_looks_ahead(example):
    module = example("my_decoder")
    torch.manual_seed(0)
    x = torch.randn(8).expand(1, 1, 12, 8)
    turned = module.rotated(x)[0, 0]
    products = turned @ turned.T
    for distance in range(12):
        assert torch.allclose(products.diagonal(distance), products[0, distance], atol=1e-5)
    assert torch.allclose(turned.norm(dim=1), x[0, 0].norm(dim=1))
    model, ids, targets = (
        module.Decoder(50, 2, 2, 16),
        torch.randint(50, (2, 9)),
        torch.full((2, 9), -100),
    )
    targets[:, :4] = ids[:, 1:5]
    later = ids.clone()
    later[:, 4:] = (ids[:, 4:] + 1) % 50
    assert torch.allclose(model(ids, targets), model(later, targets))
    later[:, 3] = (ids[:, 3] + 1) % 50
    assert not torch.allclose(model(ids, targets), model(later, targets))


def test_masked_rows_are_the_same_in_any_batch_and_hide_the_share_they_say(example):
    module = example("masked_lm")
    ids = torch.randint(200, (64, 100), generator=torch.Generator().manual_seed(0))
    batch = {
        "inputs": ids,
        "targets": torch.where(torch.arange(100) < 90, ids, -100).expand(64, 100),
    }
    result = module.masked(batch, 200)
    hidden = result["inputs"] == 200
    assert torch.equal(hidden, result["targets"] != -100) and not hidden[:, 90:].any()
    assert torch.equal(result["targets"][hidden], ids[hidden]) and torch.equal(
        result["inputs"][~hidden], ids[~hidden]
    )
    assert abs(hidden[:, :90].float().mean() - module.SHARE) < 0.02
    row = module.masked({name: t[7:8] for name, t in batch.items()}, 200)
    assert all(torch.equal(row[name], result[name][7:8]) for name in row)


def test_lion_is_the_published_update(example):
    module = example("lion")
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    lion, w, m = (
        module.Lion([{"params": [p], "weight_decay": 0.1}], {"lr": 0.01}),
        p.detach().clone(),
        torch.zeros(3, dtype=torch.float64),
    )
    for step in range(5):
        p.grad = torch.tensor([0.3, -0.1, 0.0], dtype=torch.float64) * (-1) ** (step // 2)
        c = 0.9 * m + (1 - 0.9) * p.grad
        w = w - 0.01 * (torch.sign(c) + 0.1 * w)
        m = 0.99 * m + (1 - 0.99) * p.grad
        lion.step()
    assert torch.allclose(p.detach(), w, rtol=0, atol=1e-12) and torch.allclose(
        lion.state[p]["exp_avg"], m, rtol=0, atol=1e-12
    )


# ------------------------------------------------------------------------------------- flags, messages, links, the guide

CONFIGS = [
    gpt_train.SampleConfig,
    pretraining_simple.SimpleConfig,
    pretraining_advanced.TrainConfig,
    *prep_dataset.COMMANDS.values(),
]
CONFIGS += [kind for kind, _ in wt_load.COMMANDS.values()]
FLAGS = {
    name
    for config in CONFIGS
    for field in config.__dataclass_fields__
    for name in (field, f"no_{field}")
} | {"help"}
OF_OTHERS = {  # flag -> whose it is
    "nproc_per_node": "torchrun", "nnodes": "torchrun", "master_port": "torchrun", "nightly": "tests/conftest.py", "data": "benchmarks/tokenizing.py",
    "size": "benchmarks/load_weights.py", "index-url": "pip", "model": "lm_eval", "model_args": "lm_eval", "tasks": "lm_eval",
    "include_path": "lm_eval", "port": "marimo",
}  # fmt: skip


@pytest.mark.parametrize("name", DOCS)
def test_every_flag_is_one_of_a_script(name):
    flags = set(re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", DOCS[name]))
    unknown = {f for f in flags if f not in FLAGS and f not in OF_OTHERS}
    assert not unknown
    for flag in flags & OF_OTHERS.keys():
        if (file := ROOT / OF_OTHERS[flag]).is_file():
            assert f'"--{flag}"' in file.read_text(encoding="utf-8"), flag


@pytest.mark.parametrize("name", DOCS)
def test_a_command_inside_a_sentence_names_a_script_and_flags_that_are_there(name):
    for span in re.findall(r"`((?:python )?[\w/]+\.py(?: [^`]*)?)`", DOCS[name]):
        script, *words = shlex.split(span.removeprefix("python "))
        assert (
            (ROOT / script).exists()
            or any(path.name == script for path in ROOT.rglob("*.py"))
            or script in DOCS[name]
        ), span
        if words and words[0].isalpha():
            known = {"prep_dataset.py": prep_dataset.COMMANDS, "wt_load.py": wt_load.COMMANDS}.get(
                script
            )
            assert known is None or words[0] in known, span


def texts_of_the_sources() -> list[str]:
    """Every text in the code; what is filled in stands as a character that no document has."""
    found = []
    for path in [*ROOT.glob("*.py"), *(ROOT / "parts").glob("*/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        part.value if isinstance(part, ast.Constant) else "\0"
                        for part in node.values
                    )
                )
    return found


def test_every_message_in_the_first_column_of_troubleshooting_is_one_that_the_code_has():
    sources, seen = texts_of_the_sources(), 0
    for row in re.findall(r"^\| (.*?) \|", DOCS["docs/troubleshooting.md"], flags=re.MULTILINE):
        for message in re.findall(r"`([^`]+)`", row):
            for fragment in filter(None, (f.strip() for f in message.split("..."))):
                assert any(fragment in text for text in sources), (
                    f"{message!r}: nothing prints {fragment!r}"
                )
                seen += len(fragment) > 8
    assert seen > 40


@pytest.mark.parametrize("name", DOCS)
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", DOCS[name]):
        if target.startswith("http"):
            continue
        file, _, place = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        if place and path.suffix == ".md":
            headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert place in {
                re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings
            }, target


def test_blocks_are_commands_code_a_yaml_file_or_what_is_printed():
    import yaml

    for name, text in DOCS.items():
        fences = re.findall(r"^```(\w*)$", text, flags=re.MULTILINE)
        assert set(fences) <= {"bash", "python", "yaml", ""} and len(fences) % 2 == 0, name
        for block in blocks(text, "yaml"):
            assert isinstance(yaml.safe_load(block), dict)
        for block in blocks(text, "python"):
            assert re.match(r"# \w+\.py\n", block), (
                "its first line names the file, so that the commands below can run it"
            )
            assert max(map(len, block.splitlines())) <= 140 and block.isascii(), name


def guide_maker():
    spec = importlib.util.spec_from_file_location(
        "make_reading_guide", ROOT / "docs/make_reading_guide.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reading_guide_is_what_its_script_writes():
    assert DOCS["docs/reading-guide.md"] == guide_maker().guide(), (
        "run python docs/make_reading_guide.py"
    )


def test_the_guide_has_every_line_of_the_simple_trainer_in_one_row():
    rows = re.findall(
        r"^\| \[(\d+)(?:-(\d+))?\]", DOCS["docs/reading-guide.md"], flags=re.MULTILINE
    )
    covered = [n for first, last in rows for n in range(int(first), int(last or first) + 1)]
    lines = (ROOT / "pretraining_simple.py").read_text(encoding="utf-8").splitlines()
    code = [n for n, line in enumerate(lines, 1) if line.strip() and not line.startswith("# ---")]
    assert covered == sorted(set(covered)) and set(code) <= set(covered)


def test_the_guides_figures_stand_in_readme_or_benchmarks_and_its_words_where_it_says():
    measured = " ".join(
        (DOCS["README.md"] + DOCS["docs/benchmarks.md"]).replace(" | ", ": ").split()
    )
    table, words = DOCS["docs/reading-guide.md"].split("## Words")
    figures = re.findall(r"^\| \[.*\| ([^|]+) \|$", table, flags=re.MULTILINE)
    assert (
        all(figure == "-" or figure in measured for figure in figures)
        and sum(figure != "-" for figure in figures) > 5
    )
    entries = re.findall(r"^- \*\*(.*?)\*\* \((.*?)\)", words, flags=re.MULTILINE)
    assert len(entries) > 40 and [word.lower() for word, _ in entries] == sorted(
        word.lower() for word, _ in entries
    )
    for word, file in entries:
        text = re.sub(r"[-_\s]+", " ", (ROOT / file).read_text(encoding="utf-8").lower())
        for one in word.lower().split(", "):
            assert one.replace("-", " ") in text, f"{one} in {file}"


def test_a_guide_whose_text_is_gone_or_doubled_is_not_written(monkeypatch):
    maker = guide_maker()
    with pytest.raises(ValueError, match="occurs 0 times in pretraining_simple.py"):
        maker.line_of("pretraining_simple.py", "no such text")
    with pytest.raises(ValueError, match="choose another text"):
        maker.line_of("pretraining_simple.py", "import")
    with pytest.raises(ValueError, match="does not match exactly once in"):
        maker.figure("no such figure")
    monkeypatch.setattr(maker, "ROWS", maker.ROWS[1:])
    with pytest.raises(ValueError, match="not in the order of pretraining_simple.py"):
        maker.stretches()
    monkeypatch.setattr(maker, "WORDS", [("unicorn", "a word", "README.md")])
    monkeypatch.setattr(maker, "stretches", lambda: [])
    monkeypatch.setattr(maker, "ROWS", [])
    with pytest.raises(ValueError, match="'unicorn' does not occur in README.md"):
        maker.guide()
