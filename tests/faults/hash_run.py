"""One line about how a run ended: weights, optimizer and every logged loss of it. For the fault harness."""

import hashlib
import json
import sys
from pathlib import Path

from parts.checkpoint import load_checkpoint, load_tensors, newest_checkpoint
from wt_load import weights_hash

run = Path(sys.argv[1])
folder = newest_checkpoint(run)
weights, state = load_checkpoint(folder)
records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
assert [r["step"] for r in records] == list(range(state["step"] + 1)), "metrics.jsonl has not one line per step"
losses = json.dumps([[r.get(k) for k in ("step", "tokens", "train_loss", "lr", "grad_norm", "val_loss")] for r in records])
samples = (run / "samples.txt").read_text(encoding="utf-8")
optimizer = weights_hash(load_tensors(folder / "optimizer.safetensors")) + json.dumps(state["optimizer_numbers"], sort_keys=True)
print(state["step"], weights_hash(weights), hashlib.sha256((optimizer + losses + samples).encode()).hexdigest())
