"""
Convert weights from and to other formats, and inspect checkpoints.

    python wt_load.py import hf:gpt2 runs/gpt2               # GPT-2 from the hub or its cache
    python wt_load.py import PATH runs/theirs                # Hugging Face, OpenAI's TensorFlow
                                                             # files, nanoGPT, LLMs-from-scratch
    python wt_load.py export runs/advanced --to hf exported  # opens in AutoModelForCausalLM;
                                                             # also: gguf FILE, nanogpt FILE
    python wt_load.py info runs/advanced                     # model, progress, how to resume
    python wt_load.py verify runs/advanced                   # hashes, shapes, finite values
    python wt_load.py list runs/advanced                     # all its checkpoints
    python wt_load.py diff runs/a runs/b                     # which tensors differ, by how much
    python wt_load.py average runs/a runs/b --out runs/mean  # the mean of their weights, as a run

An import is a run folder, to sample from or to train further. A run folder means its newest good
checkpoint; info, verify and diff also read the formats that import reads. No code from a file runs.
Only import, export and average write, each to a new place that is renamed when it is complete.
Takes seconds per GB, and memory for 1.1 times the weights.
"""

from __future__ import annotations

# before torch is imported, so that Ctrl-C in those seconds leaves no traceback
if __name__ == "__main__":
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import contextlib
import hashlib
import json
import os
import re
import reprlib
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from gpt_train import SIZES, GPTConfig, load_model
from parts.base.dtypes import DTYPES
from parts.base.files import (
    fsync,
    make_folder,
    no_empty_folders,
    read_json,
    rename_durably,
    why_not_written,
)
from parts.base.text import one_line
from parts.cli.config import parse, positional
from parts.cli.launch import error_line, run_script
from parts.data.tokenizers import FILES as TOKENIZER_FILES
from parts.data.tokenizers import Tokenizer, byte_tokenizer, gpt2_tokenizer
from parts.model.families import FAMILIES, check_tensors, config_of, shell
from parts.model.llama import LlamaConfig
from parts.storage import formats, hf_llama
from parts.storage.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    save_checkpoint,
    step_of,
    verify_checkpoint,
)
from parts.storage.formats import Stored
from parts.storage.gguf_format import write_gguf
from parts.storage.hub import from_hub
from parts.storage.tf_bundle import find_prefix
from parts.training.plan import count_parameters

# ------------------------------------------------------------------------------------ configuration


@dataclass
class VerifyConfig:
    """Check hashes, shapes and values of a checkpoint; the last line is a hash of its weights."""

    # run folder (its newest checkpoint), checkpoint folder, or weights as for import
    path: positional("PATH")
    n_head: int | None = None  # attention heads, if neither file nor size tells
    debug: bool = False  # show the traceback of an error


@dataclass
class InfoConfig(VerifyConfig):
    """Describe a checkpoint: its model, its progress and data, how to resume and how to sample."""

    tensors: bool = False  # also list every tensor


@dataclass
class ListConfig(VerifyConfig):
    """List the checkpoints of a run, including damaged ones."""


@dataclass
class ImportConfig:
    """Convert weights into a run, to sample from, score, or train further (with --init_from)."""

    # hf:NAME, a Hugging Face or TensorFlow folder, or a safetensors or torch file
    source: positional("SOURCE")
    run_dir: positional("RUN")  # run folder to write
    tokenizer: str | None = None  # folder, file, gpt2 or bytes; None: the source's, else GPT-2's
    n_head: int | None = None  # attention heads, if neither file nor size tells
    debug: bool = False  # show the traceback of an error


@dataclass
class ExportConfig:
    """Write a checkpoint for other programs."""

    path: positional("PATH")  # run folder (its newest checkpoint) or checkpoint folder
    to: tuple[Literal["hf", "gguf", "nanogpt"], str]  # hf FOLDER, gguf FILE or nanogpt FILE
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the weights written
    force: bool = False  # overwrite an earlier export
    debug: bool = False  # show the traceback of an error


