"""
Weights as other projects keep them: what lies in a file, and what it is called here.

    Hugging Face       a folder with model.safetensors (or parts and an index), or pytorch_model.bin; linear weights (in, out)
    OpenAI             GPT-2's TensorFlow variables (read by parts/storage/tf_bundle.py), weights (1, in, out)
    nanoGPT            ckpt.pt: the same names as here
    LLMs-from-scratch  a .pth file: query, key and value apart, an output head of its own

Nothing is read but names and shapes until a tensor is asked for, and no file can run code: pickles only as `weights_only`.
"""

from __future__ import annotations

import os
import re
import reprlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from parts.base.dtypes import SAFETENSORS_NAMES
from parts.base.files import read_json


@dataclass
class Stored:
    """A tensor in a file: its shape, a function that reads it into memory of its own, transposed if it is told to; and its type's name."""

    shape: tuple[int, ...]
    fetch: Callable[[bool], torch.Tensor]
    dtype: str = "torch.float32"  # torch's or safetensors' name
    turned: bool = False

    def read(self) -> torch.Tensor:
        """The tensor."""
        return self.fetch(self.turned)

    def turn(self) -> Stored:
        """The same, transposed; a leading dimension of one (OpenAI's) is dropped."""
        return Stored(self.shape[:-3:-1], self.fetch, self.dtype, not self.turned)


def in_memory(tensor, turned: bool):
    """A copy, in one step: a second one in between would leave a hole in the memory for each weight."""
    return (tensor.reshape(tensor.shape[-2:]).t() if turned else tensor).clone(
        memory_format=torch.contiguous_format
    )


# ------------------------------------------------------------------------------------------------------- the files


def read_safetensors(path) -> dict[str, Stored]:
    """What a safetensors file holds. Raises ValueError where it is none."""
    _refuse_no_file(path)
    try:
        with safe_open(path, "pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            return {
                name: Stored(tuple(s.get_shape()), partial(_one, path, name), s.get_dtype())
                for name, s in slices.items()
            }
    except (SafetensorError, OSError) as e:
        raise ValueError(
            f"{path}: not a whole safetensors file ({' '.join(str(e).split())[:150]}); download or write it again"
        ) from e


def _refuse_no_file(path) -> None:
    if not os.path.isfile(path):  # to open a pipe would be to wait for it
        raise ValueError(f"{path}: not a file; give a file of weights, or the folder that it is in")


def _one(path, name: str, turned: bool) -> torch.Tensor:
    # opened anew for each tensor: pages of the file that were read would otherwise count as this process's memory
    with safe_open(path, "pt") as f:
        return in_memory(f.get_tensor(name), turned)


def read_torch(path) -> tuple[dict[str, Stored], dict]:
    """(what a file of torch.save holds, the settings beside it: nanoGPT's model_args). Raises ValueError."""
    _refuse_no_file(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type for entry in archive.infolist()):
                    raise ValueError(
                        "it is compressed, which torch.save never does: a small file could fill all memory"
                    )
                if damaged := archive.testzip():  # torch does not look
                    raise ValueError(f"{damaged} differs from its crc32, the file is damaged")
        try:
            found = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # noqa: BLE001  a damaged or hostile pickle raises whatever it likes
        why = " ".join(str(e).split())[:150]
        raise ValueError(
            f"{path}: cannot be read as tensors and nothing else ({why}); export it as safetensors"
        ) from e
    settings = found.get("model_args") if isinstance(found, dict) else None
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if (
        not isinstance(found, dict)
        or not all(isinstance(k, str) and torch.is_tensor(t) for k, t in found.items())
        or not found
    ):
        raise ValueError(f"{path}: holds no named tensors; give the file of a model's state_dict")
    for k, t in found.items():
        if t.is_nested or t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized:
            raise ValueError(
                f"{path}: {k[:100]} is not a plain tensor of numbers; export it as safetensors"
            )
        if (
            t.numel() * t.element_size() > t.untyped_storage().nbytes()
        ):  # strides of 0: a few bytes that would be read as terabytes
            raise ValueError(
                f"{path}: {k[:100]} is {list(t.shape)}, of which the file has only {t.untyped_storage().nbytes():,} bytes"
            )
    settings = settings if isinstance(settings, dict) else {}
    plain = {
        k: v for k, v in settings.items() if isinstance(v, str | int | float | None)
    }  # a tensor cannot be compared or told in a line
    return {
        k: Stored(tuple(t.shape), partial(in_memory, t.detach()), str(t.dtype))
        for k, t in found.items()
    }, plain


