"""
The Llama family: what most decoders are built of since GPT-2. Llama, Qwen2 and Mistral are this.

What replaces what in GPT-2:

    RMSNorm         LayerNorm: no mean, no bias (Zhang and Sennrich 2019)
    rotary          learned positions: queries and keys are turned by an angle that grows with the
                    position, so a score depends on the distance (Su et al. 2021)
    SwiGLU          GELU: one half of the MLP opens and closes the other (Shazeer 2020)
    grouped query   several query heads share a key and a value: a smaller cache (Ainslie et al.
                    2023)
    no biases       except those of query, key and value in Qwen2

Tensors have Hugging Face's names, so its folders load and export by name; logits equal those of
its LlamaForCausalLM, Qwen2ForCausalLM and MistralForCausalLM. To take the model into another
project, copy this file and the three modules of parts/model that it imports.

Letters: B rows, T positions, C width, H query heads, K key-value heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.model.cpu_products import Linear, attend, product
from parts.model.kv_cache import LayerCache
from parts.model.losses import cross_entropy_of_head, product_dtype


@dataclass
class LlamaConfig:
    """The shape of a Llama, Qwen2 or Mistral. The defaults are Llama 1's smallest size, 7B."""

    family: ClassVar[str] = "llama"
    vocab_size: int = 32000  # V, tokens
    block_size: int = 2048  # longest T the model can read, tokens
    n_layer: int = 32  # L, blocks
    n_head: int = 32  # H, query heads per block
    n_kv_head: int = 32  # K, key-value heads per block; H is a multiple of it
    n_embd: int = 4096  # C, width of the residual stream
    n_hidden: int = 11008  # width inside the MLP
    head_dim: int = 128  # D, width of a head
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    rope_theta: float = 10_000.0  # the slowest rotation takes about 2 pi theta positions
    # Llama 3's longer context: slow rotations are slower by rope_factor; 1: no such scaling.
    # Between the two other factors, as many turns in the original context, it is blended in.
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_context: int = 8192  # context of the training before it was extended, tokens
    qkv_bias: bool = False  # query, key and value have a bias (Qwen2)
    window: int | None = None  # a position reads only so many, itself included (Mistral); None: all
    tied: bool = False  # the output head is the token embedding

    def __post_init__(self):
        whole = ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden")
        for name in (*whole, "head_dim", *(["window"] if self.window is not None else [])):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                shown = str(value)[:50]
                raise ValueError(f"LlamaConfig: {name} is {shown}; give a whole number, at least 1")
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"LlamaConfig: n_head {self.n_head} is not a multiple of n_kv_head "
                f"{self.n_kv_head}; change one of them"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"LlamaConfig: head_dim is {self.head_dim}; it must be even, "
                "as rotary positions turn pairs of numbers"
            )

    @classmethod
    def of_size(cls, name: str, **changes) -> LlamaConfig:
        """The config of a named size (see SIZES), with `changes` applied. Raises ValueError."""
        if name not in SIZES:
            sizes = ", ".join(SIZES)
            raise ValueError(f"--model_size: unknown size {name!r}; choose one of {sizes}")
        names = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden")
        shape = {**dict(zip(names, SIZES[name], strict=True)), "tied": True, "norm_eps": 1e-5}
        shape |= changes
        if "n_embd" in changes:  # the MLP as much wider as in the named size, in steps of 16
            width = SIZES[name][4] * changes["n_embd"] / SIZES[name][3]
            shape = {"n_hidden": 16 * max(1, round(width / 16)), **changes} | shape
        if shape["n_embd"] % shape["n_head"]:
            raise ValueError(
                f"LlamaConfig: n_embd {shape['n_embd']} is not a multiple of n_head "
                f"{shape['n_head']}; change one of them"
            )
        return cls(**{"head_dim": shape["n_embd"] // shape["n_head"], **shape})


# name -> (n_layer, n_head, n_kv_head, n_embd, n_hidden). The last is Llama 3.2's 1B.
SIZES = {
    "llama-nano": (2, 2, 1, 64, 176),
    "llama-micro": (4, 4, 2, 128, 352),
    "llama-mini": (6, 6, 2, 384, 1024),
    "llama-small": (8, 8, 4, 512, 1408),
    "llama-130m": (12, 12, 4, 768, 2048),
    "llama-350m": (24, 16, 8, 1024, 2816),
    "llama-1b": (16, 32, 8, 2048, 8192),
}


def rotations(config: LlamaConfig, start: int, T: int, device):
    """cos and sin (T, D / 2) of the angles of positions start .. start + T - 1, in fp32."""
    D = config.head_dim
    speeds = config.rope_theta ** -(torch.arange(0, D, 2, device=device).float() / D)  # (D / 2,)
    if config.rope_factor != 1:
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        turns = config.rope_original_context * speeds / (2 * math.pi)
        unscaled = ((turns - low) / (high - low)).clamp(0, 1)
        speeds = speeds * (unscaled + (1 - unscaled) / config.rope_factor)
    angles = torch.arange(start, start + T, device=device).float()[:, None] * speeds
    return angles.cos(), angles.sin()


def rotated(x, rotation):
    """Queries or keys (B, H, T, D) turned by rotation, cos and sin (T, D / 2) each."""
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=3)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=3).to(x.dtype)