@dataclass
class DiffConfig:
    """Compare the weights of two checkpoints, in any formats."""

    a: positional("A")  # the first
    b: positional("B")  # the second
    n_head: int | None = None  # attention heads, if neither file nor size tells
    debug: bool = False  # show the traceback of an error


@dataclass
class AverageConfig:
    """
    Average several checkpoints of one model, as a new run.

    Along one run the mean is often the better model (Izmailov et al. 2018).
    """

    paths: positional("RUN ...", tuple[str, ...])  # two or more run or checkpoint folders
    out: str  # run folder to write
    debug: bool = False  # show the traceback of an error


# ------------------------------------------------------------------------------------------ reading


@dataclass
class Weights:
    """A model in any format."""

    config: GPTConfig | LlamaConfig
    tensors: dict[str, Stored]  # by our names
    tokenizer_path: Path | None  # a tokenizer beside the weights
    facts: dict  # trainer state of a checkpoint of this project, or "kind" and "source" of another


def open_weights(source: str, n_head: int | None = None) -> Weights:
    """
    The model at `source`: a run or checkpoint folder, weights of another project, or hf:NAME.

    Reads names and shapes only, and an output head that may be the embedding. Raises
    FileNotFoundError or ValueError if there are no weights, if they are damaged or of another
    family, and with a list of all tensors that do not fit.
    """
    path = from_hub(source.removeprefix("hf:")) if source.startswith("hf:") else Path(source)
    if not os.path.lexists(path):
        raise FileNotFoundError(
            f"{path}: does not exist; give a run folder, weights of another project, or hf:NAME"
        )
    if os.path.lexists(path / "MANIFEST.json") or (path / "checkpoints").is_dir():
        return _open_checkpoint(newest_checkpoint(path))
    tensors, settings, kind = _read_format(path)
    try:
        if settings.get("model_type") in hf_llama.MODEL_TYPES:
            config, named = _llama_of(tensors, settings)
        else:
            config, named = _gpt_of(tensors, settings, n_head)
        check_tensors(named, config)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    folder = path if path.is_dir() else path.parent
    beside = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    tokenizer_path = folder if beside else None
    return Weights(config, named, tokenizer_path, {"kind": kind, "source": source})


def _gpt_of(tensors: dict, settings: dict, n_head: int | None) -> tuple[GPTConfig, dict]:
    """(shape, tensors by our names) of a GPT-2. Raises ValueError if it is none."""
    _check_arithmetic(settings)
    if not settings and any(name.endswith(".self_attn.q_proj.weight") for name in tensors):
        raise ValueError(
            "its tensors are those of a Llama, but it has no config.json; give the complete folder"
        )
    named = formats.our_names(tensors)
    shape = formats.shape_of(named, settings)
    config = GPTConfig(**shape, n_head=_n_head(shape, settings, n_head))
    if config.tied and settings.get("tie_word_embeddings") is False:
        raise ValueError(
            "config.json says that the head is not the embedding, but lm_head.weight is missing; "
            "get the complete weights, or correct config.json"
        )
    config.tied = config.tied or _head_is_embedding(named, "wte.weight")
    if config.tied:
        named.pop("lm_head.weight", None)
    if settings.get("bias") is False:  # nanoGPT's option: the same model with biases of zero
        for name in list(named):
            if name.endswith(".weight") and name.startswith(("h.", "ln_f")) and named[name].shape:
                bias = name.removesuffix("weight") + "bias"
                named.setdefault(bias, formats.zeros(named[name].shape[0]))
    return config, named


def _llama_of(tensors: dict, settings: dict) -> tuple[LlamaConfig, dict]:
    """(shape, tensors) of a Llama, Qwen2 or Mistral. Raises ValueError for other arithmetic."""
    config = hf_llama.config_of_settings(settings)
    named = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tied and "lm_head.weight" in named:
        if not _head_is_embedding(named, "model.embed_tokens.weight"):
            raise ValueError(
                "config.json says tie_word_embeddings, but lm_head.weight is not the embedding; "
                "correct config.json"
            )
        named.pop("lm_head.weight")
    return config, named


