"""
Weights in and out, and looking into checkpoints.

    python wt_load.py import hf:gpt2 runs/gpt2                # GPT-2 from the hub or its cache, as a run to sample from and go on with
    python wt_load.py import FOLDER_OR_FILE runs/theirs       # Hugging Face, OpenAI's TensorFlow files, nanoGPT, LLMs-from-scratch
    python wt_load.py export runs/advanced --to hf exported   # opens in AutoModelForCausalLM; also: gguf FILE, nanogpt FILE
    python wt_load.py info runs/advanced                      # what it is, how far, how to go on (any of the formats above)
    python wt_load.py verify runs/advanced                    # hashes, shapes, finite values; a hash of the weights in the last line
    python wt_load.py list runs/advanced                      # all its checkpoints
    python wt_load.py diff runs/a runs/b                      # which tensors differ, by how much
    python wt_load.py average runs/a runs/b --out runs/mean   # the mean of their weights, as a run

A run folder stands for its newest good checkpoint. Nothing here runs code from a file; only import, export and average write, each
into a new place that is renamed when it is whole. Seconds per GB, and 1.1 times the weights of memory.
"""

from __future__ import annotations

if (
    __name__ == "__main__"
):  # before torch is imported, so that Ctrl-C in those seconds leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import contextlib
import hashlib
import json
import os
import reprlib
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from gpt_train import GPT, SIZES, GPTConfig, load_model, shell
from parts.base.dtypes import DTYPES
from parts.base.files import fsync, make_folder, read_json, rename_durably, sha256_of
from parts.cli.config import parse
from parts.cli.launch import error_line, run_script
from parts.data.tokenizers import Tokenizer, gpt2_tokenizer
from parts.storage import formats
from parts.storage.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    save_checkpoint,
    step_of,
    verify_checkpoint,
)
from parts.storage.tf_bundle import Bundle, find_prefix
from parts.training.plan import count_parameters

Path_ = tyro.conf.Positional[str]


@dataclass
class VerifyConfig:
    """Compare a checkpoint with its hashes, look at each value; the last line printed is the sha256 of its weights."""

    path: Path_  # run folder (its newest checkpoint), checkpoint folder, or weights of another project
    n_head: int | None = None  # attention heads, where neither the file nor its size tells
    debug: bool = False  # show the traceback of an error


@dataclass
class InfoConfig(VerifyConfig):
    """Say what a checkpoint is: its model, how far it was trained, on what, how to go on and how to sample."""

    tensors: bool = False  # list every tensor, too


@dataclass
class ListConfig(VerifyConfig):
    """List the checkpoints of a run, damaged ones too."""


@dataclass
class ImportConfig:
    """Make a run of weights from elsewhere: sample from it, score it, go on with it (--init_from of pretraining_advanced.py)."""

    source: Path_  # hf:NAME of the hub, a Hugging Face or TensorFlow folder, or a .safetensors, .bin, .pt or .pth file
    run_dir: Path_  # run folder to make
    # folder or file with the tokenizer; None: the source's own, else GPT-2's
    tokenizer: str | None = None
    n_head: int | None = None  # attention heads, where neither the source nor its size tells
    debug: bool = False  # show the traceback of an error


@dataclass
class ExportConfig:
    """Write a checkpoint for other programs."""

    path: Path_  # run folder (its newest checkpoint) or checkpoint folder
    to: tuple[Literal["hf", "gguf", "nanogpt"], str]  # hf FOLDER, gguf FILE or nanogpt FILE
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the weights written
    force: bool = False  # write over what is there
    debug: bool = False  # show the traceback of an error


@dataclass
class DiffConfig:
    """Compare the weights of two checkpoints, of whatever formats."""

    a: Path_  # the first
    b: Path_  # the second
    n_head: int | None = None  # attention heads, where neither file nor size tells
    debug: bool = False  # show the traceback of an error


@dataclass
class AverageConfig:
    """The mean of several checkpoints of one model, as a run (Izmailov et al. 2018: along one run it is often the better model)."""

    paths: tyro.conf.Positional[tuple[str, ...]]  # two or more run or checkpoint folders
    out: str  # run folder to make
    debug: bool = False  # show the traceback of an error


