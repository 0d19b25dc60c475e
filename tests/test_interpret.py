"""What the notebook shows of a model equals attentions and hidden states of transformers."""

import pytest
import torch
import torch.nn.functional as F
from test_gpt import as_transformers, tiny_model
from test_llama import both as llama_pair

from parts.report.interpret import (
    attention_maps,
    logit_lens,
    neighbours,
    residual_stream,
    token_losses,
)


def rough_model(**changes):
    """A tiny GPT whose biases and norms are away from 0 and 1, or half of it is not tested."""
    model = tiny_model(n_layer=3, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def pair():
    """A model, ids (13,), and the output of transformers for them."""
    model, ids = rough_model(), torch.randint(97, (13,))
    reference = as_transformers(model)
    reference.set_attn_implementation("eager")  # the kernels do not hold probabilities
    with torch.no_grad():
        return model, ids, reference(ids[None], output_attentions=True, output_hidden_states=True)


def test_attention_maps_equal_those_of_transformers(pair):
    model, ids, reference = pair
    for layer in range(3):
        difference = attention_maps(model, ids, layer) - reference.attentions[layer][0]
        assert difference.abs().max() <= 1e-5


def test_every_row_of_attention_adds_up_to_one_and_none_looks_ahead(pair):
    model, ids, _ = pair
    maps = attention_maps(model, ids, 1)
    assert maps.shape == (2, 13, 13)
    assert torch.allclose(maps.sum(dim=2), torch.ones(2, 13), atol=1e-6)
    assert maps.triu(1).abs().max() == 0


def test_the_residual_stream_equals_the_hidden_states_of_transformers(pair):
    model, ids, reference = pair
    stream = residual_stream(model, ids)
    for i in range(3):  # after the last block transformers has applied its last norm
        assert (stream[i] - reference.hidden_states[i][0]).abs().max() <= 1e-5
    assert (model.ln_f(stream[3]) - reference.hidden_states[3][0]).abs().max() <= 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_the_last_layer_of_the_lens_is_the_models_own_answer(tied):
    model, ids = rough_model(tied=tied), torch.randint(97, (7,))
    with torch.no_grad():
        expected = model(ids[None])[0, -1].log_softmax(dim=0)
    lens = logit_lens(model, ids)
    assert lens.shape == (4, 97) and (lens[-1] - expected).abs().max() <= 1e-5
    assert (lens[0] - expected).abs().max() > 1e-2  # and the layers before it say something else


def test_losses_of_the_tokens_are_cross_entropy_and_add_up_to_the_models_loss(pair):
    model, ids, reference = pair
    losses = token_losses(model, ids)
    expected = F.cross_entropy(reference.logits[0, :-1], ids[1:], reduction="none")
    assert torch.allclose(losses, expected, atol=1e-4)
    with torch.no_grad():
        total = model(ids[None, :-1], ids[None, 1:]).item()
    assert losses.sum().item() == pytest.approx(total, rel=1e-5)


def test_neighbours_are_the_highest_cosines_and_not_the_token_itself():
    model = tiny_model()
    with torch.no_grad():
        model.wte.weight[5] = 3 * model.wte.weight[70] + 0.001  # the same way, another length
    ids, cosines = neighbours(model, 5, 4)
    expected = F.cosine_similarity(model.wte.weight, model.wte.weight[5][None])
    assert ids[0] == 70 and len(ids) == 4 and 5 not in ids
    assert cosines == pytest.approx(expected[ids].tolist(), abs=1e-6)
    assert cosines == sorted(cosines, reverse=True)
    assert len(neighbours(model, 0, 1000)[0]) == 96


def test_ids_that_the_tokenizer_lacks_are_left_out():
    model, ids = rough_model(), torch.randint(50, (7,))
    lens = logit_lens(model, ids, n_ids=50)
    assert lens.shape == (4, 50)
    assert torch.allclose(lens.exp().sum(dim=1), torch.ones(4), atol=1e-5)
    assert max(neighbours(model, 3, 96, n_ids=50)[0]) < 50


def test_one_token_is_enough_and_one_too_many_is_refused():
    model = tiny_model()  # a context of 16
    assert attention_maps(model, torch.tensor([4]), 0).tolist() == [[[1.0]], [[1.0]]]
    assert token_losses(model, torch.tensor([4])).shape == (0,)
    for n in (0, 17):
        with pytest.raises(ValueError, match=f"{n} tokens, the model reads 1 to 16"):
            residual_stream(model, torch.zeros(n, dtype=torch.int64))


def test_looking_leaves_the_model_in_training_with_its_dropout():
    model, ids = tiny_model(dropout=0.5).train(), torch.randint(97, (9,))
    assert torch.equal(attention_maps(model, ids, 1), attention_maps(model, ids, 1))
    assert torch.equal(token_losses(model, ids), token_losses(model, ids)) and model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_model_that_diverged_is_said_to_have_diverged():
    model = tiny_model()
    with torch.no_grad():
        model.ln_f.weight[0] = float("nan")
    for look in (logit_lens, token_losses):
        with pytest.raises(RuntimeError, match="diverged"):
            look(model, torch.randint(97, (5,)))


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_what_is_shown_of_a_llama_equals_transformers_too(name):
    model, reference = llama_pair(name)
    ids = torch.randint(97, (45,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(ids[None], output_attentions=True, output_hidden_states=True)
    for layer in range(2):
        difference = attention_maps(model, ids, layer) - expected.attentions[layer][0]
        assert difference.abs().max() <= 1e-5
    stream = residual_stream(model, ids)
    for i in range(2):
        assert (stream[i] - expected.hidden_states[i][0]).abs().max() <= 1e-5
    lens = logit_lens(model, ids)
    assert (lens[-1] - expected.logits[0, -1].log_softmax(dim=0)).abs().max() <= 1e-4
    losses = F.cross_entropy(expected.logits[0, :-1], ids[1:], reduction="none")
    assert torch.allclose(token_losses(model, ids), losses, atol=1e-4)
    assert len(neighbours(model, 3, 5)[0]) == 5
