"""
What a training needs to be told, checked before anything is touched: see docs/contract.md.
"""

from __future__ import annotations

import torch

from parts.data.batches import BatchError, RowBatches, check_batch
from parts.storage.checkpoint import check_name

FACTS = {  # what a resumed run must share -> what it is
    "model_config": "a dict of the model's shape",
    "data": "a hash of the text",
    "tokenizer": "a hash of the tokenizer",
}


def check_job(job, batch_size: int) -> None:
    """Raises ValueError with everything that a Job lacks or has wrong, in one line."""
    problems = []
    if not isinstance(job.family, str) or not job.family:
        problems.append("family: give the model's family a name, such as 'gpt'")
    if not isinstance(job.model, torch.nn.Module):
        problems.append(f"model: is {type(job.model).__name__}, not a torch.nn.Module")
    else:
        problems += _model_problems(job)
    facts = job.facts if isinstance(job.facts, dict) else {}
    problems += [
        f"facts[{name!r}]: missing, {what}" for name, what in FACTS.items() if not facts.get(name)
    ]
    if facts.get("model_config") and not isinstance(facts["model_config"], dict):
        problems.append("facts['model_config']: is not a dict")
    if not isinstance(job.flops_per_token, int | float) or job.flops_per_token <= 0:
        problems.append(f"flops_per_token: {job.flops_per_token!r} is not a positive number")
    if not isinstance(job.tokens_per_row, int) or job.tokens_per_row < 1:
        problems.append(f"tokens_per_row: {job.tokens_per_row!r} is not a positive whole number")
    problems += [
        f"{name}: is {getattr(job, name)!r:.50}, not a function"
        for name in ("loss_fn", "val_batches", "weights")
        if not callable(getattr(job, name))
    ]
    problems += [
        f"{name}: is neither None nor a function"
        for name in ("sample", "metrics", "export", "plan", "dummy_batch")
        if getattr(job, name) is not None and not callable(getattr(job, name))
    ]
    if not all(isinstance(data, bytes) for data in job.files.values()):
        problems.append("files: {file name: bytes}; one of them is not bytes")
    try:
        check_name(job.checkpoint_name)
    except ValueError as e:
        problems.append(str(e))
    problems += _batch_problems(job, batch_size)
    if problems:
        raise ValueError(f"this Job cannot be trained: {'; '.join(problems)}")


def _model_problems(job) -> list[str]:
    problems = []
    if not any(p.requires_grad for p in job.model.parameters()):
        problems.append("model: has no parameter with requires_grad, so nothing to train")
    if not job.model.training:
        problems.append("model: is in eval mode, which switches dropout off; call model.train()")
    blocks = job.blocks if isinstance(job.blocks, tuple) else (job.blocks,)
    if not all(isinstance(block, type) for block in blocks):
        problems.append("blocks: is not a tuple of classes")
    elif blocks and not any(isinstance(m, blocks) for m in job.model.modules()):
        names = ", ".join(block.__name__ for block in blocks)
        problems.append(f"blocks: the model has no module of class {names}")
    return problems


def _batch_problems(job, batch_size: int) -> list[str]:
    """What is wrong with the training batches; ValueErrors of `batch` itself are raised."""
    batches = job.train_batches
    if not isinstance(batches, RowBatches):
        return [f"train_batches: is {type(batches).__name__}, not a RowBatches"]
    if batches.tokens_per_row != job.tokens_per_row:
        length = batches.tokens_per_row
        return [f"train_batches: has rows of {length} tokens, unlike tokens_per_row"]
    n = min(batch_size, batches.n_rows)
    if not n:
        return []  # resolve_length says what to do
    try:
        check_batch(batches.batch(0, n), n)
    except OSError:
        return []  # reported when training reads it, after saving
    except BatchError as e:
        return [f"train_batches: {e}"]
    return []