# ----------------------------------------------------------------------------------------------------------- in


@dataclass
class Weights:
    """A GPT from anywhere: its shape, its tensors by our names, its tokenizer if one lies there, and what else is known."""

    config: GPTConfig
    tensors: dict[str, formats.Stored]
    tokenizer_at: Path | None
    facts: dict


def open_weights(source: str, n_head: int | None = None) -> Weights:
    """
    What `source` holds, as a GPT; reads names and shapes, no tensor but an output head that may be the embedding.

    Raises FileNotFoundError or ValueError: no weights, damaged, another family, or the list of every tensor that does not fit.
    """
    path = from_hub(source.removeprefix("hf:")) if source.startswith("hf:") else Path(source)
    if not os.path.lexists(path):
        raise FileNotFoundError(
            f"{path}: does not exist; give a run folder, weights of another project, or hf:NAME of the hub"
        )
    if os.path.lexists(path / "MANIFEST.json") or (path / "checkpoints").is_dir():
        folder = newest_checkpoint(path)
        tensors, state = load_checkpoint(folder)
        try:
            config = GPTConfig(**state["model_config"])
            formats.shape_of(tensors, asdict(config))
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(
                f"{folder}: holds no GPT of this project ({error_line(e)[:300]})"
            ) from e
        named = {
            name: formats.Stored(tuple(t.shape), lambda _, t=t: t.detach(), str(t.dtype))
            for name, t in tensors.items()
        }
        return _fitting(
            Weights(config, named, folder, {"checkpoint": str(folder), **state}), folder
        )
    settings, folder = {}, path if path.is_dir() else path.parent
    if path.is_dir() and (prefix := find_prefix(path)):
        bundle = Bundle(prefix)
        tensors = {
            name: formats.Stored(
                shape,
                lambda turned, name=name: formats.in_memory(bundle.tensor(name), turned),
                str(bundle.dtypes[name]),
            )
            for name, shape in bundle.shapes.items()
        }
        kind = "TensorFlow checkpoint"
        settings = _settings(path / "hparams.json")
    elif path.is_dir():
        tensors, kind = formats.read_folder(path), "Hugging Face folder"
        settings = _settings(path / "config.json")
    elif path.suffix == ".safetensors":
        tensors, kind = formats.read_safetensors(path), "safetensors file"
    else:
        (tensors, settings), kind = formats.read_torch(path), "torch file"
    _same_arithmetic(settings, path)
    try:
        named = formats.our_names(tensors)
        shape = formats.shape_of(named, settings)
        H = (
            settings.get("n_head")
            or n_head
            or {(L, C): H for L, H, C in SIZES.values()}.get((shape["n_layer"], shape["n_embd"]))
        )
        if not isinstance(H, int):
            what = f"{shape['n_layer']} blocks of width {shape['n_embd']} may have any number of attention heads"
            raise ValueError(f"{what}, and n_head is {reprlib.repr(H)}; say how many by --n_head")
        config = GPTConfig(**shape, n_head=H)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    head = named.get("lm_head.weight")
    if (
        head
        and head.shape == named["wte.weight"].shape
        and torch.equal(head.read(), named["wte.weight"].read())
    ):
        config.tied = True
    if config.tied:
        named.pop("lm_head.weight", None)
    if settings.get("bias") is False:  # nanoGPT's option: a bias of zeros is the same model
        for name in [n for n in named if n.endswith(".weight") and n.startswith(("h.", "ln_f"))]:
            n = named[name].shape[:1]
            named.setdefault(
                name.replace(".weight", ".bias"), formats.Stored(n, lambda _, n=n: torch.zeros(n))
            )
    tokenizer_at = next(
        (
            folder / n
            for n in ("tokenizer.json", "vocab.bpe", "merges.txt")
            if (folder / n).exists()
        ),
        None,
    )
    return _fitting(Weights(config, named, tokenizer_at, {"kind": kind, "source": source}), path)


def _settings(path: Path) -> dict:
    """The configuration beside weights, if there is one."""
    return read_json(path, "download it again, or delete it") if path.exists() else {}


