"""Files of other trainers, in which the weights are one of several entries, come in as they are."""

import pytest
import torch
import torch.nn.functional as F
from small_models import UNTIED, gpt, same_bits, tensors_of

from parts.data.tokenizers import byte_tokenizer
from wt_load import ImportConfig, load_gpt, main

V, T_MAX, L, H, C = 257, 32, 2, 4, 32


def fused_weights(norm=("weight", "bias"), qkv_bias=True, seed=3) -> dict:
    """Tensors of a GPT with `att.qkv` and `att.proj`, drawn at random under its own names."""
    draw = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(*shape, generator=draw) * 0.2

    named = {"tok_emb.weight": tensor(V, C), "pos_emb.weight": tensor(T_MAX, C)}
    norms, linears = ["final_norm"], {}
    for i in range(L):
        block = f"trf_blocks.{i}"
        norms += [f"{block}.norm1", f"{block}.norm2"]
        linears[f"{block}.att.qkv"] = (3 * C, C)
        linears[f"{block}.att.proj"] = (C, C)
        linears[f"{block}.ff.layers.0"] = (4 * C, C)
        linears[f"{block}.ff.layers.2"] = (C, 4 * C)
    for name, (n_out, n_in) in linears.items():
        named[f"{name}.weight"] = tensor(n_out, n_in)
        if qkv_bias or not name.endswith("qkv"):
            named[f"{name}.bias"] = tensor(n_out)
    for name in norms:
        named[f"{name}.{norm[0]}"] = 1 + tensor(C)
        named[f"{name}.{norm[1]}"] = tensor(C)
    named["out_head.weight"] = tensor(V, C)
    return named


