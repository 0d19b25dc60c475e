"""Weights of other projects come in and go out again bit for bit, and compute the same logits."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, one_error_line, run, shared
from small_models import TINY, UNTIED, as_run, far_from_default, gpt, same_bits, tensors_of
from test_gpt import as_transformers
from test_tf_bundle import save as save_bundle
from weight_cases import openai_weights, scratch_weights

import wt_load
from gpt_train import GPT, SIZES, load_model, sample_text
from parts.base.dtypes import DTYPES
from parts.data.tokenizers import Tokenizer, byte_tokenizer, train_bpe
from parts.storage.gguf_format import gguf_name
from wt_load import ExportConfig, ImportConfig, load_gpt, main

# ---------------------------------------------------------------------------------------- both ways

# name -> (blocks, vocabulary): GPT-2's four widths, whole where that takes seconds
DEPTHS = {"124M": (12, 50257), "355M": (2, 1000), "774M": (1, 1000), "1558M": (1, 1000)}


@pytest.mark.parametrize("size", DEPTHS)
@torch.no_grad()
def test_transformers_to_here_and_back_is_the_same_to_the_bit(size, tmp_path):
    import transformers

    (L, V), (_, H, C) = DEPTHS[size], SIZES[size]
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=V, n_layer=L, n_head=H, n_embd=C)
    theirs = far_from_default(transformers.GPT2LMHeadModel(config))
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer().to_json())
    tokenizer = str(tmp_path / "tokenizer.json")
    main(ImportConfig(str(tmp_path / "theirs"), str(tmp_path / "run"), tokenizer))
    model, _, state = load_model(tmp_path / "run", "cpu")
    ids = torch.randint(V, (2, 40))
    assert model.config.n_head == H and state["step"] == 0
    assert (model(ids) - theirs(ids).logits).abs().max() <= 1e-4
    main(ExportConfig(str(tmp_path / "run"), ("hf", str(tmp_path / "out"))))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_bits(dict(back.named_parameters()), dict(theirs.named_parameters()))
    assert torch.equal(back(ids).logits, theirs(ids).logits)


def test_nanogpt_and_back_is_the_same_to_the_bit(tmp_path):
    as_run(gpt(), tmp_path / "run")
    main(ExportConfig(str(tmp_path / "run"), ("nanogpt", str(tmp_path / "ckpt.pt"))))
    theirs = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert theirs["model_args"] == {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "block_size": 32,
        "bias": True,
        "vocab_size": 257,
        "dropout": 0.0,
    }
    head, embedding = (
        theirs["model"][name] for name in ("lm_head.weight", "transformer.wte.weight")
    )
    assert head.data_ptr() == embedding.data_ptr()
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer().to_json())
    main(ImportConfig(str(tmp_path / "ckpt.pt"), str(tmp_path / "again")))
    assert same_bits(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "run"))
    # its option without biases is a model whose biases are zeros
    bare = {name: t for name, t in theirs["model"].items() if not name.endswith("bias")}
    settings = {**theirs["model_args"], "bias": False}
    torch.save({"model": bare, "model_args": settings}, tmp_path / "bare.pt")
    assert load_gpt(str(tmp_path / "bare.pt")).h[1].attn.c_attn.bias.abs().max() == 0


def test_a_padded_vocabulary_comes_in_and_its_extra_ids_are_never_sampled(tmp_path):
    model = gpt(replace(TINY, vocab_size=320))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer().to_json())
    main(ImportConfig(str(tmp_path / "a.pt"), str(tmp_path / "run"), n_head=4))
    loaded, tokenizer, _ = load_model(tmp_path / "run", "cpu")
    assert loaded.config.vocab_size == 320
    assert len(sample_text(loaded, tokenizer, "cpu", "a", 4, 40, temperature=5.0, seed=1)) == 4


# ----------------------------------------------------------------------------------------------- in


@torch.no_grad()
def test_openais_tensorflow_files_give_the_same_model(tmp_path):
    model = gpt()
    tensors = openai_weights(model)
    assert tensors["model/h0/attn/c_attn/w"].shape == (1, 32, 96)
    (tmp_path / "tf").mkdir()
    save_bundle(tmp_path / "tf/model.ckpt", tensors)
    settings = {"n_vocab": 257, "n_ctx": 32, "n_embd": 32, "n_head": 4, "n_layer": 2}
    (tmp_path / "tf/hparams.json").write_text(json.dumps(settings), encoding="utf-8")
    loaded = load_gpt(str(tmp_path / "tf"))
    assert loaded.config == TINY and same_bits(loaded.state_dict(), model.state_dict())


def test_llms_from_scratch_keeps_query_key_value_apart_and_a_head_of_its_own(tmp_path):
    model, path = gpt(UNTIED), tmp_path / "model.pth"
    theirs = scratch_weights(model)
    assert theirs["trf_blocks.1.att.W_key.weight"].shape == (32, 32)
    torch.save(theirs, path)
    loaded = load_gpt(str(path), n_head=4)
    assert loaded.config == UNTIED and same_bits(loaded.state_dict(), model.state_dict())
    # qkv_bias=False, the book's default, and the dictionary in which it keeps optimizer and model
    biases = {name for name in theirs if ".att.W_" in name and name.endswith("bias")}
    plain = {name: t for name, t in theirs.items() if name not in biases}
    torch.save({"model_state_dict": plain, "optimizer_state_dict": {}}, path)
    assert load_gpt(str(path), n_head=4).h[1].attn.c_attn.bias.abs().max() == 0
    # a head that is the embedding after all
    torch.save({**theirs, "out_head.weight": theirs["tok_emb.weight"]}, path)
    assert load_gpt(str(path), n_head=4).config == TINY


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "transformer."])
def test_what_wrappers_put_before_the_names_is_taken_off(prefix, tmp_path):
    model = gpt()
    torch.save({prefix + name: t for name, t in model.state_dict().items()}, tmp_path / "a.pt")
    assert same_bits(load_gpt(str(tmp_path / "a.pt"), n_head=4).state_dict(), model.state_dict())


def test_weights_in_several_files_and_in_the_old_format(tmp_path):
    theirs = as_transformers(gpt())
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    assert (tmp_path / "parts/model.safetensors.index.json").exists()
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert same_bits(load_gpt(str(tmp_path / "parts")).state_dict(), gpt().state_dict())
    (tmp_path / "bin").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "bin/pytorch_model.bin")
    theirs.config.save_pretrained(tmp_path / "bin")
    assert same_bits(load_gpt(str(tmp_path / "bin")).state_dict(), gpt().state_dict())


def test_every_tensor_that_does_not_fit_is_named_at_once(tmp_path):
    tensors = gpt().state_dict()
    del tensors["h.1.ln_2.bias"]
    tensors["h.0.mlp.c_fc.bias"] = torch.zeros(7)
    tensors["extra.weight"] = torch.zeros(2)
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(ValueError) as e:
        load_gpt(str(tmp_path / "a.pt"), n_head=4)
    wrong = [
        "h.1.ln_2.bias is missing",
        "extra.weight is not part of this model",
        "h.0.mlp.c_fc.bias is [7] instead of [128]",
    ]
    assert str(e.value).endswith(": " + "; ".join(wrong))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "type 'mixtral', not gpt2, llama, qwen2, mistral"),
        ({"activation_function": "relu"}, "'relu'"),
        ({"layer_norm_epsilon": 1e-6}, "1e-06"),
    ],
)
def test_another_family_or_arithmetic_is_refused(tmp_path, change, message):
    as_transformers(gpt()).save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text(encoding="utf-8"))
    (tmp_path / "hf/config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_gpt(str(tmp_path / "hf"))


def test_a_name_of_the_hub_is_looked_up_in_its_cache_and_its_absence_told(tmp_path, monkeypatch):
    cached = tmp_path / "hub/models--me--tiny"
    as_transformers(gpt()).save_pretrained(cached / "snapshots/abc")
    (cached / "snapshots/abc/tokenizer.json").write_bytes(byte_tokenizer().to_json())
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc", encoding="utf-8")
    env = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    result = run("wt_load.py", "import", "hf:me/tiny", "run", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert same_bits(tensors_of(tmp_path / "run"), gpt().state_dict())
    # the cache names large files by their sha256
    file = cached / "snapshots/abc/model.safetensors"
    blob = cached / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert wt_load.from_hub("me/tiny") == cached / "snapshots/abc"
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="differs from the sha256 in its name"):
        wt_load.from_hub("me/tiny")
    result = run("wt_load.py", "import", "hf:me/other", "r", cwd=tmp_path, env=env)
    assert "hf:me/other: not in the hub's cache" in one_error_line(result, 2)


def test_gpt2s_own_tokenizer_is_one_and_the_same_from_every_file():
    folder = shared("data/gpt2/hf")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(shared("data/gpt2/tiktoken_cache")))
    from parts.data.tokenizers import gpt2_tokenizer

    assert Tokenizer.load(folder).fingerprint == gpt2_tokenizer().fingerprint


LOADING = """
import sys, torch
from wt_load import load_gpt

