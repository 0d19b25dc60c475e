"""Packages that are missing or broken: what goes on without them, and what says so in one line."""

import re
import subprocess
import sys

import pytest
import tiktoken
from conftest import ROOT, TINY, one_error_line, run
from corpus_cases import documents, write_jsonl

import test_smollm
from parts.data.tokenizers import EOT, GPT2_PATTERN, byte_tokenizer
from parts.training.optim import _galore
from test_smollm import Skipped

FAULTS = {  # how a package fails when it is imported: (code of its __init__.py, what is reported)
    "missing": ("raise ModuleNotFoundError(\"No module named '{0}'\", name='{0}')", "{0}"),
    "without its library": (
        "raise ImportError('lib{0}.so.3: cannot open shared object file')",
        "lib{0}.so.3: cannot open shared object file",
    ),
    "without its C module": ("import {0}.core", "No module named '{0}.core'"),
    "without a library of the system": ("import ctypes\nctypes.CDLL('lib{0}.so.9')", "lib{0}.so.9"),
    "of another version": ("import sys\nsys.no_such_thing", "no_such_thing"),
}


def faulty(folder, fault: str, *packages: str) -> dict[str, str]:
    """Write packages with this fault; returns the environment in which they are found first."""
    for package in packages:
        path = folder / "packages" / package / "__init__.py"
        path.parent.mkdir(parents=True)
        path.write_text(FAULTS[fault][0].format(package), encoding="utf-8")
    return {"PYTHONPATH": str(folder / "packages")}


def simple(cwd, texts, env, *more: str) -> subprocess.CompletedProcess:
    """A run of three steps."""
    words = (*TINY, "--data_dir", texts, "--max_steps", "3", *more)
    return run("pretraining_simple.py", *words, cwd=cwd, env=env)


def fine(result: subprocess.CompletedProcess) -> str:
    """All that a command printed, which had to succeed."""
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Traceback" not in result.stderr + result.stdout
    return result.stdout + result.stderr


OPTIONAL = [  # (fault, packages that have it); torch imports tqdm, too, if it can
    ("missing", ("tqdm", "matplotlib")),
    ("without its library", ("tqdm", "matplotlib")),
    ("without its C module", ("tqdm", "matplotlib")),
    ("of another version", ("matplotlib",)),
]


@pytest.mark.parametrize(("fault", "packages"), OPTIONAL)
def test_without_tqdm_and_matplotlib_a_run_is_complete_but_for_its_plot(
    fault, packages, tmp_path, texts
):
    output = fine(simple(tmp_path, texts, faulty(tmp_path, fault, *packages)))
    notes = [line for line in output.splitlines() if re.match("note: no|warning: ", line)]
    assert len(notes) == len(packages)
    for note, package in zip(sorted(notes), packages, strict=True):
        assert package in note and FAULTS[fault][1].format(package) in note
    assert "step 3: validation loss" in output and "loss.png, samples" not in output
    files = sorted(path.name for path in (tmp_path / "runs/simple").glob("[!.]*"))
    assert files == ["checkpoints", "metrics.jsonl", "run.json", "samples.txt"]


@pytest.mark.parametrize("fault", ["missing", "of another version"])
def test_runs_are_compared_without_matplotlib(fault, tmp_path, texts):
    for name in ("one", "two"):
        fine(simple(tmp_path, texts, {}, "--output_dir", name))
    env = faulty(tmp_path, fault, "matplotlib")
    output = fine(run("gpt_train.py", "--compare", "one", "two", cwd=tmp_path, env=env))
    assert "one" in output and "warning: no compare.png: " in output
    assert not (tmp_path / "compare.png").exists()


def test_books_are_prepared_without_tqdm(tmp_path, texts):
    env = faulty(tmp_path, "without its library", "tqdm")
    words = ("gutenberg", "--data_dir", texts, "--workers", 2, "--languages", "all")
    output = fine(run("prep_dataset.py", *words, cwd=tmp_path, env=env))
    assert output.count("note: no progress bar") == 1
    assert (tmp_path / "gutenberg_preprocessed/combined_1.txt").exists()


