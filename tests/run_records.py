"""Files of a run as the production trainer writes them."""

import json
from pathlib import Path


def write_metrics(folder: Path, records) -> Path:
    """Write records as the metrics of a run; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def advanced(n: int, first: int = 1) -> list[dict]:
    """Records as the production trainer writes them: 100 tokens a step, 50 tokens a second."""
    return [
        {
            "step": i,
            "tokens": 100 * i,
            "train_loss": 5 - i / 100,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_s": 50.0,
            "mfu": None,
            "memory_gib": 0.25,
        }
        for i in range(first, first + n)
    ]
