"""recipes/orchestrator, whole runs: Hugging Face folders in and out, kills, ranks, its README."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TORCHRUN, one_error_line, ranks, run
from documents import blocks, commands
from test_full_disk import LIMITED
from training_cases import metrics, ranks_of, state_of, the_same_to_the_bit

from parts.data.tokenizers import byte_tokenizer
from recipes.orchestrator.config_loader import load_config
from wt_load import load_gpt

SCRIPT = "recipes/orchestrator/orchestrator.py"
README = (ROOT / "recipes/orchestrator/README.md").read_text(encoding="utf-8")
SMALL = """\
model:
  type: llama
  hidden_size: 32
  intermediate_size: 64
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  max_position_embeddings: 64
training:
  batch_size: 4
  learning_rate: 3e-3
  warmup_steps: 2
  max_steps: 20
  eval_steps: 10
  sample_steps: 100
  save_steps: 5
  keep_checkpoints: 9
  dtype: fp32
  device: cpu
  export: false
data: {dataset: texts, tokenizer: bytes, sequence_length: 32, val_share: 0.05}
distributed: {strategy: none}
"""
FSDP = (
    *("distributed.strategy=fsdp", "distributed.fsdp_config.activation_checkpointing=false"),
    "distributed.fsdp_config.mixed_precision=false",
)


@pytest.fixture
def home(tmp_path, texts):
    """A folder with small.yaml and its texts."""
    (tmp_path / "small.yaml").write_text(SMALL, encoding="utf-8")
    (tmp_path / "texts").symlink_to(texts)
    return tmp_path


def train(home, *words, world=1, file="small.yaml") -> str:
    """A run that has to succeed, on `world` processes; returns what rank 0 printed."""
    results = ranks(SCRIPT, "--config", file, *words, world=world, cwd=home).wait(240)
    for result in results:
        assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return results[0].stdout


# ----------------------------------------------------------------------------- Hugging Face folders


def logits_of(folder, ids) -> torch.Tensor:
    """The logits of transformers' class for the folder."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(ids).logits


def difference(folder, checkpoint) -> float:
    """The largest difference between transformers' logits of a folder and ours of a checkpoint."""
    ids = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (logits_of(folder, ids) - load_gpt(str(checkpoint))(ids)).abs().max().item()


@pytest.mark.parametrize("strategy", ["none", "fsdp"])
def test_a_tiny_llama_of_100_steps_opens_in_transformers(home, strategy):
    words = ["training.max_steps=100", "training.export=true", "training.save_steps=50"]
    world = 1
    if strategy == "fsdp":
        words += [*FSDP, "training.max_steps=20"]
        world = 2
    printed = train(home, *words, world=world)
    stages = ("fp32", "parameters: ", "rows in an epoch", "step 0: ", "step 10: ", "exported")
    places = [printed.index(stage) for stage in stages]
    assert places == sorted(places)  # configuration, model, data, loop with validation, folder
    run_dir = home / "runs/small"
    last = sorted((run_dir / "checkpoints").iterdir())[-1]
    assert difference(run_dir / "export/final", last) <= 1e-5
    assert difference(last, last) <= 1e-5  # a checkpoint of a Llama is such a folder, too
    losses = metrics(run_dir)
    assert losses[-1] < losses[0] - 0.5
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(run_dir / "export/final")
    assert tokenizer("the sea").input_ids == byte_tokenizer().encode("the sea").tolist()


