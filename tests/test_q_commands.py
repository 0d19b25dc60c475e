"""recipes/q_lora/README.md: its commands, one after another, on real Q code and a tiny Qwen2."""

import json
import os
import re
import shlex
import subprocess

from conftest import ROOT, run, shared
from documents import commands
from q_cases import SCRIPT, write_model

from wt_load import load_gpt

README = (ROOT / "recipes/q_lora/README.md").read_text(encoding="utf-8")
MODEL = "Qwen2.5-7B-Instruct"
# what makes the documented trainings small
SMALL = (
    "--max_seq_length 128 --max_steps 12 --warmup_steps 2 --save_steps 6 --eval_freq 6 "
    "--learning_rate 2e-2 --eval_tokens 4000 --device cpu --print_sample_iter 12"
)
FOLDERS = {  # flags of a training -> its folder in output/
    "": MODEL,
    "--training_method lora": MODEL,
    "--training_method qlora": f"{MODEL}-qlora-raw",
    "--training_method full": f"{MODEL}-full-raw",
    "--data_type raw": MODEL,
    "--data_type filtered": f"{MODEL}-lora-filtered",
    "--data_type described_filtered": f"{MODEL}-lora-described_filtered",
    "--wandb --wandb_project q-pretraining --experiment_name tracked": "tracked",
    "--config recipes/q_lora/config.yaml --max_steps 200": MODEL,
    f"--model_name Qwen/{MODEL}": MODEL,
    "--model_name tiny --max_seq_length 256 --max_steps 20": "tiny",
}


def check_training(out, printed: str, n_steps: int) -> None:
    """The tree of a run is complete, and it has learned."""
    names = {p.relative_to(out).as_posix() for p in out.rglob("*")}
    expected = ("config.yaml", "logs/training_log.txt", "logs/eval_results.json")
    expected += ("results/loss.png", "results/samples.txt", f"checkpoints/checkpoint-{n_steps}")
    assert names.issuperset(expected)
    evaluations = json.loads((out / "logs/eval_results.json").read_text(encoding="utf-8"))
    first, last = evaluations[0], evaluations[-1]
    assert (first["step"], last["step"]) == (0, n_steps)
    assert last["val_perplexity"] < 0.9 * first["val_perplexity"]  # of held-out repositories
    metrics = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [loss for row in metrics if (loss := json.loads(row).get("train_loss"))]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_commands_of_the_document_run_one_after_another_and_learn(tmp_path):
    write_model(tmp_path / "Qwen" / MODEL, block_size=2048)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    trained = []
    for command, needs in commands(README):
        words = shlex.split(command.replace("YOUR_CODE", str(shared("data/q_code/q_files.jsonl"))))
        if needs or words[0] in ("pip", "torchrun"):
            continue  # .ci/run installs; torchrun: tests/test_q_distributed.py
        flags = command.partition(f"{SCRIPT} ")[2]
        trains = words[1] == SCRIPT and "--plan" not in words
        if trains:
            words += shlex.split(SMALL)
        if words[0] == "bash":
            result = subprocess.run(
                words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
            )
        else:
            result = run(*words[1:], cwd=tmp_path, env=env, timeout=300)
        assert result.returncode == 0, f"{command}: {result.stderr[-2000:]}"
        if trains:
            check_training(tmp_path / "output" / FOLDERS[flags], result.stdout, 12)
            finished = "already finished at step 12" in result.stdout
            assert finished == (FOLDERS[flags] in trained)
            trained.append(FOLDERS[flags])
            said = re.search(r"has a run of \w+ on \w+; this one takes (\S+)", result.stdout)
            assert bool(said) == ("-raw" in trained[-1] or "filtered" in trained[-1])
            assert said is None or said[1] == f"output/{trained[-1]}"
    assert set(trained) == set(FOLDERS.values())
    assert load_gpt(str(tmp_path / "merged")).config.n_layer == 2


def test_the_sweep_prints_a_command_for_each_method_on_each_kind_of_data(tmp_path):
    command = ["bash", str(ROOT / "recipes/q_lora/pretrain_exps.sh"), "--dry_run", "--seed", "7"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == len(set(lines)) == 9 and all("--seed 7" in line for line in lines)
    assert not any(tmp_path.iterdir())
