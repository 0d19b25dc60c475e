"""The Llama family equals transformers' Llama, Qwen2 and Mistral, packed, cached and trained."""

import math

import pytest
import torch
import torch.nn.functional as F

from gpt_train import generate
from parts.model.cpu_products import attend
from parts.model.kv_cache import LayerCache
from parts.model.llama import Llama, LlamaConfig, attention_mask

SMALL = {"vocab_size": 97, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "n_hidden": 72}
SMALL |= {"head_dim": 8, "block_size": 160}
LLAMA_3 = {"rope_factor": 8.0, "rope_original_context": 64, "rope_theta": 5e5}
THEIR_LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
THEIR_LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
# name -> (ours, transformers' class, its settings besides the shape)
FAMILIES = {
    "llama": ({}, "Llama", {}),
    "llama, one key head, tied": ({"n_kv_head": 1, "tied": True}, "Llama", {}),
    "llama, no groups, wide heads": ({"n_kv_head": 4, "head_dim": 16}, "Llama", {"head_dim": 16}),
    "llama 3": (LLAMA_3, "Llama", {"rope_parameters": THEIR_LLAMA_3}),
    "qwen2": ({"qkv_bias": True, "tied": True, "rope_theta": 1e6}, "Qwen2", {}),
    "mistral": ({"window": 32, "norm_eps": 1e-5}, "Mistral", {"sliding_window": 32}),
}


def both(name: str, seed: int = 0):
    """(our model, transformers' model) with the same random weights."""
    transformers = pytest.importorskip("transformers")
    ours, kind, theirs = FAMILIES[name]
    config = LlamaConfig(**{**SMALL, **ours})
    torch.manual_seed(seed)
    model = Llama(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.ndim == 2 else p.uniform_(0.5, 1.5)
    settings = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attn_implementation": "eager",
    }
    their_config = getattr(transformers, f"{kind}Config")(**{**settings, **theirs})
    reference = getattr(transformers, f"{kind}ForCausalLM")(their_config).eval()
    names = {name: t.shape for name, t in reference.state_dict().items()}
    if config.tied:
        names.pop("lm_head.weight", None)
    assert {name: t.shape for name, t in model.state_dict().items()} == names
    reference.load_state_dict(model.state_dict(), strict=not config.tied)
    reference.tie_weights()
    return model, reference


@pytest.mark.parametrize("T", [1, 31, 128])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_and_names_equal_those_of_transformers(name, T):
    model, reference = both(name)
    ids = torch.randint(97, (2, T), generator=torch.Generator().manual_seed(T))
    expected = reference(ids, use_cache=False).logits
    assert (model(ids) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    assert (model(ids, last=True) - expected[:, -1:]).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_loss_and_gradients_equal_those_of_transformers(name):
    model, reference = both(name)
    ids = torch.randint(97, (2, 50), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, dims=1)
    targets[:, -7:] = -100
    loss = model(ids, targets)
    expected = F.cross_entropy(
        reference(ids, use_cache=False).logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = dict(reference.named_parameters())
    for parameter_name, p in model.named_parameters():
        gradient, other = p.grad.to_dense(), theirs[parameter_name].grad
        assert (gradient - other).norm() <= 1e-5 * other.norm(), parameter_name


def test_parameters_of_llama_7b():
    with torch.device("meta"):
        model = Llama(LlamaConfig())
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616


def test_parameters_of_llama_3_2_1b():
    with torch.device("meta"):
        model = Llama(LlamaConfig.of_size("llama-1b", vocab_size=128_256))
    assert sum(p.numel() for p in model.parameters()) == 1_235_814_400


@pytest.mark.parametrize("window", [None, 16])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(window):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**{**SMALL, "window": window})).eval()
    lengths = [1, 40, 20, 3]
    ids = torch.randint(97, (2, sum(lengths)))
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    packed = model(ids, documents=documents)
    parts = [model(part) for part in ids.split(lengths, dim=1)]
    assert (packed - torch.cat(parts, dim=1)).abs().max() <= 1e-5
    assert (packed - model(ids)).abs().max() > 1e-2  # else the mask does nothing


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_a_cache_gives_the_same_ids(name):
    model, reference = both(name)
    ids = torch.randint(97, (3, 9), generator=torch.Generator().manual_seed(2))
    options = {"temperature": 0.7, "top_k": 20, "seed": 3}
    cached = generate(model, ids, 60, **options)
    assert cached.equal(generate(model, ids, 60, use_cache=False, **options))
    greedy = generate(model, ids, 60, temperature=0)
    theirs = reference.generate(
        ids, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0,
        attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    assert greedy.equal(theirs)


def test_generation_past_the_context_reads_its_last_tokens():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**{**SMALL, "block_size": 24})).eval()
    ids = torch.randint(97, (2, 5))
    cached = generate(model, ids, 40, temperature=0)
    assert cached.equal(generate(model, ids, 40, temperature=0, use_cache=False))


@torch.no_grad()
def test_a_cache_takes_several_positions_at_once():
    model, _ = both("mistral")
    ids = torch.randint(97, (2, 90), generator=torch.Generator().manual_seed(4))
    cache = [LayerCache(90) for _ in range(2)]
    parts = [model(part, cache=cache) for part in ids.split([40, 1, 30, 19], dim=1)]
    assert (torch.cat(parts, dim=1) - model(ids)).abs().max() <= 1e-4


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_in_products_equals_the_kernel(window, packed):
    """bf16 on a CPU computes two products and a softmax; here both ways in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL, "window": window})
    q, k, v = (torch.randn(2, heads, 20, 8).bfloat16() for heads in (4, 2, 2))
    documents = torch.arange(20).div(7, rounding_mode="floor").expand(2, -1) if packed else None
    mask = attention_mask(config, 0, 20, documents, torch.device("cpu"))
    exact = attend(q.float(), k.float(), v.float(), mask)
    assert (attend(q, k, v, mask).float() - exact).abs().max() <= 0.03


def test_at_the_start_every_token_is_as_likely():
    torch.manual_seed(0)
    model = Llama(LlamaConfig.of_size("llama-nano", vocab_size=500, block_size=64))
    ids = torch.randint(500, (4, 64))
    targets = ids.roll(-1, dims=1)
    assert model(ids, targets).item() / ids.numel() == pytest.approx(math.log(500), abs=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_head": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
        ({"head_dim": 7}, "head_dim is 7; it must be even"),
        ({"n_layer": 0}, "n_layer is 0; give a whole number"),
        ({"window": 0}, "window is 0; give a whole number"),
    ],
)
def test_a_shape_that_cannot_be_is_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**{**SMALL, **changes})


def test_text_longer_than_the_context_is_refused():
    model = Llama(LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match="161 tokens are more than the context of 160"):
        model(torch.zeros(1, 161, dtype=torch.int64))