def plain_logits(t: dict, ids, norm=("weight", "bias")):
    """The logits (B, T, V) of those tensors, computed from nothing but them."""
    B, T = ids.shape

    def normalised(x, name):
        return F.layer_norm(x, (C,), t[f"{name}.{norm[0]}"], t[f"{name}.{norm[1]}"])

    def linear(x, name):
        return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))

    x = t["tok_emb.weight"][ids] + t["pos_emb.weight"][:T]
    later = torch.ones(T, T).triu(1).bool()
    for i in range(L):
        block = f"trf_blocks.{i}"
        qkv = linear(normalised(x, f"{block}.norm1"), f"{block}.att.qkv")
        q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in qkv.split(C, dim=-1))
        scores = q @ k.transpose(2, 3) / (C // H) ** 0.5
        y = scores.masked_fill(later, -torch.inf).softmax(-1) @ v  # (B, H, T, D)
        x = x + linear(y.transpose(1, 2).reshape(B, T, C), f"{block}.att.proj")
        wide = F.gelu(
            linear(normalised(x, f"{block}.norm2"), f"{block}.ff.layers.0"), approximate="tanh"
        )
        x = x + linear(wide, f"{block}.ff.layers.2")
    return normalised(x, "final_norm") @ t["out_head.weight"].T


def trainer_file(weights: dict, **more) -> dict:
    """The eight entries that such a trainer saves, with the state of a real AdamW."""
    parameters = [torch.nn.Parameter(t.clone()) for t in weights.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    sum((p * p).sum() for p in parameters).backward()
    optimizer.step()
    return {
        "model_state_dict": weights,
        "optimizer_state_dict": optimizer.state_dict(),
        "epoch": 1,
        "global_step": 1200,
        "train_losses": [9.5, 4.25],
        "val_losses": [9.6, 4.5],
        "track_tokens_seen": [0, 1 << 20],
        "track_lrs": [1e-4, 5e-4],
        **more,
    }


def renamed(weights: dict, rename) -> dict:
    return {rename(name): t for name, t in weights.items()}


WRAPPED = {
    "plain": lambda name: name,
    "compiled": lambda name: f"_orig_mod.{name}",
    "on several devices": lambda name: f"module.{name}",
    "compiled, then on several": lambda name: f"module._orig_mod.{name}",
    "on several, then compiled": lambda name: f"_orig_mod.module.{name}",
    "inside a class": lambda name: f"module.model._orig_mod.{name}",
    "each block compiled": lambda name: name.replace(".att.", "._orig_mod.att."),
    "each block checkpointed": lambda n: n.replace(".ff.", "._checkpoint_wrapped_module.ff."),
}


@pytest.mark.parametrize("case", WRAPPED)
@torch.no_grad()
def test_a_trainers_file_with_fused_attention_computes_the_same_logits(case, tmp_path):
    weights, path = fused_weights(), tmp_path / "model_pg_1200.pt"
    with torch.enable_grad():
        torch.save(trainer_file(renamed(weights, WRAPPED[case])), path)
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer().to_json())
    main(ImportConfig(str(path), str(tmp_path / "run"), n_head=H))
    model = load_gpt(str(tmp_path / "run"))
    ids = torch.randint(V, (3, T_MAX), generator=torch.Generator().manual_seed(1))
    assert not model.config.tied and model.config.block_size == T_MAX
    assert torch.allclose(model(ids), plain_logits(weights, ids), atol=2e-5)
    # the same file without the entries around the weights, under the other usual ending
    torch.save(renamed(weights, WRAPPED[case]), tmp_path / "bare.pth")
    bare = load_gpt(str(tmp_path / "bare.pth"), n_head=H)
    assert same_bits(bare.state_dict(), tensors_of(tmp_path / "run"))


@pytest.mark.parametrize("norm", [("weight", "bias"), ("scale", "shift")])
@pytest.mark.parametrize("qkv_bias", [True, False])
@torch.no_grad()
def test_fused_attention_with_either_norm_and_with_or_without_biases(norm, qkv_bias, tmp_path):
    weights = fused_weights(norm, qkv_bias)
    torch.save({"model_state_dict": weights}, tmp_path / "a.pt")
    model = load_gpt(str(tmp_path / "a.pt"), n_head=H)
    ids = torch.arange(40).view(2, 20)
    assert torch.allclose(model(ids), plain_logits(weights, ids, norm), atol=2e-5)


@pytest.mark.parametrize("key", ["config", "model_config", "cfg"])
def test_the_number_of_heads_comes_from_the_file_if_it_says_so(key, tmp_path):
    book = {"vocab_size": V, "context_length": T_MAX, "emb_dim": C, "n_heads": H, "n_layers": L}
    saved = trainer_file(fused_weights(), **{key: {**book, "drop_rate": 0.1, "qkv_bias": True}})
    torch.save(saved, tmp_path / "a.pt")
    assert load_gpt(str(tmp_path / "a.pt")).config == UNTIED
    torch.save({**saved, key: {**book, "context_length": 64}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="block_size = 64, the tensors have 32"):
        load_gpt(str(tmp_path / "a.pt"))
    torch.save({**saved, key: {"lr": 1e-3}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="give --n_head"):
        load_gpt(str(tmp_path / "a.pt"))


def test_weights_in_an_entry_of_an_entry_are_found_and_a_file_that_holds_itself_ends(tmp_path):
    path = tmp_path / "a.pt"
    for nested in (
        {"model": {"state_dict": gpt(UNTIED).state_dict()}},
        {"state_dict": {"model": gpt(UNTIED).state_dict()}},
        {"model_state": gpt(UNTIED).state_dict(), "step": 3},
    ):
        torch.save(nested, path)
        loaded = load_gpt(str(path), n_head=H)
        assert same_bits(loaded.state_dict(), gpt(UNTIED).state_dict())
    endless = {}
    endless["model"] = endless
    torch.save(endless, path)
    with pytest.raises(ValueError, match="holds more than named tensors"):
        load_gpt(str(path))


def test_fused_attention_of_which_a_part_is_missing_is_refused_by_name(tmp_path):
    whole = fused_weights()
    for gone, named in (
        ("trf_blocks.1.att.qkv.bias", "h.1.attn.c_attn.bias is missing"),
        ("trf_blocks.0.att.qkv.weight", "h.0.attn.c_attn.weight is missing"),
        ("trf_blocks.1.att.proj.weight", "h.1.attn.c_proj.weight is missing"),
        ("final_norm.bias", "ln_f.bias is missing"),
    ):
        torch.save({n: t for n, t in whole.items() if n != gone}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=named):
            load_gpt(str(tmp_path / "a.pt"), n_head=H)
    # under the names of both layouts at once, none of them is dropped silently
    both = {**whole, "trf_blocks.0.att.out_proj.bias": whole["trf_blocks.0.att.proj.bias"]}
    torch.save(both, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"two of its tensors are named h.0.attn.c_proj.bias"):
        load_gpt(str(tmp_path / "a.pt"), n_head=H)
    names = [f"trf_blocks.0.att.W_{part}.weight" for part in ("query", "key", "value")]
    apart = dict.fromkeys(names, torch.zeros(C, C))
    torch.save({**whole, **apart}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="block 0 has query, key and value twice"):
        load_gpt(str(tmp_path / "a.pt"), n_head=H)
