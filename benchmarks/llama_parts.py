"""
What each part of the Llama family changes in GPT-2's loss, at equal tokens.

    python benchmarks/llama_parts.py                     # 21 runs of configs/laptop.yaml, an hour
    python benchmarks/llama_parts.py --parts none rotary --seeds 1 2 --max_steps 200

Trains the example one_part.py of docs/how-to-extend.md with each part, and the whole Llama of the
same width and depth, with several seeds. Needs the text of configs/laptop.yaml. Prints validation
losses at the end, and the mean difference from GPT-2's with the same seed. Runs that are finished
already are not repeated.
"""

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

from parts.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("none", "no_biases", "rmsnorm", "rotary", "swiglu", "grouped", "llama")


def example(folder: Path) -> Path:
    """one_part.py, taken out of the document."""
    text = (ROOT / "docs/how-to-extend.md").read_text(encoding="utf-8")
    code = next(b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "# one_part" in b)
    path = folder / "one_part.py"
    path.write_text(code, encoding="utf-8")
    return path


def loss_of(part: str, seed: int, script: Path, flags: list[str]) -> float:
    """The last validation loss of a run, which is trained or resumed first."""
    run_dir = script.parent / f"{part}-{seed}"
    command = [sys.executable, str(script), "--part", part]
    if part == "llama":
        command = [sys.executable, str(ROOT / "pretraining_advanced.py")]
        command += ["--model_size", "llama-micro", "--n_kv_head", "4"]
    command += ["--config", str(ROOT / "configs/laptop.yaml"), "--seed", str(seed)]
    command += ["--output_dir", str(run_dir), "--print_sample_iter", "100000", *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr[-1000:])
    return [record["val_loss"] for record in read_metrics(run_dir) if "val_loss" in record][-1]


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", default="runs/llama_parts", help="folder of the runs")
    args, flags = parser.parse_known_args()
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    script, reference = example(folder), {}
    for part in args.parts:
        losses = {}
        for seed in args.seeds:
            losses[seed] = loss_of(part, seed, script, flags)
            print(f"{part}, seed {seed}: {losses[seed]:.4f}", flush=True)
        reference = reference or losses
        differences = [losses[seed] - reference[seed] for seed in args.seeds]
        spread = f"from {min(differences):+.4f} to {max(differences):+.4f}"
        mean = statistics.mean(losses.values())
        print(
            f"{part}: mean {mean:.4f}, {statistics.mean(differences):+.4f} ({spread})", flush=True
        )


if __name__ == "__main__":
    main()
