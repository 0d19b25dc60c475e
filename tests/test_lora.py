"""LoRA equals peft in logits, gradients, training and files; what is refused."""

import copy
import json
import math

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from test_llama import both

from parts.model.families import shell
from parts.model.llama import Llama, LlamaBlock, LlamaConfig
from parts.model.lora import (
    LoRALinear,
    adapter_config,
    adapter_tensors,
    add_lora,
    base_name,
    load_adapters,
    trainable_count,
)
from parts.model.nf4 import quantise_linears
from parts.training.engine import recompute_in_backward

IDS = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(5))
RANK, ALPHA = 4, 12.0


def adapted(name="qwen2", dropout=0.0, seed=1):
    """(our model with adapters that matter, the same base of transformers)."""
    model, reference = both(name)
    add_lora(model, RANK, ALPHA, dropout, LlamaBlock, seed)
    return with_random_B(model), reference


def with_random_B(model):
    generator = torch.Generator().manual_seed(7)
    for name, tensor in adapter_tensors(model).items():
        if "lora_B" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def adapters_only(model) -> dict:
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def with_peft(reference, model, **settings):
    """transformers' model with peft's adapters, which have the numbers of ours."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        **settings,
    )
    theirs = peft.get_peft_model(reference, config)
    own = {name.replace(".weight", ".default.weight"): p for name, p in named(theirs).items()}
    assert {name.replace(".default", "") for name in own} == set(adapter_tensors(model))
    with torch.no_grad():
        for name, tensor in adapter_tensors(model).items():
            named(theirs)[name].copy_(tensor)
    return theirs


def named(theirs) -> dict:
    """peft's adapters by their names in its file."""
    parameters = theirs.named_parameters()
    return {n.replace(".default.", "."): p for n, p in parameters if "lora_" in n}


def loss_of(logits):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


# --------------------------------------------------------------------------- equal to peft


