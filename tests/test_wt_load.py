"""Weights come in from other projects and go out again with the same bits, and compute the same logits there."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, one_error_line, run, shared
from test_gpt import as_transformers
from test_tf_bundle import save as save_bundle

import wt_load
from gpt_train import GPT, SIZES, GPTConfig, load_model, sample_text
from parts.data.tokenizers import Tokenizer, byte_tokenizer, train_bpe
from parts.storage.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from wt_load import (
    AverageConfig,
    DiffConfig,
    ExportConfig,
    ImportConfig,
    InfoConfig,
    ListConfig,
    VerifyConfig,
    load_gpt,
    main,
    weights_hash,
)

TINY = GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=4, n_embd=32)


def far_from_default(model):
    """Biases and norms away from 0 and 1, or a mix-up of them would go unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def gpt(config=TINY, seed=0) -> GPT:
    torch.manual_seed(seed)
    return far_from_default(GPT(config))


def as_run(model, folder, tokenizer=None, step=7, **more):
    """A run folder as the trainers leave it, with one checkpoint."""
    tokenizer = tokenizer or byte_tokenizer()
    state = {
        "script": "pretraining_advanced.py",
        "step": step,
        "tokens": 100,
        "model_config": asdict(model.config),
    }
    state |= {"tokenizer": tokenizer.fingerprint, "best": {"step": step, "val_loss": 1.5}, **more}
    save_checkpoint(
        folder,
        step,
        {"model.safetensors": model.state_dict()},
        state,
        {"tokenizer.json": tokenizer.to_json()},
        3,
    )
    return folder


def tensors_of(folder):
    return load_checkpoint(newest_checkpoint(folder))[0]


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in a
    )


# name -> (blocks, vocabulary): GPT-2's four widths, whole where that takes seconds
DEPTHS = {"124M": (12, 50257), "355M": (2, 1000), "774M": (1, 1000), "1558M": (1, 1000)}


@pytest.mark.parametrize("size", DEPTHS)
@torch.no_grad()
def test_transformers_to_here_and_back_is_the_same_to_the_bit(size, tmp_path):
    import transformers

    (L, V), (_, H, C) = DEPTHS[size], SIZES[size]
    torch.manual_seed(1)
    theirs = far_from_default(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=V, n_layer=L, n_head=H, n_embd=C)
        )
    )
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


@torch.no_grad()
def test_openais_tensorflow_files_give_the_same_model(tmp_path):
    model = gpt()
    tensors = {}
    for name, t in model.state_dict().items():
        name = (
            "model/" + name.replace("h.", "h", 1).replace(".", "/")
            if name.startswith("h.")
            else "model/" + name.replace(".", "/")
        )
        if name in ("model/wte/weight", "model/wpe/weight"):
            name = name.removesuffix("/weight")
        norm = "/ln_" in name
        name = (
            name.removesuffix("/weight") + ("/g" if norm else "/w")
            if name.endswith("/weight")
            else name.replace("/bias", "/b")
        )
        tensors[name] = t.t()[None].contiguous() if t.ndim == 2 and name.endswith("/w") else t
    (tmp_path / "tf").mkdir()
    save_bundle(tmp_path / "tf/model.ckpt", tensors)
    (tmp_path / "tf/hparams.json").write_text(
        json.dumps({"n_vocab": 257, "n_ctx": 32, "n_embd": 32, "n_head": 4, "n_layer": 2})
    )
    assert "model/h0/attn/c_attn/w" in tensors and tensors["model/h0/attn/c_attn/w"].shape == (
        1,
        32,
        96,
    )
    loaded = load_gpt(str(tmp_path / "tf"))
    assert loaded.config == TINY and same_bits(loaded.state_dict(), model.state_dict())


