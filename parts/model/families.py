"""
The families of models that the scripts know: what each one's parts are called, and its shapes.

    FAMILIES["llama"].config.of_size("llama-nano", vocab_size=257)
    shell(config)                    a model of this shape, without memory
    check_tensors(tensors, config)   are these the tensors of that shape?

gpt_train.py adds the GPT, which is defined there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn

from parts.base.dtypes import FLOAT_NAMES
from parts.model import llama

MAX_DIFFERENCES = 200  # listed in one message


@dataclass(frozen=True)
class Family:
    """A kind of model that the scripts train, convert, sample and score."""

    title: str  # for people
    config: type  # its shape
    model: type
    block: type  # the part that is compiled, recomputed and sharded as one
    blocks: str  # what the names of the tensors of its blocks begin with, before the number
    sizes: dict  # name -> numbers, as for --model_size


# A recipe may add its own.
FAMILIES = {
    "llama": Family(
        "Llama", llama.LlamaConfig, llama.Llama, llama.LlamaBlock, "model.layers", llama.SIZES
    ),
}


def shape_of_size(size: str, changes: dict):
    """
    The config of the family that has a size of this name, with `changes` applied.

    Raises ValueError for an unknown name, or a change of what the family does not have.
    """
    for family in FAMILIES.values():
        if size in family.sizes:
            _check_names(family.config, changes)
            return family.config.of_size(size, **changes)
    names = ", ".join(name for kind in sorted(FAMILIES) for name in FAMILIES[kind].sizes)
    raise ValueError(f"--model_size: unknown size {size!r}; choose one of {names}")


def shape_to_continue(config, asked: dict, context_length: int):
    """
    The config of a model that is trained further, with the dropout that is asked for.

    Raises ValueError if other numbers in `asked` differ, or the context is longer than the model's.
    """
    _check_names(type(config), asked)
    for name, value in asked.items():
        if name != "dropout" and value != getattr(config, name):
            raise ValueError(
                f"--{name}: {value} is another shape than {getattr(config, name)} of the model; "
                "leave the flag out"
            )
    if context_length > config.block_size:
        longest = f"the {config.block_size} of the model"
        raise ValueError(f"--context_length: {context_length} is more than {longest}; give less")
    if not hasattr(config, "dropout"):
        return config
    return replace(config, dropout=asked.get("dropout", 0.0))


def _check_names(kind: type, asked: dict) -> None:
    if unknown := [name for name in asked if name not in kind.__dataclass_fields__]:
        raise ValueError(
            f"--{unknown[0]}: a model of the family {kind.family} has none; leave the flag out"
        )


def shell(config) -> nn.Module:
    """A model of this shape without memory, for load_state_dict(..., assign=True)."""
    normal_, nn.init.normal_ = nn.init.normal_, lambda tensor, *_, **__: tensor
    try:  # for random numbers without memory torch imports its compiler, a second of every start
        with torch.device("meta"):
            return FAMILIES[config.family].model(config)
    finally:
        nn.init.normal_ = normal_


def tensor_shapes(config) -> dict[str, tuple]:
    """{name: shape} of the tensors of a model of this shape."""
    # All blocks have the same shapes; building thousands of them would take minutes.
    of_one = shell(replace(config, n_layer=1)).state_dict()
    blocks = FAMILIES[config.family].blocks
    first = f"{blocks}.0."
    shapes = {name: tuple(t.shape) for name, t in of_one.items() if not name.startswith(first)}
    for name, t in of_one.items():
        if name.startswith(first):
            inside = name.removeprefix(first)
            shapes |= {f"{blocks}.{i}.{inside}": tuple(t.shape) for i in range(config.n_layer)}
    return shapes


def check_tensors(tensors: dict, config) -> None:
    """
    Raise ValueError with a list of the tensors that a model of this shape lacks, or has not.

    tensors: {name: tensor, or what has its shape and dtype}.
    """
    for name, t in tensors.items():
        if str(t.dtype) not in FLOAT_NAMES:
            raise ValueError(
                f"{name[:100]} is {t.dtype}; save the weights as F64, F32, F16 or BF16"
            )
    if config.n_layer > len(tensors):  # any number may be claimed
        raise ValueError(f"{len(tensors)} tensors are too few for {config.n_layer} blocks")
    try:
        shapes = tensor_shapes(config)
    except (RuntimeError, TypeError) as e:  # torch counts bytes in 64 bits
        raise ValueError("no model is as large as its configuration says") from e
    if wrong := _differences(tensors, shapes):
        raise ValueError(f"does not fit a {config.family} of its size: {'; '.join(wrong)}")


def _differences(named: dict, expected: dict[str, tuple]) -> list[str]:
    """One phrase for each tensor that is missing, unexpected or of another shape; the first 200."""
    found = [f"{name} is missing" for name in expected if name not in named]
    found += [f"{name[:100]} is not part of this model" for name in named if name not in expected]
    for name, shape in expected.items():
        if name in named and tuple(named[name].shape) != tuple(shape):
            found.append(f"{name} is {list(named[name].shape)} instead of {list(shape)}")
    if len(found) > MAX_DIFFERENCES:
        return [*found[:MAX_DIFFERENCES], f"and {len(found) - MAX_DIFFERENCES} more"]
    return found


def config_of(state: dict):
    """The shape of the model in a checkpoint with this trainer state. Raises ValueError."""
    family, file = state.get("family", "gpt"), str(state.get("weights_file", ""))[:50]
    if file.startswith("adapter"):
        raise ValueError(f"{file} has adapters only; merge them into the model they belong to")
    if family not in FAMILIES:
        raise ValueError(
            f"holds a model of the family {str(family)[:50]!r}, this script reads "
            f"{' and '.join(sorted(FAMILIES))}; use the script that trained it"
        )
    try:
        config = FAMILIES[family].config(**state["model_config"])
    except (KeyError, TypeError) as e:
        raise ValueError(f"its model_config is not that of a {family}: {e}") from e
    for field in fields(config):  # untrusted; the config itself checks its whole numbers
        value = getattr(config, field.name)
        allowed = {bool: (bool,), float: (int, float)}.get(type(field.default))
        if allowed and type(value) not in allowed:
            raise ValueError(f"its {field.name} is {str(value)[:50]!r}, not {allowed[-1].__name__}")
    return config
