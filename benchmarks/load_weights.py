"""
How much memory wt_load.load_gpt takes to load a GPT-2 from a Hugging Face folder, in fp32.

    python benchmarks/load_weights.py                  # 124M
    python benchmarks/load_weights.py --size 1558M     # 6.2 GB of memory; the file is sparse

Prints the highest memory of the process (VmHWM, Linux) less what it had before, over the bytes of
the weights, and the seconds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from gpt_train import GPT, SIZES, GPTConfig

# Hugging Face stores these as (in, out).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
LOADING = """
import sys, time, torch
from wt_load import load_gpt

def peak():
    with open("/proc/self/status", encoding="ascii") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))

torch.ones(1000, 1000) @ torch.ones(1000, 1000)
before = peak()
started = time.perf_counter()
n_bytes = sum(p.nbytes for p in load_gpt(sys.argv[1]).parameters())
seconds = time.perf_counter() - started
ratio = (peak() - before) / n_bytes
print(f"{n_bytes / 1e9:.2f} GB of weights, peak {ratio:.3f} times that, {seconds:.1f} s")
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--size", default="124M", choices=SIZES)
    size = parser.parse_args().size
    with torch.device("meta"):
        model = GPT(GPTConfig.of_size(size))
    header = {}
    start = 0  # offset of the next tensor
    for name, t in model.state_dict().items():
        shape = list(t.shape[::-1] if name.endswith(TRANSPOSED) else t.shape)
        offsets = [start, start + t.nbytes]
        header[f"transformer.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        start += t.nbytes
    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as tmp:
        with open(f"{tmp}/model.safetensors", "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + start)
        config = json.dumps({"model_type": "gpt2", "n_head": model.config.n_head})
        Path(tmp, "config.json").write_text(config, encoding="utf-8")
        subprocess.run([sys.executable, "-c", LOADING, tmp], check=True)


if __name__ == "__main__":
    main()