def test_llms_from_scratch_keeps_query_key_value_apart_and_a_head_of_its_own(tmp_path):
    model = gpt(GPTConfig(**{**asdict(TINY), "tied": False}))
    names = {
        "wte.weight": "tok_emb.weight",
        "wpe.weight": "pos_emb.weight",
        "lm_head.weight": "out_head.weight",
    }
    names |= {"ln_f.weight": "final_norm.scale", "ln_f.bias": "final_norm.shift"}
    middle = {
        "ln_1.weight": "norm1.scale",
        "ln_1.bias": "norm1.shift",
        "ln_2.weight": "norm2.scale",
        "ln_2.bias": "norm2.shift",
    }
    middle |= {
        "mlp.c_fc.": "ff.layers.0.",
        "mlp.c_proj.": "ff.layers.2.",
        "attn.c_proj.": "att.out_proj.",
    }
    theirs = {}
    for name, t in model.state_dict().items():
        if name in names:
            theirs[names[name]] = t
            continue
        _, i, rest = name.split(".", 2)
        if rest.startswith("attn.c_attn."):
            for letter, part in zip(("query", "key", "value"), t.split(32), strict=True):
                theirs[f"trf_blocks.{i}.att.W_{letter}.{rest.rpartition('.')[2]}"] = part.clone()
            theirs[f"trf_blocks.{i}.att.mask"] = torch.ones(32, 32).triu(1)
            continue
        for ours, their in middle.items():
            rest = rest.replace(ours, their)
        theirs[f"trf_blocks.{i}.{rest}"] = t
    torch.save(theirs, tmp_path / "model.pth")
    loaded = load_gpt(str(tmp_path / "model.pth"), n_head=4)
    assert loaded.config == model.config and same_bits(loaded.state_dict(), model.state_dict())
    # qkv_bias=False, the book's default, and the dictionary in which it keeps optimizer and model
    plain = {
        name: t for name, t in theirs.items() if not (".att.W_" in name and name.endswith("bias"))
    }
    torch.save({"model_state_dict": plain, "optimizer_state_dict": {}}, tmp_path / "model.pth")
    assert (
        load_gpt(str(tmp_path / "model.pth"), n_head=4)
        .state_dict()["h.1.attn.c_attn.bias"]
        .abs()
        .max()
        == 0
    )
    # a head that is the embedding after all
    torch.save({**theirs, "out_head.weight": theirs["tok_emb.weight"]}, tmp_path / "model.pth")
    assert load_gpt(str(tmp_path / "model.pth"), n_head=4).config == TINY


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "transformer."])
def test_what_wrappers_put_before_the_names_is_taken_off(prefix, tmp_path):
    model = gpt()
    torch.save({prefix + name: t for name, t in model.state_dict().items()}, tmp_path / "a.pt")
    assert same_bits(load_gpt(str(tmp_path / "a.pt"), n_head=4).state_dict(), model.state_dict())


def test_weights_in_several_files_and_in_the_old_format(tmp_path):
    import transformers

    theirs = as_transformers(gpt())
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    assert (tmp_path / "parts/model.safetensors.index.json").exists() and len(
        list((tmp_path / "parts").glob("*.safetensors"))
    ) > 1
    assert same_bits(load_gpt(str(tmp_path / "parts")).state_dict(), gpt().state_dict())
    (tmp_path / "bin").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "bin/pytorch_model.bin")
    theirs.config.save_pretrained(tmp_path / "bin")
    assert same_bits(load_gpt(str(tmp_path / "bin")).state_dict(), gpt().state_dict())
    assert isinstance(theirs, transformers.GPT2LMHeadModel)


def test_every_tensor_that_does_not_fit_is_named_at_once(tmp_path):
    tensors = gpt().state_dict()
    del tensors["h.1.ln_2.bias"]
    tensors |= {
        "h.0.mlp.c_fc.bias": torch.zeros(7),
        "extra.weight": torch.zeros(2),
        "wpe.weight": torch.zeros(32, 32),
    }
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(
        ValueError,
        match="h.1.ln_2.bias is missing; extra.weight is not part.*h.0.mlp.c_fc.bias is .7. instead of .128.",
    ):
        load_gpt(str(tmp_path / "a.pt"), n_head=4)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model_type": "llama"}, "type 'llama'"),
        ({"activation_function": "relu"}, "'relu'"),
        ({"layer_norm_epsilon": 1e-6}, "1e-06"),
    ],
)
def test_another_family_or_arithmetic_is_refused(tmp_path, change, what):
    as_transformers(gpt()).save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text(encoding="utf-8"))
    (tmp_path / "hf/config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(ValueError, match=what):
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
    # large files lie in the cache under their sha256
    file = cached / "snapshots/abc/model.safetensors"
    blob = cached / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert wt_load.from_hub("me/tiny") == cached / "snapshots/abc"
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="differs from its sha256, which is its name"):
        wt_load.from_hub("me/tiny")
    assert "hf:me/other: not in the hub's cache" in one_error_line(
        run("wt_load.py", "import", "hf:me/other", "r", cwd=tmp_path, env=env), 2
    )


