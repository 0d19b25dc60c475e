"""recipes/orchestrator: one YAML file to a run; all problems of a file at once; speed; the cost."""

import dataclasses
import json
import re
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import ROOT, run

from parts.model.families import FAMILIES, shell
from parts.training.metrics import peak_flops
from parts.training.plan import count_parameters
from recipes.orchestrator import PretrainingOrchestrator, SpeedMonitor, load_config, orchestrator
from recipes.orchestrator.config_loader import (
    CONFIGS,
    PATH_OF,
    ConfigError,
    OrchestratorConfig,
    resolved_yaml,
)
from recipes.orchestrator.model_sizes import SIZES, shape_of

SCRIPT = "recipes/orchestrator/orchestrator.py"
GOOD = """\
model: {type: llama, size: tiny}
training: {batch_size: 4, learning_rate: 3e-3, max_steps: 4, warmup_steps: 1}
data: {dataset: texts, tokenizer: bytes, sequence_length: 32}
distributed: {strategy: none}
"""
SEVEN_B = """\
model:
  {type: llama, size: 7B, vocab_size: 32000, hidden_size: 4096, intermediate_size: 11008,
   num_hidden_layers: 32, num_attention_heads: 32, max_position_embeddings: 2048,
   rms_norm_eps: 1e-6}
training:
  {batch_size: 4, gradient_accumulation_steps: 8, learning_rate: 3e-4, warmup_steps: 2000,
   max_steps: 100000, lr_scheduler: cosine, weight_decay: 0.1, clip_grad_norm: 1.0}
data: {dataset: texts, tokenizer: bytes}
distributed:
  {strategy: fsdp, fsdp_config: {sharding_strategy: FULL_SHARD, mixed_precision: true,
   activation_checkpointing: true}}
"""