def read_folder(folder) -> dict[str, Stored]:
    """What a Hugging Face folder holds: one file, or parts and an index. Raises ValueError where it has no weights."""
    folder = Path(folder)
    for name, read in (
        ("model.safetensors", read_safetensors),
        ("pytorch_model.bin", lambda path: read_torch(path)[0]),
    ):
        if (folder / name).exists():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if not index.exists():
            continue
        places = read_json(index, "download the folder again").get("weight_map")
        if not isinstance(places, dict) or not all(
            isinstance(f, str) and Path(f).name == f for f in places.values()
        ):
            raise ValueError(
                f"{index}: has no weight_map of tensors to files beside it; download the folder again"
            )
        if missing := sorted({f for f in places.values() if not os.path.isfile(folder / f)}):
            verb = "is" if len(missing) == 1 else "are"
            raise ValueError(
                f"{folder}: {', '.join(missing)[:200]} {verb} missing; download the folder again"
            )
        parts = {f: read(folder / f) for f in sorted(set(places.values()))}
        if lost := sorted(tensor for tensor, f in places.items() if tensor not in parts[f]):
            raise ValueError(
                f"{index}: {lost[0][:100]} is not in {places[lost[0]]}; download the folder again"
            )
        return {tensor: parts[f][tensor] for tensor, f in places.items()}
    raise ValueError(
        f"{folder}: neither model.safetensors nor pytorch_model.bin, nor an index of parts; give a folder of weights"
    )


# ------------------------------------------------------------------------------------------------------- the names

SCRATCH = {  # LLMs-from-scratch -> here; query, key and value are joined below
    r"tok_emb\.weight": "wte.weight",
    r"pos_emb\.weight": "wpe.weight",
    r"out_head\.weight": "lm_head.weight",
    r"final_norm\.(scale|shift)": r"ln_f.\1",
    r"trf_blocks\.(\d+)\.norm(1|2)\.(scale|shift)": r"h.\1.ln_\2.\3",
    r"trf_blocks\.(\d+)\.att\.out_proj\.(weight|bias)": r"h.\1.attn.c_proj.\2",
    r"trf_blocks\.(\d+)\.att\.W_(query|key|value)\.(weight|bias)": r"h.\1.attn.\2.\3",
    r"trf_blocks\.(\d+)\.ff\.layers\.0\.(weight|bias)": r"h.\1.mlp.c_fc.\2",
    r"trf_blocks\.(\d+)\.ff\.layers\.2\.(weight|bias)": r"h.\1.mlp.c_proj.\2",
}
MASKS = re.compile(
    r"(h\.\d+\.attn\.(bias|masked_bias)|trf_blocks\.\d+\.att\.mask)"
)  # buffers: what may see what
TURNED = re.compile(r"h\.\d+\.(attn|mlp)\.c_(attn|proj|fc)\.weight")