def _same_arithmetic(settings: dict, path) -> None:
    """Refuse a configuration that computes something else from the same tensors."""
    if settings.get("model_type", "gpt2") != "gpt2":
        kind = reprlib.repr(settings["model_type"])
        raise ValueError(
            f"{path}: a model of type {kind}; this GPT is GPT-2's, other families are for the recipes"
        )
    for name, same in {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }.items():
        if settings.get(name, same[0]) not in same:
            raise ValueError(
                f"{path}: {name} is {reprlib.repr(settings[name])}, this GPT has {same[0]!r}; its output would differ"
            )


def _fitting(weights: Weights, where) -> Weights:
    # all blocks are alike, and ten thousand would be built for minutes
    expected = {
        name: tuple(t.shape)
        for name, t in shell(replace(weights.config, n_layer=1)).state_dict().items()
    }
    block = {
        name.removeprefix("h.0."): expected.pop(name)
        for name in list(expected)
        if name.startswith("h.0.")
    }
    expected |= {
        f"h.{i}.{name}": shape
        for i in range(weights.config.n_layer)
        for name, shape in block.items()
    }
    if wrong := formats.differences(weights.tensors, expected):
        raise ValueError(f"{where}: does not fit a GPT-2 of its size: {'; '.join(wrong)}")
    return weights


def load_gpt(source: str, n_head: int | None = None) -> GPT:
    """The model of weights from anywhere, in fp32 and eval mode, on the CPU. Never more memory than its weights and one tensor."""
    weights = open_weights(source, n_head)
    model = shell(weights.config)
    model.load_state_dict(
        {name: weights.tensors[name].read().float() for name in model.state_dict()}, assign=True
    )
    return model.eval()


