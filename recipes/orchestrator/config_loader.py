"""
One YAML file that describes a run: read, checked as a whole, translated into the core's settings.

    config = load_config("recipes/orchestrator/configs/tiny_llama_cpu.yaml")
    config = load_config(path, ["training.learning_rate=1e-4"])       # what is given here wins

Every problem is found before anything is started, and all are reported at once (ConfigError), each
with its path, its value, what is expected, and the nearest name. README.md explains every key.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
import yaml

from parts.base.text import one_line
from parts.cli.config import converted, nearest_name, read_yaml, shown, words_of
from parts.training.run_settings import setting_problems
from pretraining_advanced import RunConfig, TrainConfig
from recipes.orchestrator import model_sizes

CONFIGS = Path(__file__).parent / "configs"
STRATEGIES = ("none", "ddp", "fsdp", "deepspeed")
EXAMPLE = "see recipes/orchestrator/configs for examples"


@dataclass
class OrchestratorConfig(TrainConfig):
    """The settings of a run; load_config makes one of a file."""

    MAY_CHANGE: ClassVar[tuple] = (
        *TrainConfig.MAY_CHANGE,
        *("model_type", "strategy", "fsdp_config", "ddp_config", "deepspeed_config"),
        *("global_batch_size", "export", "export_dtype"),
    )

    run_name: str = ""  # name of the run; empty: that of the file
    # model; the dimensions are None if the size, or the folder, has them
    model_type: Literal["llama", "qwen2", "gpt2"] | None = None  # family
    model_size: str | None = None  # a named size, such as 7B
    init_from: str | None = None  # Hugging Face folder, name on the hub, or run: its weights
    vocab_size: int | None = None  # ids; None: those of the size or the tokenizer
    n_hidden: int | None = None  # width inside the MLP
    block_size: int | None = None  # longest text that the model can read, tokens
    norm_eps: float | None = None  # added to the mean square in RMSNorm
    rope_theta: float | None = None  # base of the rotary positions
    tied: bool | None = None  # the output head is the token embedding
    # data
    context_length: int | None = None  # tokens per row; None: max_position_embeddings
    # gpt2, bpe, bpe:8192, bytes, a file or folder; None: that of model.from, else gpt2
    tokenizer: str | None = None
    # training
    global_batch_size: int | None = None  # rows per step on all ranks, to be checked
    export: bool = True  # write a Hugging Face folder at the end
    export_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of its weights
    # distributed
    strategy: Literal["none", "ddp", "fsdp", "deepspeed"] = "none"  # how it runs on several ranks
    fsdp_config: dict = field(default_factory=dict)  # of strategy fsdp
    ddp_config: dict = field(default_factory=dict)  # of strategy ddp
    deepspeed_config: dict | str | None = None  # DeepSpeed's JSON: a file, or the same as a block


DATA = {
    "dataset": "dataset_name",
    "subset": "dataset_subset",
    "text_field": "text_field",
    "tokenizer": "tokenizer",
    "sequence_length": "context_length",
    "cache_dir": "cache_dir",
    "max_documents": "max_documents",
    "val_share": "val_share",
    "eval_tokens": "eval_tokens",
    "streaming": "streaming",
}
DISTRIBUTED = {
    "strategy": "strategy",
    "fsdp_config": "fsdp_config",
    "ddp_config": "ddp_config",
    "deepspeed_config": "deepspeed_config",
}
# settings of every training that have another name in the file
RENAMED = {
    "max_lr": "learning_rate",
    "min_lr": "min_learning_rate",
    "grad_accum_steps": "gradient_accumulation_steps",
    "schedule": "lr_scheduler",
    "max_grad_norm": "clip_grad_norm",
    "n_epochs": "num_epochs",
    "eval_freq": "eval_steps",
    "print_sample_iter": "sample_steps",
    "save_ckpt_freq": "save_steps",
    "save_ckpt_minutes": "save_minutes",
    "keep_last": "keep_checkpoints",
}
# what the section `distributed` or the command line decides
NOT_IN_TRAINING = (
    *("config", "parallel", "reshard", "replicate", "cpu_offload"),
    *("plan", "plan_memory_gb", "debug"),
)
TRAINING = {
    RENAMED.get(f.name, f.name): f.name
    for f in dataclasses.fields(RunConfig)
    if f.name not in NOT_IN_TRAINING
} | {name: name for name in ("global_batch_size", "export", "export_dtype")}
SECTIONS = {
    "model": model_sizes.MODEL,
    "training": TRAINING,
    "data": DATA,
    "distributed": DISTRIBUTED,
}
PATH_OF = {own: f"{part}.{name}" for part, names in SECTIONS.items() for name, own in names.items()}
# flags of the core that the section `distributed` decides
DISTRIBUTED_FLAGS = {
    "parallel": "distributed.strategy",
    "reshard": "distributed.fsdp_config.sharding_strategy",
    "replicate": "distributed.fsdp_config.replicate",
    "cpu_offload": "distributed.fsdp_config.cpu_offload",
}
ALIASES = {("lr_scheduler", "fixed"): "constant"}
FSDP = (  # keys of fsdp_config; strategies.py checks the values
    *("sharding_strategy", "mixed_precision", "activation_checkpointing"),
    *("activation_checkpointing_policy", "cpu_offload", "replicate"),
)
# setting of the core -> key of fsdp_config that decides it
DECIDED_BY = {
    "dtype": "mixed_precision",
    "activation_checkpointing": "activation_checkpointing",
}
DDP = {"backend": Literal["nccl", "gloo"], "find_unused_parameters": bool}


class ConfigError(ValueError):
    """Everything that is wrong with a file and its overrides; `problems` has one line for each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