def our_names(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """The same tensors under this project's names, linear weights as (out, in); others stay. Raises ValueError for two of one name."""
    named = _renamed(
        tensors,
        lambda name: re.sub(
            r"^((module|model|transformer)\.)+", "", name.replace("_orig_mod.", "")
        ),
    )
    named = {name: t for name, t in named.items() if not MASKS.fullmatch(name)}
    if any("/wte" in name for name in tensors):
        named = _renamed(named, _openai)
    elif any(name.startswith("trf_blocks.") for name in named):
        named = _joined(_renamed(named, _scratch))
    first = named.get("h.0.mlp.c_fc.weight")
    if first and len(first.shape) >= 2 and first.shape[-1] == 4 * first.shape[-2]:
        named = {
            name: t.turn() if TURNED.fullmatch(name) and t.shape[:-2] in ((), (1,)) else t
            for name, t in named.items()
        }
    return named


def _renamed(tensors: dict[str, Stored], rename) -> dict[str, Stored]:
    named = {}
    for old, t in tensors.items():
        if (name := rename(old)) in named:  # one of them would be left out without a word
            raise ValueError(f"two of its tensors are the same one, {name[:100]}; keep one of them")
        named[name] = t
    return named


def _scratch(name: str) -> str:
    for old, new in SCRATCH.items():
        name = re.sub(f"^{old}$", new, name)
    return name.replace(".scale", ".weight").replace(".shift", ".bias")


def _openai(name: str) -> str:
    """`h.0.attn.c_attn.weight` of `model/h0/attn/c_attn/w`."""
    name = re.sub(r"^h(\d+)/", r"h.\1/", name.removeprefix("model/"))
    name = re.sub(r"/[wg]$", "/weight", re.sub(r"/b$", "/bias", name)).replace("/", ".")
    return f"{name}.weight" if name in ("wte", "wpe") else name


def _joined(named: dict[str, Stored]) -> dict[str, Stored]:
    """Query, key and value as one tensor, one below the other; without their biases (an option of that book) zeros."""
    joined = {
        name: t for name, t in named.items() if not re.search(r"\.attn\.(query|key|value)\.", name)
    }
    for i in sorted(
        {name.split(".")[1] for name in named if re.search(r"\.attn\.query\.weight$", name)}
    ):
        for kind in ("weight", "bias"):
            parts = [
                named.get(f"h.{i}.attn.{letter}.{kind}") for letter in ("query", "key", "value")
            ]
            C = named[f"h.{i}.attn.query.weight"].shape[:1]
            if all(parts) and len({(p.shape, p.dtype) for p in parts}) == 1 and parts[0].shape:
                shape = (3 * parts[0].shape[0], *parts[0].shape[1:])
                joined[f"h.{i}.attn.c_attn.{kind}"] = Stored(
                    shape, partial(_one_below_the_other, parts), parts[0].dtype
                )
            elif kind == "bias" and not any(parts) and C:
                n = 3 * C[0]
                joined[f"h.{i}.attn.c_attn.bias"] = Stored((n,), lambda _, n=n: torch.zeros(n))
    return joined


def _one_below_the_other(parts: list[Stored], _) -> torch.Tensor:
    return torch.cat([part.read() for part in parts])


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOAT_NAMES = {str(dtype) for dtype in FLOATS} | {SAFETENSORS_NAMES[dtype] for dtype in FLOATS}
STATED = {
    "n_vocab": "vocab_size",
    "n_positions": "block_size",
}  # OpenAI's and Hugging Face's names -> here


def shape_of(named: dict, stated: dict) -> dict:
    """
    {"vocab_size", "block_size", "n_layer", "n_embd", "tied"} of tensors (or Stored) under our names.

    stated: what a configuration beside them says, perhaps by other names. Raises ValueError where it is no GPT-2, or where
    the two differ: a configuration may claim any size, and a model is built only as large as tensors that are there.
    """
    V, T = named.get("wte.weight"), named.get("wpe.weight")
    layers = {int(m[1]) for name in named if (m := re.match(r"h\.(\d{1,4})\.", name))}
    if V is None or T is None or not layers or len(V.shape) != 2 or len(T.shape) != 2:
        names = ", ".join(name[:50] for name in sorted(named)[:3])
        raise ValueError(
            f"these are not the weights of a GPT-2 ({len(named)} tensors: {names}, ...); other families are for the recipes"
        )
    if missing := sorted(set(range(max(layers))) - layers):
        raise ValueError(
            f"there is a block {max(layers)}, but no block {missing[0]}; a part of the weights is missing"
        )
    if odd := [name for name, t in named.items() if str(t.dtype) not in FLOAT_NAMES]:
        raise ValueError(
            f"{odd[0][:100]} holds {named[odd[0]].dtype}; weights are F64, F32, F16 or BF16, save them as one of these"
        )
    found = {
        "vocab_size": V.shape[0],
        "block_size": T.shape[0],
        "n_layer": len(layers),
        "n_embd": V.shape[1],
    }
    found["tied"] = "lm_head.weight" not in named
    for name, value in stated.items():
        there = found.get(STATED.get(name, name), value)
        if value is not None and there != value:
            what = f"{name} is said to be {reprlib.repr(value)}, but the tensors have {there}"
            raise ValueError(f"{what}; configuration and weights are of two models")
    return found


MOST_TOLD = 200


def differences(named: dict[str, Stored], expected: dict[str, tuple]) -> list[str]:
    """The tensors that are missing, too many or of another shape, a phrase each; of many the first ones and their number."""
    found = [f"{name} is missing" for name in expected if name not in named]
    found += [f"{name[:100]} is not part of this model" for name in named if name not in expected]
    found += [
        f"{name} is {list(named[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in named and tuple(named[name].shape) != tuple(shape)
    ]
    return found[:MOST_TOLD] + (
        [f"and {len(found) - MOST_TOLD} more"] if len(found) > MOST_TOLD else []
    )