# ---------------------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@torch.no_grad()
def test_a_head_of_its_own_and_half_precision_arrive_at_transformers(tmp_path, dtype):
    import transformers

    model = gpt(GPTConfig(**{**asdict(TINY), "tied": False}))
    as_run(model, tmp_path / "run")
    main(ExportConfig(str(tmp_path / "run"), ("hf", str(tmp_path / "out")), dtype))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    half = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert theirs.lm_head.weight.dtype == half and torch.equal(
        theirs.lm_head.weight, model.lm_head.weight.to(half)
    )
    ids = torch.randint(257, (2, 20))
    rounded = GPT(model.config).eval()
    rounded.load_state_dict({name: t.to(half).float() for name, t in model.state_dict().items()})
    assert (rounded(ids) - theirs.float()(ids).logits).abs().max() <= 1e-4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 50 steps of the production trainer, with a BPE of its own."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").mkdir()
    words = "the old man and a small dog went down to the sea where ships of every kind lay still in the morning light".split()
    rows = [
        " ".join(words[(n * 5 + i * (n % 7 + 1)) % len(words)] for i in range(50)) + "."
        for n in range(300)
    ]
    (folder / "data/train.jsonl").write_text(
        "".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8"
    )
    options = "--dataset_name data --tokenizer bpe:300 --val_share 0.05 --model_size nano --context_length 64 --batch_size 8 --max_steps 50"
    options += " --max_lr 3e-3 --device cpu --dtype fp32 --eval_freq 50 --print_sample_iter 50 --run_name first"
    result = run("pretraining_advanced.py", *options.split(), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_what_was_trained_here_writes_the_same_in_transformers(trained, tmp_path):
    import transformers

    result = run("wt_load.py", "export", trained / "runs/first", "--to", "hf", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    theirs, words = (
        c.from_pretrained(tmp_path / "out")
        for c in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    model, tokenizer, _ = load_model(trained / "runs/first", "cpu")
    for text in ("the old man", " Ein  Satz\n\nmit naïve 😀 <|endoftext|>", ""):
        assert (
            words(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text).tolist()
        )
        assert words.decode(tokenizer.encode(text).tolist()) == text
    start = torch.tensor([[tokenizer.eot, *tokenizer.encode("the old").tolist()]])
    ids = theirs.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=50, do_sample=False
    )
    ours = sample_text(model, tokenizer, "cpu", "the old", 1, 50, temperature=0)[0]
    assert (
        words.decode(ids[0, start.shape[1] :], skip_special_tokens=True) == ours and len(ours) > 50
    )
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "| steps | 50 |" in card and "| text | data |" in card and "validation loss" in card


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_read_back_with_its_own_package_holds_every_tensor(tmp_path, dtype, tied):
    gguf = pytest.importorskip("gguf")
    model, tokenizer = (
        gpt(GPTConfig(**{**asdict(TINY), "tied": tied, "vocab_size": 320})),
        train_bpe(["the old man and the sea " * 50], 280),
    )
    as_run(model, tmp_path / "run", tokenizer)
    main(ExportConfig(str(tmp_path / "run"), ("gguf", str(tmp_path / "m.gguf")), dtype))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {t.name: t for t in reader.tensors}
    assert found.keys() == {wt_load.gguf_name(name) for name in model.state_dict()} and (
        "output.weight" in found
    ) == (not tied)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for name, t in model.state_dict().items():
        stored = found[wt_load.gguf_name(name)]
        expected = t if t.ndim < 2 or name == "wpe.weight" else t.to(torch_dtype)
        values = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
        assert torch.equal(values.reshape(t.shape), expected.float()), name
        assert list(stored.shape) == list(t.shape)[::-1], "ggml counts dimensions from the last"
    fields = {
        name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF")
    }
    assert (
        fields["general.architecture"] == "gpt2"
        and fields["gpt2.attention.head_count"] == 4
        and fields["gpt2.context_length"] == 32
    )
    assert (
        len(fields["tokenizer.ggml.tokens"]) == 320
        and fields["tokenizer.ggml.eos_token_id"] == tokenizer.eot
    )
    assert len(fields["tokenizer.ggml.merges"]) == tokenizer.vocab_size - 257
    known = {
        gguf.TENSOR_NAMES[kind].format(bid=i)
        for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT2]
        for i in range(2)
    }
    assert {name.rpartition(".")[0] for name in found} <= known, (
        "the names that the architecture has in llama.cpp"
    )


def test_nanogpt_and_back_is_the_same_to_the_bit(tmp_path):
    as_run(gpt(), tmp_path / "run")
    main(ExportConfig(str(tmp_path / "run"), ("nanogpt", str(tmp_path / "ckpt.pt"))))
    theirs = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert theirs["model_args"] == {
        "n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32, "bias": True, "vocab_size": 257, "dropout": 0.0
    }  # fmt: skip
    assert (
        theirs["model"]["lm_head.weight"].data_ptr()
        == theirs["model"]["transformer.wte.weight"].data_ptr()
    )
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer().to_json())
    main(ImportConfig(str(tmp_path / "ckpt.pt"), str(tmp_path / "again")))
    assert same_bits(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "run"))
    # its option without biases is a model whose biases are zeros
    bare = {name: t for name, t in theirs["model"].items() if not name.endswith("bias")}
    torch.save(
        {"model": bare, "model_args": {**theirs["model_args"], "bias": False}}, tmp_path / "bare.pt"
    )
    assert load_gpt(str(tmp_path / "bare.pt")).h[1].attn.c_attn.bias.abs().max() == 0


