"""Llama, Qwen2 and Mistral in and out of Hugging Face's folders; what does not fit is refused."""

import json
import shutil

import pytest
import torch
from conftest import one_error_line, run, shared
from test_llama import FAMILIES, SMALL, both

import wt_load
from gpt_train import generate, load_model
from parts.data.tokenizers import byte_tokenizer
from parts.model.families import shell
from parts.model.llama import Llama, LlamaConfig
from parts.storage import formats, hf_llama
from wt_load import DiffConfig, ExportConfig, ImportConfig, main, weights_hash


def their_folder(name, folder, dtype=torch.float32, shard="5GB"):
    """A folder as transformers writes it, with a tokenizer of 97 ids or fewer; the model."""
    _, reference = both(name)
    reference.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return reference


def imported(source, run_dir, tokenizer):
    """Import a folder as a run; returns its model."""
    main(ImportConfig(str(source), str(run_dir), tokenizer=str(tokenizer)))
    return load_model(run_dir, torch.device("cpu"))[0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer.json of 257 ids."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(byte_tokenizer().to_json())
    return path


@pytest.fixture(autouse=True)
def vocabulary(monkeypatch):
    """Models with the 257 ids of the tokenizer."""
    monkeypatch.setitem(SMALL, "vocab_size", 257)


@pytest.mark.parametrize(
    ("name", "dtype", "shard"),
    [
        *((name, torch.float32, "5GB") for name in FAMILIES),
        *((name, torch.bfloat16, "20KB") for name in ("llama", "qwen2")),
    ],
)
def test_in_and_out_and_in_again_has_the_same_bits(
    name, dtype, shard, tmp_path, tokenizer, monkeypatch
):
    transformers = pytest.importorskip("transformers")
    reference = their_folder(name, tmp_path / "theirs", dtype, shard)
    model = imported(tmp_path / "theirs", tmp_path / "run", tokenizer)
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    monkeypatch.setattr(formats, "SHARD_BYTES", 20_000 if shard == "20KB" else 10**9)
    main(ExportConfig(str(tmp_path / "run"), ("hf", str(tmp_path / "out")), dtype=kind))
    assert (tmp_path / "out/model.safetensors.index.json").exists() == (shard == "20KB")
    again = imported(tmp_path / "out", tmp_path / "again", tokenizer)
    assert weights_hash(again.state_dict()) == weights_hash(model.state_dict())
    assert again.config == model.config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert type(theirs) is type(reference)
    before, after = reference.state_dict(), theirs.state_dict()
    assert weights_hash(before) == weights_hash(after)
    ids = torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    expected = theirs.float().generate(ids, max_new_tokens=40, **options)
    assert generate(model, ids, 40, temperature=0).equal(expected)


def test_an_exported_tokenizer_opens_with_the_same_ids(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    their_folder("llama", tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "run", tokenizer)
    main(ExportConfig(str(tmp_path / "run"), ("hf", str(tmp_path / "out"))))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Привет, \u0627\u0644\u0639 \n\tx é"
    assert theirs(text)["input_ids"] == byte_tokenizer().encode(text).tolist()


def test_a_tokenizer_that_tiktoken_cannot_run_goes_in_and_out(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    source = shared("data/tokenizers/qwen2.5")
    monkeypatch.setitem(SMALL, "vocab_size", 151_665)
    their_folder("qwen2", tmp_path / "theirs")
    for file in source.iterdir():
        shutil.copy(file, tmp_path / "theirs")
    main(ImportConfig(str(tmp_path / "theirs"), str(tmp_path / "run")))
    main(ExportConfig(str(tmp_path / "run"), ("hf", str(tmp_path / "out"))))
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "\u041f\u0440\u0438\u0432\u0435\u0442 e\u0301 <|im_end|>\n  f:{x+1}"
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    line = (tmp_path / "out/generation_config.json").read_text(encoding="utf-8")
    assert json.loads(line)["eos_token_id"] == 151_643


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    their_folder("llama", tmp_path / "theirs")
    source = shared("data/tokenizers/modernbert-base")
    flags = ("import", tmp_path / "theirs", "run", "--tokenizer", source)
    line = one_error_line(run("wt_load.py", *flags, cwd=tmp_path), 2)
    assert "has 50,368 ids, the model a vocabulary of 257" in line


def test_info_diff_verify_and_sampling(tmp_path, tokenizer, capsys):
    their_folder("llama", tmp_path / "a")
    their_folder("llama", tmp_path / "b")
    imported(tmp_path / "a", tmp_path / "run", tokenizer)
    capsys.readouterr()
    main(wt_load.InfoConfig(str(tmp_path / "run")))
    out = capsys.readouterr().out
    assert "model: Llama, 2 blocks, 4 heads with 2 keys and values, width 32, context 160" in out
    model = Llama(LlamaConfig(**SMALL))
    assert f"parameters: {sum(p.numel() for p in model.parameters()):,}" in out
    main(wt_load.VerifyConfig(str(tmp_path / "run")))
    main(DiffConfig(str(tmp_path / "run"), str(tmp_path / "b")))
    out = capsys.readouterr().out
    assert "intact; step 0" in out and "21 tensors are equal, 0 differ" in out
    flags = ("--checkpoint", tmp_path / "run", "--prompt", "Once", "--max_new_tokens", "5")
    result = run("gpt_train.py", *flags, "--device", "cpu", cwd=tmp_path)
    assert result.returncode == 0 and "Once" in result.stdout, result.stderr
    main(wt_load.AverageConfig((str(tmp_path / "run"),) * 2, out=str(tmp_path / "mean")))
    main(DiffConfig(str(tmp_path / "run"), str(tmp_path / "mean")))
    assert "0 differ" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["gguf", "nanogpt"])
def test_formats_of_gpt2_only_refuse_a_llama(kind, tmp_path, tokenizer):
    their_folder("llama", tmp_path / "a")
    imported(tmp_path / "a", tmp_path / "run", tokenizer)
    flags = ("export", tmp_path / "run", "--to", kind, tmp_path / "file")
    line = one_error_line(run("wt_load.py", *flags, cwd=tmp_path), 2)
    assert f"--to {kind}: writes a GPT-2, this is a llama; use --to hf" in line
    assert not (tmp_path / "file").exists()


BAD_SETTINGS = [
    ({"model_type": "mixtral"}, "type 'mixtral', not gpt2, llama, qwen2, mistral"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', this Llama computes with 'silu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "of the type 'yarn'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "of the type 'linear'"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "factor is None, not a number"),
    ({"num_local_experts": 8}, "num_local_experts is 8, this Llama computes with None"),
    ({"alibi": True}, "alibi is True, this Llama computes with False"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is"),
    ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
    ({"num_hidden_layers": 10**9}, "too few for 1000000000 blocks"),
    ({"intermediate_size": None}, "has no number intermediate_size"),
    ({"vocab_size": 300}, "embed_tokens.weight is [257, 32] instead of [300, 32]"),
    ({"num_attention_heads": 3}, "n_head 3 is not a multiple of n_kv_head 2"),
    ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x', not a number"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS, ids=str)
def test_a_folder_that_does_not_fit_is_one_line(changes, message, tmp_path, capsys):
    their_folder("llama", tmp_path / "theirs")
    path = tmp_path / "theirs/config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ValueError) as e:
        main(ImportConfig(str(tmp_path / "theirs"), str(tmp_path / "run")))
    assert message in str(e.value) and str(tmp_path / "theirs") in str(e.value)
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


def test_files_that_are_missing_are_named(tmp_path, tokenizer):
    their_folder("llama", tmp_path / "theirs", shard="20KB")
    line = one_error_line(run("wt_load.py", "import", "theirs", "run", cwd=tmp_path), 2)
    assert "--tokenizer: the source has none for its vocabulary of 257" in line
    shard = sorted((tmp_path / "theirs").glob("model-*.safetensors"))[1]
    shard.unlink()
    line = one_error_line(run("wt_load.py", "import", "theirs", "run", cwd=tmp_path), 2)
    assert f"{shard.name} is missing" in line
    (tmp_path / "theirs/config.json").unlink()
    their_folder("llama", tmp_path / "bare")
    (tmp_path / "bare/config.json").unlink()
    line = one_error_line(run("wt_load.py", "import", "bare", "run", cwd=tmp_path), 2)
    assert "its tensors are those of a Llama, but it has no config.json" in line
    assert not (tmp_path / "run").exists()


def test_a_config_json_of_version_4_means_the_same(tmp_path):
    shape = {**SMALL, "rope_theta": 5e5, "rope_factor": 8.0, "rope_original_context": 64}
    config = LlamaConfig(**shape)
    settings = {"model_type": "llama", **hf_llama.settings_of_config(config)}
    assert hf_llama.config_of_settings(settings) == config
    settings.pop("rope_parameters")
    assert hf_llama.config_of_settings(settings) == config
    assert shell(config).state_dict().keys() == Llama(config).state_dict().keys()