def from_hub(name: str) -> Path:
    """
    The folder of a model in the standard hub cache; downloaded and resumed by the hub's own library if it is not there.

    Raises ValueError where it cannot be had, or where a file differs from the sha256 that the hub names it by.
    """
    import huggingface_hub  # here: only this needs it
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = ["config.json", "tokenizer.json", "merges.txt", "vocab.bpe"]
    try:
        try:
            folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
            formats.read_folder(folder)
        except (LocalEntryNotFoundError, ValueError):  # not there, or not all of it
            folder = Path(
                huggingface_hub.snapshot_download(
                    name, allow_patterns=[*wanted, "model*.safetensors*"], etag_timeout=10
                )
            )
            if not any(folder.glob("model*.safetensors*")):
                folder = Path(
                    huggingface_hub.snapshot_download(
                        name, allow_patterns=[*wanted, "pytorch_model*.bin*"], etag_timeout=10
                    )
                )
    except Exception as e:  # noqa: BLE001  the hub's client raises errors of whatever http library it uses
        why = " ".join(str(e).split())[:150]
        raise ValueError(
            f"hf:{name}: not in the hub's cache here, and the hub gives nothing ({why}); give a folder instead"
        ) from e
    for file in sorted([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        blob = file.resolve()  # the cache names large files by their sha256
        if len(blob.name) == 64 and sha256_of(blob) != blob.name:
            raise ValueError(
                f"{blob}: differs from its sha256, which is its name; delete it, it is fetched again"
            )
    return folder


def tokenizer_of(weights: Weights, spec: str | None) -> Tokenizer:
    """The tokenizer named, else the source's own, else GPT-2's. Raises ValueError where it has more tokens than the model."""
    V = weights.config.vocab_size
    if spec or weights.tokenizer_at:
        tokenizer = Tokenizer.load(spec or weights.tokenizer_at)
    elif V in (50257, 50304):  # GPT-2's, and nanoGPT's, which is filled up to a multiple of 64
        try:
            tokenizer = gpt2_tokenizer()
        except OSError as e:
            what = f"the source has no tokenizer, and GPT-2's is neither in tiktoken's cache nor reachable ({error_line(e)})"
            raise ValueError(f"--tokenizer: {what}; give a folder or file with one") from e
    else:
        raise ValueError(
            f"--tokenizer: the source has none for its vocabulary of {V:,}; give a tokenizer.json or merges.txt"
        )
    if tokenizer.vocab_size > V or (tokenizer.vocab_size < V - 64 and not spec):
        what = f"the tokenizer has {tokenizer.vocab_size:,} ids, the model a vocabulary of {V:,}"
        raise ValueError(f"--tokenizer: {what}; give the tokenizer that it was trained with")
    return tokenizer


def import_weights(config: ImportConfig) -> None:
    """Write a run folder with one checkpoint, of step 0."""
    refuse_existing(config.run_dir)
    weights = open_weights(config.source, config.n_head)
    tokenizer = tokenizer_of(weights, config.tokenizer)
    tensors = {name: t.read().float() for name, t in weights.tensors.items()}
    state = {
        "script": "wt_load.py",
        "step": 0,
        "tokens": 0,
        "model_config": asdict(weights.config),
        "tokenizer": tokenizer.fingerprint,
    }
    state |= {
        "imported_from": config.source,
        "kind": weights.facts.get("kind", "checkpoint of this project"),
    }
    folder = save_checkpoint(
        config.run_dir,
        0,
        {"model.safetensors": tensors},
        state,
        {"tokenizer.json": tokenizer.to_json()},
        1,
    )
    print(
        f"{folder}: {count_parameters(weights.config):,} parameters from {config.source}, tokenizer {tokenizer.name}"
    )
    print(f"python gpt_train.py --checkpoint {config.run_dir} --prompt 'Once'")


def refuse_existing(run_dir: str) -> None:
    """Raises ValueError where a file or a folder with something in it is in the way."""
    if os.path.isfile(run_dir) or (os.path.isdir(run_dir) and os.listdir(run_dir)):
        raise ValueError(f"{run_dir}: is there already; name another run folder, or move it away")


# ---------------------------------------------------------------------------------------------------------- out


def export(config: ExportConfig) -> None:
    """Write a checkpoint in another format, beside its name first, renamed when it is whole."""
    kind, target = config.to[0], Path(config.to[1])
    if (
        not config.force
        and os.path.lexists(target)
        and not (target.is_dir() and not any(target.iterdir()))
    ):
        raise ValueError(
            f"--to: {target} is there already; name another place, or add --force to write over it"
        )
    if config.force and target.is_dir() != (kind == "hf") and target.exists():
        there, wanted = ("folder", "file") if target.is_dir() else ("file", "folder")
        raise ValueError(
            f"--to: {target} is a {there}, {kind} writes a {wanted}; name another place"
        )
    if target.is_dir() and (others := {f.name for f in target.iterdir()} - EXPORTED):
        raise ValueError(
            f"--to: {target} holds {min(others)}, too, which would be deleted; name another place"
        )
    folder = newest_checkpoint(config.path)
    model, tokenizer, state = load_model(folder, torch.device("cpu"))
    dtype = DTYPES[config.dtype]
    tensors = model.state_dict()
    if dtype == torch.float16 and (
        large := [name for name, t in tensors.items() if t.abs().max() > 65504]
    ):
        raise ValueError(
            f"--dtype fp16: {large[0]} has values beyond 65504, the largest of fp16; use bf16 or fp32"
        )
    part = target.with_name(f".{target.name}.part")
    _delete(part)
    try:
        make_folder(part.parent)
        {"hf": _to_hf, "gguf": _to_gguf, "nanogpt": _to_nanogpt}[kind](
            part, model.config, tensors, dtype, tokenizer, state
        )
        for file in part.iterdir() if part.is_dir() else ():
            fsync(file)
        if target.is_dir():
            _delete(target)
        rename_durably(part, target)
    finally:
        _delete(part)
    n_bytes = sum(f.stat().st_size for f in ([target] if target.is_file() else target.iterdir()))
    print(f"{target}: step {state['step']} of {folder}, {config.dtype}, {n_bytes:,} bytes")


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


EXPORTED = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
}
LINEAR = (
    "c_attn.weight",
    "c_proj.weight",
    "c_fc.weight",
)  # (in, out) at Hugging Face, (out, in) here


def _to_hf(
    folder: Path, config: GPTConfig, tensors: dict, dtype, tokenizer: Tokenizer, state: dict
) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    c = config
    named = {
        name if name == "lm_head.weight" else f"transformer.{name}": t.t()
        if name.endswith(LINEAR)
        else t
        for name, t in tensors.items()
    }
    save_file(
        {name: t.to(dtype).contiguous() for name, t in named.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "model.safetensors").chmod(0o644)  # the library makes it readable for one user only
    ids = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": str(dtype).removeprefix("torch."),
        **ids,
    }
    settings |= {
        "vocab_size": c.vocab_size,
        "n_positions": c.block_size,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
    }
    settings |= {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": c.tied,
    }
    settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
    words = {
        "bos_token": tokenizer.eot_text,
        "eos_token": tokenizer.eot_text,
        "unk_token": tokenizer.eot_text,
    }
    words |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": c.block_size,
        "clean_up_tokenization_spaces": False,
    }
    contents = {
        "config.json": settings,
        "tokenizer_config.json": words,
        "generation_config.json": {**ids, "pad_token_id": tokenizer.eot},
    }
    for name, value in contents.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(tokenizer.to_json())
    (folder / "README.md").write_text(model_card(config, tokenizer, state), encoding="utf-8")