def load_config(path, overrides=(), world: int | None = None, elsewhere: bool = False):
    """
    The OrchestratorConfig of a YAML file.

    overrides: words such as training.max_steps=100, which win over the file; a value is written as
    in the file, and null takes the key away. world: ranks that it is checked for; None: those of
    this start. elsewhere: it is checked for other machines than this one. Raises FileNotFoundError
    with the nearest names, or ConfigError with all problems.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {_why_no_file(path)}")
    reader = _Reader(str(path))
    try:
        tree = read_yaml(path, EXAMPLE)
    except ValueError as e:
        raise ConfigError([f"{path}: {e}"]) from e
    reader.override(tree, overrides)
    config = reader.settings(tree)
    config.config = str(path)
    config.run_name = config.run_name or path.stem
    world = world or int(os.environ.get("WORLD_SIZE", 1))
    reader.check(config, world, elsewhere)
    if reader.problems:
        raise ConfigError(reader.problems)
    return config


def _why_no_file(path: Path) -> str:
    """What a path that is no file is instead, with the nearest files."""
    if path.is_dir():
        files = sorted(p.name for p in path.glob("*.yaml"))
        return f"is a folder; give one of its files: {', '.join(files) or 'it has no .yaml'}"
    known = {p.name: str(p) for folder in (CONFIGS, path.parent) for p in folder.glob("*.y*ml")}
    near = sorted(known, key=lambda name: -_likeness(name, path.name))[:3]
    names = ", ".join(_short(Path(known[name])) for name in near)
    return f"there is no such file; the nearest are {names}"


def _short(path: Path) -> str:
    """A path below the current folder without that."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def in_words_of_the_file(text: str) -> str:
    """A message of the core with the keys of the file in place of its flags."""

    def key(flag) -> str:
        path = PATH_OF.get(flag[1]) or DISTRIBUTED_FLAGS.get(flag[1])
        return f"{path}{'=' if flag[2] else ''}" if path else flag[0]

    return re.sub(r"--(\w+)( (?=[\d.]))?", key, text)