def peak():
    with open("/proc/self/status", encoding="ascii") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))

torch.ones(1000, 1000) @ torch.ones(1000, 1000)
before = peak()
model = load_gpt(sys.argv[1])
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_hardly_more_memory_than_the_weights(tmp_path):
    import transformers

    shape = {"vocab_size": 5000, "n_layer": 24, "n_head": 16, "n_embd": 1024, "n_positions": 256}
    config = transformers.GPT2Config(**shape)  # 300 million parameters, 1.2 GB
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    command = [sys.executable, "-c", LOADING, tmp_path / "hf"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert float(result.stdout) <= 1.15


# ---------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@torch.no_grad()
def test_a_head_of_its_own_and_half_precision_arrive_at_transformers(tmp_path, dtype):
    import transformers

    model, half = gpt(UNTIED), DTYPES[dtype]
    as_run(model, tmp_path / "run")
    main(ExportConfig(str(tmp_path / "run"), ("hf", str(tmp_path / "out")), dtype))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.lm_head.weight.dtype == half
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight.to(half))
    ids = torch.randint(257, (2, 20))
    rounded = GPT(model.config).eval()
    rounded.load_state_dict({name: t.to(half).float() for name, t in model.state_dict().items()})
    assert (rounded(ids) - theirs.float()(ids).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_read_back_with_its_own_package_holds_every_tensor(tmp_path, dtype, tied):
    gguf = pytest.importorskip("gguf")
    model = gpt(replace(TINY, tied=tied, vocab_size=320))
    tokenizer = train_bpe(["the old man and the sea " * 50], 280)
    as_run(model, tmp_path / "run", tokenizer)
    main(ExportConfig(str(tmp_path / "run"), ("gguf", str(tmp_path / "m.gguf")), dtype))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {t.name: t for t in reader.tensors}
    assert found.keys() == {gguf_name(name) for name in model.state_dict()}
    assert ("output.weight" in found) == (not tied)
    for name, t in model.state_dict().items():
        stored = found[gguf_name(name)]
        expected = t if t.ndim < 2 or name == "wpe.weight" else t.to(DTYPES[dtype])
        values = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
        assert torch.equal(values.reshape(t.shape), expected.float()), name
        assert list(stored.shape) == list(t.shape)[::-1], "ggml counts dimensions from the last"
    fields = {
        name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF")
    }
    assert fields["general.architecture"] == "gpt2"
    assert fields["gpt2.attention.head_count"] == 4
    assert fields["gpt2.context_length"] == 32
    assert len(fields["tokenizer.ggml.tokens"]) == 320
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eot
    assert len(fields["tokenizer.ggml.merges"]) == tokenizer.vocab_size - 257
    of_llama_cpp = {
        gguf.TENSOR_NAMES[kind].format(bid=i)
        for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT2]
        for i in range(2)
    }
    assert {name.rpartition(".")[0] for name in found} <= of_llama_cpp


def test_every_file_of_an_export_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    as_run(gpt(), tmp_path / "run")
    synced = []
    monkeypatch.setattr(wt_load, "fsync", lambda path: synced.append(path.name))
    monkeypatch.setattr(wt_load, "rename_durably", lambda part, target: synced.append("renamed"))
    with pytest.raises(FileNotFoundError):  # nothing was renamed
        main(ExportConfig(str(tmp_path / "run"), ("hf", str(tmp_path / "out"))))
    assert all(map(wt_load.EXPORTED.fullmatch, synced[:-1])) and synced[-1] == "renamed"