def foreign(kind: str, folder) -> None:
    """A small random model of transformers, with a tokenizer and a chat template beside it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    sizes = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4,
            bos_token_id=256, eos_token_id=256,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    else:
        config = transformers.Qwen2Config(**sizes, tie_word_embeddings=True)
        model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():  # biases that are zero would prove nothing
            if name.endswith("bias"):
                p.normal_(std=0.1)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(byte_tokenizer().to_json())
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_model_of_transformers_is_trained_further_and_comes_back(home, kind):
    folder = home / "base"
    foreign(kind, folder)
    text = re.sub(r"(?s)^model:.*?(?=training:)", "model: {from: base}\n", SMALL)
    text = text.replace("tokenizer: bytes, ", "")
    (home / "more.yaml").write_text(text, encoding="utf-8")
    words = ["training.export=true", "training.max_steps=4", "training.eval_steps=4"]
    train(home, *words, "training.learning_rate=1e-30", "training.weight_decay=0", file="more.yaml")
    run_dir = home / "runs/more"
    ids = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
    untouched = (logits_of(run_dir / "export/final", ids) - logits_of(folder, ids)).abs().max()
    assert untouched <= 1e-5  # in and out again
    train(home, *words, "training.run_name=real", file="more.yaml")
    real = home / "runs/real"
    last = sorted((real / "checkpoints").iterdir())[-1]
    assert difference(real / "export/final", last) <= 1e-5
    assert difference(real / "export/final", folder) > 1e-2
    chat = real / "export/final/chat_template.jinja"
    assert chat.read_text(encoding="utf-8") == "{{ messages }}"
    # the settings of the file are compared with the folder
    with pytest.raises(ValueError, match=r"model.hidden_size: 64 contradicts 32 of base"):
        os.chdir(home)
        load_config("more.yaml", ["model.hidden_size=64"])
    # the run is of this base only
    shutil.rmtree(folder)
    torch.manual_seed(4)
    foreign("llama" if kind == "gpt2" else kind, folder)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n: t + 1 for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    line = one_error_line(run(SCRIPT, "--config", "more.yaml", *words, cwd=home), 2)
    assert ("is of another base" in line) if kind != "gpt2" else "family 'gpt'" in line


# ----------------------------------------------------------------------------- ranks and strategies


def test_every_strategy_and_accumulation_gives_the_losses_of_one_process(home):
    straight = train(home) and metrics(home / "runs/small")
    norms = metrics(home / "runs/small", "grad_norm")
    others = {
        "accum": (1, "training.batch_size=1", "training.gradient_accumulation_steps=4"),
        "ddp": (2, "distributed.strategy=ddp", "training.batch_size=2"),
        "fsdp": (2, *FSDP, "training.batch_size=1", "training.gradient_accumulation_steps=2"),
    }
    hybrid = "distributed.fsdp_config.sharding_strategy=HYBRID_SHARD"
    others["hybrid"] = (4, *FSDP, hybrid, "training.batch_size=1")
    block = "{train_batch_size: 4, gradient_clipping: 1.0, zero_optimization: {stage: 2}}"
    zero = ("distributed.strategy=deepspeed", f"distributed.deepspeed_config={block}")
    others["zero"] = (2, *zero, "training.batch_size=2")
    for name, (world, *words) in others.items():
        train(home, *words, f"training.run_name={name}", world=world)
        assert metrics(home / f"runs/{name}") == pytest.approx(straight, rel=1e-5), name
        found = metrics(home / f"runs/{name}", "grad_norm")
        assert found == pytest.approx(norms, rel=1e-5), name


def test_a_run_goes_from_strategy_to_strategy_and_from_ranks_to_ranks(home):
    train(home)
    legs = (
        (5, 2, (*FSDP, "training.batch_size=2")),
        (10, 2, ("distributed.strategy=ddp", "training.batch_size=2")),
        (15, 1, ()),
        (20, 2, (*FSDP, "training.batch_size=2")),
    )
    for stop, world, words in legs:
        words += ("training.run_name=legs", f"training.max_steps={stop}")
        words += ("training.allow_change=max_steps", "training.lr_scheduler=constant")
        train(home, *words, world=world)
    train(home, "training.run_name=constant", "training.lr_scheduler=constant")
    straight = metrics(home / "runs/constant")
    assert metrics(home / "runs/legs") == pytest.approx(straight, rel=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_is_killed_ends_with_the_same_bits(home, world):
    words = () if world == 1 else (*FSDP, "training.batch_size=2")
    train(home, *words, world=world)
    words += ("training.run_name=killed",)
    for step in (7, 13):
        group = ranks(
            *(SCRIPT, "--config", "small.yaml", *words, "training.log_exact=true"),
            **{"world": world, "cwd": home},
        )
        ends = time.monotonic() + 120
        while f"step {step} loss" not in group.out[0].read_text(encoding="utf-8"):
            assert time.monotonic() < ends, group.err[0].read_text(encoding="utf-8")
            time.sleep(0.005)
        group.kill()
        group.wait(60)
    assert "resumed from step" in train(home, *words, world=world)
    assert state_of(home / "runs/killed") == state_of(home / "runs/small")
    assert the_same_to_the_bit(home / "runs/killed", home / "runs/small")


def test_one_rank_that_is_killed_ends_the_run_within_a_minute_and_nothing_is_lost(home):
    words = [*FSDP, "training.batch_size=2", "training.max_steps=5000", "training.log_exact=true"]
    line = [*TORCHRUN, "2", ROOT / SCRIPT, "--config", "small.yaml", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    with subprocess.Popen(line, cwd=home, **options) as process:
        assert any("step 8 loss" in text for text in process.stdout)
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        started = time.monotonic()
        process.communicate(timeout=60)
        assert process.returncode == 1 and time.monotonic() - started < 60
    words[2:] = ["training.batch_size=2", "training.max_steps=10"]
    words += ["training.allow_change=max_steps,min_lr"]
    assert "resumed from step" in train(home, *FSDP, *words[2:], world=2)


def test_a_rank_with_another_file_is_one_line_and_nobody_waits(home):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    processes = []
    for rank, words in enumerate(([], ["training.learning_rate=1e-2"])):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, ROOT / SCRIPT, "--config", "small.yaml"]
        command += ["distributed.strategy=ddp", "training.batch_size=2", *words]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=home, env=env, **options))
    results = [(p.communicate(timeout=60), p.returncode) for p in processes]
    assert time.monotonic() - started < 60
    errors = [line for (_, err), _ in results for line in err.splitlines() if "error:" in line]
    assert [code for _, code in results] == [2, 2] and len(errors) == 1, errors
    assert "rank 1 has other settings than rank 0; start all ranks with the same file" in errors[0]
    assert not (home / "runs").exists()


def test_a_disk_that_refuses_is_one_line_nothing_is_lost_and_the_same_command_resumes(home):
    words = ["--config", "small.yaml", "training.save_retry_minutes=0", "training.export=true"]
    train(home, *words[2:], "training.max_steps=10", "training.allow_change=max_steps")
    before = state_of(home / "runs/small")
    words += ["training.allow_change=max_steps,min_lr,warmup_steps"]
    limited = [sys.executable, "-c", LIMITED, "40000", ROOT / SCRIPT, *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    options = {"capture_output": True, "text": True, "check": False, "timeout": 120}
    result = subprocess.run(limited, cwd=home, env=env, **options)
    line = one_error_line(result, 1)
    assert "the last step could not be saved" in line
    assert "is not saved" in result.stdout and state_of(home / "runs/small") == before
    assert "resumed from step 10" in train(home, *words[2:])
    assert (home / "runs/small/export/final/model.safetensors").exists()


# ---------------------------------------------------------------------------------- what is written


def cpu_s(*command) -> float:
    """CPU seconds of a process that has to succeed; the least of three."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], check=True, capture_output=True, env=env)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(found)