@pytest.mark.parametrize("name", ["qwen2", "llama", "mistral"])
def test_logits_and_gradients_equal_those_of_peft_also_after_five_steps(name):
    model, reference = adapted(name)
    theirs = with_peft(reference, model)
    ours_by_name = {n.removeprefix("base_model.model."): n for n in named(theirs)}
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], **options)
        for m in (model, theirs)
    ]
    for _ in range(5):
        logits, expected = model(IDS), theirs(IDS, use_cache=False).logits
        assert (logits - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
        loss_of(logits).backward()
        loss_of(expected).backward()
        other = named(theirs)
        for n, p in adapters_only(model).items():
            gradient = other[ours_by_name[n]].grad
            assert (p.grad - gradient).norm() <= 1e-5 * max(1, gradient.norm()), n
            assert gradient.norm() > 0
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    logits, expected = model(IDS), theirs(IDS, use_cache=False).logits
    assert (logits - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("name", ["qwen2", "llama, one key head, tied"])
def test_peft_loads_the_folder_of_our_files(tmp_path, name):
    peft = pytest.importorskip("peft")
    model, reference = adapted(name, dropout=0.25)
    save_file(adapter_tensors(model), tmp_path / "adapter_model.safetensors")
    config = adapter_config(model, "a/base")
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len(config["target_modules"]) == 7
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path).eval()
    expected = theirs(IDS, use_cache=False).logits
    model.eval()
    assert (model(IDS) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    found = theirs.peft_config["default"]
    assert (found.r, found.lora_alpha, found.lora_dropout) == (RANK, ALPHA, 0.25)
    assert (found.task_type, found.base_model_name_or_path) == ("CAUSAL_LM", "a/base")


def test_a_file_of_peft_loads_here_and_ours_comes_back_to_the_bit(tmp_path):
    model, reference = adapted()
    with_peft(reference, model).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    fresh, _ = both("qwen2")
    add_lora(fresh, RANK, ALPHA, 0.0, LlamaBlock)
    assert not fresh(IDS).equal(model(IDS))
    load_adapters(fresh, tensors)
    assert fresh(IDS).equal(model(IDS))
    own = adapter_tensors(fresh)
    assert own.keys() == tensors.keys() and all(own[n].equal(tensors[n]) for n in own)


def test_the_trained_numbers_are_as_many_as_in_peft_and_in_the_formula():
    model, reference = adapted()
    theirs = with_peft(reference, model)
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base, _ = both("qwen2")
    assert n == theirs.get_nb_trainable_parameters()[0] == trainable_count(base, RANK, LlamaBlock)


def test_adapters_of_qwen_2_5_7b():
    shape = {"vocab_size": 152_064, "n_layer": 28, "n_head": 28, "n_kv_head": 4, "n_embd": 3584}
    model = shell(LlamaConfig(**shape, n_hidden=18_944, qkv_bias=True))
    assert sum(p.numel() for p in model.parameters()) == 7_615_616_512
    assert trainable_count(model, 16, LlamaBlock) == 40_370_176
    quantise_linears(model, LlamaBlock)
    assert trainable_count(model, 16, LlamaBlock) == 40_370_176, "of a quantised base as well"
    add_lora(model, 16, 32.0, 0.0, LlamaBlock)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 40_370_176


# ------------------------------------------------------------------------------ beginning


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_new_adapters_has_the_logits_of_its_base_to_the_bit(quantised, dtype):
    model, _ = both("qwen2")
    if quantised:
        quantise_linears(model, LlamaBlock)
    expected = []
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            expected.append(model(IDS))
        if not any(isinstance(m, LoRALinear) for m in model.modules()):
            add_lora(model, RANK, ALPHA, 0.5, LlamaBlock)
            model.eval()
    assert expected[0].equal(expected[1])


def test_a_base_in_16_bits_works_without_autocast():
    model, _ = both("llama")
    model.bfloat16()
    expected = model(IDS)
    add_lora(model, RANK, ALPHA, 0.0, LlamaBlock)
    assert model(IDS).equal(expected)
    assert {p.dtype for p in adapters_only(model).values()} == {torch.float32}
    loss_of(with_random_B(model)(IDS).float()).backward()
    assert all(p.grad.norm() > 0 for p in adapters_only(model).values())


def test_the_first_weights_come_from_the_seed_and_from_no_global_generator():
    found = []
    for seed, drawn in ((1, 0), (1, 3), (2, 0)):
        torch.manual_seed(drawn)
        model = Llama(LlamaConfig(11, 8, 1, 2, 1, 16, 24, 8))
        before = torch.get_rng_state()
        add_lora(model, 8, 16.0, 0.0, LlamaBlock, seed)
        assert torch.get_rng_state().equal(before)
        found.append(adapter_tensors(model))
    assert all(found[0][n].equal(found[1][n]) for n in found[0])
    assert any(not found[0][n].equal(found[2][n]) for n in found[0])
    for name, tensor in found[0].items():
        if "lora_B" in name:
            assert not tensor.any()
        else:  # uniform as peft's: kaiming_uniform_(a=sqrt(5))
            bound = 1 / math.sqrt(tensor.shape[1])
            assert bound * 0.8 < tensor.abs().max() <= bound


def test_only_the_blocks_are_adapted_and_a_tied_head_stays_tied():
    for tied in (True, False):
        model = Llama(LlamaConfig(11, 8, 2, 2, 1, 16, 24, 8, tied=tied))
        names = add_lora(model, 2, 4.0, 0.0, (LlamaBlock,))
        assert len(names) == 14 and all(name.startswith("model.layers.") for name in names)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == set(adapters_only(model)) and len(trained) == 28
        assert tied == (model.head is model.model.embed_tokens.weight)


def test_the_names_of_the_base_are_those_of_hugging_face():
    model, reference = adapted("llama")
    names = {base_name(n) for n, _ in model.named_parameters() if ".lora_" not in n}
    assert names == {name for name, _ in reference.named_parameters()}


# ------------------------------------------------------------------------------- training


@pytest.mark.parametrize("quantised", [False, True])
def test_training_moves_the_adapters_and_no_bit_of_the_base(quantised):
    model, _ = both("qwen2")
    if quantised:
        quantise_linears(model, LlamaBlock)
    add_lora(model, RANK, ALPHA, 0.1, LlamaBlock)
    model.train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = loss_of(model(IDS))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        model(IDS)
        model.train()
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert all(after[n].equal(before[n]) == (".lora_" not in n) for n in before)


def test_dropout_is_drawn_from_the_global_generator_in_training_only():
    model, _ = adapted(dropout=0.5)
    model.train()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model(IDS))
    assert found[0].equal(found[1]) and not found[0].equal(found[2])
    model.eval()
    assert model(IDS).equal(adapted()[0](IDS))


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_recomputed_blocks_draw_the_same_dropout_again(name):
    gradients = []
    for recomputed in (False, True):
        if name == "llama":
            model, block = both("qwen2")[0], LlamaBlock
        else:
            model, block = their_model("GPTNeoX")
        add_lora(model, RANK, ALPHA, 0.5, block)
        with_random_B(model).train()
        blocks = [m for m in model.modules() if isinstance(m, block)]
        assert blocks and all(b.draws_random for b in blocks)
        if recomputed:
            for each in blocks:
                recompute_in_backward(each)
        torch.manual_seed(3)
        logits = model(IDS)
        loss_of(logits if name == "llama" else logits.logits).backward()
        gradients.append([p.grad for p in adapters_only(model).values()])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


def test_without_dropout_no_random_state_is_kept():
    model, _ = adapted()
    assert not any(block.draws_random for block in model.model.layers)


def test_a_compiled_block_with_adapters_is_one_graph():
    model, _ = both("qwen2")
    quantise_linears(model, LlamaBlock)
    add_lora(model, RANK, ALPHA, 0.0, LlamaBlock)
    with_random_B(model)
    found = []
    for compiled in (False, True):
        if compiled:
            for block in model.model.layers:
                block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        loss_of(model(IDS)).backward()
        found.append([p.grad.clone() for p in adapters_only(model).values()])
        model.zero_grad()
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


# ------------------------------------------------------------------------ other architectures


def their_model(kind: str):
    """(a small random model of transformers, the class of its blocks)."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 64, "use_cache": False}
    if kind != "GPTNeoX":
        shape["num_key_value_heads"] = 2
    config = getattr(transformers, f"{kind}Config")(**shape)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    layers = model.gpt_neox.layers if kind == "GPTNeoX" else model.model.layers
    return model, type(layers[0])


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("kind", ["GPTNeoX", "Llama", "Qwen2"])
def test_models_of_transformers_are_adapted_and_give_pefts_logits(tmp_path, kind, quantised):
    peft = pytest.importorskip("peft")
    model, block = their_model(kind)
    reference = copy.deepcopy(model)
    expected = model(IDS).logits
    if quantised:
        for name in quantise_linears(model, block):  # the reference gets the numbers as they are
            layer = reference.get_submodule(name)
            layer.weight.data.copy_(model.get_submodule(name).weight())
        expected = reference(IDS).logits
    add_lora(model, RANK, ALPHA, 0.0, block)
    assert (model(IDS).logits - expected).abs().max() <= 1e-5
    with_random_B(model)
    save_file(adapter_tensors(model), tmp_path / "adapter_model.safetensors")
    config = json.dumps(adapter_config(model, "base"))
    (tmp_path / "adapter_config.json").write_text(config, encoding="utf-8")
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path).eval()
    found = model(IDS).logits
    assert (found - theirs(IDS).logits).abs().max() <= 1e-5
    assert (found - expected).abs().max() > 1e-3, "the adapters do something"


def test_layers_whose_short_names_are_ambiguous_are_named_in_full():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)

    model = nn.ModuleDict({"first": Block(), "head": nn.ModuleDict({"proj": nn.Linear(4, 4)})})
    assert add_lora(model, 2, 2.0, 0.0, Block) == ["first.proj"]
    assert adapter_config(model, "x")["target_modules"] == ["first.proj"]


def test_a_layer_that_reads_the_weight_past_the_adapter_fails_loudly():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    add_lora(model, 2, 2.0, 0.0, nn.TransformerEncoderLayer)
    with pytest.raises(AttributeError, match="weight"):
        model(torch.randn(1, 3, 8))


# --------------------------------------------------------------------------------- refusals


SPOIL = {
    "missing": (lambda t: t.pop(next(iter(t))), "lora_A.weight is missing"),
    "all missing": (lambda t: t.clear(), "is missing; and 25 more"),
    "unexpected": (lambda t: t.update({"x.lora_A.weight": torch.ones(1)}), "x.lora_A.weight has"),
    "a shape": (lambda t: t.update({next(iter(t)): torch.ones(3, 32)}), "[3, 32] instead of [4"),
}


@pytest.mark.parametrize("how", SPOIL)
def test_adapters_that_do_not_fit_are_refused_and_nothing_is_changed(how):
    model, _ = adapted()
    before = {n: t.clone() for n, t in adapter_tensors(model).items()}
    tensors = {n: t + 1 for n, t in before.items()}
    spoil, expected = SPOIL[how]
    spoil(tensors)
    with pytest.raises(ValueError, match="the adapters do not fit") as e:
        load_adapters(model, tensors)
    assert expected in str(e.value) and "\n" not in str(e.value)
    assert all(before[n].equal(t) for n, t in adapter_tensors(model).items())


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        *[((rank, 8.0, 0.0), "--lora_rank") for rank in (0, -1, 2.5, True, None)],
        *[((4, alpha, 0.0), "--lora_alpha") for alpha in (0, -1.0, math.inf, math.nan)],
        *[((4, 8.0, dropout), "--lora_dropout") for dropout in (1.0, -0.1, 2, math.nan)],
    ],
)
def test_wrong_settings_are_named_by_their_flag_and_the_model_is_unchanged(settings, flag):
    model, _ = both("llama")
    with pytest.raises(ValueError, match=f"^{flag}: ") as e:
        add_lora(model, *settings, LlamaBlock)
    assert "\n" not in str(e.value)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_adapters_on_adapters_are_refused():
    model, _ = adapted()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for _ in range(2):
        with pytest.raises(ValueError, match="the model has LoRA adapters"):
            add_lora(model, RANK, ALPHA, 0.0, LlamaBlock)
    with pytest.raises(ValueError, match="the model has LoRA adapters"):
        add_lora(model, 2, 1.0, 0.1, (nn.Module,))
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("within", [nn.GRU, (nn.GRU, nn.LSTM), nn.RMSNorm])
def test_blocks_without_linear_layers_are_refused(within):
    model, _ = both("llama")
    with pytest.raises(ValueError, match="no block of the model has a linear layer"):
        add_lora(model, RANK, ALPHA, 0.0, within)
    assert all(p.requires_grad for p in model.parameters())


def test_quantising_before_or_after_the_adapters_is_the_same():
    before, _ = both("qwen2")
    quantise_linears(before, LlamaBlock)
    add_lora(before, RANK, ALPHA, 0.0, LlamaBlock)
    after, _ = both("qwen2")
    add_lora(after, RANK, ALPHA, 0.0, LlamaBlock)
    quantise_linears(after, LlamaBlock)
    found, expected = (with_random_B(model) for model in (after, before))
    assert found(IDS).equal(expected(IDS))
    assert {n for n, p in found.named_parameters() if p.requires_grad} == set(adapters_only(before))
    assert trainable_count(found, RANK, LlamaBlock) == trainable_count(before, RANK, LlamaBlock)