@pytest.fixture
def file_of(tmp_path):
    """text -> path of a file with it."""

    def write(text, name="a.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def problems_of(path, *overrides, **options) -> list[str]:
    """What load_config reports of a file, without the file's name."""
    with pytest.raises(ConfigError) as e:
        load_config(path, overrides, **options)
    return [line.removeprefix(f"{path}: ") for line in e.value.problems]


# --------------------------------------------------------------------------------- reading a file


def test_every_key_reaches_its_setting_and_the_resolved_file_is_the_same_run(file_of):
    config = load_config(file_of(SEVEN_B), ["training.learning_rate=1e-4", "training.seed=7"])
    assert (config.max_lr, config.seed, config.warmup_steps) == (1e-4, 7, 2000)
    assert (config.grad_accum_steps, config.max_grad_norm, config.schedule) == (8, 1.0, "cosine")
    assert (config.n_embd, config.n_hidden, config.n_layer) == (4096, 11008, 32)
    assert (config.run_name, config.tokenizer) == ("a", "bytes")
    again = load_config(file_of(resolved_yaml(config), "b.yaml"))
    assert dataclasses.asdict(again) | {"config": config.config} == dataclasses.asdict(config)


def test_a_key_that_is_null_is_not_given(file_of):
    config = load_config(file_of(GOOD), ["model.size=null", "model.from=null"] + [
        f"model.{name}={n}" for name, n in {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 64,
        }.items()
    ])  # fmt: skip
    assert config.model_size is None and shape_of(config, 300).head_dim == 16


@pytest.mark.parametrize(
    ("alias", "name"),
    [("fixed", "constant"), ("constant", "constant"), ("wsd", "wsd"), ("linear", "linear"),
     ("cosine_with_restarts", "cosine_with_restarts")],
)  # fmt: skip
def test_schedulers_have_names(file_of, alias, name):
    path = file_of(GOOD)
    words = [f"training.lr_scheduler={alias}", "training.lr_cycles=3"]
    config = load_config(path, words)
    assert (config.schedule, config.lr_cycles) == (name, 3)


def test_all_problems_of_a_file_are_reported_at_once_each_with_path_value_and_nearest_name(file_of):
    text = """\
modle: {}
model: {type: llama, size: 7B, hidden_size: 4095, num_attention_heads: 31}
training: {batch_size: many, max_lr: 1, eval_step: 4, warmup_steps: 1, warmup_ratio: 0.1,
  lr_scheduler: cosin, tokenizer: gpt2, weight_decay: -1}
distributed: {strategy: ddp, ddp_config: {backend: ncl, find_unused: true}, fsdp_config: {x: 1}}
"""
    found = problems_of(file_of(text), "training.x", "distributed.strategy.x=1")
    expected = [
        "command line: 'training.x' is no override; write such as training.learning_rate=1e-4",
        "command line: distributed.strategy.x: distributed.strategy is 'ddp', which has no keys",
        "modle: no such section; did you mean model?",
        "training.batch_size: 'many' is not of type int",
        "training.max_lr: 1: no such setting; did you mean training.learning_rate?",
        "training.eval_step: 4: no such setting; did you mean training.eval_steps?",
        "training.lr_scheduler: 'cosin' is not one of 'cosine', ",
        "training.tokenizer: 'gpt2': no such setting; did you mean data.tokenizer?",
        "data: is missing; give a section with dataset, ",
        "distributed.ddp_config.backend: 'ncl' is not one of 'nccl', 'gloo'; did you mean nccl?",
        "distributed.ddp_config.find_unused: True: no such setting; did you mean find_unused_par",
        "distributed.fsdp_config.x: 1: no such setting; there are sharding_strategy, ",
        "training.weight_decay: -1.0 is out of range; give a positive number",
        "training.warmup_steps, training.warmup_ratio: give one of them",
        "model.hidden_size: 4095 contradicts model.size 7B, which has 4096; change one of them",
        "model.num_attention_heads: 31 contradicts model.size 7B, which has 32",
        "model.num_attention_heads: 31 heads do not divide model.hidden_size 4095",
    ]
    for start in expected:
        assert any(line.startswith(start) for line in found), (start, found)
    assert any(line.endswith("did you mean cosine?") for line in found)


BAD = {
    "an unknown strategy": (["distributed.strategy=zero"], "distributed.strategy: 'zero' is not"),
    "an unknown sharding strategy": (
        ["distributed.strategy=fsdp", "distributed.fsdp_config.sharding_strategy=FULL_SHRAD"],
        "distributed.fsdp_config.sharding_strategy: 'FULL_SHRAD' is not one of FULL_SHARD",
    ),
    "an unknown policy": (
        [
            "distributed.strategy=fsdp",
            "distributed.fsdp_config.activation_checkpointing_policy=x",
        ],
        "distributed.fsdp_config.activation_checkpointing_policy: 'x' is not one of",
    ),
    "rows that do not add up": (
        ["training.global_batch_size=12", "training.gradient_accumulation_steps=2"],
        "training.global_batch_size: 12, but 4 rows x 2 micro-batches x 1 ranks = 8; give "
        "training.gradient_accumulation_steps 3",
    ),
    "none for several ranks": (
        [],
        "distributed.strategy: 'none' is for one process, this run has 2 ranks; give ddp or fsdp",
    ),
    "DeepSpeed's rows": (
        [
            "distributed.strategy=deepspeed",
            "distributed.deepspeed_config={train_batch_size: 7, scheduler: {type: WarmupLR}}",
        ],
        "distributed.deepspeed_config.train_batch_size: 7, but the run has 4 rows",
    ),
    "DeepSpeed's keys": (
        [
            "distributed.strategy=deepspeed",
            "distributed.deepspeed_config={train_batch_size: 7, scheduler: {type: WarmupLR}}",
        ],
        "distributed.deepspeed_config.scheduler: the schedule is the trainer's",
    ),
    "no DeepSpeed configuration": (
        ["distributed.strategy=deepspeed"],
        "distributed.deepspeed_config: is missing",
    ),
    "no such DeepSpeed file": (
        ["distributed.strategy=deepspeed", "distributed.deepspeed_config=nowhere.json"],
        "distributed.deepspeed_config: nowhere.json: there is no such",
    ),
    "a block of another strategy": (
        ["distributed.strategy=ddp", "distributed.fsdp_config.cpu_offload=true"],
        "distributed.fsdp_config: belongs to strategy fsdp, this is ddp",
    ),
    "heads that do not divide": (
        ["model.size=null", "model.hidden_size=64", "model.num_attention_heads=5"],
        "model.num_attention_heads: 5 heads do not divide model.hidden_size 64",
    ),
    "keys that do not divide": (
        ["model.size=null", "model.num_attention_heads=4", "model.num_key_value_heads=3"],
        "model.num_key_value_heads: 3 does not divide model.num_attention_heads 4",
    ),
    "a number that is not positive": (
        ["model.size=null", "model.num_attention_heads=0"],
        "model.num_attention_heads: 0 is out of range; give a positive number",
    ),
    "dimensions that are missing": (
        ["model.size=null", "model.hidden_size=64"],
        "model.intermediate_size: is missing (model.intermediate_size, model.num_hidden_layers, ",
    ),
    "a size of another family": (["model.size=124M"], "model.size: '124M' is no size of llama"),
    "a part that GPT-2 does not have": (
        ["model.type=gpt2", "model.size=124M", "model.rms_norm_eps=1e-6"],
        "model.rms_norm_eps: 1e-06: gpt2 has none; leave it out",
    ),
    "dropout of a Llama": (["model.dropout=0.1"], "model.dropout: 0.1: a llama has none"),
    "a row that is too long": (
        ["data.sequence_length=129"],
        "data.sequence_length: 129 is more than the 128 of model.max_position_embeddings",
    ),
    "nccl without a GPU": (
        ["distributed.strategy=ddp", "distributed.ddp_config.backend=nccl", "training.device=cpu"],
        "distributed.ddp_config.backend: 'nccl' needs GPUs, and this run has none",
    ),
    "another precision": (
        [
            "distributed.strategy=fsdp",
            "distributed.fsdp_config.mixed_precision=false",
            "training.dtype=bf16",
        ],
        "training.dtype: 'bf16' contradicts 'fp32' of distributed; give one of them",
    ),
    "a base that is not there": (
        ["model={from: ./nowhere}"],
        "model.from: './nowhere' does not exist",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_contradicts_itself_is_refused(name, file_of):
    overrides, start = BAD[name]
    if name == "a base that is not there":
        found = problems_of(file_of(GOOD.replace("type: llama, size: tiny", "from: ./nowhere")))
    else:
        world = 2 if name == "none for several ranks" else 1
        found = problems_of(file_of(GOOD), *overrides, world=world)
    assert any(line.removeprefix("command line: ").startswith(start) for line in found), found


def test_a_size_of_another_name_must_have_about_that_many_parameters(file_of):
    dims = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 2048, "vocab_size": 32000,
    }  # fmt: skip
    words = [f"model.{name}={n}" for name, n in dims.items()]
    config = load_config(file_of(GOOD), ["model.size=6.7B", *words])
    assert count_parameters(shape_of(config, 1)) == 6_738_415_616
    (found,) = problems_of(file_of(GOOD), "model.size=3B", *words)
    assert "model.size: '3B' contradicts the dimensions, which have 6,738,415,616" in found


def test_hostile_yaml_is_refused(file_of):
    (line,) = problems_of(file_of(GOOD + "a: !!python/object/apply:os.system [ls]\n"))
    assert "not readable as YAML" in line and "python/object" in line
    bomb = "".join(
        f"{n}: &{n} [{', '.join([f'*{before}' if before else 'x'] * 9)}]\n"
        for before, n in zip(["", *"abcdefg"], "abcdefgh", strict=True)
    )
    started = time.monotonic()
    (line,) = problems_of(file_of(bomb + GOOD))
    assert "the alias *a; write it out" in line and time.monotonic() - started < 5
    (line,) = problems_of(file_of(GOOD + "model: {}\n"))
    assert "line 5: model is given twice" in line
    (line,) = problems_of(file_of("- a\n- b\n"))
    assert "holds list, not a mapping" in line
    assert len(problems_of(file_of(""))) == 4  # the sections


def test_a_file_that_does_not_exist_names_the_nearest(file_of):
    file_of(GOOD, "llama_small.yaml")
    with pytest.raises(FileNotFoundError, match=r"continual_llama_3.1_8b.yaml"):
        load_config("config/experiments/continual_llama_3.1_7b.yaml")
    with pytest.raises(FileNotFoundError, match=r"nearest are \S*llama_small.yaml"):
        load_config(file_of(GOOD).with_name("lama_small.yaml"))
    with pytest.raises(FileNotFoundError, match=r"is a folder; give one of its files: .*7b"):
        load_config(CONFIGS)


def test_without_torchrun_a_strategy_for_several_ranks_runs_as_none(file_of, monkeypatch):
    from recipes.orchestrator.config_loader import strategy_settings

    monkeypatch.delenv("RANK", raising=False)
    config = load_config(file_of(SEVEN_B))
    settings, notes, _ = strategy_settings(config, 1)
    assert config.parallel == "none" and config.activation_checkpointing and config.reshard
    assert notes[0] == "one process: strategy fsdp runs as none; torchrun starts several"
    config = load_config(file_of(SEVEN_B), world=8)
    assert (config.parallel, config.replicate, config.reshard) == ("fsdp", 1, True)


def test_messages_of_the_core_name_the_keys_of_the_file():
    from recipes.orchestrator.config_loader import in_words_of_the_file

    text = "resume with --batch_size 4 --grad_accum_steps 8; or --parallel ddp, --nproc_per_node 2"
    assert in_words_of_the_file(text) == (
        "resume with training.batch_size=4 training.gradient_accumulation_steps=8; "
        "or distributed.strategy ddp, --nproc_per_node 2"
    )


# --------------------------------------------------------------------------------------- the model


PARAMETERS = {
    ("llama", "7B"): 6_738_415_616,
    ("llama", "13B"): 13_015_864_320,
    ("llama", "8B"): 8_030_261_248,
    ("llama", "70B"): 70_553_706_496,
    ("llama", "1B"): 1_235_814_400,
    ("qwen2", "0.5B"): 494_032_768,
    ("qwen2", "1.5B"): 1_543_714_304,
    ("qwen2", "7B"): 7_615_616_512,
    ("gpt2", "124M"): 124_439_808,
}


@pytest.mark.parametrize(("kind", "size"), PARAMETERS)
def test_named_sizes_have_the_published_number_of_parameters(kind, size):
    shape = shape_of(OrchestratorConfig(model_type=kind, model_size=size), 50257)
    assert count_parameters(shape) == PARAMETERS[kind, size]
    if size in ("7B", "124M"):
        model = shell(shape)
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[kind, size]
        assert type(model) is FAMILIES[shape.family].model


def test_every_size_has_heads_that_divide():
    for kind, sizes in SIZES.items():
        for size in sizes:
            shape = shape_of(OrchestratorConfig(model_type=kind, model_size=size), 300)
            assert shape.n_embd % shape.n_head == 0


# ---------------------------------------------------------------------------------------- validate


def test_the_7b_of_the_document_is_validated_without_its_memory(file_of, texts, monkeypatch):
    import resource

    path = file_of(SEVEN_B)
    (path.parent / "texts").symlink_to(texts)
    monkeypatch.chdir(path.parent)
    config = load_config(path, world=8, elsewhere=True)
    settings = dataclasses.asdict(config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = PretrainingOrchestrator(config).validate(ranks=8, memory_gb=80)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB; 27 GB fp32
    text = "\n".join(lines)
    assert "parameters: 6,738,415,616 (" in text
    assert re.search(r"memory per rank, computed: at most [\d.]+ GB at one time, fits the 80", text)
    assert re.search(r"step: 4 x 8 x 8 = 256 rows \(batch_size x .*\), 524,288 tokens", text)
    assert "run: 100,000 steps, 52,428,800,000 tokens" in text
    assert "disk: 80.9 GB a checkpoint" in text
    assert "data: texts, 3 files, " in text and "not tokenised yet" in text
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.yaml", "texts"]
    assert dataclasses.asdict(config) == settings
    with pytest.raises(ConfigError, match="at most .* does NOT fit the 8 GB of each GPU"):
        PretrainingOrchestrator(config).validate(ranks=8, memory_gb=8)


def test_validate_reports_data_that_is_missing_and_a_tokenizer_that_is_too_large(file_of, texts):
    config = load_config(file_of(GOOD), ["model.vocab_size=100", "data.text_field=x"])
    config.dataset_name = str(texts / "nothing.txt")
    with pytest.raises(ConfigError) as e:
        PretrainingOrchestrator(config).validate()
    (line,) = e.value.problems
    assert "data.tokenizer: bytes has 257 ids, the model a vocabulary of 100" in line
    config = load_config(file_of(GOOD), ["data.tokenizer=nothing.json"])
    with pytest.raises(ConfigError, match=r"data.tokenizer: nothing.json does not exist"):
        PretrainingOrchestrator(config).validate()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_opens_with_its_command_and_its_computed_memory(path):
    text = path.read_text(encoding="utf-8")
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    relative = path.relative_to(ROOT)
    assert f"{SCRIPT} --config {relative}" in head
    assert "not yet measured" in head or re.search(r"20\d\d-\d\d-\d\d", head)
    overrides = re.search(r"--validate --ranks 8 --memory_gb 80(.*)", head)[1].split()
    stated = re.search(r"at most ([\d.]+ [GM]B)", head)[1]
    assert "computed" in head
    config = load_config(path, overrides, world=8, elsewhere=True)
    lines = PretrainingOrchestrator(config).validate(ranks=8, memory_gb=80)
    assert any(f"at most {stated} at one time, fits" in line for line in lines), lines


# ------------------------------------------------------------------------------------------- speed


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_speed_monitor_is_exact_over_its_window():
    clock = Clock()
    monitor = SpeedMonitor(window_size=3, time_unit="hours", clock=clock)
    assert monitor.compute()["samples_per_second"] is None
    for seconds, samples in ((2.0, 100), (1.0, 8), (2.0, 8), (1.0, 16)):
        clock.now += seconds
        monitor.update(samples=samples)
    figures = monitor.compute()
    assert figures == {
        "samples_per_second": 32 / 4,
        "tokens_per_second": None,
        "batches_per_hour": 3 * 3600 / 4,
        "mfu": None,
        "elapsed_hours": 6 / 3600,
    }


@pytest.mark.parametrize("unit", ["seconds", "minutes", "hours", "days"])
def test_the_speed_monitor_has_units(unit):
    clock = Clock()
    monitor = SpeedMonitor(time_unit=unit, clock=clock)
    clock.now += 0.5
    monitor.update(samples=1, tokens=50)
    seconds = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}[unit]
    figures = monitor.compute()
    assert figures[f"batches_per_{unit[:-1]}"] == 2 * seconds
    assert figures[f"elapsed_{unit}"] == 0.5 / seconds
    assert figures["tokens_per_second"] == 100


def test_mfu_is_none_where_the_peak_is_not_known_and_right_where_it_is(monkeypatch):
    clock = Clock()
    options = {"flops_per_token": 1e9, "clock": clock}
    unknown = SpeedMonitor(**options)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    device = torch.device("cuda")
    assert peak_flops(device, torch.bfloat16) == 989e12
    known = SpeedMonitor(**options, device=device, n_devices=2)
    in_fp32 = SpeedMonitor(**options, device=device, dtype=torch.float32)
    clock.now += 1
    for monitor in (unknown, known, in_fp32):
        monitor.update(samples=1, tokens=500_000)
    assert known.compute()["mfu"] == 500_000 * 1e9 / (2 * 989e12)
    assert unknown.compute()["mfu"] is None and in_fp32.compute()["mfu"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window_size": 0}, "window_size: 0 is not a positive"),
        ({"time_unit": "hour"}, "time_unit: 'hour' is not one of .*did you mean hours?"),
    ],
)
def test_the_speed_monitor_names_what_is_wrong(options, said):
    with pytest.raises(ValueError, match=said):
        SpeedMonitor(**options)


def test_an_update_costs_less_than_a_hundredth_of_a_step_of_two_milliseconds():
    monitor = SpeedMonitor(window_size=50)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(200):
            monitor.update(samples=1, tokens=10)
        best = min(best, (time.perf_counter() - started) / 200)
    assert best < 0.01 * 2e-3


# ----------------------------------------------------------------------------------- the package


def test_the_package_imports_nothing_until_a_name_is_used():
    program = (
        "import sys, recipes.orchestrator as o; assert 'torch' not in sys.modules;"
        "assert len(o.__all__) == 6;"
        "print([getattr(o, name).__name__ for name in o.__all__])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "PretrainingOrchestrator" in done.stdout
    import recipes.orchestrator

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        recipes.orchestrator.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "the following arguments are required: --config (see --help)"),
        ("--config a.yaml --rank 2", "unrecognized arguments: --rank"),
        ("--config a.yaml --ranks 2", "--ranks: is for --validate"),
        ("--config a.yaml --validate --memory_gb -1", "--memory_gb: -1.0 is not positive"),
        ("--config b.yaml", "b.yaml: there is no such file; the nearest are a.yaml"),
    ],
)
def test_a_wrong_command_line_is_one_line(file_of, monkeypatch, words, said):
    monkeypatch.chdir(file_of(GOOD).parent)
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        orchestrator.main(words.split())
    assert str(e.value).startswith(said)


