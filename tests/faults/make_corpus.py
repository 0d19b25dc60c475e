"""
Writes a few hundred small documents as jsonl, always the same. For the fault harness.

    python make_corpus.py FOLDER          train.jsonl
    python make_corpus.py FOLDER raw      raw_train.jsonl and raw_test.jsonl, as recipes/q_lora has
"""

import json
import os
import sys
from pathlib import Path

folder = Path(sys.argv[1])
kind = sys.argv[2] if len(sys.argv) > 2 else None
folder.mkdir(parents=True, exist_ok=True)
words = (
    "the old man and a small dog went down to the sea "
    "where ships of every kind lay still in the morning light"
).split()
lines = []
for n in range(300):
    text = " ".join(words[(n * 5 + i * (n % 7 + 2)) % len(words)] for i in range(60))
    lines.append(json.dumps({"text": f"{n}. {text}."}) + "\n")
parts = {f"{kind}_train": lines[:280], f"{kind}_test": lines[280:]} if kind else {"train": lines}
for name, chosen in parts.items():
    path = folder / f"{name}.jsonl"
    path.write_text("".join(chosen), encoding="utf-8", newline="\n")
    os.utime(path, (1_700_000_000, 1_700_000_000))  # a copy is the same data