class _Reader:
    """Reads one file with its overrides; collects the problems."""

    def __init__(self, source: str):
        self.source = source
        self.problems = []
        self.overridden = set()  # paths
        self.given = set()  # settings, by their own names
        self.wrong = set()  # settings whose values could not be read

    def bad(self, path: str, what: str) -> None:
        """One more problem, with the place that the value comes from."""
        source = "command line" if path in self.overridden else self.source
        self.problems.append(one_line(f"{source}: {path}: {what}"))

    # ------------------------------------------------------------------------ reading

    def override(self, tree: dict, words) -> None:
        """Put `section.key=value` words into the tree."""
        for word in words:
            path, equals, text = word.partition("=")
            names = path.split(".")
            if not equals or len(names) < 2 or not all(names):
                what = "is no override; write such as training.learning_rate=1e-4"
                self.problems.append(f"command line: {word[:60]!r} {what}")
                continue
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError as e:
                self.problems.append(f"command line: {path}: {one_line(e, 100)}")
                continue
            self.overridden.add(path)
            block = tree
            for i, name in enumerate(names[:-1]):
                if block.get(name) is None:
                    block[name] = {}
                if not isinstance(block[name], dict):
                    outer = ".".join(names[: i + 1])
                    self.bad(path, f"{outer} is {shown(block[name])}, which has no keys")
                    break
                block = block[name]
            else:
                block[names[-1]] = value

    def settings(self, tree: dict) -> OrchestratorConfig:
        """The settings of all sections; wrong ones stay at their defaults."""
        types = typing.get_type_hints(OrchestratorConfig)
        for name in (name for name in tree if name not in SECTIONS):
            near = nearest_name(str(name), SECTIONS)
            what = f"no such section{near}; the sections are {', '.join(SECTIONS)}"
            self.bad(str(name)[:50], what)
        values = {}
        for part, names in SECTIONS.items():
            block = tree.get(part)
            if not isinstance(block, dict):
                is_missing = part not in tree or block is None
                what = "is missing" if is_missing else f"is {shown(block)}"
                self.bad(part, f"{what}; give a section with {', '.join(list(names)[:4])}, ...")
                self.wrong |= set(names.values())
                continue
            for name, value in block.items():
                path = f"{part}.{str(name)[:50]}"
                if name not in names:
                    self.bad(path, f"{shown(value)}: no such setting{self._nearest(name, part)}")
                    continue
                own = names[name]
                if value is None:
                    continue  # as if it were not there
                if part == "distributed" and name != "strategy":
                    values |= self._block(own, value)
                    continue
                value = ALIASES.get((name, str(value)), value)
                try:
                    values[own] = converted(value, types[own])
                    self.given.add(own)
                except (TypeError, ValueError, OverflowError):
                    self.bad(path, self._mistyped(value, types[own]))
                    self.wrong.add(own)
        return OrchestratorConfig(**values)

    @staticmethod
    def _nearest(name, part: str) -> str:
        """The nearest name of a key: its own name here, one of its section, or of another one."""
        name = str(name)
        if own := PATH_OF.get(name) or DISTRIBUTED_FLAGS.get(name):
            return f"; did you mean {own}?"
        for other, names in SECTIONS.items():
            if name in names:
                return f"; did you mean {other}.{name}?"
        near = nearest_name(name, SECTIONS[part])
        return near.replace("did you mean ", f"did you mean {part}.") if near else ""

    @staticmethod
    def _mistyped(value, kind) -> str:
        """Why a value is not of a type, with the nearest choice if it is a choice."""
        literal = next((c for c in (kind, *typing.get_args(kind)) if _is_choice(c)), None)
        if literal is None:
            return f"{shown(value)} is not {words_of(kind)}"
        choices = [str(choice) for choice in typing.get_args(literal)]
        return f"{shown(value)} is not {words_of(literal)}{nearest_name(str(value), choices)}"

    def _block(self, own: str, value) -> dict:
        """fsdp_config, ddp_config or deepspeed_config; the last is read by strategies.py."""
        path = PATH_OF[own]
        if own == "deepspeed_config":
            if isinstance(value, dict | str):
                return {own: value}
            self.bad(path, f"{shown(value)} is neither a file nor a block of keys")
            self.wrong.add(own)
            return {}
        if not isinstance(value, dict):
            self.bad(path, f"{shown(value)} is not a block of keys")
            return {}
        known = {"fsdp_config": FSDP, "ddp_config": DDP}[own]
        found = {}
        for name, item in value.items():
            inner = f"{path}.{str(name)[:50]}"
            if name not in known:
                near = nearest_name(str(name), known)
                what = f"no such setting{near or '; there are ' + ', '.join(known)}"
                self.bad(inner, f"{shown(item)}: {what}")
                continue
            try:
                found[name] = converted(item, DDP[name]) if own == "ddp_config" else item
            except (TypeError, ValueError, OverflowError):
                self.bad(inner, self._mistyped(item, DDP[name]))
        return {own: found}

    # ----------------------------------------------------------------------- checking

    def check(self, config: OrchestratorConfig, world: int, elsewhere: bool) -> None:
        """Everything that the values must fulfil together; fills in what the strategy decides."""
        for problem in setting_problems(config):
            flags, _, what = problem.partition(": ")
            self.bad(in_words_of_the_file(flags), in_words_of_the_file(what))
        if "model_type" not in self.wrong:
            for path, what in model_sizes.model_problems(config):
                self.bad(path, what)
        self._check_rows(config)
        self._check_batch(config, world)
        self._check_blocks(config, elsewhere)
        settings, _, problems = strategy_settings(config, world)
        for path, what in problems:
            if "deepspeed_config" not in self.wrong:
                self.bad(path, what)
        for own, value in settings.items():
            asked = getattr(config, own)
            if own in self.given and asked not in (value, "auto"):
                name = DECIDED_BY.get(own)
                if config.strategy == "fsdp" and name not in config.fsdp_config:
                    continue  # a default of fsdp_config contradicts nothing
                what = f"{shown(asked)} contradicts {value!r} of distributed; give one of them"
                self.bad(PATH_OF[own], what)
            setattr(config, own, value)

    def _check_rows(self, config: OrchestratorConfig) -> None:
        """A row must not be longer than the model can read."""
        longest = model_sizes.numbers_of(config).get("block_size")
        T = config.context_length
        if T and longest and longest < T:
            what = f"{T} is more than the {longest} of model.max_position_embeddings"
            self.bad(PATH_OF["context_length"], f"{what}; lower one, or raise the other")

    def _check_batch(self, config: OrchestratorConfig, world: int) -> None:
        """global_batch_size = batch_size x gradient_accumulation_steps x ranks."""
        B, accum, rows = config.batch_size, config.grad_accum_steps, config.global_batch_size
        if rows is None or min(B, accum) < 1 or rows == B * accum * world:
            return
        sum_of = f"{B} rows x {accum} micro-batches x {world} ranks = {B * accum * world}"
        fix = f"give {B * accum * world}"
        if rows % (B * world) == 0:
            fix = f"give training.gradient_accumulation_steps {rows // (B * world)}"
        self.bad(PATH_OF["global_batch_size"], f"{rows}, but {sum_of}; {fix}")

    def _check_blocks(self, config: OrchestratorConfig, elsewhere: bool) -> None:
        """Blocks of another strategy, and a backend that the machine does not have."""
        for own, strategy in OF_STRATEGY.items():
            if getattr(config, own) and config.strategy not in (strategy, "none"):
                what = f"belongs to strategy {strategy}, this is {config.strategy}; leave it out"
                self.bad(PATH_OF[own], what)
        backend = config.ddp_config.get("backend")
        path = f"{PATH_OF['ddp_config']}.backend"
        has_gpu = torch.cuda.is_available() and config.device in ("auto", "cuda")
        if elsewhere or config.strategy != "ddp":
            return
        if backend == "nccl" and not has_gpu:
            self.bad(path, "'nccl' needs GPUs, and this run has none; give gloo, or leave it out")
        if backend == "gloo" and has_gpu:
            what = "'gloo', but GPUs exchange through nccl; leave it out, or give training.device"
            self.bad(path, f"{what} cpu")


