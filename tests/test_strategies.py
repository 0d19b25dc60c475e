"""Sharding strategies, DDP, and what is read from DeepSpeed's JSON."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, TORCHRUN
from strategy_cases import killed_ten_times, same_training, train_under
from training_cases import home  # noqa: F401  a fixture

from parts.training.engine import choose_engine
from recipes.orchestrator.strategies import (
    ENGINES,
    SHARDING,
    DeepSpeedEngine,
    SettingsError,
    engines_of,
    get_fsdp_config,
    read_deepspeed,
    setup_ddp,
    setup_model_with_ddp,
)

# ---------------------------------------------------------------------------------------- FSDP


@pytest.mark.parametrize(
    ("strategy", "reshard", "replicate"),
    [
        ("FULL_SHARD", True, 1),
        ("SHARD_GRAD_OP", False, 1),
        ("HYBRID_SHARD", True, 2),
        ("_HYBRID_SHARD_ZERO2", False, 2),
        ("NO_SHARD", True, 8),
    ],
)
def test_a_strategy_is_settings_of_the_core(strategy, reshard, replicate):
    settings = get_fsdp_config(sharding_strategy=strategy).run_settings(world=8)
    assert settings == {
        "parallel": "fsdp",
        "reshard": reshard,
        "replicate": replicate,
        "cpu_offload": False,
        "activation_checkpointing": True,
        "dtype": "auto",
    }


def test_the_groups_of_a_hybrid_are_the_nodes_or_as_asked(monkeypatch):
    config = get_fsdp_config(sharding_strategy="HYBRID_SHARD")
    monkeypatch.setenv("WORLD_SIZE", "32")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert config.run_settings()["replicate"] == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert config.run_settings()["replicate"] == 2
    asked = get_fsdp_config(sharding_strategy="HYBRID_SHARD", replicate=8)
    assert asked.run_settings()["replicate"] == 8


def test_options_of_fsdp_are_handed_on_and_contiguous_is_explained():
    config = get_fsdp_config(False, "SHARD_GRAD_OP", True, "contiguous", cpu_offload=True)
    settings = config.run_settings(2)
    assert (settings["dtype"], settings["cpu_offload"]) == ("fp32", True)
    assert len(config.notes) == 1 and '"contiguous" is no policy of torch' in config.notes[0]
    assert get_fsdp_config("bf16").dtype == "bf16"
    for kind in ({"checkpoint_activation": False}, {"activation_checkpointing_policy": "none"}):
        config = get_fsdp_config(**kind)
        assert not config.notes and not config.run_settings(2)["activation_checkpointing"]
    assert not get_fsdp_config(activation_checkpointing_policy="full").notes


def test_unknown_options_of_fsdp_are_refused_all_at_once_with_the_nearest_name():
    with pytest.raises(SettingsError) as e:
        get_fsdp_config(
            mixed_precision="bf61",
            sharding_strategy="full_shrad",
            checkpoint_activation="yes",
            activation_checkpointing_policy=["contigous"],
            replicate=0,
        )
    found = dict(e.value.problems)
    assert "FULL_SHARD, SHARD_GRAD_OP, HYBRID_SHARD" in found["sharding_strategy"]
    assert "did you mean FULL_SHARD?" in found["sharding_strategy"]
    assert "did you mean bf16?" in found["mixed_precision"]
    assert "full, contiguous, none" in found["activation_checkpointing_policy"]
    assert set(found) - set(str(e.value).replace(":", " ").split()) == set() and len(found) == 5
    with pytest.raises(ValueError, match="replicate: 2 is for HYBRID_SHARD"):
        get_fsdp_config(replicate=2)


# ----------------------------------------------------------------------------------------- DDP

UNUSED = """
import sys
import torch
from recipes.orchestrator.strategies import setup_ddp, setup_model_with_ddp
assert "deepspeed" not in sys.modules
print(setup_ddp(backend="gloo", find_unused_parameters=sys.argv[1] == "find"))
plain = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "unused": torch.nn.Linear(2, 2)})
plain.forward = lambda x: plain["used"](x).sum()
model = setup_model_with_ddp(plain)
for n in range(2):
    loss = model(torch.ones(1, 2) * (1 + torch.distributed.get_rank()))
    loss.backward()