def test_problems_are_one_line_each_exit_code_2_and_leave_nothing(file_of, tmp_path):
    file_of(GOOD)
    words = ("--config", "a.yaml", "training.batch_size=x", "model.size=x")
    result = run(SCRIPT, *words, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first == "error: command line: training.batch_size: 'x' is not of type int"
    assert second.startswith("error: command line: model.size: 'x' is no size of llama")
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"]


def test_every_setting_of_the_core_has_a_key_or_is_decided_elsewhere():
    missing = {f.name for f in dataclasses.fields(OrchestratorConfig)} - set(PATH_OF)
    assert missing == {
        *("config", "parallel", "reshard", "replicate", "cpu_offload"),
        *("plan", "plan_memory_gb", "debug"),
    }
    readme = (ROOT / "recipes/orchestrator/README.md").read_text(encoding="utf-8")
    for path in PATH_OF.values():
        assert f"`{path.partition('.')[2]}`" in readme, path


# ------------------------------------------------------------------------------------ a short run


def test_a_run_keeps_its_resolved_file_and_resumes(file_of, texts, tmp_path):
    file_of(GOOD)
    (tmp_path / "texts").symlink_to(texts)
    words = ("--config", "a.yaml", "training.save_steps=2", "training.device=cpu")
    result = run(SCRIPT, *words, "training.dtype=fp32", "training.val_share=1", cwd=tmp_path)
    assert "training.val_share: 1: no such setting; did you mean data.val_share?" in result.stderr
    words += ("training.dtype=fp32", "data.val_share=0.05", "training.validations_per_epoch=20")
    result = run(SCRIPT, *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    resolved = yaml.safe_load((tmp_path / "runs/a/config.yaml").read_text(encoding="utf-8"))
    assert resolved["training"]["learning_rate"] == 3e-3
    assert resolved["training"]["save_steps"] == 2
    assert (tmp_path / "runs/a/export/final/config.json").is_file()
    n_rows = int(re.search(r"; ([\d,]+) rows in an epoch", result.stdout)[1].replace(",", ""))
    saved = json.loads((tmp_path / "runs/a/run.json").read_text(encoding="utf-8"))["config"]
    assert saved["eval_freq"] == round(n_rows / 4 / 20)
    again = run(SCRIPT, *words, "training.learning_rate=1", cwd=tmp_path)
    assert again.returncode == 2
    assert "max_lr 0.003 then, 1.0 now" in again.stderr