def _is_choice(kind) -> bool:
    return typing.get_origin(kind) is Literal


# ------------------------------------------------------------------------------- the strategy


def strategy_settings(config, world: int) -> tuple[dict, list[str], list[tuple[str, str]]]:
    """
    (settings of the core, notes for people, problems) of the section `distributed`.

    world: ranks. A problem is (path in the file, what is wrong). Started without torchrun there is
    one process, for which every strategy is `none`; a note says so.
    """
    settings, notes, problems = {"parallel": config.strategy}, [], []
    if config.strategy == "fsdp":
        settings, notes, problems = _of_fsdp(config, world)
    elif config.strategy == "deepspeed":
        settings, notes, problems = _of_deepspeed(config, world)
    elif config.strategy == "ddp" and config.ddp_config.get("find_unused_parameters") is False:
        notes.append(
            "ddp_config.find_unused_parameters: the trainer keeps it on, so that gradients are "
            "added in the same order after a restart"
        )
    if config.strategy == "none":
        blocks = [name for name in OF_STRATEGY if getattr(config, name)]
        notes += [f"strategy none: {name} is not used" for name in blocks]
        if world > 1:
            what = f"'none' is for one process, this run has {world} ranks; give ddp or fsdp"
            problems.append((PATH_OF["strategy"], what))
    elif world == 1 and "RANK" not in os.environ:
        settings = {name: v for name, v in settings.items() if name not in ONLY_SHARDED}
        settings["parallel"] = "none"
        how = "torchrun starts several"
        notes = [f"one process: strategy {config.strategy} runs as none; {how}", *notes]
    return settings, notes, problems