def _open_checkpoint(folder: Path) -> Weights:
    """The model in a checkpoint folder of this project that was verified."""
    tensors, state = load_checkpoint(folder)
    try:
        config = config_of(state)
        check_tensors(tensors, config)
    except ValueError as e:
        raise ValueError(f"{folder}: holds no model of this project: {str(e)[:300]}") from e
    named = {}
    for name, t in tensors.items():
        named[name] = Stored(tuple(t.shape), lambda _transposed, t=t: t.detach(), str(t.dtype))
    return Weights(config, named, folder, {"checkpoint": str(folder), **state})


def _read_format(path: Path) -> tuple[dict[str, Stored], dict, str]:
    """(tensors, configuration beside them, name of the format) of weights of another project."""
    if path.is_dir() and (prefix := find_prefix(path)):
        settings = _read_settings(path / "hparams.json")
        return formats.read_tensorflow(prefix), settings, "TensorFlow checkpoint"
    if path.is_dir():
        settings = _read_settings(path / "config.json")
        return formats.read_folder(path), settings, "Hugging Face folder"
    if path.suffix == ".safetensors":
        return formats.read_safetensors(path), {}, "safetensors file"
    return *formats.read_torch(path), "torch file"


def _read_settings(path: Path) -> dict:
    return read_json(path, "download it again, or delete it") if path.exists() else {}


# what the forward pass of our GPT does; a configuration without the setting means its default
ARITHMETIC = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def _check_arithmetic(settings: dict) -> None:
    """Refuse a configuration that computes something else from the same tensors."""
    kind = settings.get("model_type", "gpt2")
    if kind != "gpt2":
        known = ", ".join(("gpt2", *hf_llama.MODEL_TYPES))
        raise ValueError(
            f"a model of type {reprlib.repr(kind)}, not {known}; use a recipe for other families"
        )
    for name, supported in ARITHMETIC.items():
        value = settings.get(name, supported[0])
        if value not in supported:
            what = f"{name} is {reprlib.repr(value)}, this GPT computes with {supported[0]!r}"
            raise ValueError(f"{what}; use weights trained with that")


def _n_head(shape: dict, settings: dict, n_head: int | None) -> int:
    L, C = shape["n_layer"], shape["n_embd"]
    by_size = {(n_layer, n_embd): H for n_layer, H, n_embd in SIZES.values()}
    H = settings.get("n_head") or n_head or by_size.get((L, C))
    if not isinstance(H, int):
        raise ValueError(
            f"{L} blocks of width {C} may have any number of attention heads, "
            f"and n_head is {reprlib.repr(H)}; give --n_head"
        )
    return H


def _head_is_embedding(named: dict[str, Stored], embedding_name: str) -> bool:
    head, embedding = named.get("lm_head.weight"), named.get(embedding_name)
    if head is None or embedding is None or head.shape != embedding.shape:
        return False
    return torch.equal(head.read(), embedding.read())


