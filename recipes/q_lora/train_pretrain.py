"""
Continue the pretraining of a Llama or Qwen2 on code: the model, its data, its loss.

    python recipes/q_lora/train_pretrain.py merge CHECKPOINT OUT

merges the adapters of a checkpoint into the 16-bit weights that it was trained on, and writes a
Hugging Face folder. run_pretraining.py trains.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import contextlib
import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import tyro
import yaml

from gpt_train import sampler
from parts.base.dtypes import DTYPES
from parts.base.files import no_empty_folders, rename_durably
from parts.cli.config import parse
from parts.cli.launch import print_notes, run_script
from parts.data import shard_writer
from parts.data.batches import TrainBatches, val_batches
from parts.data.readers import json_rows
from parts.data.shards import Shards, content_hash, read_index
from parts.data.sources import identity_of
from parts.data.tokenizers import Tokenizer, byte_tokenizer
from parts.model import lora, nf4
from parts.model.families import shell, tensor_shapes
from parts.model.llama import Llama, LlamaBlock, LlamaConfig
from parts.storage import checkpoint, formats, hf_llama
from parts.storage.formats import Stored
from parts.training.plan import flops_per_token
from pretraining_advanced import Job, RunConfig
from recipes.q_lora.prepare_data import DATA_DIR, data_files
from wt_load import Weights, open_weights

ADAPTERS = "adapter_model.safetensors"  # as peft names it
TINY = "tiny"  # a random Qwen2 of two layers, for trying


@dataclass
class QConfig(RunConfig):
    """Continue the pretraining of a Llama or Qwen2 on code; resume where an attempt ended."""

    MAY_CHANGE: ClassVar[tuple] = (
        *RunConfig.MAY_CHANGE,
        *("model_name", "data_dir", "cache_dir", "eval_tokens"),
    )
    IN_DATA: ClassVar[tuple] = ("data_type",)
    OTHER_NAMES: ClassVar[dict] = {
        "base_model": "model_name",
        "learning_rate": "max_lr",
        "gradient_accumulation_steps": "grad_accum_steps",
        "save_steps": "save_ckpt_freq",
        "wandb": "use_wandb",
        "experiment_name": "run_name",
    }
    SECTIONS: ClassVar[tuple] = ("model",)

    # Hugging Face folder, name in the hub's cache or on the hub, or: tiny (random, for trying)
    model_name: str = "Qwen/Qwen2.5-7B-Instruct"
    data_type: Literal["raw", "filtered", "described_filtered", "licensed"] = "raw"  # which files
    training_method: Literal["lora", "qlora", "full"] = "lora"  # what is trained
    max_seq_length: int = 2048  # tokens per row
    max_lr: float = 2e-5  # learning rate after the warmup
    batch_size: int = 1  # rows per micro-batch on each rank
    grad_accum_steps: int = 8  # micro-batches per step on each rank
    warmup_steps: int | None = 100  # steps up to max_lr
    max_steps: int | None = 1000  # optimizer steps
    save_ckpt_freq: int = 50  # steps between two checkpoints
    eval_freq: int = 50  # steps between two evaluations of the test files
    print_sample_iter: int = 200  # steps between two samples
    weight_decay: float = 0.0  # on matrices only
    activation_checkpointing: bool = True  # recompute blocks in the backward pass: less memory
    lora_rank: int = 16  # rank of the adapters
    lora_alpha: float = 32.0  # their factor is lora_alpha / lora_rank
    lora_dropout: float = 0.1  # of the adapters' inputs
    data_dir: str = DATA_DIR  # folder with DATA_TYPE_train.jsonl and DATA_TYPE_test.jsonl
    cache_dir: str = "token_cache"  # where token shards are kept
    eval_tokens: int | None = None  # evaluate on the first so many tokens; None: all test files
    run_name: str = ""  # name of the run; empty: the last part of model_name
    wandb_project: str = "q-pretraining"  # wandb's project


def resolve(config: QConfig) -> None:
    """
    Name the run and its folder after the model, if the configuration does not.

    A run of another method or on other data takes another folder, and that is said. Raises
    ValueError for settings of the adapters that cannot be right.
    """
    lora.check_lora(config.lora_rank, config.lora_alpha, config.lora_dropout)
    if config.training_method == "qlora" and config.parallel == "fsdp":
        what = "weights in 4 bits are not sharded, each rank holds them whole"
        raise ValueError(f"--training_method qlora: {what}; use --parallel ddp, or lora")
    model = Path(config.model_name.rstrip("/")).name
    named = config.run_name or config.output_dir
    config.run_name = config.run_name or model
    config.output_dir = config.output_dir or f"output/{config.run_name}"
    if named:
        return
    asked = (config.training_method, config.data_type)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no earlier run
        saved = json.loads(Path(config.output_dir, "run.json").read_text(encoding="utf-8"))
        then = (saved["config"]["training_method"], saved["config"]["data_type"])
        if then != asked:
            earlier = config.output_dir
            config.run_name = "-".join((model, *asked))
            config.output_dir = f"output/{config.run_name}"
            what = f"{earlier} has a run of {' on '.join(then)}"
            print_notes([f"{what}; this one takes {config.output_dir}"])


# -------------------------------------------------------------------------------------------- data


@dataclass
class CodeText:
    """Token shards of the training and the test file, and their tokenizer."""

    train: Shards
    test: Shards
    tokenizer: Tokenizer
    data: str  # hash of all tokens


def open_code(config: QConfig, tokenizer: Tokenizer) -> CodeText:
    """The token shards of the data files, built if they do not exist yet. Raises ValueError."""
    sides = data_files(config.data_type, config.data_dir)
    files = {"train": sides["train"], "val": sides["test"]}
    facts = {"files": [], "tokenizer": tokenizer.fingerprint, "writer": shard_writer.WRITER}
    for path in files.values():
        facts["files"].append(identity_of(path))
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    folder = Path(config.cache_dir) / f"q-{config.data_type}-{digest}"
    facts |= {"dataset_name": str(config.data_dir), "dataset_subset": config.data_type}

    def chunks(state):
        return _chunks(files, state)

    def tokenise(rows) -> dict:
        return {split: _tokens(rows, split, tokenizer) for split in files}

    shard_writer.build(folder, tokenizer, chunks, tokenise, facts, os.cpu_count() or 1)
    index = read_index(folder)
    train, test = Shards(folder, "train", index), Shards(folder, "val", index)
    for path, part in zip(files.values(), (train, test), strict=True):
        if len(part) < 2:
            raise ValueError(f"{path}: holds no code; prepare it again with more files")
    return CodeText(train, test, tokenizer, content_hash(index))


def _chunks(files: dict[str, Path], state):
    """Yield ([(split, kind, row)], state after them) of the files, one after the other."""
    state = state or {"file": 0, "row": 0}
    first = None  # kind of the first row
    for i, (split, path) in enumerate(files.items()):
        if i < state["file"]:
            continue
        rows, skip = [], state["row"] if i == state["file"] else 0
        for n, row in json_rows(path, 0):
            kind = _kind_of(row, path, n)
            first = first or kind
            if kind != first:
                what = f"a row of {kind}, but the rows before have {first}"
                raise ValueError(f"{path}: line {n:,}: {what}; keep them in separate data types")
            if n <= skip:
                continue
            rows.append((split, kind, row))
            if len(rows) == 64:
                yield rows, {"file": i, "row": n}
                rows = []
        yield rows, {"file": i + 1, "row": 0}


def _kind_of(row: dict, path: Path, n: int) -> str:
    """The kind of a row: "text", or "prompt and completion". Raises ValueError for any other."""
    for names in (("text",), ("prompt", "completion")):
        if all(isinstance(row.get(name), str) for name in names):
            return " and ".join(names)
    columns = ", ".join(map(str, row))[:80] or "nothing"
    what = f"has {columns}, but neither a text nor a prompt and a completion"
    raise ValueError(f"{path}: line {n:,}: {what}; prepare_data.py writes such rows")


def _tokens(rows: list, split: str, tokenizer: Tokenizer) -> tuple:
    """(ids, documents, bytes) of the rows of a split, and for prompts which tokens are trained."""
    ids, trained, n_bytes, n_documents = [], [], 0, 0
    has_prompts = rows and rows[0][1] != "text"
    for _, _, row in (row for row in rows if row[0] == split):
        prompt, code = ("", row["text"]) if not has_prompts else (row["prompt"], row["completion"])
        before, after = tokenizer.encode(prompt), tokenizer.encode(code)
        ids += [before, after, [tokenizer.eot]]
        trained += [np.zeros(len(before)), np.ones(len(after) + 1)]
        n_bytes += len(f"{prompt}{code}".encode(errors="replace"))
        n_documents += 1
    ids = np.concatenate([np.zeros(0), *ids]).astype(np.uint32)
    result = (ids, n_documents, n_bytes)
    if not has_prompts:
        return result
    return (*result, np.concatenate([np.zeros(0), *trained]).astype(np.uint8))


def documents_of(inputs: torch.Tensor, eot: int) -> torch.Tensor:
    """Number (B, T) of the document of each token of packed rows (B, T), from 0 in each row."""
    ends = (inputs == eot).long()
    return ends.cumsum(dim=1) - ends


class PackedBatches(TrainBatches):
    """Rows of token shards whose documents are kept apart: a batch also has "documents"."""

    def __init__(self, shards: Shards, T: int, seed: int, vocab_size: int, eot: int):
        super().__init__(shards, T, seed, vocab_size)
        self.eot = eot

    def batch(self, first: int, n: int) -> dict:
        """As TrainBatches.batch, with documents (n, T) int64."""
        batch = super().batch(first, n)
        return batch | {"documents": documents_of(batch["inputs"], self.eot)}


# ------------------------------------------------------------------------------------------- model


def tiny_config(vocab_size: int, block_size: int) -> LlamaConfig:
    """The shape of a Qwen2 of two layers."""
    return LlamaConfig(
        vocab_size, block_size, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_hidden=128,
        head_dim=16, qkv_bias=True, tied=True,
    )  # fmt: skip


@dataclass
class Base:
    """The weights that the training begins with."""

    config: LlamaConfig
    weights: Weights | None  # None: random ones
    tokenizer: Tokenizer
    files: dict[str, bytes]  # its tokenizer's files and config.json, as they are


# files of a Hugging Face folder that belong to a model and are no weights
MODEL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "tokenizer.model"),
)


def open_base(config: QConfig) -> Base:
    """
    The model that --model_name names; reads its shapes, not its weights.

    Raises FileNotFoundError or ValueError if there is none, if it is of another family, or its
    tokenizer does not fit.
    """
    if config.model_name == TINY:
        tokenizer = byte_tokenizer()
        shape = tiny_config(tokenizer.vocab_size, config.max_seq_length)
        settings = hf_llama.settings_of_config(shape)
        files = {"config.json": json.dumps(settings, indent=2).encode()}
        return Base(shape, None, tokenizer, files | {"tokenizer.json": tokenizer.to_json()})
    is_local = os.path.lexists(config.model_name)
    try:
        weights = open_weights(config.model_name if is_local else f"hf:{config.model_name}")
    except (ValueError, FileNotFoundError) as e:
        raise type(e)(f"--model_name: {e}") from e
    if weights.config.family != "llama":
        what = f"{config.model_name} is a {weights.config.family}"
        kinds = ", ".join(hf_llama.MODEL_TYPES)
        raise ValueError(f"--model_name: {what}; this recipe trains {kinds}")
    if weights.tokenizer_path is None:
        fix = "put its tokenizer.json beside the weights"
        raise ValueError(f"--model_name: {config.model_name} has no tokenizer; {fix}")
    tokenizer = Tokenizer.load(weights.tokenizer_path)
    V = weights.config.vocab_size
    if tokenizer.vocab_size > V:
        what = f"its tokenizer has {tokenizer.vocab_size:,} ids, the model only {V:,}"
        raise ValueError(f"--model_name: {config.model_name}: {what}; give the model's own")
    if config.max_seq_length > weights.config.block_size:
        longest = f"{weights.config.block_size:,} positions that the model was made for"
        raise ValueError(f"--max_seq_length: {config.max_seq_length:,} is more than the {longest}")
    folder = Path(weights.tokenizer_path)
    paths = [folder / name for name in MODEL_FILES if (folder / name).is_file()]
    files = {path.name: path.read_bytes() for path in paths}
    return Base(weights.config, weights, tokenizer, files | {"tokenizer.json": tokenizer.to_json()})


def load_base(model: Llama, base: Base, dtype: torch.dtype, quantise: bool) -> str:
    """
    Give a model without memory the weights of its base; returns a hash of them.

    One tensor at a time, so that no more than the model and one tensor (of a block, if its linear
    layers are quantised) is in memory.
    """
    digest = hashlib.sha256()

    def read(name: str) -> torch.Tensor:
        tensor = base.weights.tensors[name].read()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return tensor.to(dtype)

    modules = {name: m for name, m in model.named_modules() if isinstance(m, LlamaBlock)}
    of_blocks = {f"{name}.{key}" for name, block in modules.items() for key in block.state_dict()}
    for name, block in modules.items():
        tensors = {key: read(f"{name}.{key}") for key in block.state_dict()}
        block.load_state_dict(tensors, assign=True)
        if quantise:
            nf4.quantise_linears(block, (LlamaBlock,))
    rest = {name: read(name) for name in tensor_shapes(base.config) if name not in of_blocks}
    model.load_state_dict(rest, assign=True, strict=False)
    return digest.hexdigest()


def hash_of(base: Base) -> str:
    """The hash that `load_base` returns, for a rank that holds no weights."""
    return load_base(shell(base.config), base, torch.float32, quantise=False)


def make_model(config: QConfig, base: Base, building) -> tuple[Llama, str]:
    """(model with what is trained, hash of its base)."""
    quantise = config.training_method == "qlora"
    with building:
        is_shell = torch.empty(0).is_meta  # on ranks that get their part later, or for a plan
    if base.weights is None:
        torch.manual_seed(config.seed)
        with building:
            model = Llama(base.config)
        of_base = f"random, seed {config.seed}"
        if quantise and not is_shell:
            nf4.quantise_linears(model, (LlamaBlock,))
    else:
        model = shell(base.config)
        # what is trained is in fp32; a frozen base in the dtype of the products
        frozen = config.training_method != "full" and config.parallel != "fsdp"
        dtype = DTYPES[config.dtype] if frozen else torch.float32
        of_base = hash_of(base) if is_shell else load_base(model, base, dtype, quantise)
    if config.training_method != "full":
        numbers = (config.lora_rank, config.lora_alpha, config.lora_dropout)
        lora.add_lora(model, *numbers, within=(LlamaBlock,), seed=config.seed)
    return model, of_base


# --------------------------------------------------------------------------------------------- job


def code_loss(model, batch) -> torch.Tensor:
    """fp32 sum of the cross-entropy over the targets; each document reads only itself."""
    return model(batch["inputs"], batch["targets"], batch["documents"])


def code_job(config: QConfig, building) -> Job:
    """The job of a run. Raises ValueError or FileNotFoundError for what cannot be trained."""
    base = open_base(config)
    shape, T, eot = base.config, config.max_seq_length, base.tokenizer.eot
    planned = config.plan or config.plan_memory_gb
    text = None if planned else open_code(config, base.tokenizer)
    model, of_base = make_model(config, base, building)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def dummy_batch(n_rows: int) -> dict:
        ids = torch.randint(shape.vocab_size, (n_rows, T))
        return {"inputs": ids, "targets": ids, "documents": torch.zeros_like(ids)}

    # without gradients of frozen weights the backward pass is half as much work
    flops = flops_per_token(replace(shape, block_size=T))
    trains_all = config.training_method == "full"
    job = Job(
        family=shape.family,
        model=model,
        train_batches=None,
        val_batches=None,
        loss_fn=code_loss,
        blocks=(LlamaBlock,),
        flops_per_token=flops if trains_all else flops * 2 / 3,
        tokens_per_row=T,
        facts={
            "model_config": asdict(shape),
            "base": of_base,
            "trained": f"{config.training_method}, {n_trained:,} numbers",
        },
        checkpoint_name="checkpoint-{step}",
        dummy_batch=dummy_batch,
        text_log="logs/training_log.txt",
        eval_log="logs/eval_results.json",
        results="results",
        run_files={"config.yaml": yaml.safe_dump(asdict(config), sort_keys=False).encode()},
        files=base.files,
    )
    if not trains_all:
        settings = lora.adapter_config(model, config.model_name)
        files = {"adapter_config.json": json.dumps(settings, indent=2).encode()}
        job = replace(
            job,
            weights=lora.adapter_tensors,
            weights_file=ADAPTERS,
            files=base.files | files,
        )
    if text is None:
        return job

    def test_batches():
        B, V = config.batch_size, shape.vocab_size
        for batch in val_batches(text.test, T, B, V, config.eval_tokens):
            yield batch | {"documents": documents_of(batch["inputs"], eot)}

    token_bytes = np.zeros(shape.vocab_size, dtype=np.int64)
    token_bytes[: base.tokenizer.vocab_size] = base.tokenizer.token_bytes()
    return replace(
        job,
        train_batches=PackedBatches(text.train, T, config.seed, shape.vocab_size, eot),
        val_batches=test_batches,
        facts=job.facts | {"data": text.data, "tokenizer": base.tokenizer.fingerprint},
        token_bytes=token_bytes,
        sample=sampler(base.tokenizer),
    )


# ------------------------------------------------------------------------------------------- merge


@dataclass
class MergeConfig:
    """Merge the adapters of a checkpoint into their base, as a Hugging Face folder."""

    checkpoint: tyro.conf.Positional[str]  # run folder or checkpoint folder
    out: tyro.conf.Positional[str]  # folder for the merged model
    base: str | None = None  # the base, if it is no longer where the run found it
    debug: bool = False  # show the traceback of an error


def merge(config: MergeConfig) -> Path:
    """
    Write the base in its own dtype with the adapters added; returns the folder.

    One shard at a time is in memory. Raises ValueError if the checkpoint has no adapters, if they
    were trained on other weights, or if the folder exists.
    """
    out = Path(config.out)
    if out.exists():
        raise ValueError(f"{out}: already exists; choose another folder")
    folder = checkpoint.newest_checkpoint(config.checkpoint, "checkpoint-{step}")
    adapters, state = checkpoint.load_checkpoint(folder)
    settings = state.get("config", {})
    if state.get("weights_file") != ADAPTERS or "base" not in state:
        raise ValueError(f"{folder}: holds no adapters; a full checkpoint needs no merge")
    settings = QConfig(model_name=config.base or settings["model_name"], **{
        name: settings[name] for name in ("max_seq_length", "seed", "lora_rank", "lora_alpha")
    })  # fmt: skip
    base = open_base(settings)
    if base.weights is None:
        raise ValueError(f"{folder}: its base is random; train on a model to merge into it")
    if hash_of(base) != state["base"]:
        what = f"was trained on other weights than {settings.model_name} has"
        raise ValueError(f"{folder}: {what}; give the right ones with --base")
    lora.check_merge({name: t.shape for name, t in base.weights.tensors.items()}, adapters)
    scaling = settings.lora_alpha / settings.lora_rank

    def merged(name: str, stored: Stored) -> Stored:
        def read(_transposed: bool) -> torch.Tensor:
            return lora.merged(name, stored.read(), adapters, scaling)

        return Stored(stored.shape, read, stored.dtype)

    tensors = {name: merged(name, stored) for name, stored in base.weights.tensors.items()}
    dtype = next(iter(base.weights.tensors.values())).read().dtype
    part = out.with_name(f".{out.name}.part")
    with no_empty_folders(out.parent):
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(parents=True)
            formats.write_folder(part, tensors, dtype)
            for name, data in base.files.items():
                (part / name).write_bytes(data)
            rename_durably(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    print(f"{out}: {folder.name} of {config.checkpoint}, merged into {settings.model_name}")
    return out


def main(argv: list[str]) -> None:
    """Run the command line `merge CHECKPOINT OUT`."""
    if argv[:1] not in (["merge"], ["--help"], ["-h"]):
        raise ValueError("say what to do: merge CHECKPOINT OUT; run_pretraining.py trains")
    merge(parse(MergeConfig, argv[1:] if argv[0] == "merge" else argv))


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