OF_STRATEGY = {"fsdp_config": "fsdp", "ddp_config": "ddp", "deepspeed_config": "deepspeed"}
ONLY_SHARDED = ("reshard", "replicate", "cpu_offload")


def _of_fsdp(config, world: int) -> tuple[dict, list[str], list[tuple[str, str]]]:
    """The same of fsdp_config. What the section `training` says wins over a default here."""
    from recipes.orchestrator.strategies import get_fsdp_config

    options = {"activation_checkpointing_policy": "full", **config.fsdp_config}
    if "activation_checkpointing" in options:  # its name in get_fsdp_config is another
        options["checkpoint_activation"] = options.pop("activation_checkpointing")
    try:
        found = get_fsdp_config(**options)
        return found.run_settings(world), list(found.notes), []
    except ValueError as e:
        names = {"checkpoint_activation": "activation_checkpointing"}
        return {}, [], _problems_of(e, PATH_OF["fsdp_config"], names)


def _problems_of(e: ValueError, path: str, names=()) -> list[tuple[str, str]]:
    """(path in the file, what is wrong) of a SettingsError; `names` are other ones in the file."""
    found = getattr(e, "problems", [("", str(e))])
    names = dict(names)
    return [(f"{path}.{names.get(name, name)}".rstrip("."), what) for name, what in found]


def _of_deepspeed(config, world: int) -> tuple[dict, list[str], list[tuple[str, str]]]:
    """The same of deepspeed_config."""
    path = PATH_OF["deepspeed_config"]
    if config.deepspeed_config is None:
        return {}, [], [(path, "is missing; give DeepSpeed's JSON file, or the same as a block")]
    try:
        plan = deepspeed_plan(config, world)
    except FileNotFoundError as e:
        return {}, [], [(path, str(e))]
    except ValueError as e:
        return {}, [], _problems_of(e, path)
    from recipes.orchestrator.strategies import have_deepspeed

    native = not have_deepspeed()
    return plan.run_settings(native), plan.notes_of(native), []


def deepspeed_plan(config, world: int):
    """The DeepSpeedPlan of deepspeed_config. Raises SettingsError or FileNotFoundError."""
    from recipes.orchestrator.strategies import read_deepspeed

    source, B, accum = config.deepspeed_config, config.batch_size, config.grad_accum_steps
    return read_deepspeed(source, B, accum, world)


def resolved_yaml(config: OrchestratorConfig) -> str:
    """All settings of a run as a file that load_config reads."""
    tree = {}
    for part, names in SECTIONS.items():
        values = {name: getattr(config, own) for name, own in names.items()}
        tree[part] = {name: v for name, v in values.items() if v is not None and v != {}}
    head = f"# resolved from {config.config}\n"
    return head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=False)