def model_card(config: GPTConfig, tokenizer: Tokenizer, state: dict) -> str:
    """Facts of a checkpoint for people, as Hugging Face's README.md; what is not known is not said."""
    settings, best = state.get("config", {}), state.get("best") or {}
    facts = {
        "parameters": f"{count_parameters(config):,}",
        "steps": f"{state['step']:,}",
        "tokens seen": f"{state.get('tokens', 0):,}",
    }
    facts |= (
        {"validation loss (nats per token)": f"{best['val_loss']:.4f} at step {best['step']:,}"}
        if best.get("val_loss")
        else {}
    )
    facts |= (
        {
            "text": " ".join(
                str(settings[k]) for k in ("dataset_name", "dataset_subset") if settings.get(k)
            )
        }
        if settings
        else {}
    )
    facts |= {"imported from": state["imported_from"]} if "imported_from" in state else {}
    facts |= {
        "tokenizer": f"{tokenizer.name}, {tokenizer.vocab_size:,} ids",
        "context": f"{config.block_size} tokens",
    }
    facts |= {"blocks, heads, width": f"{config.n_layer}, {config.n_head}, {config.n_embd}"}
    facts |= {
        name: settings[name]
        for name in ("max_lr", "batch_size", "optimizer", "seed")
        if name in settings
    }
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items() if value != "")
    begin = f"A text that begins a document begins with {tokenizer.eot_text}: the model saw it before each one."
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n# A GPT-2\n\n| | |\n|---|---|\n{rows}\n{begin}\n"


