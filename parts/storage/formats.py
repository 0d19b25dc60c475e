"""
Weights in the files of other projects: what a file holds, and our names for it.

    Hugging Face       a folder with model.safetensors or pytorch_model.bin, or shards and an index;
                       linear weights are (in, out), ours (out, in)
    OpenAI             GPT-2's TensorFlow variables (parts/storage/tf_bundle.py); (1, in, out)
    nanoGPT            ckpt.pt, with the same names as here
    LLMs-from-scratch  a .pth file: query, key and value apart, or together in `att.qkv`; an
                       output head of its own

Only names and shapes are read until a tensor is asked for. Files are untrusted: no code from them
runs (pickles are loaded with `weights_only=True`), and no size in them is trusted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import reprlib
import shlex
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from parts.base.files import read_json
from parts.base.text import one_line
from parts.storage.tf_bundle import Bundle, find_prefix

SHARD_BYTES = 5 * 10**9  # of one file that write_folder writes


@dataclass
class Stored:
    """
    A tensor in a file.

    `fetch(transposed)` reads it into memory of its own. `dtype` is torch's name or safetensors'.
    """

    shape: tuple[int, ...]
    fetch: Callable[[bool], torch.Tensor]
    dtype: str = "torch.float32"
    transposed: bool = False

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        return self.fetch(self.transposed)

    def transpose(self) -> Stored:
        """The same tensor transposed, without a leading dimension of one (OpenAI's)."""
        return Stored(self.shape[:-3:-1], self.fetch, self.dtype, not self.transposed)


def in_memory(tensor, transposed: bool) -> torch.Tensor:
    """
    A contiguous copy of a tensor, transposed if asked.

    One copy: an intermediate one would leave a hole in the heap for each weight.
    """
    if transposed:
        tensor = tensor.reshape(tensor.shape[-2:]).t()
    return tensor.clone(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------- the files


def read_safetensors(path) -> dict[str, Stored]:
    """The tensors of a safetensors file. Raises ValueError if it is none."""
    _check_is_file(path)
    try:
        with safe_open(path, "pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            return {
                name: Stored(tuple(s.get_shape()), partial(_read_one, path, name), s.get_dtype())
                for name, s in slices.items()
            }
    except (SafetensorError, OSError) as e:
        reason = one_line(e, 150)
        raise ValueError(
            f"{path}: not a complete safetensors file ({reason}); download or write it again"
        ) from e


def _check_is_file(path) -> None:
    if not os.path.isfile(path):  # opening a pipe would wait forever
        raise ValueError(f"{path}: not a file; give a file of weights, or its folder")


def _read_one(path, name: str, transposed: bool) -> torch.Tensor:
    # Open the file for each tensor: the pages that were read would otherwise count as our memory.
    with safe_open(path, "pt") as f:
        return in_memory(f.get_tensor(name), transposed)


def read_torch(path) -> tuple[dict[str, Stored], dict]:
    """
    (tensors, settings) of a file of torch.save.

    settings: nanoGPT's model_args, or the shape in a trainer's config, if the file has them. What
    else a trainer keeps there is left out. Raises ValueError for anything but tensors.
    """
    _check_is_file(path)
    found = _load_tensors_only(path)
    settings = _settings_of(found)
    for _ in range(3):  # a dictionary may hold itself
        inner = [found[k] for k in STATE_DICTS if isinstance(found, dict) and k in found]
        found = next((value for value in inner if isinstance(value, dict)), found)
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: holds no named tensors; give the file of a model's state_dict")
    tensors = {}
    for name, t in found.items():
        if not isinstance(name, str) or not torch.is_tensor(t):
            raise ValueError(
                f"{path}: holds more than named tensors; give the file of a model's state_dict"
            )
        _check_is_plain(path, name, t)
        tensors[name] = Stored(tuple(t.shape), partial(in_memory, t.detach()), str(t.dtype))
    return tensors, settings


# where a trainer keeps the weights, and the shape, in its file
STATE_DICTS = ("model_state_dict", "model_state", "state_dict", "model")
SHAPES = ("config", "model_config", "cfg")


def _settings_of(found) -> dict:
    """The settings in a trainer's file, without tensors and lists: those cannot be compared."""
    if not isinstance(found, dict):
        return {}
    if isinstance(settings := found.get("model_args"), dict):
        return {k: v for k, v in settings.items() if isinstance(v, str | int | float | None)}
    for key in SHAPES:  # where most settings are those of the training
        settings = found.get(key)
        if isinstance(settings, dict) and settings.keys() & SCRATCH_SHAPE.keys():
            shape = {ours: settings.get(theirs) for theirs, ours in SCRATCH_SHAPE.items()}
            return {name: n for name, n in shape.items() if type(n) is int}
    return {}


def _load_tensors_only(path):
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        try:
            return torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # noqa: BLE001  a damaged or hostile pickle may raise anything
        raise ValueError(
            f"{path}: cannot be loaded as plain tensors ({_why_not_loaded(e)}); "
            "save its state_dict alone, or export it as safetensors"
        ) from e


def _why_not_loaded(e: Exception) -> str:
    """The reason of torch.load, without its colours and its advice to load the file unsafely."""
    text = str(e)
    if found := re.search(r"GLOBAL (.*?) (?:was not an allowed|whose module)", text, re.DOTALL):
        return f"it asks for {one_line(found[1], 100)}, which is code and not a tensor"
    text = re.split(r"WeightsUnpickler error:|from a trusted source\.", text)[-1]
    text = re.split(r"Please use `torch|Check the documentation of torch", text)[0]
    return one_line(text, 150) or type(e).__name__


def _check_archive(path) -> None:
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type for entry in archive.infolist()):  # a zip bomb
            raise ValueError("it is compressed, which torch.save never does")
        if damaged := archive.testzip():  # torch does not check
            raise ValueError(f"{damaged} does not match its crc32, the file is damaged")


def _check_is_plain(path, name: str, t: torch.Tensor) -> None:
    name = name[:100]
    if t.is_nested or t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized:
        raise ValueError(
            f"{path}: {name} is not a plain tensor of numbers; export it as safetensors"
        )
    n_bytes = t.untyped_storage().nbytes()
    if t.numel() * t.element_size() > n_bytes:  # strides of 0: a few bytes that claim terabytes
        raise ValueError(
            f"{path}: {name} is {list(t.shape)}, but the file has only {n_bytes:,} bytes of it; "
            "export it as safetensors"
        )


def read_tensorflow(prefix) -> dict[str, Stored]:
    """The variables of a TensorFlow checkpoint. Raises ValueError or FileNotFoundError."""
    bundle = Bundle(prefix)
    return {
        name: Stored(shape, partial(_read_variable, bundle, name), str(bundle.dtypes[name]))
        for name, shape in bundle.shapes.items()
    }


def _read_variable(bundle: Bundle, name: str, transposed: bool) -> torch.Tensor:
    return in_memory(bundle.tensor(name), transposed)


def read_folder(folder) -> dict[str, Stored]:
    """The tensors of a Hugging Face folder: one file, or shards and an index. Raises ValueError."""
    folder = Path(folder)
    for name, read in HF_WEIGHTS.items():
        if (folder / name).exists():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            return _read_shards(index, read)
    fix = "give a folder with weights"
    if files := _weight_files(folder):
        fix = f"to read {files[0].name}, give {files[0]}"
    raise ValueError(
        f"{folder}: has neither model.safetensors nor pytorch_model.bin, nor an index of shards; "
        f"{fix}"
    )


HF_WEIGHTS = {  # files of a Hugging Face folder, the first that is there
    "model.safetensors": read_safetensors,
    "pytorch_model.bin": lambda path: read_torch(path)[0],
}


def _read_shards(index: Path, read) -> dict[str, Stored]:
    folder, fix = index.parent, "download the folder again"
    files = read_json(index, fix).get("weight_map")  # tensor -> name of its file
    if not isinstance(files, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in files.values()
    ):
        raise ValueError(f"{index}: has no weight_map of tensors to files beside it; {fix}")
    if missing := sorted({file for file in files.values() if not os.path.isfile(folder / file)}):
        verb = "is" if len(missing) == 1 else "are"
        raise ValueError(f"{folder}: {', '.join(missing)[:200]} {verb} missing; {fix}")
    shards = {file: read(folder / file) for file in sorted(set(files.values()))}
    for name in sorted(files):
        if name not in shards[files[name]]:
            raise ValueError(f"{index}: {name[:100]} is not in {files[name]}; {fix}")
    return {name: shards[file][name] for name, file in files.items()}


def write_folder(folder, named: dict[str, Stored], dtype: torch.dtype) -> None:
    """
    Write tensors as model.safetensors; as shards and an index if they exceed SHARD_BYTES.

    One shard at a time is in memory. Raises OSError.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    sizes = {name: math.prod(t.shape) * dtype.itemsize for name, t in named.items()}
    shards, n_bytes = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and n_bytes + size > SHARD_BYTES:
            shards.append([])
            n_bytes = 0
        shards[-1].append(name)
        n_bytes += size
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: named[name].read().to(dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # the library makes it readable for its owner only
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------- where a run was expected

HF_FILES = ("config.json", *(f"{name}{end}" for name in HF_WEIGHTS for end in ("", ".index.json")))
SUFFIXES = {
    ".safetensors": "a safetensors file",
    ".pt": "a torch file",
    ".pth": "a torch file",
    ".ckpt": "a torch file",
    ".gguf": "a GGUF file",
}


def instead_of_a_run(path) -> str:
    """
    The end of an error message about a path that is no run folder: what to do.

    If it looks like weights of another project, it says so, with the command that reads them.
    """
    text, path = str(path), Path(path)
    if text.startswith("hf:") and not os.path.lexists(text):
        return f", it is a name on the hub; {_how_to_import(text)}"
    if path.is_file():
        return _instead_of_a_folder(path)
    if path.is_dir() and not os.path.lexists(path / "MANIFEST.json"):
        if any((path / name).is_file() for name in HF_FILES):
            return f", it looks like a Hugging Face folder; {_how_to_import(text)}"
        with contextlib.suppress(ValueError, OSError):  # a damaged file tells nothing
            if find_prefix(path):
                return f", it looks like a TensorFlow checkpoint; {_how_to_import(text)}"
        if files := _weight_files(path):
            return f" but {files[0].name}{_instead_of_a_folder(files[0])}"
    return "; give a run folder such as runs/simple, or train one first"


def _instead_of_a_folder(file: Path) -> str:
    if os.path.lexists(file.parent / "MANIFEST.json"):
        return f", it is a file of a checkpoint; give its folder, {file.parent}"
    kind = _kind_of_weights(file)
    if kind == "a GGUF file":
        return f", {kind}, which is only written here; give the weights that it was made from"
    if kind:
        return f", {kind}; {_how_to_import(str(file))}"
    return ", it is a file; give a run folder such as runs/simple"


def _how_to_import(source: str) -> str:
    command = f"python wt_load.py import {shlex.quote(source)} runs/NAME"
    return f"import it first: {command}, and give runs/NAME (to train further: --init_from)"


def _kind_of_weights(file: Path) -> str | None:
    if file.name.startswith(("pytorch_model", "model")) and file.suffix == ".bin":
        return "a torch file"  # another .bin may be a token shard
    return SUFFIXES.get(file.suffix.lower())


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder, those that can be read first."""
    found = [f for f in sorted(folder.iterdir()) if _kind_of_weights(f) and f.is_file()]
    return sorted(found, key=lambda file: file.suffix.lower() == ".gguf")


# ---------------------------------------------------------------------------------------- the names

SCRATCH_SHAPE = {  # LLMs-from-scratch -> here
    "n_heads": "n_head",
    "n_layers": "n_layer",
    "emb_dim": "n_embd",
    "context_length": "block_size",
    "vocab_size": "vocab_size",
}
SCRATCH = {  # LLMs-from-scratch -> here; query, key and value are joined below
    r"tok_emb\.weight": "wte.weight",
    r"pos_emb\.weight": "wpe.weight",
    r"out_head\.weight": "lm_head.weight",
    r"final_norm\.(scale|shift|weight|bias)": r"ln_f.\1",
    r"trf_blocks\.(\d+)\.norm(1|2)\.(scale|shift|weight|bias)": r"h.\1.ln_\2.\3",
    r"trf_blocks\.(\d+)\.att\.(?:out_)?proj\.(weight|bias)": r"h.\1.attn.c_proj.\2",
    r"trf_blocks\.(\d+)\.att\.qkv\.(weight|bias)": r"h.\1.attn.c_attn.\2",
    r"trf_blocks\.(\d+)\.att\.W_(query|key|value)\.(weight|bias)": r"h.\1.attn.\2.\3",
    r"trf_blocks\.(\d+)\.ff\.layers\.0\.(weight|bias)": r"h.\1.mlp.c_fc.\2",
    r"trf_blocks\.(\d+)\.ff\.layers\.2\.(weight|bias)": r"h.\1.mlp.c_proj.\2",
}
# what wrappers put into the names, and what they and classes around the model put before them
WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
PREFIXES = re.compile(r"^((module|model|transformer)\.)+")
# buffers with the causal mask
MASKS = re.compile(r"(h\.\d+\.attn\.(bias|masked_bias)|trf_blocks\.\d+\.att\.mask)")
LINEAR_WEIGHTS = re.compile(r"h\.\d+\.(attn|mlp)\.c_(attn|proj|fc)\.weight")
# names of the same dimension at OpenAI and at Hugging Face -> here
DIMENSIONS = {"n_vocab": "vocab_size", "n_positions": "block_size"}


def our_names(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """
    The same tensors under this project's names, linear weights as (out, in).

    Names that are not a GPT-2's stay. Raises ValueError if two tensors get the same name.
    """
    named = _rename(tensors, lambda name: PREFIXES.sub("", WRAPPERS.sub("", name)))
    named = {name: t for name, t in named.items() if not MASKS.fullmatch(name)}
    if any("/wte" in name for name in tensors):
        named = _rename(named, _from_openai)
    elif any(name.startswith("trf_blocks.") for name in named):
        named = _join_attention(_rename(named, _from_scratch))
    first = named.get("h.0.mlp.c_fc.weight")
    if first and len(first.shape) >= 2 and first.shape[-1] == 4 * first.shape[-2]:  # (in, out)
        for name, t in named.items():
            if LINEAR_WEIGHTS.fullmatch(name) and t.shape[:-2] in ((), (1,)):
                named[name] = t.transpose()
    return named


def _rename(tensors: dict[str, Stored], rename) -> dict[str, Stored]:
    named = {}
    for old, t in tensors.items():
        if (name := rename(old)) in named:  # or one of them would be dropped silently
            raise ValueError(f"two of its tensors are named {name[:100]} here; keep one of them")
        named[name] = t
    return named


def _from_scratch(name: str) -> str:
    for old, new in SCRATCH.items():
        name = re.sub(f"^{old}$", new, name)
    return name.replace(".scale", ".weight").replace(".shift", ".bias")


def _from_openai(name: str) -> str:
    """`h.0.attn.c_attn.weight` for `model/h0/attn/c_attn/w`."""
    name = re.sub(r"^h(\d+)/", r"h.\1/", name.removeprefix("model/"))
    name = re.sub(r"/[wg]$", "/weight", re.sub(r"/b$", "/bias", name)).replace("/", ".")
    return f"{name}.weight" if name in ("wte", "wpe") else name


def _join_attention(named: dict[str, Stored]) -> dict[str, Stored]:
    """
    The tensors with query, key and value of each block joined along the first dimension.

    Biases that no block has (an option of that book) become zeros.
    """
    separate = re.compile(r"h\.(\d+)\.attn\.(query|key|value)\.(weight|bias)")
    found = {name: m for name in named if (m := separate.fullmatch(name))}
    joined = dict(named)
    for i, kind in sorted({(m[1], m[3]) for m in found.values()}):
        names = [f"h.{i}.attn.{part}.{kind}" for part in ("query", "key", "value")]
        parts = [named.get(name) for name in names]
        if all(parts) and len({(p.shape, p.dtype) for p in parts}) == 1 and parts[0].shape:
            n, *rest = parts[0].shape
            stored = Stored((3 * n, *rest), partial(_concatenate, parts), parts[0].dtype)
            joined = {name: t for name, t in joined.items() if name not in names}
            if f"h.{i}.attn.c_attn.{kind}" in joined:
                raise ValueError(f"block {i} has query, key and value twice; keep one of them")
            joined[f"h.{i}.attn.c_attn.{kind}"] = stored
    biases = re.compile(r"h\.\d+\.attn\.(c_attn|query|key|value)\.bias")
    if not any(map(biases.fullmatch, named)):
        for name, t in list(joined.items()):
            if name.endswith(".attn.c_attn.weight") and t.shape:
                joined[name.removesuffix("weight") + "bias"] = zeros(t.shape[0])
    return joined


def _concatenate(parts: list[Stored], _transposed) -> torch.Tensor:
    return torch.cat([part.read() for part in parts])


def zeros(n: int) -> Stored:
    """A bias of n zeros, for a model that was saved without it."""
    return Stored((n,), lambda _transposed: torch.zeros(n))


# --------------------------------------------------------------------------------------- the shapes


def shape_of(named: dict, stated: dict) -> dict:
    """
    {"vocab_size", "block_size", "n_layer", "n_embd", "tied"} of tensors under our names.

    named: {name: tensor or Stored}. stated: the configuration beside them, perhaps with names of
    other projects. It may claim any size, so the tensors decide, before a model is built. Raises
    ValueError if they are no GPT-2, or if the configuration contradicts them.
    """
    wte, wpe = named.get("wte.weight"), named.get("wpe.weight")
    layers = {int(m[1]) for name in named if (m := re.match(r"h\.(\d{1,4})\.", name))}
    if wte is None or wpe is None or not layers or len(wte.shape) != 2 or len(wpe.shape) != 2:
        names = ", ".join(name[:50] for name in sorted(named)[:3])
        raise ValueError(
            f"these are not the weights of a GPT-2 ({len(named)} tensors: {names}, ...); "
            "use a recipe for other families"
        )
    if missing := sorted(set(range(max(layers))) - layers):
        raise ValueError(
            f"block {missing[0]} of {max(layers) + 1} is missing; get the complete weights"
        )
    found = {
        "vocab_size": wte.shape[0],
        "block_size": wpe.shape[0],
        "n_layer": len(layers),
        "n_embd": wte.shape[1],
        "tied": "lm_head.weight" not in named,
    }
    for name, value in stated.items():
        actual = found.get(DIMENSIONS.get(name, name), value)
        if value is not None and actual != value:
            claim = f"the configuration says {name} = {reprlib.repr(value)}"
            raise ValueError(
                f"{claim}, the tensors have {actual}; use the configuration of these weights"
            )
    return found
