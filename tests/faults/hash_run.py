"""
One line about how a run ended: every file of the last checkpoint but trainer_state.json (weights or
adapters, optimizer, tokenizer, ...), every logged loss, the evaluations and the samples.

For the fault harness. Without torch, whose import would take longer than the run: the hashes are
those of MANIFEST.json, compared with the files.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

run = Path(sys.argv[1])
folder = max(run.glob("checkpoints/*[0-9]"), key=lambda path: int(re.search(r"\d+$", path.name)[0]))
manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
for name, sha256 in files.items():
    damaged = hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256
    assert not damaged, f"{folder / name} is damaged"
state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
records = [
    json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
]
assert [r["step"] for r in records] == list(range(state["step"] + 1)), (
    "metrics.jsonl has not one line per step"
)
losses = [
    [r.get(k) for k in ("step", "tokens", "train_loss", "lr", "grad_norm", "val_loss")]
    for r in records
]
texts = [  # of the trainer, or of a recipe with a folder for each
    path.read_text(encoding="utf-8")
    for path in (
        *(run / "samples.txt", run / "results/samples.txt"),
        run / "logs/eval_results.json",
    )
    if path.exists()
]
assert texts, "the run has no samples"
weights = next(name for name in ("model.safetensors", "adapter_model.safetensors") if name in files)
others = {n: sha for n, sha in files.items() if n not in (weights, "trainer_state.json")}
rest = json.dumps([others, state["optimizer_numbers"], losses, texts], sort_keys=True)
print(state["step"], files[weights], hashlib.sha256(rest.encode()).hexdigest())