def _to_gguf(
    file: Path, config: GPTConfig, tensors: dict, dtype, tokenizer: Tokenizer, state: dict
) -> None:
    try:
        import gguf
    except ImportError as e:
        raise ValueError("--to gguf: needs the package gguf; pip install gguf") from e
    c, writer = config, gguf.GGUFWriter(file, "gpt2")
    writer.add_name(f"gpt2-{c.n_layer}x{c.n_embd}-step-{state['step']}")
    for add, value in (
        (writer.add_context_length, c.block_size),
        (writer.add_embedding_length, c.n_embd),
        (writer.add_feed_forward_length, 4 * c.n_embd),
        (writer.add_block_count, c.n_layer),
        (writer.add_head_count, c.n_head),
        (writer.add_layer_norm_eps, 1e-5),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "gpt-2"),
        (writer.add_bos_token_id, tokenizer.eot),
        (writer.add_eos_token_id, tokenizer.eot),
        (writer.add_add_bos_token, True),  # a document begins with it, here as there
    ):
        add(value)
    spec = json.loads(tokenizer.to_json())
    words = {i: word for word, i in spec["model"]["vocab"].items()} | {
        i: word for word, i in tokenizer.special.items()
    }
    filled = range(c.vocab_size)  # a vocabulary that is filled up has ids without a word
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in filled])
    writer.add_token_types(
        [
            kinds[i in tokenizer.special.values()] if i in words else gguf.TokenType.UNUSED
            for i in filled
        ]
    )
    writer.add_token_merges([" ".join(merge) for merge in spec["model"]["merges"]])
    kind = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    writer.add_file_type({torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[dtype])
    for name, t in tensors.items():
        small = t.ndim < 2 or name == "wpe.weight"  # which llama.cpp adds, and wants in fp32
        t = t.float() if small else t.to(dtype)
        raw = t.view(torch.int16).numpy().view("uint8") if t.dtype == torch.bfloat16 else t.numpy()
        writer.add_tensor(gguf_name(name), raw, raw_dtype=kind[t.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of our tensors."""
    tops = {
        "wte.weight": "token_embd.weight",
        "wpe.weight": "position_embd.weight",
        "lm_head.weight": "output.weight",
    }
    tops |= {"ln_f.weight": "output_norm.weight", "ln_f.bias": "output_norm.bias"}
    if name in tops:
        return tops[name]
    _, i, *middle, kind = name.split(".")
    parts = {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
    }
    parts |= {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    return f"blk.{i}.{parts['.'.join(middle)]}.{kind}"


def _to_nanogpt(
    file: Path, config: GPTConfig, tensors: dict, dtype, tokenizer: Tokenizer, state: dict
) -> None:
    if not config.tied:
        raise ValueError(
            "--to nanogpt: its output head is the embedding, this model has one of its own; use --to hf"
        )
    named = {f"transformer.{name}": t.to(dtype) for name, t in tensors.items()}
    shape = {k: v for k, v in asdict(config).items() if k != "tied"}
    best = (state.get("best") or {}).get("val_loss", 1e9)
    found = {
        "model": named | {"lm_head.weight": named["transformer.wte.weight"]},
        "model_args": {**shape, "bias": True},
    }
    torch.save(
        found | {"iter_num": state["step"], "best_val_loss": best, "config": {"out_dir": "out"}},
        file,
    )


# ------------------------------------------------------------------------------------------------------ looking


def weights_hash(tensors: dict) -> str:
    """sha256 of named tensors: of names, types, shapes and bits, in the order of the names; no file format is part of it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def info(config: InfoConfig) -> None:
    """Print what a checkpoint is."""
    weights = open_weights(config.path, config.n_head)
    c, f = weights.config, weights.facts
    heads = "the head is the embedding" if c.tied else "a head of its own"
    writer = f"family {f['family']}" if "family" in f else f.get("script", "this project")
    print(f"{f.get('checkpoint', config.path)}: {f.get('kind', f'checkpoint of {writer}')}")
    shape = f"{c.n_layer} blocks, {c.n_head} heads, width {c.n_embd}, context {c.block_size}, vocabulary {c.vocab_size:,}"
    print(f"model: GPT-2, {shape}, {heads}")
    n_bytes = 4 * count_parameters(c)
    print(f"parameters: {count_parameters(c):,}, {n_bytes / 1e6:,.1f} MB in fp32")
    if "checkpoint" in f:
        best = f.get("best") or {}
        loss = (
            f", best validation loss {best['val_loss']:.4f} at step {best['step']}"
            if best.get("val_loss")
            else ""
        )
        print(f"trained: step {f.get('step')}, {f.get('tokens', 0):,} tokens{loss}")
        print(
            f"data: {str(f.get('data', 'not recorded'))[:16]}, tokenizer: {f.get('tokenizer', 'not recorded')}"
        )
        run_dir = (
            Path(config.path)
            if (Path(config.path) / "checkpoints").is_dir()
            else Path(f["checkpoint"]).parent.parent
        )
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            print(
                f"to go on: {json.loads((run_dir / 'run.json').read_text(encoding='utf-8'))['resume']}"
            )
        print(f"to sample: python gpt_train.py --checkpoint {f['checkpoint']}")
    else:
        print(f"tokenizer: {weights.tokenizer_at or 'none beside it'}")
        print(f"to use it: python wt_load.py import {config.path} runs/NAME")
    if config.tensors:
        for name, t in weights.tensors.items():
            print(f"{' x '.join(map(str, t.shape)):16} {name}")


def verify(config: VerifyConfig) -> None:
    """Compare files with their hashes, shapes with the model, values with what is finite."""
    weights = open_weights(config.path, config.n_head)
    tensors = {name: t.read() for name, t in weights.tensors.items()}
    if wrong := [name for name, t in tensors.items() if not torch.isfinite(t).all()]:
        names = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ValueError(
            f"{config.path}: {names}: not all values are finite; the training diverged, use an earlier checkpoint"
        )
    n_numbers = sum(t.numel() for t in tensors.values())
    where, step = weights.facts.get("checkpoint", config.path), weights.facts.get("step")
    hashed = (
        "whole"
        if "checkpoint" in weights.facts
        else "shapes and values are right (there are no hashes to compare)"
    )
    print(
        f"{where}: {hashed}; {f'step {step}, ' if step is not None else ''}{len(tensors)} tensors, {n_numbers:,} numbers"
    )
    print(weights_hash(tensors))


def list_run(config: ListConfig) -> None:
    """A line for each checkpoint of a run."""
    folders = list_checkpoints(config.path)
    if not folders:
        raise FileNotFoundError(
            f"{config.path}: no checkpoints here; give a run folder such as runs/advanced"
        )
    for folder in folders:
        try:
            verify_checkpoint(folder)
            state = read_state(folder)
            best = (state.get("best") or {}).get("step") == state["step"]
            n_bytes = sum(f.lstat().st_size for f in folder.iterdir())
            print(
                f"{folder}: step {step_of(folder)}, {state.get('tokens', 0):,} tokens, {n_bytes:,} bytes{', the best' if best else ''}"
            )
        except ValueError as e:
            print(f"{folder}: damaged ({e})")


def diff(config: DiffConfig) -> None:
    """Print the tensors that differ, those that differ most first."""
    a, b = open_weights(config.a, config.n_head), open_weights(config.b, config.n_head)
    lines = [
        f"{k}: {v} in {config.a}, {asdict(b.config)[k]} in {config.b}"
        for k, v in asdict(a.config).items()
        if v != asdict(b.config)[k]
    ]
    lines += [f"{name}: only in {config.a}" for name in a.tensors.keys() - b.tensors.keys()]
    lines += [f"{name}: only in {config.b}" for name in b.tensors.keys() - a.tensors.keys()]
    apart, same = [], 0
    for name in sorted(a.tensors.keys() & b.tensors.keys()):
        if a.tensors[name].shape != b.tensors[name].shape:
            lines.append(
                f"{name}: {list(a.tensors[name].shape)} in {config.a}, {list(b.tensors[name].shape)} in {config.b}"
            )
            continue
        x, y = a.tensors[name].read().float(), b.tensors[name].read().float()
        if torch.equal(x, y):
            same += 1
        else:
            apart.append(
                (
                    (x - y).norm().item() / max(x.norm().item(), 1e-30),
                    (x - y).abs().max().item(),
                    name,
                )
            )
    lines += [
        f"{name}: relative difference {rel:.3e}, at most {most:.3e}"
        for rel, most, name in sorted(apart, reverse=True)
    ]
    print("\n".join([*lines, f"{same} tensors are equal, {len(apart)} differ"]))


def average(config: AverageConfig) -> None:
    """Write a run folder with the mean of the weights."""
    if len(config.paths) < 2:
        raise ValueError("average: give two or more checkpoints")
    refuse_existing(config.out)
    folders = [newest_checkpoint(path) for path in config.paths]
    model, tokenizer, state = load_model(folders[0], torch.device("cpu"))
    total = {name: t.double() for name, t in model.state_dict().items()}
    for folder in folders[1:]:
        other, its_tokenizer, its_state = load_model(folder, torch.device("cpu"))
        if other.config != model.config or its_tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"{folder}: is of another model or tokenizer than {folders[0]}; average checkpoints of one kind"
            )
        for name, t in other.state_dict().items():
            total[name] += t
    mean = {name: (t / len(folders)).float() for name, t in total.items()}
    step = max(read_state(folder)["step"] for folder in folders)
    more = {
        "script": "wt_load.py",
        "step": step,
        "averaged": [str(folder) for folder in folders],
        "best": None,
    }
    folder = save_checkpoint(
        config.out,
        step,
        {"model.safetensors": mean},
        state | more,
        {"tokenizer.json": tokenizer.to_json()},
        1,
    )
    print(f"{folder}: the mean of {len(folders)} checkpoints")


COMMANDS = {  # name -> (what it takes, what it does)
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
