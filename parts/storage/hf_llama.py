"""
config.json of Llama, Qwen2 and Mistral folders of Hugging Face, and our LlamaConfig.

The tensors have the same names and shapes there as here, so only the configuration is translated.
A setting that would compute something else from the same tensors is refused by name.
"""

from __future__ import annotations

import reprlib

from parts.model.llama import LlamaConfig

MODEL_TYPES = ("llama", "qwen2", "mistral")
# name there -> name here
NUMBERS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "block_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
    "intermediate_size": "n_hidden",
}
# name there -> the values that this project computes with; a missing setting means the first
SUPPORTED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
    "num_local_experts": (None,),
    "alibi": (False,),
}


def config_of_settings(settings: dict) -> LlamaConfig:
    """
    The shape that a config.json describes.

    Raises ValueError for a setting that is missing, or that means another arithmetic.
    """
    kind = settings["model_type"]
    for name, values in SUPPORTED.items():
        value = settings.get(name, values[0])
        if value not in values:
            what = f"{name} is {reprlib.repr(value)}, this Llama computes with {values[0]!r}"
            raise ValueError(f"{what}; use weights trained with that")
    if missing := [name for name in NUMBERS if type(settings.get(name)) is not int]:
        raise ValueError(f"config.json has no number {missing[0]}; download it again")
    shape = {ours: settings[theirs] for theirs, ours in NUMBERS.items()}
    H = shape["n_head"]
    # what transformers takes if the file does not say
    kv_heads = settings.get("num_key_value_heads", 8 if kind == "mistral" else None)
    head_dim = settings.get("head_dim") or shape["n_embd"] // max(H, 1)
    return LlamaConfig(
        **shape,
        n_kv_head=H if kv_heads is None else kv_heads,
        head_dim=head_dim,
        norm_eps=_number(settings, "rms_norm_eps", 1e-6),
        **_rotary(settings),
        qkv_bias=kind == "qwen2",
        window=settings.get("sliding_window", 4096) if kind == "mistral" else None,
        tied=bool(settings.get("tie_word_embeddings", False)),
    )


def _rotary(settings: dict) -> dict:
    """Our names of the rotary settings; transformers 5 keeps them in one place, 4 in two."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(
            f"its rope_parameters are {reprlib.repr(rope)}; download config.json again"
        )
    theta = _number(rope, "rope_theta", _number(settings, "rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise ValueError(
            f"its rotary positions are of the type {reprlib.repr(kind)}, "
            "this Llama has default and llama3; use a model with one of them"
        )
    return {
        "rope_theta": theta,
        "rope_factor": _number(rope, "factor"),
        "rope_low_freq_factor": _number(rope, "low_freq_factor"),
        "rope_high_freq_factor": _number(rope, "high_freq_factor"),
        "rope_original_context": int(_number(rope, "original_max_position_embeddings")),
    }


def _number(settings: dict, name: str, default: float | None = None) -> float:
    value = settings.get(name, default)
    if type(value) not in (int, float):
        raise ValueError(f"{name} is {reprlib.repr(value)}, not a number; correct config.json")
    return float(value)


def settings_of_config(config: LlamaConfig) -> dict:
    """
    The config.json of a shape, for transformers.

    Raises ValueError for a combination that none of its classes has.
    """
    if config.qkv_bias and config.window:
        raise ValueError("--to hf: transformers has no class with qkv_bias and a window")
    kind, name = "llama", "Llama"
    if config.qkv_bias:
        kind, name = "qwen2", "Qwen2"
    elif config.window:
        kind, name = "mistral", "Mistral"
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_factor != 1:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_context,
        }
    # older versions of transformers read rope_theta and rope_scaling
    scaling = None if config.rope_factor == 1 else {k: rope[k] for k in rope if k != "rope_theta"}
    settings = {theirs: getattr(config, ours) for theirs, ours in NUMBERS.items()}
    return settings | {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "sliding_window": config.window,
        "tie_word_embeddings": config.tied,
    }
