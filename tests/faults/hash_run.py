"""
One line about how a run ended: weights, optimizer, every logged loss and the samples.

For the fault harness. Without torch, whose import would take longer than the run: the hashes are
those of MANIFEST.json, compared with the files.
"""

import hashlib
import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
folder = max(run.glob("checkpoints/step_*"))
files = {
    name: entry["sha256"]
    for name, entry in json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))[
        "files"
    ].items()
}
for name, sha256 in files.items():
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256, (
        f"{folder / name} is damaged"
    )
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
rest = json.dumps(
    [
        files["optimizer.safetensors"],
        state["optimizer_numbers"],
        losses,
        (run / "samples.txt").read_text(encoding="utf-8"),
    ],
    sort_keys=True,
)
print(state["step"], files["model.safetensors"], hashlib.sha256(rest.encode()).hexdigest())
