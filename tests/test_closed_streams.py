"""A script whose standard streams are closed runs as with open ones."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY
from test_wt_load import as_run, gpt

SCRIPTS = {
    "pretraining_simple.py": ("--data_dir", "TEXTS", *TINY, "--max_steps", "2"),
    "pretraining_advanced.py": (
        *("--dataset_name", "TEXTS", *TINY, "--max_steps", "2"),
        *("--val_share", "0.5", "--output_dir", "run"),
    ),
    "gpt_train.py": ("--checkpoint", "a", "--max_new_tokens", "3", "--device", "cpu"),
    "wt_load.py": ("info", "a"),
    "prep_dataset.py": (
        *("tokenize", "--dataset_name", "TEXTS", "--tokenizer", "bytes"),
        *("--val_share", "0.5"),
    ),
}


ALL = ">&- 2>&- <&-"
ONE = [("pretraining_advanced.py", "2>&-"), ("pretraining_simple.py", ">&-")]


@pytest.mark.parametrize(
    ("script", "closed"), [*((script, ALL) for script in list(SCRIPTS)[1:]), *ONE]
)
def test_closed_streams_do_not_stop_a_script(script, closed, texts, tmp_path):
    as_run(gpt(), tmp_path / "a")
    words = [str(texts) if word == "TEXTS" else word for word in SCRIPTS[script]]
    line = " ".join([sys.executable, str(ROOT / script), *words, closed])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, env=env, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Traceback" not in result.stdout + result.stderr
    if "pretraining" in script:  # nothing that was printed went into a file of the run
        run_dir = tmp_path / ("runs/simple" if "simple" in script else "run")
        assert (run_dir / "metrics.jsonl").read_text(encoding="utf-8").startswith("{")
        assert (run_dir / "run.json").read_text(encoding="utf-8").startswith("{")
