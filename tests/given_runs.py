"""Small untrained runs, and the commands of wt_load.py and gpt_train.py on them."""

import contextlib
import hashlib
import io
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import gpt_train
import wt_load as W
from gpt_train import GPT, GPTConfig, SampleConfig
from parts.cli.config import parse
from parts.cli.launch import BAD_INPUT, error_line
from parts.data.tokenizers import byte_tokenizer
from parts.storage.checkpoint import save_checkpoint

SHAPE = GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32)
ARABIC, RUSSIAN = "كان يا ما كان", "Жил-был у бабушки"
COMMANDS = {name: kind for name, (kind, _) in W.COMMANDS.items()}


def write_run(run_dir, seed=0, step=3, scale=1.0, **changes) -> Path:
    """A run of a small untrained model; returns its folder."""
    torch.manual_seed(seed)
    model, tokenizer = GPT(GPTConfig(**{**asdict(SHAPE), **changes})), byte_tokenizer()
    state = {
        "script": "x",
        "step": step,
        "tokens": 7,
        "model_config": asdict(model.config),
        "tokenizer": tokenizer.fingerprint,
    }
    weights = {"model.safetensors": {n: t * scale for n, t in model.state_dict().items()}}
    files = {"tokenizer.json": tokenizer.to_json()}
    save_checkpoint(run_dir, step, weights, state, files, keep_last=9)
    return Path(run_dir)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """
    Runs a and b of one model, `wider`, `untied` and `large`; and hf, an export of a.

    `large` has values beyond fp16. No test may write here.
    """
    folder = tmp_path_factory.mktemp("given")
    write_run(folder / "a", seed=0, step=3)
    write_run(folder / "b", seed=1, step=5)
    write_run(folder / "wider", n_embd=64)
    write_run(folder / "untied", tied=False)
    write_run(folder / "large", scale=1e7)
    with contextlib.redirect_stdout(io.StringIO()):
        W.main(W.ExportConfig(str(folder / "a"), ("hf", str(folder / "hf"))))
    return folder


@pytest.fixture(autouse=True)
def nothing_else_changes(home):
    """Fails a test that changes the runs."""
    before = contents(home)
    yield
    assert contents(home) == before


def weights(*line) -> str:
    """What wt_load.py prints for a command line, in this process."""
    return printed(W.main, parse(COMMANDS, list(map(str, line))))


def sample(*line) -> str:
    """What gpt_train.py prints for a command line."""
    return printed(gpt_train.main, parse(SampleConfig, ["--device", "cpu", *map(str, line)]))


def printed(main, config) -> str:
    """What main(config) prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(config)
    return out.getvalue()


def refused(start, *line) -> str:
    """The one line with which a command refuses its input."""
    with pytest.raises(BAD_INPUT) as e:
        start(*line)
    message = error_line(e.value)
    assert "\n" not in message and 10 < len(message) < 500, message
    return message


def contents(folder) -> dict:
    """Everything below a folder: names, and hashes of files."""

    def hash_of(path):
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    return {str(p.relative_to(folder)): hash_of(p) for p in sorted(Path(folder).rglob("*"))}