def load_gpt(source: str, n_head: int | None = None) -> torch.nn.Module:
    """
    The model of weights in any format, in fp32 and eval mode, on the CPU.

    Never takes more memory than the weights and one tensor.
    """
    weights = open_weights(source, n_head)
    model = shell(weights.config)
    tensors = {name: weights.tensors[name].read().float() for name in model.state_dict()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


# ------------------------------------------------------------------------------------------- import


def import_weights(config: ImportConfig) -> None:
    """Write a run folder with one checkpoint, of step 0."""
    refuse_existing(config.run_dir)
    weights = open_weights(config.source, config.n_head)
    tokenizer = tokenizer_of(weights, config.tokenizer)
    tensors = {name: t.read().float() for name, t in weights.tensors.items()}
    state = {
        "script": "wt_load.py",
        "family": weights.config.family,
        "step": 0,
        "tokens": 0,
        "model_config": asdict(weights.config),
        "tokenizer": tokenizer.fingerprint,
        "imported_from": config.source,
        "kind": weights.facts.get("kind", "checkpoint of this project"),
    }
    files = {"tokenizer.json": tokenizer.to_json()}
    folder = save_new_run(config.run_dir, 0, tensors, state, files)
    n = count_parameters(weights.config)
    print(f"{folder}: {n:,} parameters from {config.source}, tokenizer {tokenizer.name}")
    print(f"python gpt_train.py --checkpoint {config.run_dir} --prompt 'Once'")


def refuse_existing(run_dir: str) -> None:
    """Raises ValueError if the path is a file, or a folder that is not empty."""
    if os.path.isfile(run_dir) or (os.path.isdir(run_dir) and os.listdir(run_dir)):
        raise ValueError(f"{run_dir}: exists already; name another run folder, or move it away")


def save_new_run(run_dir: str, step: int, tensors: dict, state: dict, files: dict) -> Path:
    """The first checkpoint of a run folder; if it cannot be written, nothing is left there."""
    with no_empty_folders(Path(run_dir) / "checkpoints"):
        return save_checkpoint(run_dir, step, {"model.safetensors": tensors}, state, files, 1)


def tokenizer_of(weights: Weights, spec: str | None) -> Tokenizer:
    """
    The tokenizer `spec`, otherwise the one beside the weights, otherwise GPT-2's.

    Raises ValueError if its vocabulary does not fit the model.
    """
    V = weights.config.vocab_size
    if spec == "bytes":
        tokenizer = byte_tokenizer()
    elif spec not in (None, "gpt2") or (spec is None and weights.tokenizer_path):
        tokenizer = Tokenizer.load(spec or weights.tokenizer_path)
    elif spec == "gpt2" or V in (50257, 50304):  # nanoGPT pads it to a multiple of 64
        try:
            tokenizer = gpt2_tokenizer()
        except OSError as e:
            raise ValueError(
                "--tokenizer: GPT-2's is neither in tiktoken's cache nor reachable "
                f"({error_line(e)}); give a folder or file with one"
            ) from e
    else:
        raise ValueError(
            f"--tokenizer: the source has none for its vocabulary of {V:,}; "
            "give a tokenizer.json or merges.txt"
        )
    if tokenizer.vocab_size > V or (tokenizer.vocab_size < V - 64 and not spec):
        raise ValueError(
            f"--tokenizer: the tokenizer has {tokenizer.vocab_size:,} ids, the model a vocabulary "
            f"of {V:,}; give the tokenizer that the model was trained with"
        )
    return tokenizer


# ------------------------------------------------------------------------------------------- export

# files of an export to hf
EXPORTED = re.compile(
    r"(generation_|tokenizer_)?config\.json|tokenizer\.json|README\.md"
    r"|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)
LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) at Hugging Face
MAX_FP16 = 65504


def export(config: ExportConfig) -> None:
    """Write a checkpoint in another format, under a temporary name that is renamed at the end."""
    kind, target = config.to[0], Path(config.to[1])
    _check_target(kind, target, config.force)
    folder = newest_checkpoint(config.path)
    model, tokenizer, state = load_model(folder, torch.device("cpu"))
    dtype, tensors = DTYPES[config.dtype], model.state_dict()
    for name, t in tensors.items() if config.dtype == "fp16" else ():
        if t.abs().max() > MAX_FP16:
            what = f"{name} has values beyond {MAX_FP16}, the largest of fp16"
            raise ValueError(f"--dtype fp16: {what}; use bf16 or fp32")
    part = target.with_name(f".{target.name}.part")
    _delete(part)
    write = {"hf": _to_hf, "gguf": _to_gguf, "nanogpt": _to_nanogpt}[kind]
    with no_empty_folders(part.parent):
        try:
            make_folder(part.parent)
            write(part, model.config, tensors, dtype, tokenizer, state)
            for file in part.iterdir() if part.is_dir() else ():
                fsync(file)
            if target.is_dir():
                _delete(target)
            rename_durably(part, target)
        except (OSError, SafetensorError, RuntimeError) as e:  # each library has its own error
            fix = "nothing was written; free some space and run the same command again"
            raise OSError(f"{target}: {why_not_written(e, part.parent)}; {fix}") from e
        finally:
            _delete(part)
    n_bytes = sum(f.stat().st_size for f in ([target] if target.is_file() else target.iterdir()))
    print(f"{target}: step {state['step']} of {folder}, {config.dtype}, {n_bytes:,} bytes")


def _check_target(kind: str, target: Path, force: bool) -> None:
    """Raises ValueError if an export would overwrite what it must not."""
    is_empty_folder = target.is_dir() and not any(target.iterdir())
    if os.path.lexists(target) and not is_empty_folder and not force:
        raise ValueError(
            f"--to: {target} exists already; name another place, or add --force to overwrite it"
        )
    if force and target.exists() and target.is_dir() != (kind == "hf"):
        found, needed = ("folder", "file") if target.is_dir() else ("file", "folder")
        raise ValueError(
            f"--to: {target} is a {found}, {kind} writes a {needed}; name another place"
        )
    others = [f.name for f in target.iterdir()] if target.is_dir() else []
    if others := [name for name in others if not EXPORTED.fullmatch(name)]:
        raise ValueError(
            f"--to: {target} also holds {min(others)}, which would be deleted; name another place"
        )


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _to_hf(folder: Path, config, tensors: dict, dtype, tokenizer: Tokenizer, state: dict) -> None:
    folder.mkdir()
    named = {}
    for name, t in tensors.items():
        named[name] = Stored(tuple(t.shape), partial(formats.in_memory, t))
    if config.family == "gpt":
        settings = settings_of_gpt(config)
        named = {n: t.transpose() if n.endswith(LINEAR) else t for n, t in named.items()}
        named = {n if n.startswith("lm_") else f"transformer.{n}": t for n, t in named.items()}
    else:
        settings = hf_llama.settings_of_config(config)
    formats.write_folder(folder, named, dtype)
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eot}
    texts = {i: text for text, i in tokenizer.special.items()}
    settings |= {"dtype": str(dtype).removeprefix("torch."), **ids}
    tokenizer_settings = {
        "bos_token": texts[tokenizer.bos],
        "eos_token": tokenizer.eot_text,
        "unk_token": tokenizer.eot_text,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False,
    }
    for name, value in {
        "config.json": settings,
        "tokenizer_config.json": tokenizer_settings,
        "generation_config.json": {**ids, "pad_token_id": tokenizer.eot},
    }.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(tokenizer.to_json())
    (folder / "README.md").write_text(model_card(config, tokenizer, state), encoding="utf-8")


