"""recipes/q_lora: resumed adapters that peft loads, merged models, prompts that are only read."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import one_error_line, run
from corpus_cases import documents
from q_cases import FLAGS, SCRIPT, write_model, write_rows
from safetensors.torch import load_file

from parts.base.files import sha256_of
from parts.data.batches import val_batches
from parts.data.tokenizers import train_bpe
from parts.model.families import shell
from parts.model.llama import Llama
from parts.storage import formats
from recipes.q_lora.bases import open_base, tiny_config
from recipes.q_lora.packed_code import documents_of, open_code
from recipes.q_lora.train_pretrain import QConfig, make_model
from wt_load import load_gpt, open_weights


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny Qwen2 as a Hugging Face folder, and data of both kinds."""
    folder = tmp_path_factory.mktemp("q")
    write_model(folder / "model")
    write_rows(folder / "data", documents(90))
    return folder


def train(home, tmp_path, *flags: str):
    """A run in tmp_path, with the model and the data of `home`; returns its folder."""
    for name in ("model", "data"):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(home / name)
    result = run(SCRIPT, *FLAGS, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    return tmp_path / "output/model"


def settings(home, monkeypatch, **changes) -> QConfig:
    """The configuration of such a run, for parts of it in this process."""
    monkeypatch.chdir(home)
    values = {"model_name": "model", "max_seq_length": 32, "batch_size": 2, "dtype": "fp32"}
    return QConfig(**{**values, "lora_rank": 2, **changes})


def base_of(config: QConfig):
    """The model that a configuration trains."""
    return open_base(config.model_name, config.max_seq_length)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_run_learns_leaves_its_tree_and_resumes_to_the_same_bits(home, tmp_path, method):
    folder = train(home, tmp_path, "--training_method", method)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    expected = ("config.yaml", "logs/training_log.txt", "logs/eval_results.json")
    expected += ("results/loss.png", "results/samples.txt", f"checkpoints/checkpoint-6/{file}")
    assert names.issuperset(expected)
    evaluations = json.loads((folder / "logs/eval_results.json").read_text(encoding="utf-8"))
    assert [e["step"] for e in evaluations] == [0, 3, 6]
    assert evaluations[-1]["val_perplexity"] < evaluations[0]["val_perplexity"]
    assert {"val_loss", "val_bits_per_byte", "val_tokens"} <= evaluations[0].keys()
    assert "finished at step 6" in (folder / "logs/training_log.txt").read_text(encoding="utf-8")
    last = folder / "checkpoints/checkpoint-6"
    files = [last / file, last / "optimizer.safetensors"]
    straight = [sha256_of(path) for path in files]
    shutil.rmtree(last)
    train(home, tmp_path, "--training_method", method)
    assert [sha256_of(path) for path in files] == straight
    again = json.loads((folder / "logs/eval_results.json").read_text(encoding="utf-8"))
    assert again == evaluations


def test_a_checkpoint_has_adapters_only_and_their_merge_computes_the_same(home, tmp_path):
    folder = train(home, tmp_path)
    last = folder / "checkpoints/checkpoint-6"
    adapters = load_file(last / "adapter_model.safetensors")
    assert all(".lora_" in name for name in adapters) and len(adapters) == 2 * 2 * 7
    words = ("merge", folder, tmp_path / "merged")
    result = run("recipes/q_lora/train_pretrain.py", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    merged, base = load_gpt(str(tmp_path / "merged")), load_gpt(str(home / "model"))
    ids = torch.randint(257, (2, 32))
    assert (merged(ids) - base(ids)).abs().max() > 1e-3
    config = QConfig(model_name=str(home / "model"), lora_rank=2, dtype="fp32", max_seq_length=32)
    model, _ = make_model(config, base_of(config), torch.device("cpu"))
    from parts.model.lora import load_adapters

    with torch.no_grad():
        load_adapters(model.eval(), adapters)
        assert (model(ids) - merged(ids)).abs().max() <= 1e-5
    line = one_error_line(run("recipes/q_lora/train_pretrain.py", *words, cwd=tmp_path), 2)
    assert "merged: already exists" in line
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, last).eval()
    with torch.no_grad():
        assert (theirs(ids).logits - merged(ids)).abs().max() <= 1e-5


def test_info_and_verify_read_a_checkpoint_of_adapters_and_sampling_says_merge(home, tmp_path):
    folder = train(home, tmp_path)
    described = run("wt_load.py", "info", folder, cwd=tmp_path)
    assert described.returncode == 0, described.stderr
    for line in ("adapters only", "base_model_name_or_path: model", "r: 2", "trained: step 6"):
        assert line in described.stdout
    assert "run_pretraining.py --model_name model" in described.stdout
    intact = run("wt_load.py", "verify", folder, cwd=tmp_path)
    assert intact.returncode == 0 and "intact; step 6, 28 tensors" in intact.stdout
    line = one_error_line(run("gpt_train.py", "--checkpoint", folder, cwd=tmp_path), 2)
    assert "has adapters only; merge them into the model" in line


def test_a_run_merges_at_its_end_if_asked_and_the_result_is_sampled(home, tmp_path):
    folder = train(home, tmp_path, "--merge")
    for name in ("final", "best"):
        merged = folder / "results/export" / name
        assert load_gpt(str(merged)).config.vocab_size == 300
    run_folder = run("wt_load.py", "import", merged, "runs/merged", cwd=tmp_path)
    assert run_folder.returncode == 0, run_folder.stderr
    words = ("--checkpoint", "runs/merged", "--prompt", "f:{", "--max_new_tokens", "5")
    assert "f:{" in run("gpt_train.py", *words, cwd=tmp_path).stdout
    flags = ("--merge", "--training_method", "full", "--output_dir", "other")
    line = one_error_line(run(SCRIPT, *FLAGS, *flags, cwd=tmp_path), 2)
    assert "--merge: a full training has no adapters" in line


def test_another_base_is_refused_when_resuming_and_when_merging(home, tmp_path):
    folder = train(home, tmp_path)
    (tmp_path / "model").unlink()
    shutil.copytree(home / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["model.norm.weight"] += 1
    formats.write_folder(
        tmp_path / "model",
        {n: formats.Stored(tuple(t.shape), lambda _, t=t: t) for n, t in tensors.items()},
        torch.float32,
    )
    line = one_error_line(run(SCRIPT, *FLAGS, cwd=tmp_path), 2)
    assert "is of another base" in line
    words = ("merge", folder, tmp_path / "merged")
    line = one_error_line(run("recipes/q_lora/train_pretrain.py", *words, cwd=tmp_path), 2)
    assert "was trained on other weights" in line and not (tmp_path / "merged").exists()


def test_another_method_takes_another_folder_and_says_so(home, tmp_path):
    train(home, tmp_path)
    result = run(SCRIPT, *FLAGS, "--training_method", "full", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "output/model has a run of lora on raw; this one takes" in result.stdout
    assert (tmp_path / "output/model-full-raw/checkpoints/checkpoint-6").is_dir()
    weights = open_weights(str(tmp_path / "output/model-full-raw/checkpoints/checkpoint-6"))
    assert weights.config.vocab_size == 300


def test_prompts_are_read_and_not_trained(home, monkeypatch, tmp_path):
    config = settings(home, monkeypatch, data_type="described_filtered", cache_dir=str(tmp_path))
    base = base_of(config)
    text = open_code(config, base.tokenizer)
    rows = (home / "data/described_filtered_test.jsonl").read_text(encoding="utf-8").splitlines()
    n_completions = sum(len(json.loads(row)["completion"].encode()) + 1 for row in rows)
    batches = val_batches(text.test, 32, 2, 300)
    assert sum(int((b["targets"] != -100).sum()) for b in batches) == n_completions
    plain = open_code(settings(home, monkeypatch, cache_dir=str(tmp_path)), base.tokenizer)
    n_targets = sum(int((b["targets"] != -100).sum()) for b in val_batches(plain.test, 32, 2, 300))
    assert n_targets == len(plain.test) - 1 and not plain.test.masks


def test_packed_documents_do_not_read_each_other():
    torch.manual_seed(0)
    model = Llama(tiny_config(257, 64)).eval()
    rows = [torch.tensor([*range(n, n + 9), 256]) for n in (5, 60, 130)]
    ids = torch.cat(rows)[None]
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:].clone()}
    batch["documents"] = documents_of(batch["inputs"], 256)
    assert batch["documents"][0].tolist() == [0] * 10 + [1] * 10 + [2] * 9
    starts = torch.tensor([9, 19])  # the first token of a document follows from no other
    batch["targets"][0, starts] = -100
    with torch.no_grad():
        packed = model(batch["inputs"], batch["targets"], batch["documents"])
        alone = sum(model(row[None, :-1], row[None, 1:]) for row in rows)
    assert (packed - alone).abs() < 1e-4


def test_config_yaml_holds_the_defaults_and_nothing_else():
    from conftest import ROOT

    from parts.cli.config import from_yaml

    path = ROOT / "recipes/q_lora/config.yaml"
    block = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert list(block) == ["model"] and len(block["model"]) == 11
    assert from_yaml(QConfig, str(path)) == QConfig(config=str(path))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--data_dir nowhere", "nowhere/raw_train.jsonl, nowhere/raw_test.jsonl: not found"),
        ("--data_type licensed", "--licenses FILE"),
        ("--model_name nowhere", "--model_name: hf:nowhere"),
        ("--lora_rank 0", "--lora_rank: 0"),
        ("--lora_dropout 1", "--lora_dropout: 1"),
        ("--max_seq_length 65", "--max_seq_length: 65 is more than the 64 positions"),
        ("--training_method qlora --parallel fsdp", "--training_method qlora: weights in 4 bits"),
        ("--lora_rnak 4", "did you mean --lora_rank"),
        ("--merge --model_name tiny", "--merge: the base of tiny is random"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(home, tmp_path, flags, said):
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(home / name)
    words, given = list(FLAGS), flags.split()
    for flag in given:
        if flag in words and flag.startswith("--"):
            del words[words.index(flag) : words.index(flag) + 2]
    assert said in one_error_line(run(SCRIPT, *words, *given, cwd=tmp_path), 2)
    assert not (tmp_path / "output").exists()


def test_a_model_without_a_fitting_tokenizer_is_refused(home, tmp_path):
    shutil.copytree(home / "model", tmp_path / "model")
    (tmp_path / "model/tokenizer.json").unlink()
    with pytest.raises(ValueError, match="model has no tokenizer; put its tokenizer.json beside"):
        open_base(str(tmp_path / "model"), 32)
    larger = tmp_path / "larger"
    write_model(larger)
    texts = [f"{n} {n * n}" for n in range(2000)]
    (larger / "tokenizer.json").write_bytes(train_bpe(texts, 400).to_json())
    with pytest.raises(ValueError, match=r"its tokenizer has 400 ids, the model only 300"):
        open_base(str(larger), 32)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (['{"text": "a"}', '{"prompt": "a", "completion": "b"}'], "line 2: a row of prompt and"),
        (['{"body": "a"}'], "line 1: has body, but neither a text nor a prompt"),
        (['{"text": 5}'], "line 1: has text, but neither"),
        (['{"text": '], "line 1: not JSON"),
    ],
)
def test_a_wrong_row_is_named(home, tmp_path, monkeypatch, rows, said):
    shutil.copytree(home / "data", tmp_path / "data")
    (tmp_path / "data/raw_train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = settings(home, monkeypatch, data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=said):
        open_code(config, base_of(config).tokenizer)


def test_a_base_without_memory_has_the_same_hash_and_no_weights(home, monkeypatch):
    config = settings(home, monkeypatch)
    base = base_of(config)
    full, of_base = make_model(config, base, torch.device("cpu"))
    meta, again = make_model(config, base, torch.device("meta"))
    assert of_base == again and all(p.is_meta for p in meta.parameters())
    assert not any(p.is_meta for p in full.parameters()) and shell(base.shape) is not None
