"""Writes a few hundred small documents as jsonl, always the same. For the fault harness."""

import json
import os
import sys
from pathlib import Path

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
words = (
    "the old man and a small dog went down to the sea "
    "where ships of every kind lay still in the morning light"
).split()
with open(folder / "train.jsonl", "w", encoding="utf-8") as f:
    for n in range(300):
        text = " ".join(words[(n * 5 + i * (n % 7 + 2)) % len(words)] for i in range(60))
        f.write(json.dumps({"text": f"{n}. {text}."}) + "\n")
os.utime(folder / "train.jsonl", (1_700_000_000, 1_700_000_000))  # a copy is the same data
