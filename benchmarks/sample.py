"""
Sampling with cached keys and values, ours against transformers' generate (sdpa, cache).

    python benchmarks/sample.py                      # 124M, 200 tokens, batches of 1 and 8, fp32
    python benchmarks/sample.py --dtype bf16 --device cuda
    python benchmarks/sample.py --size nano          # seconds

Weights, dtype, number of tokens and top-k (50) are the same. After a warm-up, three times each in
turn; prints tokens/s from the medians, and their ratio.
"""

import argparse
import statistics
import time

import torch
import transformers

from gpt_train import GPT, SIZES, GPTConfig, generate
from parts.base.dtypes import DTYPES

PROMPT_TOKENS = 16
NEW_TOKENS = 200


def seconds(run, device) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--size", default="124M", choices=SIZES)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    ours = GPT(GPTConfig.of_size(args.size)).eval()
    c = ours.config
    sizes = {"n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head}
    config = transformers.GPT2Config(**sizes, attn_implementation="sdpa")
    theirs = transformers.GPT2LMHeadModel(config).eval()
    # transformers stores these as (in, out)
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = ours.state_dict()
    weights = {name: t.t() if name.endswith(transposed) else t for name, t in weights.items()}
    theirs.transformer.load_state_dict(weights)
    dtype = DTYPES[args.dtype]
    ours = ours.to(args.device, dtype)
    theirs = theirs.to(args.device, dtype)
    for B in (1, 8):
        ids = torch.randint(c.vocab_size, (B, PROMPT_TOKENS), device=args.device)
        options = {
            "max_new_tokens": NEW_TOKENS,
            "min_new_tokens": NEW_TOKENS,
            "do_sample": True,
            "top_k": 50,
            "use_cache": True,
            "attention_mask": torch.ones_like(ids),
            "pad_token_id": 50256,
        }
        runs = {
            "ours": lambda ids=ids: generate(ours, ids, NEW_TOKENS, top_k=50, seed=1),
            "transformers": lambda ids=ids, options=options: theirs.generate(ids, **options),
        }
        for run in runs.values():
            assert run().shape == (B, PROMPT_TOKENS + NEW_TOKENS)
        measured = {name: [] for name in runs}
        for _ in range(3):
            for name, run in runs.items():
                measured[name].append(seconds(run, args.device))
        rate = {name: B * NEW_TOKENS / statistics.median(times) for name, times in measured.items()}
        peer = rate["transformers"]
        print(
            f"batch {B}: ours {rate['ours']:.1f} tokens/s, transformers {peer:.1f}; "
            f"ratio {rate['ours'] / peer:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