def attention_mask(config: LlamaConfig, start: int, T: int, documents, device):
    """
    Which keys 0 .. start + T - 1 each query may read, bool (T, keys) or (B, 1, T, keys); or None.

    None means every earlier key and its own. documents (B, T): number of the document of each
    position; other documents of the row are not read.
    """
    limited = config.window is not None and start + T > config.window
    if documents is None and not limited and (start == 0 or T == 1):
        return None
    queries = torch.arange(start, start + T, device=device)[:, None]
    keys = torch.arange(start + T, device=device)
    mask = keys <= queries  # (T, keys)
    if limited:
        mask = mask & (queries - keys < config.window)
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    return mask


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, D, bias = config.n_embd, config.head_dim, config.qkv_bias
        self.head_dim = D
        self.q_proj = Linear(C, config.n_head * D, bias=bias)
        self.k_proj = Linear(C, config.n_kv_head * D, bias=bias)
        self.v_proj = Linear(C, config.n_kv_head * D, bias=bias)
        self.o_proj = Linear(config.n_head * D, C, bias=False)

    def forward(self, x, rotation, mask, cache: LayerCache | None = None):
        """x (B, T, C) -> (B, T, C). With a cache, x has only positions after the cached ones."""
        B, T, _ = x.shape
        x = x.to(product_dtype(x))  # once; autocast would keep a copy for each product
        q, k, v = [
            projection(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H or K, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        ]
        q, k = rotated(q, rotation), rotated(k, rotation)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, K, earlier + T, D)
        y = attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: a wider copy of x, multiplied by a gate, and back."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, width = config.n_embd, config.n_hidden
        self.gate_proj = Linear(C, width, bias=False)
        self.up_proj = Linear(C, width, bias=False)
        self.down_proj = Linear(width, C, bias=False)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C), each position by itself."""
        x = x.to(product_dtype(x))  # once; autocast would keep a copy for each product
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """Attention, then MLP; each reads a normalised copy of the residual stream and adds to it."""

    draws_random = False  # no dropout

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rotation, mask, cache: LayerCache | None = None):
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The embedding, the blocks and the last norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)

    def forward(self, ids, documents=None, cache: list[LayerCache] | None = None):
        """Hidden states (B, T, C) of ids (B, T); see Llama.forward."""
        start = len(cache[0]) if cache else 0
        T = ids.shape[1]
        rotation = rotations(self.config, start, T, ids.device)
        mask = attention_mask(self.config, start, T, documents, ids.device)
        # sparse: see GPT.forward
        sparse = self.config.tied and ids.device.type == "cpu"
        x = F.embedding(ids, self.embed_tokens.weight, sparse=sparse)  # (B, T, C)
        for i, block in enumerate(self.layers):
            x = block(x, rotation, mask, cache[i] if cache else None)
        return self.norm(x)


class Llama(nn.Module):
    """A decoder of the Llama family with its output head."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        # 2 L products add to the residual stream; with this scale its variance does not grow
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def head(self):
        """The weight (V, C) of the output head."""
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def forward(self, ids, targets=None, documents=None, cache=None, last: bool = False):
        """
        Logits for the token after each position, or after the last one only; or the loss.

        ids, targets, cache and `last` as for GPT.forward. documents (B, T): number of the document
        of each position; positions read their own document only. (Their numbers need not start
        anew: rotary positions act by distance.) Raises ValueError if the text is longer than
        block_size.
        """
        seen, T = len(cache[0]) if cache else 0, ids.shape[1]
        if seen + T > self.config.block_size:
            raise ValueError(
                f"Llama: {seen + T} tokens are more than the context of "
                f"{self.config.block_size}; crop the input"
            )
        x = self.model(ids, documents, cache)  # (B, T, C)
        if targets is None:
            return product(x[:, -1:] if last else x, self.head)  # (B, T, V) or (B, 1, V)
        return cross_entropy_of_head(x.flatten(0, 1), self.head, targets.flatten())