def test_a_padded_vocabulary_comes_in_and_its_extra_ids_are_never_sampled(tmp_path):
    model = gpt(GPTConfig(**{**asdict(TINY), "vocab_size": 320}))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer().to_json())
    main(ImportConfig(str(tmp_path / "a.pt"), str(tmp_path / "run"), n_head=4))
    loaded, tokenizer, _ = load_model(tmp_path / "run", "cpu")
    assert loaded.config.vocab_size == 320
    assert len(sample_text(loaded, tokenizer, "cpu", "a", 4, 40, temperature=5.0, seed=1)) == 4


# ------------------------------------------------------------------------------------------------------- looking


def test_info_says_what_it_is_and_the_line_that_goes_on_goes_on(trained, capsys):
    main(InfoConfig(str(trained / "runs/first"), tensors=True))
    out = capsys.readouterr().out
    for part in (
        "checkpoint of pretraining_advanced.py",
        "2 blocks, 2 heads, width 64, context 64",
        "step 50, 25,600 tokens",
        "256 x 64",
    ):
        assert part in out
    assert "best validation loss" in out and "h.1.mlp.c_fc.weight" in out
    line = next(
        row.removeprefix("to go on: ") for row in out.splitlines() if row.startswith("to go on")
    )
    done = subprocess.run(
        shlex.split(line), cwd=trained, capture_output=True, text=True, timeout=120, check=True
    )
    assert "already finished at step 50" in done.stdout
    line = next(
        row.removeprefix("to sample: ") for row in out.splitlines() if row.startswith("to sample")
    )
    assert run(*shlex.split(line)[1:], "--max_new_tokens", "5", cwd=trained).returncode == 0


def test_list_names_every_checkpoint_and_the_damaged_one(tmp_path, capsys):
    for step in (1, 2, 3):
        as_run(gpt(seed=step), tmp_path / "run", step=step)
    (tmp_path / "run/checkpoints/step_000002/model.safetensors").write_bytes(b"")
    main(ListConfig(str(tmp_path / "run")))
    lines = capsys.readouterr().out.splitlines()
    assert [("damaged" in line, "the best" in line) for line in lines] == [
        (False, True),
        (True, False),
        (False, True),
    ]


def test_diff_names_what_differs_and_by_how_much(tmp_path, capsys):
    model = gpt()
    as_run(model, tmp_path / "a")
    as_transformers(model).save_pretrained(tmp_path / "same")
    main(DiffConfig(str(tmp_path / "a"), str(tmp_path / "same")))
    assert capsys.readouterr().out == "28 tensors are equal, 0 differ\n"
    with torch.no_grad():
        model.h[1].ln_2.bias[3] += 0.5
        model.wte.weight.mul_(1.1)
    as_run(model, tmp_path / "b")
    main(DiffConfig(str(tmp_path / "a"), str(tmp_path / "b")))
    lines = capsys.readouterr().out.splitlines()
    assert "h.1.ln_2.bias" in lines[0] and "at most 5.000e-01" in lines[0]
    assert (
        "wte.weight: relative difference 1.000e-01" in lines[1]
        and lines[2] == "26 tensors are equal, 2 differ"
    )


