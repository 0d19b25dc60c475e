"""
Continue the pretraining of Qwen2.5, or another Llama-like model, on code; kill it at will, and the
same command resumes it with bit-identical results.

    python recipes/q_lora/prepare_data.py --input YOUR_CODE
    python recipes/q_lora/run_pretraining.py --model_name tiny --max_steps 20      # to try: seconds
    python recipes/q_lora/run_pretraining.py --model_name Qwen/Qwen2.5-7B-Instruct # LoRA, one GPU
    python recipes/q_lora/run_pretraining.py --training_method qlora --data_type filtered
    python recipes/q_lora/run_pretraining.py --config recipes/q_lora/config.yaml --max_steps 200
    torchrun --nproc_per_node 2 recipes/q_lora/run_pretraining.py --training_method lora

The run writes output/MODEL (or output/EXPERIMENT_NAME): checkpoints/checkpoint-50, which peft loads
(of --training_method full: transformers), logs/training_log.txt, logs/eval_results.json, results/,
config.yaml. `train_pretrain.py merge CHECKPOINT OUT` makes one model of base and adapters.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

from parts.cli.config import parse
from parts.cli.launch import run_script
from pretraining_advanced import run
from recipes.q_lora.train_pretrain import QConfig, code_job, resolve


def main(config: QConfig) -> int:
    """Train, or plan; returns the exit code."""
    resolve(config)
    return run(config, code_job)


if __name__ == "__main__":
    run_script(lambda: main(parse(QConfig)))
