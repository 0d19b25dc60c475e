"""
Text to token shards with GPT-2's vocabulary: prep_dataset.py smollm against nanoGPT's recipe, datasets.map(num_proc=2) and a memmap.

    python benchmarks/tokenizing.py --data FOLDER        # parquet, jsonl or txt files, such as a part of smollm-corpus
    python benchmarks/tokenizing.py                      # the prose of Python's documentation, two hundred times over

Both are processes of their own, from start to end, with the same documents and two workers; the Arrow cache of the peer is new
each time. Both write the same tokens into the same two files, train and val, which is checked byte by byte; what else we write
(hashes, index, tokenizer) the peer does not. Three times each in turn; prints MB/s from the medians, and their ratio.
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

from parts.data.corpus import python_docs
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
arrays = [np.memmap(f"{out}.{side}", np.uint16, "w+", shape=(int(lengths[val == side].sum()),)) for side in (0, 1)]
at, parts = [0, 0], min(64, len(done))
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
        files = (
            sorted(str(f) for f in Path(args.data).rglob("*") if f.suffix in (".parquet", ".jsonl"))
            if args.data
            else []
        )
        if not files:
            documents = python_docs()
            with open(f"{tmp}/docs.jsonl", "w", encoding="utf-8") as f:
                f.writelines(
                    json.dumps({"text": text}) + "\n" for _ in range(200) for text in documents
                )
            files = [f"{tmp}/docs.jsonl"]
        kinds = {Path(f).suffix for f in files}
        if len(kinds) > 1:
            sys.exit(f"{args.data}: holds both parquet and jsonl; give a folder of one kind")
        os.makedirs(f"{tmp}/text")
        for i, f in enumerate(files):
            os.symlink(os.path.abspath(f), f"{tmp}/text/{i:05d}{Path(f).suffix}")
        kind = {".parquet": "parquet", ".jsonl": "json"}[kinds.pop()]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        seconds = {"ours": [], "peer": []}
        for i in range(3):
            build = [
                ROOT / "prep_dataset.py",
                "smollm",
                "--dataset_name",
                f"{tmp}/text",
                "--cache_dir",
                f"{tmp}/ours{i}",
            ]
            started = time.perf_counter()
            subprocess.run([sys.executable, *build], check=True, capture_output=True, env=env)
            seconds["ours"].append(time.perf_counter() - started)
            index = json.loads(next(Path(f"{tmp}/ours{i}").glob("*/index.json")).read_text())
            n_tokens, n_bytes = (
                sum(s[key] for s in index["shards"]) for key in ("tokens", "bytes")
            )
            peer = [PEER, kind, "\n".join(files), f"{tmp}/peer.bin", f"{tmp}/arrow{i}"]
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", *peer], check=True, capture_output=True, env=env)
            seconds["peer"].append(time.perf_counter() - started)
            for side, split in enumerate(("train", "val")):
                shards = sorted(Path(f"{tmp}/ours{i}").glob(f"*/{split}_*.bin"))
                if (
                    b"".join(f.read_bytes()[HEADER_BYTES:] for f in shards)
                    != Path(f"{tmp}/peer.bin.{side}").read_bytes()
                ):
                    sys.exit(f"the two sides do not have the same tokens in {split}")
    ours, theirs = (n_bytes / 1e6 / statistics.median(seconds[side]) for side in ("ours", "peer"))
    print(f"{n_bytes / 1e6:.1f} MB, {n_tokens:,} tokens")
    print(
        f"ours {ours:.1f} MB/s, datasets.map(num_proc=2) {theirs:.1f} MB/s; ratio {ours / theirs:.1f}"
    )


if __name__ == "__main__":
    main()