def test_the_bytes_of_a_text_need_no_tiktoken_in_training_and_sampling(tmp_path, texts):
    env = faulty(tmp_path, "missing", "tiktoken", "regex", "tokenizers")
    fine(simple(tmp_path, texts, env))
    words = ("--checkpoint", "runs/simple", "--prompt", "It", "--max_new_tokens", 3)
    assert "tokenizer bytes" in fine(run("gpt_train.py", *words, cwd=tmp_path, env=env))


@pytest.mark.parametrize("allowed", [(), (EOT,)])
def test_the_ids_of_bytes_are_those_of_tiktoken(allowed):
    tokenizer = byte_tokenizer()
    ranks, special = tokenizer.ranks, tokenizer.special
    theirs = tiktoken.Encoding(
        "bytes", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    options = {"allowed_special": set(allowed), "disallowed_special": ()}
    for text in ("", "naïve 😀 ", f"{EOT}a{EOT}{EOT} b", "<|endof", EOT, "\x00\x7f\r\n"):
        ids = tokenizer.encode(text, allowed)
        assert ids.tolist() == theirs.encode(text, **options) and ids.dtype == "uint32"
        assert tokenizer.decode_bytes(ids) == theirs.decode_bytes(ids.tolist()) == text.encode()
    assert tokenizer.vocab_size == theirs.n_vocab == 257


@pytest.mark.parametrize("fault", ["missing", "without its library"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_local_text_is_tokenised_and_trained_on_without_datasets(fault, name, tmp_path):
    env = faulty(tmp_path, fault, "datasets", "pyarrow", "huggingface_hub", "tqdm")
    write_jsonl(tmp_path / "a.jsonl", documents(200))
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents(200)), encoding="utf-8")
    words = f"--dataset_name {name} --tokenizer bytes"
    result = run("prep_dataset.py", "tokenize", *words.split(), cwd=tmp_path, env=env)
    assert "documents" in fine(result)
    words += " --model_size nano --context_length 32 --batch_size 2 --max_steps 3 --device cpu"
    result = run("pretraining_advanced.py", *words.split(), cwd=tmp_path, env=env)
    assert "finished at step 3" in fine(result)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_needs_pyarrow_or_datasets_says_so_in_one_line(fault, tmp_path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": documents(9)}), tmp_path / "a.parquet")
    env = faulty(tmp_path, fault, "pyarrow", "datasets")
    for name, package in (("a.parquet", "pyarrow"), ("someone/else", "datasets")):
        words = ("tokenize", "--dataset_name", name, "--tokenizer", "bytes")
        result = run("prep_dataset.py", *words, cwd=tmp_path, env=env)
        line = one_error_line(result, result.returncode)
        assert package in line and "install" in line and result.returncode in (1, 2)


@pytest.mark.parametrize("fault", ["missing", "without its library"])
def test_a_job_is_trained_without_the_mirrors_of_its_metrics(fault, tmp_path):
    env = faulty(tmp_path, fault, "wandb", "tensorboard", "matplotlib")
    write_jsonl(tmp_path / "texts.jsonl", documents(200))
    words = "--dataset_name texts.jsonl --tokenizer bytes --model_size nano --context_length 32"
    words += " --batch_size 2 --max_steps 3 --device cpu --run_name a --use_wandb --tensorboard"
    output = fine(run("pretraining_advanced.py", *words.split(), cwd=tmp_path, env=env))
    for message in ("wandb is off", "--tensorboard is off", "no loss.png"):
        lines = [line for line in output.splitlines() if message in line]
        assert lines and all(line.startswith("warning: ") for line in lines), message
    assert "finished at step 3" in output


NEEDED = [
    ("torch", "without a library of the system"),
    ("torch", "without its library"),
    ("numpy", "without its C module"),
    ("tyro", "missing"),
    ("tyro", "without its library"),
    ("yaml", "missing"),
    ("yaml", "without its library"),
    ("safetensors", "of another version"),
    ("filelock", "without its library"),
]


@pytest.mark.parametrize(("package", "fault"), NEEDED)
def test_a_package_that_every_run_needs_is_named_in_one_line(package, fault, tmp_path, texts):
    env = faulty(tmp_path, fault, package)
    if package == "yaml":
        (tmp_path / "a.yaml").write_text("max_steps: 3\n", encoding="utf-8")
        result = run("pretraining_advanced.py", "--config", "a.yaml", cwd=tmp_path, env=env)
    else:
        result = simple(tmp_path, texts, env)
    line = one_error_line(result, 1)
    assert package in line and FAULTS[fault][1].format(package) in line
    assert line.endswith(("; pip install -r requirements.txt", "; install it again"))
    assert not (tmp_path / "runs/simple/run.json").exists()


def test_a_vocabulary_that_needs_tiktoken_says_so_in_one_line(tmp_path, texts):
    env = faulty(tmp_path, "without its library", "tiktoken")
    line = one_error_line(simple(tmp_path, texts, env, "--tokenizer", "bpe:300"), 1)
    assert "the package tiktoken is broken" in line and "libtiktoken.so.3" in line


def test_an_import_of_ours_that_fails_is_a_bug_and_keeps_its_traceback():
    start = "from parts.cli.launch import quiet_ctrl_c, run_script\nquiet_ctrl_c()\n"
    for code in (
        "from parts.cli.launch import no_such_name",
        "run_script(lambda: __import__('parts.cli.no_such_module'))",
        "run_script(lambda: [][1])",
    ):
        result = subprocess.run(
            [sys.executable, "-c", start + code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 1 and "Traceback" in result.stderr, code


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function: names of packages that fail to be imported in this process."""

    def packages(fault: str, *names: str) -> tuple[str, ...]:
        monkeypatch.syspath_prepend(faulty(tmp_path, fault, *names)["PYTHONPATH"])
        for module in list(sys.modules):
            if module.partition(".")[0] in names:
                monkeypatch.delitem(sys.modules, module)
        return names

    return packages


@pytest.mark.parametrize("fault", FAULTS)
def test_the_readiness_check_imports_what_it_reports_on(fault, fake, monkeypatch):
    names = fake(fault, "tqdm", "rarfile")
    monkeypatch.setattr(test_smollm, "OPTIONAL", {"filelock": "locks", "rarfile": ".rar archives"})
    cause = re.escape(FAULTS[fault][1].format("tqdm"))
    with pytest.raises(AssertionError, match=rf"tqdm is broken .*\(\w+: .*{cause}") as needed:
        test_smollm.check_python_and_packages()
    assert "numpy" not in str(needed.value)
    with pytest.raises(Skipped, match=r"^rarfile is broken .*\(for \.rar archives\)"):
        test_smollm.check_optional_packages()
    monkeypatch.setattr(test_smollm, "NEEDED", ("numpy", "no-such-package"))
    with pytest.raises(AssertionError, match=r"^no-such-package is not installed; pip install"):
        test_smollm.check_python_and_packages()
    assert names == ("tqdm", "rarfile")


def test_the_readiness_check_is_satisfied_with_packages_that_work(monkeypatch):
    monkeypatch.setattr(test_smollm, "OPTIONAL", {"rarfile": ".rar archives"})
    assert re.search(r"Python 3\.\d+.*, torch \d", test_smollm.check_python_and_packages())
    assert test_smollm.check_optional_packages().startswith("rarfile ")


def test_galore_that_cannot_be_imported_is_refused_before_the_run(fake):
    import torch

    fake("without its library", "galore_torch")
    with pytest.raises(ValueError, match=r"--optimizer galore: needs .* \(libgalore_torch\.so"):
        _galore("galore", torch.device("cpu"))