sys.stdout.write(f"mean {plain['used'].weight.grad.tolist()}\\n")  # at once, beside the other rank
"""


def ddp_script(tmp_path, word, *launcher) -> subprocess.CompletedProcess:
    script = tmp_path / "unused.py"
    script.write_text(UNUSED, encoding="utf-8")
    line = [*(launcher or (sys.executable,)), str(script), word]
    options = {"capture_output": True, "text": True, "timeout": 100, "check": False}
    return subprocess.run(line, cwd=ROOT, **options, env={"PYTHONPATH": str(ROOT), "PATH": ""})


def test_ddp_of_your_own_runs_in_one_process_without_torchrun(tmp_path):
    result = ddp_script(tmp_path, "find")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split("\n")[:2] == ["cpu", "mean [[2.0, 2.0], [2.0, 2.0]]"]


def test_unused_parameters_are_found_only_if_asked_for(tmp_path):
    found = ddp_script(tmp_path, "find", *TORCHRUN, "2")
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("mean [[3.0, 3.0], [3.0, 3.0]]") == 2  # the ranks' gradients: 2 and 4
    refused = ddp_script(tmp_path, "refuse", *TORCHRUN, "2")
    assert refused.returncode == 1 and "find_unused_parameters=True" in refused.stderr


def test_nccl_without_a_gpu_names_gloo(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match='backend nccl: needs GPUs.*backend="gloo"'):
        setup_ddp()
    with pytest.raises(ValueError, match="backend: 'glo' is not one of nccl, gloo; did you mean"):
        setup_ddp("glo")
    with pytest.raises(ValueError, match="call setup_ddp first"):
        setup_model_with_ddp(None)


# ------------------------------------------------------------------------------ DeepSpeed's JSON


def read(config, micro_batch=4, accumulation=2, world=8):
    return read_deepspeed(config, micro_batch, accumulation, world)


def problems(config, **sizes) -> dict:
    with pytest.raises(SettingsError) as e:
        read(config, **sizes)
    assert all(path in str(e.value) and what in str(e.value) for path, what in e.value.problems)
    return dict(e.value.problems)


ORDINARY = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "steps_per_print": 100,
    "wall_clock_breakdown": False,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 5e8,
        "allgather_bucket_size": "auto",
    },
}


def test_an_ordinary_file_is_taken_as_it_is(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ORDINARY), encoding="utf-8")
    plan = read(path)
    assert plan == read(ORDINARY)
    common = {"cpu_offload": True, "dtype": "bf16", "max_grad_norm": 1.0}
    assert plan.run_settings(native=False) == {**common, "parallel": "deepspeed"}
    native = plan.run_settings(native=True)
    assert native == {**common, "parallel": "fsdp", "reshard": False}
    notes = plan.notes_of(native=True)
    assert "not installed: ZeRO stage 2 runs as fsdp (SHARD_GRAD_OP) with cpu_offload" in notes[0]
    for name in ("steps_per_print", "initial_scale_power", "reduce_bucket_size"):
        assert any(name in note for note in notes), name
    zero = plan.engine_config(offload=True)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 500_000_000 and "allgather_bucket_size" not in zero
    assert (zero["stage"], zero["offload_optimizer"]) == (2, {"device": "cpu"})


@pytest.mark.parametrize(
    ("stage", "parallel", "reshard"),
    [(0, "ddp", True), (1, "fsdp", False), (2, "fsdp", False), (3, "fsdp", True)],
)
def test_each_stage_has_a_native_strategy(stage, parallel, reshard):
    settings = read({"zero_optimization": {"stage": stage}}).run_settings(native=True)
    assert (settings["parallel"], settings["reshard"]) == (parallel, reshard)
    assert settings["dtype"] == "fp32" and "max_grad_norm" not in settings


def test_formats_may_be_left_to_the_run():
    assert read({"fp16": {"enabled": True}}).dtype == "fp16"
    assert read({"bf16": {"enabled": "auto"}}).dtype is None
    assert read({}).dtype == "fp32"
    assert read({"gradient_clipping": "auto"}).clip is None
    assert read({"gradient_clipping": 0}).clip == 0.0


BAD = {
    "train_batch_size": ({"train_batch_size": 65}, "65, but the run has 4 rows x 2 micro"),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 4}, "4, but the run has 2"),
    "train_micro_batch_size_per_gpu": ({"train_micro_batch_size_per_gpu": 0}, "0 is not a pos"),
    "bf16, fp16": ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "choose one"),
    "fp16.loss_scale": ({"fp16": {"enabled": True, "loss_scale": 128}}, "fixed scale"),
    "fp16.enabled": ({"fp16": {"enabled": "yes"}}, "is not true, false"),
    "bf16.immediate_grad_update": ({"bf16": {"immediate_grad_update": True}}, "not done here"),
    "zero_optimization": ({"zero_optimization": 2}, "2 is not a block of keys"),
    "zero_optimization.stage": ({"zero_optimization": {"stage": 4}}, "4 is not 0, 1, 2 or 3"),
    "zero_optimization.stge": ({"zero_optimization": {"stge": 1}}, "did you mean stage?"),
    "zero_optimization.overlap_comm": ({"zero_optimization": {"overlap_comm": 1}}, "true or f"),
    "zero_optimization.zero_hpz_partition_size": (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
        "HYBRID_SHARD",
    ),
    "zero_optimization.offload_optimizer": (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        "stage 0 offloads nothing",
    ),
    "zero_optimization.offload_optimizer.device": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        "NVMe",
    ),
    "zero_optimization.offload_param.device": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
        "cpu_offload",
    ),
    "gradient_clipping": ({"gradient_clipping": -1}, "-1 is not a number from 0 up"),
    "optimizer.type": ({"optimizer": {"type": "Lamb"}}, "give AdamW"),
    "optimizer.params.lr": ({"optimizer": {"params": {"lr": 1e-4}}}, "training.learning_rate"),
    "optimizer.params.betas": ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, "[0.9, 0.95]"),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, "training.lr_scheduler"),
    "prescale_gradients": ({"prescale_gradients": True}, "give false"),
    "gradient_predivide_factor": ({"gradient_predivide_factor": 2.0}, "2.0 is not done"),
    "communication_data_type": ({"communication_data_type": "bf16"}, 'give "fp32"'),
    "activation_checkpointing.cpu_checkpointing": (
        {"activation_checkpointing": {"cpu_checkpointing": True}},
        "has no effect here",
    ),
    "flops_profiler.enabled": ({"flops_profiler": {"enabled": True}}, "MFU"),
    "data_types.grad_accum_dtype": ({"data_types": {"grad_accum_dtype": "bf16"}}, "fp32"),
    "gradient_cliping": ({"gradient_cliping": 1.0}, "did you mean gradient_clipping?"),
    "tensor_parallel": ({"tensor_parallel": {"autotp_size": 2}}, "no tensor parallelism"),
}


@pytest.mark.parametrize("path", BAD)
def test_what_is_not_done_is_named(path):
    config, words = BAD[path]
    found = problems(config)
    assert list(found) == [path] and words in found[path]


def test_all_problems_come_at_once():
    together = {}
    for config, _ in BAD.values():
        for name, value in config.items():
            if isinstance(value, dict) and isinstance(together.get(name, {}), dict):
                value = {**together.get(name, {}), **value}
            together[name] = value
    expected = {path for path in BAD if path != "zero_optimization.offload_optimizer"}
    assert len(set(problems(together)) & expected) >= len(BAD) - 6


def test_blocks_that_are_off_and_usual_values_are_harmless():
    off = {name: {"enabled": False} for name in ("wandb", "tensorboard", "flops_profiler", "amp")}
    usual = {"prescale_gradients": False, "gradient_predivide_factor": 1.0}
    assert read({**off, **usual, "zero_allow_untested_optimizer": True}).notes == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "is list, not a block"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage is given twice"),
        ("[" * 100_000, "is not JSON"),
        (" " * 1_000_001, "is larger than 1,000,000 bytes"),
        ('{"gradient_clipping": NaN}', "NaN is not a number from 0 up"),
    ],
    ids=["cut", "list", "twice", "deep", "large", "nan"],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError) as e:
        read(path)
    assert str(e.value).startswith(f"{path}: ") and words in str(e.value)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="ds.json: there is no such DeepSpeed"):
        read(tmp_path / "ds.json")


def test_deepspeed_is_one_of_the_engines_and_refused_where_it_is_not_installed(monkeypatch):
    assert list(ENGINES) == ["none", "ddp", "fsdp", "deepspeed"]
    engines = engines_of(read({"zero_optimization": {"stage": 3}}))
    assert issubclass(engines["deepspeed"], DeepSpeedEngine)
    assert (engines["deepspeed"].plan.stage, DeepSpeedEngine.plan.stage) == (3, 0)
    with pytest.raises(ValueError, match="--parallel deepspeed: is for several processes"):
        choose_engine("deepspeed", engines)
    engine = engines["deepspeed"].__new__(engines["deepspeed"])
    assert engine.memory_like(True) == ("fsdp", True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="is not installed; pip install deepspeed"):
        engine.check_options(False, True, 1)


# ------------------------------------------------------------------------- equal to one process


@pytest.fixture(scope="module")
def whole(home):  # noqa: F811
    """One batch of sixteen rows on one process."""
    return train_under(home, "whole", batch_size=16)


@pytest.mark.parametrize(("rows", "accumulation"), [(1, 16), (4, 4), (8, 2)])
def test_accumulation_on_one_process_changes_nothing(home, whole, rows, accumulation):  # noqa: F811
    settings = {"batch_size": rows, "grad_accum_steps": accumulation}
    same_training(train_under(home, f"none-{rows}", **settings), whole)


@pytest.mark.parametrize(("rows", "accumulation"), [(1, 8), (4, 2), (8, 1)])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(home, whole, parallel, rows, accumulation):  # noqa: F811
    settings = {"batch_size": rows, "grad_accum_steps": accumulation, "parallel": parallel}
    same_training(train_under(home, f"{parallel}-{rows}", 2, **settings), whole)


def test_fsdp_killed_ten_times_equals_straight_to_the_bit(home):  # noqa: F811
    killed_ten_times(home, "fsdp")


@pytest.mark.parametrize("strategy", SHARDING)
def test_four_ranks_under_each_strategy_train_as_one(home, whole, strategy):  # noqa: F811
    settings = get_fsdp_config(False, strategy).run_settings(4)
    settings |= {"batch_size": 2, "grad_accum_steps": 2}
    same_training(train_under(home, strategy, 4, **settings), whole)