def settings_of_gpt(config: GPTConfig) -> dict:
    """The config.json of a GPT, for transformers."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": config.tied,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# A {kind}

| | |
|---|---|
{rows}
Begin a document with {eot}: in training it came before each one.
"""


def model_card(config: GPTConfig, tokenizer: Tokenizer, state: dict) -> str:
    """The README.md of an export: facts of a checkpoint; unknown ones are left out."""
    settings, best = state.get("config", {}), state.get("best") or {}
    facts = {
        "parameters": f"{count_parameters(config):,}",
        "steps": f"{state['step']:,}",
        "tokens seen": f"{state.get('tokens', 0):,}",
    }
    if best.get("val_loss"):
        loss = f"{best['val_loss']:.4f} at step {best['step']:,}"
        facts["validation loss (nats per token)"] = loss
    names = [str(settings[k]) for k in ("dataset_name", "dataset_subset") if settings.get(k)]
    if names:
        facts["text"] = " ".join(names)
    if "imported_from" in state:
        facts["imported from"] = state["imported_from"]
    facts["tokenizer"] = f"{tokenizer.name}, {tokenizer.vocab_size:,} ids"
    facts["context"] = f"{config.block_size} tokens"
    facts["blocks, heads, width"] = f"{config.n_layer}, {config.n_head}, {config.n_embd}"
    for name in ("max_lr", "batch_size", "optimizer", "seed"):
        if settings.get(name, "") != "":
            facts[name] = settings[name]
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    return CARD.format(kind=FAMILIES[config.family].title, rows=rows, eot=tokenizer.eot_text)