def test_the_average_is_the_mean_of_each_number(tmp_path):
    for seed in (1, 2, 3):
        as_run(gpt(seed=seed), tmp_path / str(seed), step=seed)
    main(
        AverageConfig(
            tuple(str(tmp_path / str(seed)) for seed in (1, 2, 3)), str(tmp_path / "mean")
        )
    )
    mean, parts = (
        tensors_of(tmp_path / "mean"),
        [tensors_of(tmp_path / str(seed)) for seed in (1, 2, 3)],
    )
    assert all(
        torch.equal(t, ((parts[0][k].double() + parts[1][k] + parts[2][k]) / 3).float())
        for k, t in mean.items()
    )
    assert load_model(tmp_path / "mean", "cpu")[2]["step"] == 3


def test_verify_reads_every_value(tmp_path, capsys):
    model = gpt()
    as_run(model, tmp_path / "good")
    main(VerifyConfig(str(tmp_path / "good")))
    assert capsys.readouterr().out.splitlines()[-1] == weights_hash(model.state_dict())
    with torch.no_grad():
        model.h[0].attn.c_proj.weight[0, 0] = float("nan")
    as_run(model, tmp_path / "bad")
    with pytest.raises(ValueError, match="h.0.attn.c_proj.weight: not all values are finite"):
        main(VerifyConfig(str(tmp_path / "bad")))


# ----------------------------------------------------------------------------------------------------- going on


def test_training_goes_on_from_imported_weights(trained, tmp_path):
    model, tokenizer, _ = load_model(trained / "runs/first", "cpu")
    as_transformers(model).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/tokenizer.json").write_bytes(tokenizer.to_json())
    main(ImportConfig(str(tmp_path / "theirs"), str(tmp_path / "imported")))
    words = ["--tokenizer", str(tmp_path / "theirs/tokenizer.json")]
    options = "--dataset_name data --val_share 0.05 --context_length 64 --batch_size 8 --max_steps 5 --device cpu --dtype fp32 --eval_freq 5"
    command = (
        "pretraining_advanced.py",
        *options.split(),
        "--init_from",
        str(tmp_path / "imported"),
    )
    result = run(*command, *words, "--run_name", "second", cwd=trained)
    assert result.returncode == 0, result.stderr
    records = [
        json.loads(line)
        for line in (trained / "runs/second/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    before = [
        json.loads(line)
        for line in (trained / "runs/first/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert records[0]["val_loss"] == pytest.approx(before[-1]["val_loss"], rel=1e-6), (
        "the same weights on the same text"
    )
    assert run(*command, *words, "--run_name", "second", cwd=trained).returncode == 0, (
        "the same line again"
    )
    refused = run(*command, "--tokenizer", "bytes", "--run_name", "third", cwd=trained)
    assert "another tokenizer" in one_error_line(refused, 2)
    assert "leave these flags out" in one_error_line(
        run(*command, *words, "--n_layer", "5", "--run_name", "third", cwd=trained), 2
    )
    longer = run(*command, *words, "--context_length", "128", "--run_name", "third", cwd=trained)
    assert "--context_length: 128 is more than the 64" in one_error_line(longer, 2)


def test_score_is_the_same_for_any_batch_size(tmp_path):
    as_run(gpt(), tmp_path / "run")
    text = shared("data/reference/tinyshakespeare.txt").read_text(encoding="utf-8")[:20_000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    losses = []
    for batch_size in (1, 8, 3):
        result = run(
            "gpt_train.py",
            "--checkpoint",
            "run",
            "--eval",
            "text.txt",
            "--batch_size",
            batch_size,
            "--stride",
            "16",
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stderr
        losses.append(float(result.stdout.split("loss ")[1].split()[0]))
        assert f"({len(text.encode()) + 1:,} tokens scored)" in result.stdout
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_gpt2s_own_tokenizer_is_one_and_the_same_from_every_file():
    there = shared("data/gpt2/hf")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(shared("data/gpt2/tiktoken_cache")))
    from parts.data.tokenizers import gpt2_tokenizer

    assert Tokenizer.load(there).fingerprint == gpt2_tokenizer().fingerprint


LOADING = """
import sys, torch
from wt_load import load_gpt

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status", encoding="ascii") if line.startswith("VmHWM"))

torch.ones(1000, 1000) @ torch.ones(1000, 1000)
before = peak()
model = load_gpt(sys.argv[1])
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_hardly_more_memory_than_the_weights(tmp_path):
    import transformers

    config = transformers.GPT2Config(
        vocab_size=5000, n_layer=24, n_head=16, n_embd=1024, n_positions=256
    )  # 300 million, 1.2 GB
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, "-c", LOADING, tmp_path / "hf"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert float(out) <= 1.15
