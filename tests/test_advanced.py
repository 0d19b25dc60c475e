"""The production trainer: any arrangement of the same rows trains the same model, and what cannot be is told in one line."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, one_error_line, ranks, run

import pretraining_advanced
from parts.cli.launch import BAD_INPUT, error_line
from parts.storage.checkpoint import load_tensors, newest_checkpoint, verify_checkpoint
from parts.training.optim import learning_rate
from pretraining_advanced import TrainConfig
from wt_load import weights_hash

WORDS = "the old man and a small dog went down to the sea where ships of every kind lay still in the light".split()
SMALL = {
    "tokenizer": "bytes", "val_share": 0.05, "model_size": "nano", "context_length": 32, "batch_size": 1, "max_steps": 20, "max_lr": 3e-3,
    "eval_freq": 10, "print_sample_iter": 100, "save_ckpt_freq": 100, "device": "cpu", "dtype": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a corpus in `data`; its token cache is made by the first run and shared by all."""
    folder = tmp_path_factory.mktemp("advanced")
    (folder / "data").mkdir()
    texts = [
        f"{n}. " + " ".join(WORDS[(n * 5 + i * (n % 7 + 2)) % len(WORDS)] for i in range(60))
        for n in range(400)
    ]
    (folder / "data/train.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8"
    )
    return folder


def flags(name, **settings) -> list[str]:
    settings = {"dataset_name": "data", "run_name": name, **SMALL, **settings}
    words = []
    for key, value in settings.items():
        words += (
            [f"--{key}" if value else f"--no_{key}"]
            if isinstance(value, bool)
            else [f"--{key}", str(value)]
        )
    return words


def command_line(name, world=1, **settings) -> list[str]:
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(world),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    return [
        sys.executable,
        *(torchrun if world > 1 else []),
        str(ROOT / "pretraining_advanced.py"),
        *flags(name, **settings),
    ]


def environment(**more) -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def start(home, name, world=1, env=None, fresh=False, **settings) -> subprocess.CompletedProcess:
    """The trainer, on `world` processes; more than one under torchrun."""
    if world == 1:
        return run(
            "pretraining_advanced.py",
            *flags(name, **settings),
            cwd=home,
            timeout=180,
            env=env,
            fresh=fresh,
        )
    line = command_line(name, world, **settings)
    return subprocess.run(
        line,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=180,
        env=environment(**(env or {})),
        check=False,
    )


