"""
The shape of the model that the section `model` describes: a named size, dimensions, or a folder.

    problems = model_problems(config)        # [(path in the file, what is wrong)]
    shape = shape_of(config, vocab_size)     # LlamaConfig or GPTConfig

In the file the dimensions have Hugging Face's names; here they have those of the project.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields

from gpt_train import SIZES as GPT_SIZES
from gpt_train import GPTConfig
from parts.cli.config import nearest_name
from parts.model.llama import LlamaConfig
from parts.training.plan import count_parameters
from wt_load import Weights, open_weights

# name in the section `model` -> setting
MODEL = {
    "type": "model_type",
    "size": "model_size",
    "from": "init_from",
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "intermediate_size": "n_hidden",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "max_position_embeddings": "block_size",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tied",
    "dropout": "dropout",
}
PATHS = {own: f"model.{name}" for name, own in MODEL.items()}
OF_SHAPE = tuple(own for own in PATHS if own not in ("model_type", "model_size", "init_from"))
# a size fixes these; a file may have another vocabulary, context or rotary base
FIXED = ("n_embd", "n_hidden", "n_layer", "n_head", "n_kv_head")
ONLY_LLAMA = ("n_hidden", "n_kv_head", "norm_eps", "rope_theta")
NAMES = (*FIXED, "vocab_size", "block_size", "norm_eps", "rope_theta", "tied")
# Llama 1 and 2 (7B, 13B), Llama 3 (8B, 70B), Llama 3.2 (1B; without its scaled positions), Qwen2.5
LLAMA = {
    "tiny": (64, 176, 2, 4, 2, None, 128, 1e-5, 1e4, True),
    "1B": (2048, 8192, 16, 32, 8, 128256, 8192, 1e-5, 5e5, True),
    "7B": (4096, 11008, 32, 32, 32, 32000, 2048, 1e-6, 1e4, False),
    "8B": (4096, 14336, 32, 32, 8, 128256, 8192, 1e-5, 5e5, False),
    "13B": (5120, 13824, 40, 40, 40, 32000, 2048, 1e-6, 1e4, False),
    "70B": (8192, 28672, 80, 64, 8, 128256, 8192, 1e-5, 5e5, False),
}
QWEN2 = {
    "tiny": (64, 176, 2, 4, 2, None, 128, 1e-6, 1e6, True),
    "0.5B": (896, 4864, 24, 14, 2, 151936, 32768, 1e-6, 1e6, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, 131072, 1e-6, 1e6, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, 131072, 1e-6, 1e6, False),
}
GPT2 = {
    name: {"n_layer": L, "n_head": H, "n_embd": C, "block_size": 1024}
    for name, (L, H, C) in GPT_SIZES.items()
}
SIZES = {
    "llama": {name: dict(zip(NAMES, row, strict=True)) for name, row in LLAMA.items()},
    "qwen2": {name: dict(zip(NAMES, row, strict=True)) for name, row in QWEN2.items()},
    "gpt2": GPT2,
}
SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMB])", re.IGNORECASE)  # such as 6.7B
TOLERANCE = 0.1  # between a size of another name and the number of parameters


def numbers_of(config) -> dict:
    """The dimensions that are known: those of the named size, and above them those of the file."""
    known = SIZES.get(config.model_type, {}).get(config.model_size or "", {})
    asked = {name: getattr(config, name) for name in OF_SHAPE}
    both = known | {name: value for name, value in asked.items() if value is not None}
    return {name: value for name, value in both.items() if value is not None}


def shape_of(config, vocab_size: int) -> LlamaConfig | GPTConfig:
    """
    The shape that a section `model` without `from` describes.

    vocab_size: ids of the tokenizer, if neither the section nor its size says more. Raises
    ValueError for dimensions that cannot be right.
    """
    n = {"vocab_size": vocab_size} | numbers_of(config)
    if config.model_type == "gpt2":
        names = {field.name for field in fields(GPTConfig)}
        return GPTConfig(**{name: value for name, value in n.items() if name in names})
    n.pop("dropout", None)
    n.setdefault("n_kv_head", n["n_head"])
    return LlamaConfig(
        **n, head_dim=n["n_embd"] // n["n_head"], qkv_bias=config.model_type == "qwen2"
    )


def open_base(config) -> Weights:
    """
    The model at `model.from`: a folder, or a name in the hub's cache or on the hub.

    Reads names and shapes, not the weights. Raises ValueError or FileNotFoundError.
    """
    is_local = os.path.lexists(config.init_from)
    try:
        return open_weights(config.init_from if is_local else f"hf:{config.init_from}")
    except (ValueError, FileNotFoundError) as e:
        raise type(e)(f"model.from: {e}") from e


def kind_of(shape) -> str:
    """The `type` of a shape, as the section has it."""
    if shape.family == "gpt":
        return "gpt2"
    return "qwen2" if shape.qkv_bias else "llama"


def model_problems(config) -> list[tuple[str, str]]:
    """(path in the file, what is wrong) of everything in the section `model`."""
    if config.init_from is not None:
        return _problems_of_base(config)
    if config.model_type is None:
        return [("model.type", f"is missing; give one of {', '.join(SIZES)}, or model.from")]
    found = []
    sizes = SIZES[config.model_type]
    n = numbers_of(config)
    required = ["n_embd", "n_layer", "n_head", "block_size"]
    if config.model_type != "gpt2":
        required.insert(1, "n_hidden")
    missing = [name for name in required if name not in n]
    size = config.model_size
    is_number = size is not None and SIZE.fullmatch(size)
    if size is not None and size not in sizes and (missing or not is_number):
        what = f"{size!r} is no size of {config.model_type}{nearest_name(size, sizes)}"
        found.append(("model.size", f"{what}; choose one of {', '.join(sizes)}, or give all of "
                      f"{', '.join(PATHS[name] for name in required)}"))  # fmt: skip
    elif missing:
        names = ", ".join(PATHS[name] for name in missing)
        found.append((PATHS[missing[0]], f"is missing ({names}); give it, or model.size"))
    for name in FIXED:
        asked, right = getattr(config, name), sizes.get(size, {}).get(name)
        if asked is not None and right is not None and asked != right:
            what = f"{asked} contradicts model.size {size}, which has {right}; change one of them"
            found.append((PATHS[name], what))
    found += _arithmetic(config, n)
    if not found and is_number and size not in sizes:
        found += _wrong_count(config)
    return found


def _arithmetic(config, n: dict) -> list[tuple[str, str]]:
    """Dimensions that the family does not have, or that do not divide."""
    found = []
    if config.model_type == "gpt2":
        for name in (name for name in ONLY_LLAMA if getattr(config, name) is not None):
            if name == "n_hidden" and config.n_hidden == 4 * n.get("n_embd", 0):
                continue
            what = "gpt2 has 4 x hidden_size" if name == "n_hidden" else "gpt2 has none"
            found.append((PATHS[name], f"{getattr(config, name)}: {what}; leave it out"))
    elif config.dropout:
        what = f"{config.dropout}: a {config.model_type} has none; leave it out"
        found.append((PATHS["dropout"], what))
    if found or any(n.get(name, 1) < 1 for name in FIXED):  # reported as out of range
        return found
    H, C = n.get("n_head"), n.get("n_embd")
    K = n.get("n_kv_head")
    if H and C and C % H:
        what = f"{H} heads do not divide model.hidden_size {C}; change one of them"
        found.append((PATHS["n_head"], what))
    elif H and C and config.model_type != "gpt2" and C // H % 2:
        what = f"heads of {C} / {H} = {C // H} numbers, which is odd; rotary positions turn pairs"
        found.append((PATHS["n_head"], what))
    if H and K and H % K:
        what = f"{K} does not divide model.num_attention_heads {H}; change one of them"
        found.append((PATHS["n_kv_head"], what))
    return found


def _wrong_count(config) -> list[tuple[str, str]]:
    """A size such as 3B whose dimensions have another number of parameters."""
    number, unit = SIZE.fullmatch(config.model_size).groups()
    asked = float(number) * {"K": 1e3, "M": 1e6, "B": 1e9}[unit.upper()]
    # without a vocabulary the tokenizer's counts, which is not known yet
    count = count_parameters(shape_of(config, 32000))
    if abs(count - asked) <= TOLERANCE * asked:
        return []
    what = f"contradicts the dimensions, which have {count:,} parameters; change one of them"
    return [("model.size", f"{config.model_size!r} {what}")]


def _problems_of_base(config) -> list[tuple[str, str]]:
    """What contradicts the model at `model.from`; a hub's name is only looked at when it runs."""
    if not os.path.lexists(config.init_from):
        is_path = config.init_from.startswith((".", "/", "~")) or config.init_from.count("/") > 1
        if is_path:
            return [("model.from", f"{config.init_from!r} does not exist; give a model's folder")]
        return []
    try:
        shape = open_base(config).config
    except (ValueError, FileNotFoundError) as e:
        return [("model.from", str(e).removeprefix("model.from: "))]
    found = []
    if config.model_type and config.model_type != kind_of(shape):
        what = f"{config.model_type!r}, but {config.init_from} is a {kind_of(shape)}; leave it out"
        found.append((PATHS["model_type"], what))
    if config.model_size is not None:
        what = f"{config.model_size!r}: the size is that of {config.init_from}; leave it out"
        found.append((PATHS["model_size"], what))
    for name in OF_SHAPE:
        asked, own = getattr(config, name), getattr(shape, name, None)
        if name != "dropout" and asked is not None and asked != own:
            what = f"{asked} contradicts {own} of {config.init_from}; leave it out"
            found.append((PATHS[name], what))
    if config.dropout and shape.family != "gpt":
        found.append((PATHS["dropout"], f"{config.dropout}: a llama has none; leave it out"))
    return found
