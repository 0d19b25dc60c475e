"""
Pretrain, or continue to pretrain, what one YAML file describes: on a laptop, on eight GPUs, or on
several nodes; kill it at will, and the same command resumes it with bit-identical results.

    python recipes/orchestrator/orchestrator.py --config FILE
    python recipes/orchestrator/orchestrator.py --config FILE training.learning_rate=1e-4
    python recipes/orchestrator/orchestrator.py --config FILE --validate
    python recipes/orchestrator/orchestrator.py --config FILE --validate --ranks 8 --memory_gb 80
    torchrun --nproc_per_node 8 recipes/orchestrator/orchestrator.py --config FILE
    sbatch recipes/orchestrator/two_nodes.sbatch FILE

FILE is such as recipes/orchestrator/configs/tiny_llama_cpu.yaml, which takes a minute on two CPU
cores; README.md explains every key. The run writes runs/NAME: config.yaml (the file, resolved),
checkpoints, metrics.jsonl, loss.png, and at the end Hugging Face folders in export/.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import argparse
import hashlib
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from gpt_train import sampler
from parts.base.files import make_folder, rename_durably
from parts.cli.launch import print_notes, run_script
from parts.data.batches import TrainBatches
from parts.data.shards import holds_shards
from parts.data.tokenizers import FILES, vocabulary_of
from parts.model.families import FAMILIES, shell
from parts.storage import hf_llama, hub
from parts.training import engine as core
from parts.training.plan import flops_per_token
from pretraining_advanced import Job, gpt_loss, open_text, run
from recipes.orchestrator.config_loader import (
    ConfigError,
    OrchestratorConfig,
    in_words_of_the_file,
    load_config,
    resolved_yaml,
    strategy_settings,
)
from recipes.orchestrator.model_sizes import open_base, shape_of
from wt_load import ExportConfig, Weights, weights_hash
from wt_load import export as export_weights

PYTHON_DOCS = "python_docs"  # as data.dataset: the English that comes with Python, about 1 MB


class PretrainingOrchestrator:
    """A run of an OrchestratorConfig, on the processes that it was started with."""

    def __init__(self, config: OrchestratorConfig):
        self.config = config

    def train(self) -> int:
        """
        Train to the last step; returns the exit code (0: finished, 75 and 130: stopped, saved).

        In this order: configuration, model and data, optimizer, the loop with validation and
        checkpoints, the Hugging Face folder. Raises ValueError for what cannot be trained.
        """
        config, world = self.config, int(os.environ.get("WORLD_SIZE", 1))
        _, notes, _ = strategy_settings(config, world)
        print_notes(notes)
        try:
            return run(config, make_job, engines_of(config, world))
        except (ValueError, RuntimeError) as e:  # the core names its own flags
            kind = ValueError if isinstance(e, ValueError) else RuntimeError
            raise kind(in_words_of_the_file(str(e))) from e

    def validate(self, ranks: int | None = None, memory_gb: float | None = None) -> list[str]:
        """
        What the run takes and finds, in lines; nothing is started, and no model has memory.

        ranks: processes to compute for; None: those of this start. memory_gb: of each rank's GPU,
        in 10^9 bytes; None: the device here. Raises ValueError with all that is missing or too
        large.
        """
        from recipes.orchestrator.validate import report

        lines, problems = report(self.config, ranks, memory_gb)
        if problems:
            raise ConfigError(problems)
        return lines


def engines_of(config: OrchestratorConfig, world: int) -> dict:
    """The engines that run() chooses from."""
    if config.strategy != "deepspeed":
        return core.ENGINES
    from recipes.orchestrator.config_loader import deepspeed_plan
    from recipes.orchestrator.strategies import engines_of as with_deepspeed

    return with_deepspeed(deepspeed_plan(config, world))


# ------------------------------------------------------------------------------------------ the job


def choose_tokenizer(config: OrchestratorConfig, base: Weights | None) -> int:
    """
    Fill in the tokenizer; returns its number of ids (of a bpe that is not trained yet, the most).

    Raises ValueError if there is none, or if the model has fewer ids.
    """
    if config.tokenizer is None:
        config.tokenizer = "gpt2"
        if base:
            if base.tokenizer_path is None:
                what = f"{config.init_from} has no tokenizer; give one"
                raise ValueError(f"data.tokenizer: {what}")
            config.tokenizer = str(base.tokenizer_path)
    spec = config.tokenizer
    if holds_shards(config.dataset_name) and (Path(config.dataset_name) / FILES[0]).is_file():
        spec = config.dataset_name  # the one that the text was tokenised with
    n_ids = vocabulary_of(spec)
    if not spec.startswith("bpe"):
        check_vocabulary(config, n_ids, base)
    return n_ids


def check_vocabulary(config: OrchestratorConfig, n_ids: int, base: Weights | None) -> None:
    """Raises ValueError if the model has fewer ids than its tokenizer."""
    V = base.config.vocab_size if base else shape_of(config, n_ids).vocab_size
    if n_ids > V:
        what = f"has {n_ids:,} ids, the model a vocabulary of {V:,}"
        fix = f"give the model's own, or model.vocab_size {n_ids}"
        raise ValueError(f"data.tokenizer: {config.tokenizer} {what}; {fix}")


def row_length(config: OrchestratorConfig, shape) -> int:
    """Tokens per row. Raises ValueError if that is more than the model can read."""
    T = config.context_length or shape.block_size
    if shape.block_size < T:
        what = f"{T} is more than the {shape.block_size} positions that the model was made for"
        raise ValueError(f"data.sequence_length: {what}; give less")
    return T


def write_python_docs(folder: Path) -> Path:
    """The file with the English that comes with Python; every rank gets the same one."""
    path = folder / f"{PYTHON_DOCS}.txt"
    if not path.exists():
        from parts.data.python_docs import python_docs

        make_folder(folder)
        part = folder / f".{PYTHON_DOCS}.{os.getpid()}.part"
        part.write_text("\n<|endoftext|>\n".join(python_docs()), encoding="utf-8")
        os.utime(part, (0, 0))  # it is known by name, size and time: the same for all ranks
        rename_durably(part, path)
    return path


def base_model(base: Weights, building) -> tuple[torch.nn.Module, str]:
    """
    (a model with the weights of a base in fp32, a hash of them); the hash alone is real if
    `building` gives no memory.

    Never takes more memory than the model and one tensor.
    """
    with building:
        has_memory = not torch.empty(0).is_meta
    model, digest, tensors = shell(base.config), hashlib.sha256(), {}
    for name in model.state_dict():
        tensor = base.tensors[name].read()
        digest.update(weights_hash({name: tensor}).encode())
        if has_memory:
            tensors[name] = tensor.float()
    if has_memory:
        model.load_state_dict(tensors, assign=True)
    return model, digest.hexdigest()


def make_job(config: OrchestratorConfig, building) -> Job:
    """
    The model, made in the context `building`, and the text that the file names.

    Raises ValueError or FileNotFoundError for what cannot be trained.
    """
    base = open_base(config) if config.init_from else None
    choose_tokenizer(config, base)
    if config.dataset_name == PYTHON_DOCS:
        config.dataset_name = str(write_python_docs(Path(config.cache_dir)))
    text = open_text(config)
    check_vocabulary(config, text.tokenizer.vocab_size, base)
    shape = base.config if base else shape_of(config, text.tokenizer.vocab_size)
    T = config.context_length = row_length(config, shape)
    facts = {"model_config": asdict(shape), **text.facts}
    if base:
        if shape.family == "gpt":
            base.config.dropout = config.dropout
        model, facts["base"] = base_model(base, building)
    else:
        torch.manual_seed(config.seed)
        with building:
            model = FAMILIES[shape.family].model(shape)

    def plan(setting, memory_gb) -> tuple[list[str], bool]:
        from recipes.orchestrator.validate import memory_lines

        return memory_lines(config, replace(shape, block_size=T), setting, memory_gb)

    token_bytes = torch.zeros(shape.vocab_size, dtype=torch.int64).numpy()
    token_bytes[: text.tokenizer.vocab_size] = text.tokenizer.token_bytes()
    return Job(
        family=shape.family,
        model=model,
        train_batches=TrainBatches(text.train, T, config.seed, shape.vocab_size),
        val_batches=lambda: text.validation(config),
        loss_fn=gpt_loss,
        blocks=(FAMILIES[shape.family].block,),
        flops_per_token=flops_per_token(replace(shape, block_size=T)),
        tokens_per_row=T,
        facts=facts,
        files=files_of(base, shape, text),
        token_bytes=token_bytes,
        sample=sampler(text.tokenizer),
        plan=plan,
        export=exporter(config.export_dtype) if config.export else None,
        run_files={"config.yaml": resolved_yaml(config).encode()},
    )


def files_of(base: Weights | None, shape, text) -> dict[str, bytes]:
    """
    What is kept beside the weights of a checkpoint: tokenizer, and of a base its files.

    With config.json a checkpoint of a Llama is a Hugging Face folder itself.
    """
    files = {}
    if base and base.tokenizer_path:
        files = hub.files_of(base.tokenizer_path)
    if shape.family == "llama":
        settings = hf_llama.settings_of_config(shape)
        files["config.json"] = json.dumps(settings, indent=2).encode()
    return files | text.files


def exporter(dtype: str):
    """Job.export: (checkpoint folder, target folder) -> a Hugging Face folder there."""

    def export(checkpoint: Path, target: Path) -> None:
        export_weights(ExportConfig(str(checkpoint), ("hf", str(target)), dtype))
        for name in hub.BESIDE_WEIGHTS:  # of the base that was trained further
            if name != "tokenizer.json" and (checkpoint / name).is_file():
                (target / name).write_bytes((checkpoint / name).read_bytes())

    return export


# ------------------------------------------------------------------------------------ command line


class _Arguments(argparse.ArgumentParser):
    """argparse, with errors as every script has them."""

    def error(self, message: str):
        raise ValueError(f"{message} (see --help)")


def arguments_of(argv) -> argparse.Namespace:
    """The words of the command line. Raises ValueError."""
    parser = _Arguments(
        prog="orchestrator.py",
        usage="%(prog)s --config FILE [section.key=value ...] [--validate]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="settings that win over the file's")
    parser.add_argument("--validate", action="store_true", help="check, compute and look; no run")
    parser.add_argument("--ranks", type=int, help="with --validate: processes to compute for")
    parser.add_argument("--memory_gb", type=float, help="with --validate: of each rank, 10^9 bytes")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    words = parser.parse_intermixed_args(argv)
    for name in ("ranks", "memory_gb"):
        value = getattr(words, name)
        if value is not None and not words.validate:
            raise ValueError(f"--{name}: is for --validate; torchrun says how many ranks there are")
        if value is not None and value <= 0:
            raise ValueError(f"--{name}: {value} is not positive")
    return words


def main(argv) -> int:
    """Train, or validate; returns the exit code. Prints all problems of a file, one per line."""
    words = arguments_of(argv)
    is_first = os.environ.get("RANK", "0") == "0"  # torchrun starts the same command many times
    try:
        config = load_config(
            words.config, words.overrides, words.ranks, words.memory_gb is not None
        )
        config.debug = words.debug
        orchestrator = PretrainingOrchestrator(config)
        if not words.validate:
            return orchestrator.train()
        lines = orchestrator.validate(words.ranks, words.memory_gb)
        if is_first:
            print("\n".join(lines))
    except ConfigError as e:
        if is_first:
            for problem in e.problems:
                print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