@contextlib.contextmanager
def running(home, name, until: str, world=1, **settings):
    """The trainer once it has printed a line with `until`; ended by the caller."""
    line = command_line(name, world, log_exact=True, **settings)
    with subprocess.Popen(
        line, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        if not any(until in line for line in process.stdout):
            raise AssertionError(process.stderr.read())
        yield process


def ranks_of(process) -> dict[int, int]:
    """rank -> process id, of the children of torchrun."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{pid}/stat") as stat,
            open(f"/proc/{pid}/environ", "rb") as environ,
        ):
            rank = re.search(rb"\0RANK=(\d+)\0", environ.read())
            if rank and int(stat.read().rsplit(")", 1)[1].split()[1]) == process.pid:
                found[int(rank[1])] = int(pid)
    return found


def stop(home, name, step, world=1, **settings) -> None:
    """Run it, and ask it politely to stop once it has done this step."""
    group = ranks(
        "pretraining_advanced.py", *flags(name, log_exact=True, **settings), world=world, cwd=home
    )
    try:
        ends = time.monotonic() + 120
        while f"step {step} loss" not in group.out[0].read_text(encoding="utf-8"):
            assert time.monotonic() < ends and os.path.exists(f"/proc/{group.pids[0]}"), group.err[
                0
            ].read_text(encoding="utf-8")
            time.sleep(0.005)
        group.kill(signal.SIGTERM)
    except BaseException:
        group.kill()
        raise
    finally:
        results = group.wait(60)
    assert [r.returncode for r in results] == [75] * world, [r.stderr[-2000:] for r in results]


def train(home, name, world=1, **settings):
    """The run folder of a training that has to succeed."""
    for result in ranks(
        "pretraining_advanced.py", *flags(name, **settings), world=world, cwd=home
    ).wait(180):
        assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return home / "runs" / name


def train_here(home, monkeypatch, name, stop_at=None, **settings) -> int:
    """The trainer in this process, asked to stop in step `stop_at`; returns the exit code, raises what `run_script` would print."""

    def rate(step, *args):
        if step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(step, *args)

    with monkeypatch.context() as patch, contextlib.chdir(home):
        patch.setattr(pretraining_advanced, "learning_rate", rate)
        return pretraining_advanced.run(
            TrainConfig(**{"dataset_name": "data", "run_name": name, **SMALL, **settings})
        )


def refusal(home, monkeypatch, name, **settings) -> str:
    """The line with which these settings are refused, as bad input."""
    settings = {
        key: None if value == "None" else str(value) if isinstance(value, os.PathLike) else value
        for key, value in settings.items()
    }
    with pytest.raises(BAD_INPUT) as e:
        train_here(home, monkeypatch, name, **settings)
    return error_line(e.value)


def metrics(folder, key="train_loss") -> list:
    records = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [r["step"] for r in records] == list(range(records[-1]["step"] + 1))
    return [r[key] for r in records if key in r]


def tensors(folder, file="model.safetensors") -> dict:
    return load_tensors(newest_checkpoint(folder) / file)


# (ranks, accumulation, rows per micro-batch): eight rows a step, in every way
GENTLE = {"max_grad_norm": 0, "max_lr": 1e-4, "save_ckpt_freq": 1, "keep_last": 99}
WAYS = [(1, 1, 8), (1, 2, 4), (1, 4, 2), (2, 1, 4), (2, 2, 2), (4, 1, 2), (4, 2, 1)]


@pytest.fixture(scope="module")
def one_batch(home):
    """One big batch on one process: what every other arrangement must equal."""
    return train(home, "big", batch_size=8, **GENTLE)


@pytest.mark.parametrize(("world", "accumulation", "rows"), WAYS[1:])
def test_ranks_and_accumulation_are_one_big_batch(home, one_batch, world, accumulation, rows):
    folder = train(
        home,
        f"ways{world}{accumulation}{rows}",
        world,
        batch_size=rows,
        grad_accum_steps=accumulation,
        **GENTLE,
    )
    ours, theirs = (
        load_tensors(f / "checkpoints/step_000001/optimizer.safetensors")
        for f in (folder, one_batch)
    )
    for key in (
        key for key in theirs if key.endswith("|exp_avg")
    ):  # after one step a tenth of the gradient
        assert torch.allclose(10 * ours[key], 10 * theirs[key], atol=1e-6, rtol=1e-6), key
    for a, b in zip(metrics(folder), metrics(one_batch), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert metrics(folder, "val_tokens") == metrics(one_batch, "val_tokens")
    key_bias = slice(64, 128)  # its true gradient is zero, so AdamW scales rounding noise
    for key, weights in tensors(folder).items():
        a, b = weights.clone(), tensors(one_batch)[key].clone()
        if key.endswith("c_attn.bias"):
            a[key_bias] = b[key_bias] = 0
        assert torch.allclose(a, b, atol=1e-6), key


def test_validation_is_the_same_bits_on_any_number_of_ranks(home):
    settings = {
        "max_steps": 1,
        "eval_freq": 1,
        "batch_size": 2,
        "max_lr": 1e-20,
        "weight_decay": 0,
    }  # so that the weights stay the same
    figures = [
        metrics(train(home, f"val{world}", world, **settings), "val_loss") for world in (1, 2, 3)
    ]
    assert figures[0] == figures[1] == figures[2]


def test_the_same_losses_as_the_simple_script(home, tmp_path, monkeypatch):
    """Same data, same windows, same seed, fp32, constant learning rate, no clipping: twenty equal losses."""
    import pretraining_simple as simple
    from parts.data.batches import TrainBatches
    from parts.data.shards import Shards, read_index
    from parts.data.tokenizers import byte_tokenizer
    from prep_dataset import TokenizeConfig, prepare_tokens

    settings = {
        "batch_size": 4,
        "schedule": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0,
        "max_lr": 1e-3,
    }
    advanced = metrics(train(home, "like_simple", **settings))
    monkeypatch.chdir(home)
    folder = prepare_tokens(TokenizeConfig(dataset_name="data", tokenizer="bytes", val_share=0.05))

    def windows(_tokens, batch_size, T, seed):
        batches = TrainBatches(
            Shards(folder, "train", read_index(folder)), T, seed, byte_tokenizer().vocab_size
        )
        batches.share(0, 1, batch_size, batch_size)
        yield from ((b["inputs"], b["targets"]) for step in batches for b in step)

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text(
        "\n\n".join(" ".join(WORDS) + str(i) for i in range(500)), encoding="utf-8"
    )
    monkeypatch.setattr(simple, "train_batches", windows)
    monkeypatch.setattr(simple, "learning_rate_share", lambda step, n_steps: 1.0)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    simple.main(simple.SimpleConfig(
        data_dir=str(tmp_path / "texts"), output_dir=str(tmp_path / "run"), model_size="nano", context_length=32, batch_size=4,
        max_steps=20, lr=1e-3, tokenizer="bytes", device="cpu",
    ))  # fmt: skip
    torch.set_num_threads(threads)
    lines = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [r["train_loss"] for r in map(json.loads, lines) if "train_loss" in r]
    assert len(losses) == len(advanced) == 20
    assert losses == pytest.approx(advanced, rel=1e-6)


def state_of(folder) -> tuple:
    folder_of = newest_checkpoint(folder)
    return weights_hash(load_tensors(folder_of / "model.safetensors")), weights_hash(
        load_tensors(folder_of / "optimizer.safetensors")
    )


ARRANGEMENTS = {
    "dropout": {"dropout": 0.1, "grad_accum_steps": 2},
    "compiled": {"compile": True, "eval_freq": 3, "batch_size": 4},
    "recomputed": {"activation_checkpointing": True, "dropout": 0.1},
    "bf16": {"dtype": "bf16"},
    "wsd": {"schedule": "wsd", "optimizer": "muon"},
}
OFTEN = {"save_ckpt_freq": 7, "eval_freq": 8, "max_steps": 40}


def the_same_to_the_bit(resumed, straight) -> bool:
    keys = ("train_loss", "val_loss", "grad_norm", "lr", "tokens")
    return state_of(resumed) == state_of(straight) and all(
        metrics(resumed, k) == metrics(straight, k) for k in keys
    )


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_resumed_equals_straight_to_the_bit(home, monkeypatch, name):
    """Stopped twice on the way, with evaluations in between. (In processes of their own: tests/faults.)"""
    settings = {**OFTEN, **ARRANGEMENTS[name]}
    assert train_here(home, monkeypatch, f"{name}-straight", **settings) == 0
    codes = [
        train_here(home, monkeypatch, f"{name}-resumed", step, **settings)
        for step in (10, 25, None)
    ]
    assert codes == [75, 75, 0]
    assert the_same_to_the_bit(home / f"runs/{name}-resumed", home / f"runs/{name}-straight")


def test_four_ranks_resumed_equal_straight_to_the_bit(home):
    settings = {**OFTEN, "dropout": 0.1, "max_steps": 20}
    straight = train(home, "ranks-straight", 4, **settings)
    stop(home, "ranks-resumed", 9, 4, **settings)
    assert the_same_to_the_bit(train(home, "ranks-resumed", 4, **settings), straight)


def test_one_two_one_processes_see_the_same_rows(home):
    settings = {"max_steps": 50, "save_ckpt_freq": 20, "eval_freq": 50}
    straight = train(home, "121-straight", grad_accum_steps=2, **settings)
    for world, step in ((1, 10), (2, 30)):
        stop(home, "121", step, world, grad_accum_steps=2, **settings)
    folder = train(home, "121", grad_accum_steps=2, **settings)
    assert metrics(folder, "tokens") == metrics(straight, "tokens")
    for a, b in zip(metrics(folder), metrics(straight), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    line = one_error_line(start(home, "121", grad_accum_steps=2, batch_size=3, **settings), 2)
    assert "rows per step" in line


def test_a_finished_run_says_so_and_never_moves_it_aside(home):
    before = state_of(train(home, "twice"))
    result = start(home, "twice")
    assert result.returncode == 0 and "already finished at step 20" in result.stdout
    assert state_of(home / "runs/twice") == before
    result = start(home, "twice", resume="never", max_steps=2)
    assert result.returncode == 0 and (home / "runs/twice-1/checkpoints/step_000020").exists()
    longer = start(
        home,
        "twice-1",
        resume=home / "runs/twice-1",
        max_steps=25,
        allow_change="max_steps,warmup_steps",
    )
    assert longer.returncode == 0 and len(metrics(home / "runs/twice-1")) == 25


def test_the_run_folder_tells_how_to_go_on(home):
    folder = train(home, "told", tensorboard=True)
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert {
        "config",
        "git_commit",
        "versions",
        "device",
        "data",
        "tokenizer",
        "launch",
        "resume",
    } <= set(facts)
    assert facts["config"]["max_lr"] == 3e-3 and "--run_name told" in facts["resume"]
    assert (folder / "loss.png").stat().st_size > 5000 and (folder / "samples.txt").read_text(
        encoding="utf-8"
    ).startswith("--- step 20")
    assert list((folder / "tensorboard").iterdir())
    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert {
        "train_loss",
        "val_loss",
        "val_bits_per_byte",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "memory_gib",
    } <= set(last)
    assert last["mfu"] is None, "the peak of this CPU is not known"
    verify_checkpoint(newest_checkpoint(folder))
    result = run("wt_load.py", "verify", folder, cwd=home)
    assert result.stdout.splitlines()[-1] == weights_hash(tensors(folder))
    assert (
        run("gpt_train.py", "--checkpoint", folder, "--max_new_tokens", "5", cwd=home).returncode
        == 0
    )


def test_the_best_checkpoint_is_kept_besides_the_last(home):
    # a rate that ruins the model late: warmup over the whole run
    settings = {
        "max_lr": 1.0,
        "warmup_steps": 40,
        "max_steps": 40,
        "eval_freq": 4,
        "save_ckpt_freq": 4,
        "keep_last": 2,
        "max_grad_norm": 0,
    }
    folder = train(home, "best", **settings)
    losses = dict(zip(range(0, 41, 4), metrics(folder, "val_loss"), strict=True))
    best = min((step for step in losses if step), key=losses.get)
    kept = sorted(int(p.name[5:]) for p in (folder / "checkpoints").iterdir())
    assert kept == sorted({best, 36, 40}) and best < 36


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_lr": 1e-2}, "max_lr 0.003 then, 0.01 now.*--allow_change"),
        ({"seed": 5}, "seed"),
        ({"n_layer": 3}, "another model.*n_layer 2 then, 3 now"),
        ({"context_length": 16}, "another model"),
        ({"tokenizer": "bpe:300"}, "another model|another --tokenizer"),
        ({"max_documents": 300}, "max_documents"),
        ({"batch_size": 3}, "rows per step 1 then, 3 now"),
        ({"optimizer": "muon"}, "optimizer adamw then, muon now"),
        ({"dropout": 0.5}, "dropout 0.0 then, 0.5 now"),
        (
            {"max_steps": 2, "allow_change": "max_steps,warmup_steps"},
            "--max_steps: 2 is before step 4",
        ),
        ({"resume": "nowhere"}, "--resume: nowhere does not exist"),
        ({"resume": "data"}, "no checkpoint here"),
        ({"allow_change": "max_lrr"}, "max_lrr: no such setting"),
    ],
    ids=str,
)
def test_a_resume_that_does_not_fit_is_refused_and_nothing_is_touched(
    home, monkeypatch, settings, message
):
    folder = home / "runs/fits"
    if not folder.exists():
        train(home, "fits", max_steps=4)
    before = {
        p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }
    line = refusal(home, monkeypatch, "fits", **{"max_steps": 4, **settings})
    assert re.search(message, line), line
    assert {
        p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    } == before


def test_what_may_change_brings_along_what_was_derived_from_it(home):
    train(home, "changed", max_steps=4)
    result = start(home, "changed", max_steps=40, max_lr=1e-2, allow_change="max_lr,max_steps")
    assert result.returncode == 0 and "resumed from step 4" in result.stdout, result.stderr
    config = json.loads((home / "runs/changed/run.json").read_text(encoding="utf-8"))["config"]
    assert config["min_lr"] == pytest.approx(1e-3) and config["warmup_steps"] == 0, (
        "the warmup is behind the run already"
    )


@pytest.mark.parametrize(
    ("first", "then"), [("galore", "adamw"), ("muon", "adamw"), ("adamw", "galore")]
)
def test_another_optimizer_begins_anew_where_that_is_allowed(home, first, then):
    name = f"{first}_{then}"
    train(home, name, max_steps=4, optimizer=first, galore_rank=4)
    result = start(
        home, name, max_steps=8, optimizer=then, galore_rank=4, allow_change="optimizer,max_steps"
    )
    assert result.returncode == 0 and "starts anew" in result.stdout, result.stderr


def test_epochs_on_another_number_of_processes(home):
    """The length in steps that epochs come to belongs to the run, not to the processes of one attempt."""
    settings = {"max_steps": "None", "n_epochs": 0.02, "grad_accum_steps": 2}
    stop(home, "epochs", 3, **settings)
    folder = train(home, "epochs", world=2, **settings)
    config = json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]
    assert len(metrics(folder)) == config["max_steps"] > 10


def test_an_older_checkpoint_of_the_run_itself_does_not_undo_what_came_after_it(home):
    train(home, "older", max_steps=8, save_ckpt_freq=4)
    result = start(home, "older", max_steps=8, resume="runs/older/checkpoints/step_000004")
    assert (
        result.returncode == 0
        and "already finished" in result.stdout
        and "another --run_name" in result.stdout
    )


def test_files_of_the_user_in_the_output_folder_stay(home):
    folder = home / "runs/mine"
    (folder / "film.part").mkdir(parents=True)
    for name in ("thesis.part", "film.part/a", ".other.part"):
        (folder / name).write_text("x", encoding="utf-8")
    before = sorted(folder.rglob("*"))
    one_error_line(start(home, "mine", resume="nowhere"), 2)
    assert sorted(folder.rglob("*")) == before
    train(home, "mine", max_steps=2)
    assert set(before) <= set(folder.rglob("*"))


def test_of_an_attempt_without_a_checkpoint_nothing_is_taken_over(home):
    folder = home / "runs/stale"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        '{"step": 0, "val_loss": 99.0}\n{"step": 1, "train_loss": 98.0}\n', encoding="utf-8"
    )
    (folder / "samples.txt").write_text("--- step 20\nof another model\n", encoding="utf-8")
    train(home, "stale")
    assert metrics(folder, "val_loss")[0] < 10 and "another model" not in (
        folder / "samples.txt"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", ["[1]", "null", "7", "{"])
def test_a_damaged_run_json_or_record_does_not_stop_the_run(home, damage):
    folder = home / "runs/damaged"
    if not folder.exists():
        train(home, "damaged", max_steps=4)
    (folder / "run.json").write_text(damage, encoding="utf-8")
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 1, "train_loss": "abc", "tokens": "q"}\n')
    train(home, "damaged", max_steps=4)


def test_a_damaged_shard_met_in_training_fails_the_run_after_saving(home, tmp_path):
    (tmp_path / "text.jsonl").write_text(
        (home / "data/train.jsonl").read_text(encoding="utf-8") * 15, encoding="utf-8"
    )  # eight blocks
    settings = {
        "dataset_name": tmp_path / "text.jsonl",
        "cache_dir": tmp_path / "cache",
        "eval_tokens": 1000,
    }
    train(home, "before_damage", max_steps=1, **settings)
    shard = next((tmp_path / "cache").glob("*/train_000000.bin"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    line = one_error_line(start(home, "damage", max_steps=100_000, **settings), 1)
    assert "train_000000.bin" in line and "damaged" in line
    last = len(metrics(home / "runs/damage"))
    assert newest_checkpoint(home / "runs/damage").name == f"step_{last:06d}"
    index = next((tmp_path / "cache").glob("*/val_000000.bin"))
    index.write_bytes(index.read_bytes()[:-1] + b"\xff")
    line = one_error_line(
        start(home, "damaged_val", max_steps=2, **{**settings, "eval_tokens": "None"}), 1
    )
    assert "val_000000.bin" in line, "met in an evaluation"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_before_torch_is_there_has_its_exit_code(home, name):
    with subprocess.Popen(
        command_line("early"), cwd=home, stderr=subprocess.PIPE, env=environment()
    ) as process:
        caught, wanted = 0, 1 << signal.SIGUSR1 - 1
        while not caught & wanted:  # the first thing that the script does
            with open(f"/proc/{process.pid}/status", encoding="utf-8") as status:
                caught = int(re.search(r"SigCgt:\s*(\w+)", status.read())[1], 16)
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=30)
    assert process.returncode == (130 if name == "SIGINT" else 75) and b"Traceback" not in err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_subset": "nope"}, "no folder 'nope'"),
        ({"text_field": "body"}, "its columns are text"),
        ({"model_size": "huge"}, "unknown size 'huge'"),
        ({"max_lr": -1}, "--max_lr: -1"),
        ({"parallel": "ddp"}, "torchrun --nproc_per_node 2"),
        ({"optimizer": "galore8bit"}, "needs CUDA"),
        ({"dtype": "fp16"}, "--dtype fp16: needs CUDA"),
        ({"device": "cuda:9"}, "--device"),
        ({"batch_size": 100_000, "max_steps": "None"}, "fewer than one step"),
        ({"keep_last": 1_000_000_000}, "the disk has"),
        ({"val_share": 1e-9}, "--val_share"),
        ({"output_dir": "data/train.jsonl"}, "data/train.jsonl"),
        ({"output_dir": "/proc/nope"}, "/proc/nope"),
        ({"output_dir": "."}, "current folder"),
        ({"n_embd": 65}, "n_embd 65"),
        ({"run_name": ""}, "--run_name, --output_dir: a name is empty"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_no_run_folder(home, monkeypatch, settings, message):
    line = refusal(home, monkeypatch, "bad", **settings)
    assert message in line, line
    assert not (home / "runs/bad").exists()


def test_a_name_that_is_neither_here_nor_reachable_is_one_line(home):
    result = start(
        home, "bad", env={"https_proxy": "http://127.0.0.1:9"}, dataset_name="nobody/nothing"
    )
    assert "nobody/nothing" in one_error_line(result, 2) and not (home / "runs/bad").exists()


def test_a_bad_line_under_torchrun_is_told_once(home):
    result = start(home, "bad", world=2, optimizer="galore8bit")
    assert result.returncode == 1 and result.stderr.count("error: --optimizer galore8bit") == 1, (
        result.stderr
    )
    assert result.stderr.count("Traceback") == 1, "torchrun's own, and none of ours"
    result = start(home, "bad", world=2, batch_sise=1)
    assert result.stderr.count("did you mean") == 1


def test_a_checkpoint_of_the_simple_script_is_refused(home, texts):
    words = (
        "--data_dir",
        texts,
        "--output_dir",
        "runs/of_simple",
        "--max_steps",
        "2",
        "--model_size",
        "nano",
        "--tokenizer",
        "bytes",
    )
    assert (
        run(
            "pretraining_simple.py",
            *words,
            "--context_length",
            "16",
            "--batch_size",
            "4",
            "--device",
            "cpu",
            cwd=home,
        ).returncode
        == 0
    )
    assert "pretraining_simple.py" in one_error_line(start(home, "of_simple"), 2)


def test_a_second_run_in_the_same_folder_is_refused(home):
    with running(home, "busy", "step 3 loss", max_steps=100_000) as process:
        assert "is in use by another run" in one_error_line(start(home, "busy"), 2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 75


def test_a_time_limit_stops_saves_and_goes_on(home):
    result = start(home, "minutes", max_steps=100_000, max_minutes=0.03)
    assert result.returncode == 75 and "the same command resumes from there" in result.stdout
    step = len(metrics(home / "runs/minutes"))
    again = start(home, "minutes", max_steps=100_000, max_minutes=0.03)
    assert (
        again.returncode == 75
        and f"resumed from step {step}" in again.stdout
        and len(metrics(home / "runs/minutes")) > step
    )


def test_a_time_between_checkpoints(home):
    folder = train(home, "often", max_steps=30, save_ckpt_minutes=1e-9, keep_last=100)
    assert len(list((folder / "checkpoints").iterdir())) == 30


def test_a_disk_that_refuses_costs_no_older_checkpoint(home):
    """Files may not grow beyond 1 MB at a time when the second checkpoint is due; exit 1, and the same line goes on."""
    train(home, "full", max_steps=4, save_ckpt_freq=4, min_lr=1e-4, warmup_steps=1)
    (home / "runs/full/checkpoints/.step_000008.part").write_text("in the way", encoding="utf-8")
    settings = {"max_steps": 8, "min_lr": 1e-4, "warmup_steps": 1, "allow_change": "max_steps"}
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        limited,
        str(ROOT / "pretraining_advanced.py"),
        *flags("full", **settings),
    ]
    result = subprocess.run(
        command, cwd=home, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1 and "is not saved" in result.stdout, result.stdout + result.stderr
    assert "Traceback" not in result.stderr and "could not be saved" in result.stderr
    assert [p.name for p in sorted((home / "runs/full/checkpoints").iterdir())] == ["step_000004"]
    assert start(home, "full", **settings).returncode == 0 and len(metrics(home / "runs/full")) == 8


def test_a_gradient_that_is_not_finite_is_left_out_and_told(home):
    result = start(home, "nan", max_lr=1e38, warmup_steps=0, max_grad_norm=0, max_steps=200)
    assert result.returncode == 1 and "the step is skipped" in result.stdout
    assert (
        "20 bad steps in a row" in result.stderr
        and "no checkpoint to roll back to" in result.stderr
        and "Traceback" not in result.stderr
    )


def test_yaml_stands_under_the_line_and_is_converted_by_type(home):
    (home / "a.yaml").write_text(
        "max_lr: 3e-3\nmax_steps: 3\nrun_name: from_yaml\n", encoding="utf-8"
    )
    words = [w for w in flags("unused") if w not in ("--run_name", "unused", "--max_lr", "0.003")]
    i = words.index("--max_steps")
    result = run(
        "pretraining_advanced.py", "--config", "a.yaml", *words[:i], *words[i + 2 :], cwd=home
    )
    assert result.returncode == 0, result.stderr
    config = json.loads((home / "runs/from_yaml/run.json").read_text(encoding="utf-8"))["config"]
    assert config["max_lr"] == 3e-3 and config["max_steps"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1\nmax_lrr: 2\n", "did you mean max_lr"),
        ("max_lr: fast\n", "max_lr: 'fast' is not of type float"),
        ("max_lr: .nan\n", "max_lr: nan"),
        ("compile: no_idea\n", "compile"),
        ("schedule: cosin\n", "schedule: 'cosin'"),
        ("- 1\n- 2\n", "not a mapping"),
        ("!!python/object/apply:os.system ['touch canary']", "not readable as YAML"),
        ("max_lr:\t1\n\t- x: [\n", "not readable as YAML"),
        ("max_steps: 1" + "0" * 400, "max_steps: "),
        ("max_lr: 1 # " + "x" * 2_000_000, "longer than 1,048,576 characters"),
        ("a: &a [x,x,x]\nmax_lr: [*a,*a]\n", "max_lr: list is not of type float"),
    ],
)
def test_a_bad_yaml_file_is_named_with_every_problem(home, text, message):
    (home / "bad.yaml").write_text(text, encoding="utf-8")
    result = run("pretraining_advanced.py", "--config", "bad.yaml", cwd=home)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (
        result.returncode == 2 and message in result.stderr and all("bad.yaml" in e for e in errors)
    ), result.stderr
    assert "Traceback" not in result.stderr and not (home / "canary").exists()
    assert one_error_line(run("pretraining_advanced.py", "--config", "absent.yaml", cwd=home), 2)


def test_one_yaml_file_is_enough_and_an_empty_name_is_none(home):
    for name in ("a", "b"):
        (home / f"{name}.yaml").write_text("max_steps: 3\n", encoding="utf-8")
    words = ("--config", "a.yaml", "--config=b.yaml")
    assert "is given 2 times (a.yaml, b.yaml)" in one_error_line(
        run("pretraining_advanced.py", *words, cwd=home), 2
    )
    assert "--config: is empty" in one_error_line(
        run("pretraining_advanced.py", "--config", "", cwd=home), 2
    )


def test_a_dying_rank_ends_the_job_within_a_minute_and_is_named(home):
    with running(home, "dying", "step 3 loss", world=2, max_steps=100_000) as process:
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        started = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and time.monotonic() - started < 60
        assert re.search(r"rank +: 1 ", err), err[-2000:]


MEASURED = """
import runpy, sys
report, sys.argv = sys.argv[1], sys.argv[2:]
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open("/proc/self/status", encoding="utf-8") as f, open(report, "w", encoding="utf-8") as out:
        out.write(next(line.split()[1] for line in f if line.startswith("RssAnon")))
"""


def test_memory_of_a_rank_does_not_grow_with_the_text(home, tmp_path):
    figures = []
    for times in (1, 10):
        data = tmp_path / f"x{times}"
        data.mkdir()
        (data / "a.jsonl").write_text(
            (home / "data/train.jsonl").read_text(encoding="utf-8") * 20 * times, encoding="utf-8"
        )
        settings = {
            "dataset_name": data,
            "output_dir": tmp_path / f"run{times}",
            "cache_dir": tmp_path / "cache",
            "eval_tokens": 1000,
        }
        assert start(home, "unused", max_steps=1, **settings).returncode == 0  # builds the cache
        line = command_line(
            "unused", max_steps=30, allow_change="max_steps,warmup_steps", **settings
        )
        measured = [line[0], "-c", MEASURED, str(tmp_path / f"rss{times}"), *line[1:]]
        subprocess.run(
            measured,
            cwd=home,
            check=True,
            timeout=120,
            env=environment(MALLOC_ARENA_MAX="1"),
            capture_output=True,
        )
        figures.append(int((tmp_path / f"rss{times}").read_text(encoding="utf-8")))
    assert figures[1] < 1.05 * figures[0], figures


def cpu_seconds(call) -> float:
    before = os.times()
    assert call().returncode == 0
    after = os.times()
    return (
        after.children_user - before.children_user + after.children_system - before.children_system
    )


def test_the_first_step_costs_little_more_than_importing_torch(home):
    train(home, "cache")  # the token cache is there
    torch_alone = cpu_seconds(
        lambda: subprocess.run(
            [sys.executable, "-c", "import torch"], check=True, env=environment()
        )
    )
    seconds = cpu_seconds(
        lambda: start(home, "quick", fresh=True, max_steps=1, print_sample_iter=1000)
    )
    print(
        f"{seconds:.2f} s of CPU for one step and everything around it, {torch_alone:.2f} s for torch alone"
    )
    assert seconds < 4 * torch_alone  # evaluation, checkpoint and plot are in it too


def test_wandb_offline_gets_every_record_and_cannot_stop_the_run(home):
    folder = train(home, "wandb", use_wandb=True, max_steps=10)
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    broken = home / "broken"
    broken.mkdir()
    (broken / "wandb.py").write_text("raise RuntimeError('no wandb today')", encoding="utf-8")
    result = start(home, "nowandb", env={"PYTHONPATH": str(broken)}, use_wandb=True, max_steps=10)
    assert result.returncode == 0 and "wandb is off: no wandb today" in result.stdout
    ours, theirs = (metrics(home / "runs" / name) for name in ("wandb", "nowandb"))
    assert ours == theirs and math.isfinite(ours[-1])


def test_ranks_that_see_other_text_are_refused(home, tmp_path):
    for rank in "01":
        shutil.copytree(home / "data", tmp_path / rank / "data")
    with open(tmp_path / "1/data/train.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps({"text": "One document more, on one machine only."}) + "\n")
    script = tmp_path / "apart.py"
    script.write_text(
        f"import os, runpy\nos.chdir(os.environ['RANK'])\nrunpy.run_path({str(ROOT / 'pretraining_advanced.py')!r}, run_name='__main__')\n"
    )
    line = [
        word if not word.endswith("pretraining_advanced.py") else str(script)
        for word in command_line("apart", 2)
    ]
    done = subprocess.run(
        line,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        env=environment(),
        check=False,
    )
    told = [row for row in done.stderr.splitlines() if row.startswith("error: ")]
    assert (
        done.returncode == 1
        and len(told) == 1
        and "rank 1 has other data" in told[0]
        and "--cache_dir" in told[0]
    ), done.stderr
    assert not (tmp_path / "0/runs/apart/run.json").exists()
