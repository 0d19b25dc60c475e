"""
Text to token shards with GPT-2's vocabulary: prep_dataset.py against datasets.map and a memmap.

    python benchmarks/tokenizing.py --data FOLDER    # parquet or jsonl, such as of smollm-corpus
    python benchmarks/tokenizing.py                  # Python's documentation, two hundred times

The peer is nanoGPT's recipe, datasets.map(num_proc=2). Both are processes, timed from start to end,
with the same documents and two workers; the Arrow cache of the peer is new each time. Both write
the same tokens into two files, train and val, which is checked byte by byte; our hashes, index and
tokenizer come on top. Three times each in turn; prints MB/s from the medians, and their ratio.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from parts.data.python_docs import python_docs
from parts.data.shards import HEADER_BYTES

ROOT = Path(__file__).resolve().parent.parent
PEER = """
import sys
import numpy as np, tiktoken
from datasets import load_dataset
from parts.data.corpus import in_validation
kind, files, out, cache = sys.argv[1], sys.argv[2].split("\\n"), sys.argv[3], sys.argv[4]
dataset = load_dataset(kind, data_files=files, split="train", cache_dir=cache)
enc = tiktoken.get_encoding("gpt2")

def process(example):
    ids = enc.encode_ordinary(example["text"])
    ids.append(enc.eot_token)
    return {"ids": ids, "len": len(ids), "val": in_validation(example["text"], 0.01)}

done = dataset.map(process, remove_columns=dataset.column_names, num_proc=2)
lengths, val = np.array(done["len"]), np.array(done["val"])
arrays = []
for side in (0, 1):
    n = int(lengths[val == side].sum())
    arrays.append(np.memmap(f"{out}.{side}", np.uint16, "w+", shape=(n,)))
at = [0, 0]
parts = min(64, len(done))
for i in range(parts):
    batch = done.shard(num_shards=parts, index=i, contiguous=True).with_format("numpy")[:]
    for side in (0, 1):
        chosen = [ids for ids, held in zip(batch["ids"], batch["val"]) if held == side]
        if chosen:
            tokens = np.concatenate(chosen)
            arrays[side][at[side] : at[side] + len(tokens)] = tokens
            at[side] += len(tokens)
for array in arrays:
    array.flush()
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--data")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        files = []
        if args.data:
            found = Path(args.data).rglob("*")
            files = sorted(str(f) for f in found if f.suffix in (".parquet", ".jsonl"))
        if not files:
            lines = [json.dumps({"text": text}) + "\n" for text in python_docs()]
            files = [f"{tmp}/docs.jsonl"]
            with open(files[0], "w", encoding="utf-8") as f:
                for _ in range(200):
                    f.writelines(lines)
        kinds = {Path(f).suffix for f in files}
        if len(kinds) > 1:
            sys.exit(f"{args.data}: has both parquet and jsonl files; give a folder of one kind")
        os.makedirs(f"{tmp}/text")
        for i, f in enumerate(files):
            os.symlink(os.path.abspath(f), f"{tmp}/text/{i:05d}{Path(f).suffix}")
        kind = {".parquet": "parquet", ".jsonl": "json"}[kinds.pop()]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        seconds = {"ours": [], "peer": []}
        for i in range(3):
            cache = f"{tmp}/ours{i}"
            build = [ROOT / "prep_dataset.py", "tokenize"]
            build += ["--dataset_name", f"{tmp}/text", "--cache_dir", cache]
            started = time.perf_counter()
            subprocess.run([sys.executable, *build], check=True, capture_output=True, env=env)
            seconds["ours"].append(time.perf_counter() - started)
            index = next(Path(cache).glob("*/index.json"))
            shards = json.loads(index.read_text(encoding="utf-8"))["shards"]
            n_tokens = sum(shard["tokens"] for shard in shards)
            n_bytes = sum(shard["bytes"] for shard in shards)
            peer = [PEER, kind, "\n".join(files), f"{tmp}/peer.bin", f"{tmp}/arrow{i}"]
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", *peer], check=True, capture_output=True, env=env)
            seconds["peer"].append(time.perf_counter() - started)
            for side, split in enumerate(("train", "val")):
                files_of_split = sorted(Path(cache).glob(f"*/{split}_*.bin"))
                tokens = b"".join(f.read_bytes()[HEADER_BYTES:] for f in files_of_split)
                if tokens != Path(f"{tmp}/peer.bin.{side}").read_bytes():
                    sys.exit(f"the two sides do not have the same tokens in {split}")
    ours = n_bytes / 1e6 / statistics.median(seconds["ours"])
    theirs = n_bytes / 1e6 / statistics.median(seconds["peer"])
    print(f"{n_bytes / 1e6:.1f} MB, {n_tokens:,} tokens")
    print(
        f"ours {ours:.1f} MB/s, datasets.map(num_proc=2) {theirs:.1f} MB/s; "
        f"ratio {ours / theirs:.1f}"
    )


if __name__ == "__main__":
    main()
