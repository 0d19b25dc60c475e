"""What a Job may be: checked before the first step, saved as it says, resumed to the bit."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import ranks
from safetensors.torch import load_file, save_file
from small_job import Model, Numbers, accuracy, bits, config_of, loss_fn, records, small_job

import pretraining_advanced
from parts.base.files import sha256_of
from parts.storage.checkpoint import list_checkpoints, newest_checkpoint, step_of
from parts.training.contract import check_job
from parts.training.optim import predicted_state_bytes
from parts.training.plan import wasted
from parts.training.run_settings import check_settings
from pretraining_advanced import RunConfig, run


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs go to a folder of their own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(name, *, stop_at=None, settings=None, **changes) -> int:
    """Run the small job; stop_at: the step in which SIGTERM arrives."""

    def stopping_loss(model, batch):
        if model.training and stopping_loss.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        stopping_loss.step += model.training
        return changes.get("loss_fn", loss_fn)(model, batch)

    stopping_loss.step = 1
    fields = {**changes, "loss_fn": stopping_loss} if stop_at else changes
    config = config_of(name, **(settings or {}))
    return run(config, lambda config, building: small_job(config, building, **fields))


# ------------------------------------------------------------------------------- the contract


def test_everything_a_job_lacks_is_listed_in_one_error(capsys):
    with pytest.raises(ValueError) as e:
        train("bad", family="", facts={"model_config": {"C": 8}}, tokens_per_row=0, loss_fn=None)
    line = str(e.value)
    assert "\n" not in line and line.startswith("this Job cannot be trained: ")
    for part in ("family", "facts['data']", "facts['tokenizer']", "tokens_per_row", "loss_fn"):
        assert part in line, part
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "GPT"}, "model: is str, not a torch.nn.Module"),
        ({"blocks": (torch.nn.GRU,)}, "blocks: the model has no module of class GRU"),
        ({"train_batches": [1]}, "train_batches: is list, not a RowBatches"),
        ({"tokens_per_row": 7}, "train_batches: has rows of 6 tokens"),
        ({"checkpoint_name": "last"}, "checkpoint_name: 'last'"),
        ({"checkpoint_name": "a/{step}"}, "checkpoint_name: 'a/{step}'"),
        ({"flops_per_token": None}, "flops_per_token: None"),
        ({"export": "here"}, "export: is neither None nor a function"),
        ({"files": {"a.json": "text"}}, "files: {file name: bytes}"),
    ],
)
def test_a_wrong_field_is_named(changes, said):
    with pytest.raises(ValueError, match="cannot be trained") as e:
        train("bad", **changes)
    assert said in str(e.value) and not Path("runs").exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda batch: {"inputs": batch["inputs"]}, "a batch has no tensor 'targets', only inputs"),
        (lambda batch: batch | {"mask": torch.ones(2, 2)}, "batch['mask'] has shape [2, 2]"),
        (lambda batch: batch | {"scale": torch.tensor(1.0)}, "batch['scale'] has shape []"),
        (lambda batch: batch | {"names": ["a"]}, "batch['names'] has shape list"),
    ],
)
def test_a_wrong_batch_is_refused_before_the_first_step(spoil, said):
    class Wrong(Numbers):
        def batch(self, first, n):
            return spoil(super().batch(first, n))

    with pytest.raises(ValueError, match="cannot be trained") as e:
        train("bad", train_batches=Wrong())
    assert said in str(e.value) and not Path("runs").exists()


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        train("bad", model=Model().requires_grad_(False))


def test_a_model_in_eval_mode_is_refused():
    with pytest.raises(ValueError, match=r"is in eval mode.*call model.train\(\)"):
        train("bad", model=Model().eval())


def test_the_gpts_own_job_fulfils_the_contract(texts):
    config = pretraining_advanced.TrainConfig(
        dataset_name=str(texts),
        tokenizer="bytes",
        model_size="nano",
        context_length=16,
        val_share=0.2,
    )
    job = pretraining_advanced.gpt_job(config, torch.device("cpu"))
    check_job(job, 4)


def test_an_engine_that_does_not_exist_is_one_line():
    with pytest.raises(ValueError, match="--parallel zero: there is no such engine; choose one"):
        train("bad", settings={"parallel": "zero"})
    assert not Path("runs").exists()


def test_a_batch_may_carry_any_tensor_of_rows():
    class More(Numbers):
        def batch(self, first, n):
            batch = super().batch(first, n)
            return batch | {"documents": torch.arange(n), "mask": torch.ones(n, 2, 3)}

    def loss(model, batch):
        assert not model.training or batch["mask"].shape[1:] == (2, 3)
        return loss_fn(model, batch)

    assert train("more", train_batches=More(123), loss_fn=loss) == 0
    assert train("plain") == 0
    assert bits("more") == bits("plain")


# ----------------------------------------------------------------------- checkpoints, resuming


def test_tied_weights_are_saved_once():
    assert train("tied") == 0
    names = set(load_file(newest_checkpoint("runs/tied") / "model.safetensors"))
    layers = {f"layers.{i}.linear.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert names == {"embedding.weight", *layers}


def adapters(config):
    """A frozen model with two trainable tensors, which alone are saved, under other names."""
    torch.manual_seed(config.seed)
    model = Model().requires_grad_(False)
    model.layers[1].linear.requires_grad_(True)

    def weights(model):
        return {f"adapter.{n}": p for n, p in model.layers[1].linear.named_parameters()}

    files = {"adapter_config.json": b"{}"}
    return {
        "model": model,
        "weights": weights,
        "weights_file": "adapter.safetensors",
        "files": files,
    }


def test_adapters_alone_are_saved_counted_and_resumed_to_the_bit(capsys):
    config = config_of("x")
    assert train("straight", **adapters(config)) == 0
    assert "disk: 866 bytes a checkpoint" in capsys.readouterr().out  # 72 numbers, two moments
    assert train("stopped", stop_at=5, **adapters(config)) == 75
    assert train("stopped", **adapters(config)) == 0
    assert bits("stopped") == bits("straight")
    folder = newest_checkpoint("runs/stopped")
    assert not (folder / "model.safetensors").exists()
    saved = load_file(folder / "adapter.safetensors")
    assert {name: list(t.shape) for name, t in saved.items()} == {
        "adapter.weight": [8, 8],
        "adapter.bias": [8],
    }
    model = adapters(config)["model"]
    assert predicted_state_bytes(model, (), "adamw") == 2 * 4 * 72


def change_checkpoint(folder, file, change) -> None:
    """Change the tensors of a file, with a manifest that fits."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
    manifest["files"][file] = {
        "bytes": (folder / file).stat().st_size,
        "sha256": sha256_of(folder / file),
    }
    (folder / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")


WRONG = {
    "missing weight": ("model", lambda t: t.pop("layers.0.linear.bias"), "lacks layers.0.linear"),
    "extra weight": ("model", lambda t: t.update(more=torch.ones(2)), "has more, which this run's"),
    "other shape": ("model", lambda t: t.update({"layers.0.linear.bias": torch.ones(3)}), "shape"),
    "missing moment": (
        "optimizer",
        lambda t: t.pop("layers.0.linear.bias|exp_avg"),
        "lacks layers.0.linear.bias|exp_avg",
    ),
    "extra moment": (
        "optimizer",
        lambda t: t.update({"x|exp_avg": torch.ones(2)}),
        "has x|exp_avg",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_with_a_missing_or_extra_tensor_is_refused_by_its_name(name):
    file, change, said = WRONG[name]
    assert train("a", settings={"max_steps": 3}) == 0
    folder = newest_checkpoint("runs/a")
    change_checkpoint(folder, f"{file}.safetensors", change)
    before = {p: p.read_bytes() for p in Path("runs/a").rglob("*") if p.is_file()}
    settings = {"max_steps": 6, "allow_change": "max_steps"}
    with pytest.raises(ValueError, match=f"{file}.safetensors: ") as e:
        train("a", settings=settings)
    assert said in str(e.value) and "\n" not in str(e.value)
    after = {p: p.read_bytes() for p in Path("runs/a").rglob("*") if p.is_file()}
    assert before == after, "nothing is touched"


def test_a_checkpoint_of_another_family_or_row_length_is_refused():
    assert train("a", settings={"max_steps": 3}) == 0
    allowed = {"max_steps": 6, "allow_change": "max_steps,batch_size"}
    with pytest.raises(ValueError, match="of the family 'numbers', this run trains 'letters'"):
        train("a", settings=allowed, family="letters")
    longer = {"train_batches": Numbers(length=12), "tokens_per_row": 12}
    with pytest.raises(ValueError, match="counts rows of 6 tokens, this run has rows of 12"):
        train("a", settings=allowed, **longer)
    assert train("a", settings=allowed) == 0


def test_a_checkpoint_of_an_earlier_version_is_resumed():
    """Its state knows a script in place of a family, and another data cursor."""
    assert train("straight") == 0
    assert train("old", stop_at=7) == 75
    path = newest_checkpoint("runs/old") / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    cursor = state.pop("data_cursor")
    state["data_cursor"] = {"windows": cursor["rows"], "left_out": cursor["skipped"]}
    for name in ("family", "weights_file", "optimizer_tensors", "guard", "evaluated_step"):
        del state[name]
    state["script"] = "pretraining_advanced.py"
    path.write_text(json.dumps(state), encoding="utf-8")
    manifest = json.loads((path.parent / "MANIFEST.json").read_text(encoding="utf-8"))
    entry = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest["files"][path.name] = entry
    (path.parent / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert train("old", family="gpt") == 0
    assert bits("old") == bits("straight")


def test_a_manifest_without_the_optimizers_file_is_damage():
    assert train("a", settings={"max_steps": 6}) == 0
    folder = newest_checkpoint("runs/a")
    manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
    del manifest["files"]["optimizer.safetensors"]
    (folder / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "optimizer.safetensors").unlink()
    assert newest_checkpoint("runs/a").name == "step_000003"


def test_checkpoints_may_have_a_name_of_the_jobs_own():
    changes = {"checkpoint_name": "ckpt-{step}-adapters"}
    assert train("straight", **changes) == 0
    assert train("named", stop_at=7, settings={"keep_last": 2}, **changes) == 75
    assert train("named", settings={"keep_last": 2}, **changes) == 0
    assert bits("named")[1] == bits("straight")[1]
    names = [folder.name for folder in list_checkpoints("runs/named")]
    assert names[-2:] == ["ckpt-9-adapters", "ckpt-12-adapters"] and len(names) <= 3
    assert step_of("runs/named/checkpoints/ckpt-9-adapters") == 9
    assert newest_checkpoint("runs/named").name == "ckpt-12-adapters"
    assert json.loads(Path("runs/named/run.json").read_text())["checkpoint_name"] in str(changes)


def test_what_is_printed_also_goes_to_the_text_log():
    assert train("logged", text_log="training.log") == 0
    text = Path("runs/logged/training.log").read_text(encoding="utf-8")
    assert "step 4: validation loss" in text and "finished at step 12" in text


# ------------------------------------------------------------------- export, metrics, patience


def test_the_last_and_the_best_checkpoint_are_exported_whole_or_not_at_all():
    def export(folder, target):
        target.mkdir()
        shutil.copy(folder / "model.safetensors", target / "weights.safetensors")

    assert train("exported", export=export) == 0
    last = newest_checkpoint("runs/exported") / "model.safetensors"
    written = Path("runs/exported/export/final/weights.safetensors").read_bytes()
    assert written == last.read_bytes() and Path("runs/exported/export/best").is_dir()

    def failing(folder, target):
        target.mkdir()
        raise OSError(28, "No space left on device", str(target))

    with pytest.raises(OSError, match="No space left"):
        train("full", export=failing)
    assert not Path("runs/full/export/final").exists()
    assert train("full", export=export) == 0, "the same command makes up for it"
    assert Path("runs/full/export/final").is_dir()
    assert not list(Path("runs/full/export").glob(".*.part"))


def test_metrics_are_summed_over_the_whole_validation_and_divided_once():
    assert train("scored", metrics=accuracy) == 0
    found = [r["val_accuracy"] for r in records("scored") if "val_loss" in r]
    assert len(found) == 4
    model = Model()
    model.load_state_dict(load_weights("scored"), strict=False)
    rows = [Numbers(2).batch(first, 4) for first in range(0, 20, 4)]
    correct = [(model(b["inputs"]).argmax(-1) == b["targets"]).float() for b in rows]
    assert found[-1] == pytest.approx(torch.cat(correct).mean().item())


def load_weights(name) -> dict:
    weights = load_file(newest_checkpoint(f"runs/{name}") / "model.safetensors")
    return weights | {"head.weight": weights["embedding.weight"]}


TWO = """
import sys
sys.path.insert(0, {tests!r})
from parts.cli.config import parse
from parts.cli.launch import run_script
from pretraining_advanced import run
from small_job import SmallConfig, accuracy, small_job
run_script(lambda: run(parse(SmallConfig), lambda *where: small_job(*where, metrics=accuracy)))
"""


def test_metrics_are_the_same_bits_on_any_number_of_ranks(here):
    script = here / "two.py"
    script.write_text(TWO.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    found = []
    for world in (1, 2, 3):  # five batches: not shared evenly
        name = f"world{world}"
        # no step changes the weights, so that all evaluations are of the same ones
        flags = ["--run_name", name, "--max_steps", "4", "--max_lr", "1e-30", "--device", "cpu"]
        flags += ["--batch_size", "1", "--grad_accum_steps", str(6 // world), "--dtype", "fp32"]
        results = ranks(script, *flags, world=world, cwd=here).wait(120)
        assert [r.returncode for r in results] == [0] * world, results[0].stderr[-2000:]
        first = records(name)[0]
        found.append((first["val_loss"], first["val_accuracy"]))
    assert found[0] == found[1] == found[2]


def test_patience_stops_a_killed_run_at_the_same_step(capsys):
    settings = {"max_steps": 60, "eval_freq": 2, "save_ckpt_freq": 5, "patience": 3, "max_lr": 1.0}
    assert train("straight", settings=settings) == 0
    last = records("straight")[-1]["step"]
    losses = [r["val_loss"] for r in records("straight") if "val_loss" in r]
    assert last < 60 and min(losses[-3:]) >= min(losses[:-3]), losses
    assert f"stopped early at step {last}: " in capsys.readouterr().out
    assert train("killed", settings={**settings, "max_steps": 60}, stop_at=None) == 0
    # as if killed between two evaluations: everything after the first checkpoint is lost
    for folder in list_checkpoints("runs/killed")[1:]:
        shutil.rmtree(folder)
    assert train("killed", settings=settings) == 0
    assert bits("killed") == bits("straight")
    capsys.readouterr()
    assert train("killed", settings=settings) == 0, "the same command again"
    out = capsys.readouterr().out
    assert f"stopped early at step {last}: " in out and "resumed from step" in out
    assert bits("killed") == bits("straight")
    assert train("killed", settings={**settings, "patience": None}) == 0, "more patience goes on"
    assert records("killed")[-1]["step"] == 60


def test_warmup_may_be_a_share_of_the_run():
    names = {"by_ratio": {"warmup_ratio": 0.25}, "by_steps": {"warmup_steps": 3}}
    for name, warmup in names.items():
        assert train(name, settings={"warmup_steps": None, **warmup}) == 0
    assert bits("by_ratio") == bits("by_steps")
    with pytest.raises(ValueError, match="--min_lr: 1 is above --max_lr 0.1; lower one of them"):
        check_settings(RunConfig(max_lr=0.1, min_lr=1.0))
    with pytest.raises(ValueError, match="--warmup_steps, --warmup_ratio: give one of them"):
        train("both", settings={"warmup_ratio": 0.1})


def test_a_recipes_own_optimizer_is_used_and_resumed():
    from parts.training.optim import Optimizer

    def momentum(model, config, device):
        optimizer = Optimizer(model, (), "adamw", 0.0, device)
        optimizer.parts = [torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)]
        return optimizer

    assert train("straight", make_optimizer=momentum) == 0
    assert train("stopped", stop_at=8, make_optimizer=momentum) == 75
    assert train("stopped", make_optimizer=momentum) == 0
    assert bits("stopped") == bits("straight")
    state = load_file(newest_checkpoint("runs/stopped") / "optimizer.safetensors")
    assert all(name.endswith("|momentum_buffer") for name in state)


def test_settings_without_effect_in_a_short_run_are_named():
    config = RunConfig(max_steps=50, warmup_steps=50, eval_freq=51, save_ckpt_freq=20)
    (line,) = wasted(config, 50)
    assert line.startswith("note: the run has 50 steps; --warmup_steps 50: --max_lr is never")
    assert "--eval_freq 51" in line and "--save_ckpt_freq" not in line
    assert wasted(RunConfig(warmup_steps=50), 5000) == []
    assert wasted(RunConfig(), None) == []
    assert wasted(RunConfig(schedule="constant", eval_freq=1, save_ckpt_freq=1), 5) == []