def test_help_validate_and_import_cost_little_above_torch():
    torch_s = cpu_s("-c", "import torch")
    script = str(ROOT / SCRIPT)
    config = str(ROOT / "recipes/orchestrator/configs/llama_7b.yaml")
    elsewhere = ("--ranks", "8", "--memory_gb", "80")
    figures = {
        "import": cpu_s("-c", "import recipes.orchestrator"),
        "names": cpu_s("-c", "from recipes.orchestrator import load_config, SpeedMonitor"),
        "--help": cpu_s(script, "--help"),
        "--validate": cpu_s(script, "--config", config, "--validate", *elsewhere),
    }
    print({name: round(s - torch_s, 2) for name, s in figures.items()})
    assert all(s - torch_s <= 1.5 for s in figures.values()), (torch_s, figures)


def shell(line: str, folder) -> subprocess.CompletedProcess:
    """A line of the README as a reader would type it, in a folder with the recipes."""
    env = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip


COMMANDS = [line for line, _ in commands(README)]


def test_the_readme_has_these_commands():
    assert len(COMMANDS) == 4 and all(SCRIPT in line for line in COMMANDS)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_readmes_commands_run(line, tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    if "--validate" not in line:
        line += " training.max_steps=6 training.eval_steps=6"
    # a port of its own: tests beside this one run torchrun, too
    result = shell(line.replace("torchrun ", "torchrun --standalone "), tmp_path)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr[-3000:]


@pytest.mark.parametrize("number", [0, 1])
def test_the_readmes_python_runs(number, tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    block = blocks(README, "python")[number].replace("max_steps=20", "max_steps=3")
    (tmp_path / "block.py").write_text(block, encoding="utf-8")
    result = shell("python block.py", tmp_path)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr[-3000:]
    if number == 1:
        assert float(result.stdout.splitlines()[-1]) > 0


def test_the_batch_file_starts_two_nodes_that_meet(home):
    """With stand-ins for SLURM's commands: two torchruns with one process each."""
    (home / "bin").mkdir()
    stand_ins = {
        "scontrol": "echo localhost\necho localhost",
        "srun": '"$@" & first=$!\n"$@" || exit 1\nwait $first',
    }
    for name, body in stand_ins.items():
        (home / f"bin/{name}").write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (home / f"bin/{name}").chmod(0o755)
    (home / "recipes").symlink_to(ROOT / "recipes")
    slurm = "SLURM_JOB_ID=%d SLURM_JOB_NODELIST=n[1-2] SLURM_NNODES=2 SLURM_GPUS_ON_NODE=1 "
    slurm = slurm % (os.getpid() % 20000) + "SLURM_CPUS_PER_TASK=1 PATH=bin:$PATH "
    words = "small.yaml distributed.strategy=ddp training.batch_size=2 training.max_steps=4"
    result = shell(f"{slurm} bash recipes/orchestrator/two_nodes.sbatch {words}", home)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 processes" in result.stdout and "finished at step 4" in result.stdout
    saved = json.loads((home / "runs/small/run.json").read_text(encoding="utf-8"))
    assert saved["processes"] == 2 and saved["config"]["max_minutes"] == 1410
