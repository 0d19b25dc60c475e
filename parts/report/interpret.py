"""
Inside a model while it reads: where its heads look, what each layer predicts, what surprises it.

Every function takes a GPT or a Llama (parts/model/families.py) and ids (T,) int64 on its device, T
at most its context. It runs without gradients and leaves the model as it was. `n_ids` leaves out
ids that the model has and its tokenizer lacks.
Shapes: T positions, C width, H heads, D head_dim, V vocabulary, L layers.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F

from parts.model.families import FAMILIES
from parts.model.llama import rotated, rotations


@contextlib.contextmanager
def _reading(model):
    """Without gradients and without dropout; afterwards the model is in its mode of before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def residual_stream(model, ids) -> torch.Tensor:
    """
    What each position carries from layer to layer, (L + 1, T, C).

    [0] is the embedding, [i] the output of block i - 1. Raises ValueError if the text is empty or
    longer than the context.
    """
    T, longest = len(ids), model.config.block_size
    if not 1 <= T <= longest:
        raise ValueError(
            f"the text has {T:,} tokens, the model reads 1 to {longest:,}; "
            "give a shorter or a longer one"
        )
    stream = []
    blocks = _blocks(model)
    hooks = [blocks[0].register_forward_pre_hook(lambda _, x: stream.append(x[0][0]))]
    hooks += [block.register_forward_hook(lambda _, __, y: stream.append(y[0])) for block in blocks]
    try:
        with _reading(model):
            model(ids[None], last=True)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(stream)


def _blocks(model) -> list:
    kind = FAMILIES[model.config.family].block
    return [module for module in model.modules() if isinstance(module, kind)]


def attention_maps(model, ids, layer: int) -> torch.Tensor:
    """
    How much each position reads from itself and each earlier one in one layer, (H, T, T) fp32.

    Rows are the readers and sum to 1. Computed from the layer's query and key, because the kernels
    of the training never store these probabilities.
    """
    x = residual_stream(model, ids)[layer]
    T = len(ids)
    with _reading(model):
        q, k = _queries_and_keys(model, layer, x)  # (H, T, D) each
        scores = q.float() @ k.float().transpose(1, 2) / math.sqrt(q.shape[2])  # (H, T, T)
        distance = torch.arange(T)[:, None] - torch.arange(T)
        read = (distance >= 0) & (distance < (getattr(model.config, "window", None) or T))
        return scores.masked_fill(~read.to(ids.device), -math.inf).softmax(dim=2)


def _queries_and_keys(model, layer: int, x):
    """Queries and keys (H, T, D) of one layer, from the residual stream (T, C) before it."""
    block, T, H = _blocks(model)[layer], len(x), model.config.n_head
    if model.config.family == "gpt":
        q, k, _ = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=1)  # (T, C) each
        return (a.view(T, H, -1).transpose(0, 1) for a in (q, k))
    attention, x = block.self_attn, block.input_layernorm(x)
    rotation = rotations(model.config, 0, T, x.device)
    q, k = (
        rotated(projection(x).view(1, T, -1, attention.head_dim).transpose(1, 2), rotation)[0]
        for projection in (attention.q_proj, attention.k_proj)
    )
    return q, k.repeat_interleave(H // len(k), dim=0)  # several heads share a key


def logit_lens(model, ids, n_ids: int | None = None) -> torch.Tensor:
    """
    Log-probabilities of the token after `ids`, as if the model ended after each layer: (L + 1, V).

    In fp32: the last norm and the head, applied to the residual stream after every layer; the last
    row is the output of the model. Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    Raises RuntimeError if the output is not finite.
    """
    x = residual_stream(model, ids)[:, -1]  # (L + 1, C)
    with _reading(model):
        last_norm = model.ln_f if model.config.family == "gpt" else model.model.norm
        logits = F.linear(last_norm(x), _head(model))[:, :n_ids]
        return _finite(logits).float().log_softmax(dim=1)


def token_losses(model, ids) -> torch.Tensor:
    """
    How much each token but the first surprises the model, (T - 1,) fp32 nats.

    That is -log of the probability that the model gave it.
    """
    with _reading(model):
        logits = _finite(model(ids[None])[0, :-1]).float()  # (T - 1, V)
        return F.cross_entropy(logits, ids[1:], reduction="none")


def neighbours(
    model, token: int, k: int, n_ids: int | None = None
) -> tuple[list[int], list[float]]:
    """
    The k other tokens whose embeddings have the most similar direction, and the cosines.

    Highest first.
    """
    with torch.no_grad():
        directions = F.normalize(_embedding(model)[:n_ids].float(), dim=1)  # (V, C)
        cosines = directions @ directions[token]  # (V,)
        cosines[token] = -2.0
        best = cosines.topk(min(k, len(cosines) - 1))
    return best.indices.tolist(), best.values.tolist()


def _head(model) -> torch.Tensor:
    """The (V, C) matrix that turns the stream into logits."""
    return _embedding(model) if model.config.tied else model.lm_head.weight


def _embedding(model) -> torch.Tensor:
    """The (V, C) matrix of token embeddings."""
    module = model.wte if model.config.family == "gpt" else model.model.embed_tokens
    return module.weight


def _finite(logits):
    if not torch.isfinite(logits).all():
        raise RuntimeError(
            "the model's output is not finite: its training has diverged; use another checkpoint"
        )
    return logits


# ------------------------------------------------------------------------------ tokens for the eye


def ids_of(text: str, tokenizer, longest: int, last: bool):
    """
    (ids (T,) int64 of what begins a document and the text, a note).

    Of a text that is too long these are the `last` or first `longest` ones, and the note says so;
    else it is "".
    """
    ids = torch.tensor([tokenizer.bos, *tokenizer.encode(text).tolist()])
    if len(ids) <= longest:
        return ids, ""
    which = "last" if last else "first"
    length = f"The text has {len(ids):,} tokens and the model reads {longest:,} at most"
    return ids[-longest:] if last else ids[:longest], f"{length}: these are its {which} ones."


def shown(tokenizer, token: int) -> str:
    """A token made visible: a dot for each blank, bytes of incomplete characters as hexadecimal."""
    text = tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")
    return text.replace("\n", "\\n").replace(" ", "\u00b7")
