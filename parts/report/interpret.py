"""
Inside a GPT while it reads: where its heads look, what each layer predicts, what surprises it.

Every function takes a model with the modules of `gpt_train.GPT` (wte, wpe, h, ln_f and, unless
tied, lm_head) and ids (T,) int64 on its device, T at most its context. It runs without gradients
and leaves the model as it was. `n_ids` leaves out ids that the model has and its tokenizer lacks.
Shapes: T positions, C width, H heads, D head_dim, V vocabulary, L layers.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F


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
    with _reading(model):
        x = model.wte(ids)[None] + model.wpe(torch.arange(T, device=ids.device))  # (1, T, C)
        stream = [x[0]]
        for block in model.h:
            x = block(x)
            stream.append(x[0])
    return torch.stack(stream)


def attention_maps(model, ids, layer: int) -> torch.Tensor:
    """
    How much each position reads from itself and each earlier one in one layer, (H, T, T) fp32.

    Rows are the readers and sum to 1. Computed from the layer's query and key, because the kernels
    of the training never store these probabilities.
    """
    block, x = model.h[layer], residual_stream(model, ids)[layer]
    (T, C), H = x.shape, block.attn.n_head
    with _reading(model):
        q, k, _ = block.attn.c_attn(block.ln_1(x)).float().split(C, dim=1)  # (T, C) each
        q, k = (a.view(T, H, C // H).transpose(0, 1) for a in (q, k))  # (H, T, D)
        scores = q @ k.transpose(1, 2) / math.sqrt(C // H)  # (H, T, T)
        later = torch.ones(T, T, dtype=torch.bool, device=ids.device).triu(1)
        return scores.masked_fill(later, -math.inf).softmax(dim=2)


def logit_lens(model, ids, n_ids: int | None = None) -> torch.Tensor:
    """
    Log-probabilities of the token after `ids`, as if the model ended after each layer: (L + 1, V).

    In fp32: the last norm and the head, applied to the residual stream after every layer; the last
    row is the output of the model. Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    Raises RuntimeError if the output is not finite.
    """
    x = residual_stream(model, ids)[:, -1]  # (L + 1, C)
    with _reading(model):
        return _finite(F.linear(model.ln_f(x), _head(model))[:, :n_ids]).float().log_softmax(dim=1)


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
        directions = F.normalize(model.wte.weight[:n_ids].float(), dim=1)  # (V, C)
        cosines = directions @ directions[token]  # (V,)
        cosines[token] = -2.0
        best = cosines.topk(min(k, len(cosines) - 1))
    return best.indices.tolist(), best.values.tolist()


def _head(model) -> torch.Tensor:
    """The (V, C) matrix that turns the stream into logits."""
    return model.wte.weight if model.config.tied else model.lm_head.weight


def _finite(logits):
    if not torch.isfinite(logits).all():
        raise RuntimeError(
            "the model's output is not finite: its training has diverged; use another checkpoint"
        )
    return logits


# ------------------------------------------------------------------------------ tokens for the eye


def ids_of(text: str, tokenizer, longest: int, last: bool):
    """
    (ids (T,) int64 of end-of-text and the text, a note).

    Of a text that is too long these are the `last` or first `longest` ones, and the note says so;
    else it is "".
    """
    ids = torch.tensor([tokenizer.eot, *tokenizer.encode(text).tolist()])
    if len(ids) <= longest:
        return ids, ""
    which = "last" if last else "first"
    length = f"The text has {len(ids):,} tokens and the model reads {longest:,} at most"
    return ids[-longest:] if last else ids[:longest], f"{length}: these are its {which} ones."


def shown(tokenizer, token: int) -> str:
    """A token made visible: a dot for each blank, bytes of incomplete characters as hexadecimal."""
    text = tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")
    return text.replace("\n", "\\n").replace(" ", "\u00b7")
