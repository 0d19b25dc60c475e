"""
Sampling with cached keys and values against transformers' generate (sdpa, cache): the same weights, type and number of tokens.

    python benchmarks/sample.py                      # 124M shape, 200 tokens, batches of 1 and 8, fp32
    python benchmarks/sample.py --dtype bf16 --device cuda
    python benchmarks/sample.py --size nano          # seconds

Warm-up, then three times each in turn; prints tokens/s from the medians, and their ratio. Both sample with top-k 50.
"""

import argparse
import statistics
import time

import torch
import transformers

from gpt_train import GPT, SIZES, GPTConfig, generate

PROMPT_TOKENS, NEW_TOKENS = 16, 200


def seconds(run, device) -> float:
    """How long one call takes."""
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
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, attn_implementation="sdpa"
        )
    ).eval()
    transposed = (
        "c_attn.weight",
        "c_proj.weight",
        "c_fc.weight",
    )  # transformers keeps them as (in, out)
    theirs.transformer.load_state_dict(
        {k: v.t() if k.endswith(transposed) else v for k, v in ours.state_dict().items()}
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    ours, theirs = ours.to(args.device, dtype), theirs.to(args.device, dtype)
    for B in (1, 8):
        ids = torch.randint(c.vocab_size, (B, PROMPT_TOKENS), device=args.device)
        options = {
            "max_new_tokens": NEW_TOKENS,
            "min_new_tokens": NEW_TOKENS,
            "do_sample": True,
            "top_k": 50,
            "use_cache": True,
        }
        options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 50256}
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
            f"batch {B}: ours {rate['ours']:.1f} tokens/s, transformers {peer:.1f}; ratio {rate['ours'] / peer:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