def _to_gguf(file: Path, config, tensors: dict, dtype, tokenizer: Tokenizer, state: dict) -> None:
    _refuse_other_families("gguf", config)
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            "--to gguf: llama.cpp would give other ids than its tokenizer; use --to hf"
        )
    write_gguf(file, config, tensors, dtype, tokenizer, state["step"])


def _refuse_other_families(kind: str, config) -> None:
    if config.family != "gpt":
        raise ValueError(
            f"--to {kind}: writes a GPT-2, this is a {config.family}; use --to hf"
            + (", and llama.cpp's convert_hf_to_gguf.py on the result" if kind == "gguf" else "")
        )


def _to_nanogpt(
    file: Path, config, tensors: dict, dtype, tokenizer: Tokenizer, state: dict
) -> None:
    _refuse_other_families("nanogpt", config)
    if not config.tied:
        what = "its output head is the embedding, this model has a separate one"
        raise ValueError(f"--to nanogpt: {what}; use --to hf")
    named = {f"transformer.{name}": t.to(dtype) for name, t in tensors.items()}
    named["lm_head.weight"] = named["transformer.wte.weight"]
    shape = {name: value for name, value in asdict(config).items() if name != "tied"}
    checkpoint = {
        "model": named,
        "model_args": {**shape, "bias": True},
        "iter_num": state["step"],
        "best_val_loss": (state.get("best") or {}).get("val_loss", 1e9),
        "config": {"out_dir": "out"},
    }
    torch.save(checkpoint, file)


# ----------------------------------------------------------------------------------- one checkpoint


def weights_hash(tensors: dict) -> str:
    """
    sha256 of named tensors: their names, dtypes, shapes and bytes, in the order of the names.

    The same for the same weights in every file format.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


ADAPTERS = "adapter_model.safetensors"  # as peft and recipes name it


def adapters_of(path: str) -> tuple[Path, dict, dict] | None:
    """(folder, tensors, trainer state) of a checkpoint that has adapters only; None of another."""
    folders = (Path(path), *Path(path).glob("checkpoints/*"))
    if not any((f / "MANIFEST.json").is_file() and (f / ADAPTERS).is_file() for f in folders):
        return None  # without comparing hashes, which takes seconds per GB
    folder = newest_checkpoint(path)
    return folder, *load_checkpoint(folder)


def info_of_adapters(folder: Path, tensors: dict, state: dict) -> None:
    """Print what a checkpoint with adapters is."""
    settings = read_json(folder / "adapter_config.json", "use another checkpoint")
    print(f"{folder}: adapters only, of a model of the family {one_line(state['family'], 50)}")
    for name in ("base_model_name_or_path", "r", "lora_alpha", "lora_dropout"):
        print(one_line(f"{name}: {settings.get(name)}", 200))
    n = sum(t.numel() for t in tensors.values())
    print(f"numbers: {n:,}, {4 * n / 1e6:,.1f} MB in fp32")
    _print_progress(state)
    _print_how_to_resume(folder.parent.parent)
    print("to sample: merge them into their base (recipes/q_lora/train_pretrain.py merge)")


def _print_how_to_resume(run_dir: Path) -> None:
    with contextlib.suppress(ValueError, KeyError):  # no run.json, as of an import
        print(f"to resume: {one_line(read_json(run_dir / 'run.json')['resume'])}")


def info(config: InfoConfig) -> None:
    """Print what a checkpoint is."""
    if found := adapters_of(config.path):
        return info_of_adapters(*found)
    weights = open_weights(config.path, config.n_head)
    c, facts = weights.config, weights.facts
    writer = facts.get("script", "this project")
    if "family" in facts:
        writer = f"family {facts['family']}"
    kind = facts.get("kind", f"checkpoint of {writer}")
    print(f"{facts.get('checkpoint', config.path)}: {one_line(kind, 100)}")
    heads = f"{c.n_head} heads"
    if c.family == "llama" and c.n_kv_head != c.n_head:
        heads += f" with {c.n_kv_head} keys and values"
    shape = f"{c.n_layer} blocks, {heads}, width {c.n_embd}, context {c.block_size}"
    head = "tied head" if c.tied else "separate head"
    print(f"model: {FAMILIES[c.family].title}, {shape}, vocabulary {c.vocab_size:,}, {head}")
    n = count_parameters(c)
    print(f"parameters: {n:,}, {4 * n / 1e6:,.1f} MB in fp32")
    if "checkpoint" in facts:
        _print_progress(facts)
        _print_how_to_resume(Path(facts["checkpoint"]).parent.parent)
        print(f"to sample: python gpt_train.py --checkpoint {facts['checkpoint']}")
    else:
        print(f"tokenizer: {weights.tokenizer_path or 'none beside it'}")
        print(f"to use it: python wt_load.py import {config.path} runs/NAME")
    if config.tensors:
        for name, t in weights.tensors.items():
            print(f"{' x '.join(map(str, t.shape)):16} {name}")


def _print_progress(facts: dict) -> None:
    best = facts.get("best") or {}
    loss = ""
    if best.get("val_loss"):
        loss = f", best validation loss {best['val_loss']:.4f} at step {best['step']}"
    print(f"trained: step {facts.get('step')}, {facts.get('tokens', 0):,} tokens{loss}")
    data, tokenizer = (str(facts.get(k, "not recorded"))[:16] for k in ("data", "tokenizer"))
    print(one_line(f"data: {data}, tokenizer: {tokenizer}"))


def verify(config: VerifyConfig) -> None:
    """Check files against their hashes, shapes against the model, and that values are finite."""
    if found := adapters_of(config.path):
        folder, tensors, facts = found
        facts = {"checkpoint": folder, **facts}
    else:
        weights = open_weights(config.path, config.n_head)
        tensors = {name: t.read() for name, t in weights.tensors.items()}
        facts = weights.facts
    if wrong := [name for name, t in tensors.items() if not torch.isfinite(t).all()]:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{config.path}: {', '.join(wrong[:3])}{more}: not all values are finite; "
            "the training diverged, use an earlier checkpoint"
        )
    n_values = f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} values"
    if "checkpoint" in facts:
        print(f"{facts['checkpoint']}: intact; step {facts.get('step')}, {n_values}")
    else:
        print(f"{config.path}: shapes and values are right, it has no hashes to check; {n_values}")
    print(weights_hash(tensors))


# ------------------------------------------------------------------------------ several checkpoints


def list_run(config: ListConfig) -> None:
    """Print a line for each checkpoint of a run."""
    folders = list_checkpoints(config.path)
    if not folders:
        what = formats.instead_of_a_run(config.path)
        raise FileNotFoundError(f"{config.path}: no checkpoints here{what}")
    states, damage = {}, {}
    for folder in folders:
        try:
            verify_checkpoint(folder)
            states[folder] = read_state(folder)
        except ValueError as e:
            damage[folder] = e
    # each checkpoint names the best so far: the newest knows
    newest = next(reversed(states.values()), {})
    best_step = (newest.get("best") or {}).get("step")
    for folder in folders:
        if folder in damage:
            print(f"{folder}: damaged ({one_line(damage[folder])})")
            continue
        state = states[folder]
        is_best = state["step"] == best_step
        n_bytes = sum(f.lstat().st_size for f in folder.iterdir())
        progress = f"step {step_of(folder)}, {state.get('tokens', 0):,} tokens"
        print(f"{folder}: {progress}, {n_bytes:,} bytes{', the best' if is_best else ''}")


def diff(config: DiffConfig) -> None:
    """Print the settings and tensors that differ, the largest differences first."""
    a, b = open_weights(config.a, config.n_head), open_weights(config.b, config.n_head)
    lines = []
    settings_b = asdict(b.config)
    for name, value in asdict(a.config).items():
        if value != settings_b[name]:
            lines.append(f"{name}: {value} in {config.a}, {settings_b[name]} in {config.b}")
    lines += [f"{name}: only in {config.a}" for name in a.tensors.keys() - b.tensors.keys()]
    lines += [f"{name}: only in {config.b}" for name in b.tensors.keys() - a.tensors.keys()]
    differing, n_equal = [], 0  # (relative difference, largest difference, name) of each
    for name in sorted(a.tensors.keys() & b.tensors.keys()):
        if a.tensors[name].shape != b.tensors[name].shape:
            shape_a, shape_b = list(a.tensors[name].shape), list(b.tensors[name].shape)
            lines.append(f"{name}: {shape_a} in {config.a}, {shape_b} in {config.b}")
            continue
        x, y = a.tensors[name].read().float(), b.tensors[name].read().float()
        if torch.equal(x, y):
            n_equal += 1
        else:
            relative = (x - y).norm().item() / max(x.norm().item(), 1e-30)
            differing.append((relative, (x - y).abs().max().item(), name))
    for relative, largest, name in sorted(differing, reverse=True):
        lines.append(f"{name}: relative difference {relative:.3e}, at most {largest:.3e}")
    print("\n".join([*lines, f"{n_equal} tensors are equal, {len(differing)} differ"]))


def average(config: AverageConfig) -> None:
    """Write a run folder with the mean of the weights."""
    if len(config.paths) < 2:
        raise ValueError("average: got fewer than two checkpoints; give two or more")
    refuse_existing(config.out)
    folders = [newest_checkpoint(path) for path in config.paths]
    model, tokenizer, state = load_model(folders[0], torch.device("cpu"))
    total = {name: t.double() for name, t in model.state_dict().items()}
    for folder in folders[1:]:
        other, other_tokenizer, _ = load_model(folder, torch.device("cpu"))
        if other.config != model.config or other_tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"{folder}: has another model or tokenizer than {folders[0]}; "
                "average checkpoints of one model"
            )
        for name, t in other.state_dict().items():
            total[name] += t
    mean = {name: (t / len(folders)).float() for name, t in total.items()}
    step = max(read_state(folder)["step"] for folder in folders)
    state |= {
        "script": "wt_load.py",
        "step": step,
        "averaged": [str(folder) for folder in folders],
        "best": None,
    }
    files = {"tokenizer.json": tokenizer.to_json()}
    folder = save_new_run(config.out, step, mean, state, files)
    print(f"{folder}: the mean of {len(folders)} checkpoints")


COMMANDS = {  # name -> (its configuration, its function)
    "import": (ImportConfig, import_weights),
    "export": (ExportConfig, export),
    "info": (InfoConfig, info),
    "verify": (VerifyConfig, verify),
    "list": (ListConfig, list_run),
    "diff": (DiffConfig, diff),
    "average": (AverageConfig, average),
}


def main(config) -> None:
    """Run the command whose configuration this is."""
    next(run for kind, run in COMMANDS.values() if type(config) is kind)(config)


if __name__ == "__main__":
    run_script(lambda: main(parse({name: kind for name, (kind, _) in COMMANDS.items()})))
