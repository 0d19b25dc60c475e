"""recipes/q_lora on families that transformers computes: packing, adapters, refusals."""

import json

import pytest
import torch
from conftest import one_error_line, run
from corpus_cases import documents
from q_cases import FLAGS, SCRIPT, write_rows

from parts.data.tokenizers import byte_tokenizer
from parts.model import lora
from recipes.q_lora.bases import open_base
from recipes.q_lora.other_models import OtherBase, check_reading, positions_of

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
KINDS = {
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=8),
    "llama with biases": lambda: transformers.LlamaConfig(**SHAPE, attention_bias=True),
}


def save_model(folder, config, kind=None):
    """A random model of this configuration and a byte tokenizer, as a Hugging Face folder."""
    torch.manual_seed(1)
    build = kind or transformers.AutoModelForCausalLM.from_config
    build(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(byte_tokenizer().to_json())
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_read_as_if_alone(tmp_path, kind):
    base = open_base(str(save_model(tmp_path / "model", KINDS[kind]())), 32)
    assert isinstance(base, OtherBase) and base.vocab_size == 300 and base.longest == 64
    model, of_base = base.load(torch.float32, quantise=False)
    assert of_base == base.hash() and len(base.blocks) == 1
    rows = [torch.randint(250, (n,)) for n in (5, 11, 7)]
    lengths = [len(row) - 1 for row in rows]
    batch = {
        "inputs": torch.cat([row[:-1] for row in rows])[None],
        "targets": torch.cat([row[1:] for row in rows])[None],
        "documents": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None],
    }
    with torch.no_grad():
        packed = base.loss(model.eval(), batch)
        alone = 0.0
        for row in rows:
            logits = model(input_ids=row[None, :-1], use_cache=False).logits[0]
            alone += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum")
    assert (packed - alone).abs() < 1e-4


def test_positions_begin_anew_in_each_document():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    assert positions_of(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_gpt_neox_learns_resumes_and_loads_in_peft(tmp_path, method):
    write_rows(tmp_path / "data", documents(90))
    save_model(tmp_path / "model", KINDS["gpt_neox"]())
    folder = tmp_path / "output/model"
    flags = (*FLAGS, "--training_method", method)
    result = run(SCRIPT, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "model is a model of type gpt_neox: transformers computes it" in result.stdout
    evaluations = json.loads((folder / "logs/eval_results.json").read_text(encoding="utf-8"))
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]
    last = folder / "checkpoints/checkpoint-6"
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    straight = [(last / name).read_bytes() for name in (file, "optimizer.safetensors")]
    for path in sorted(last.iterdir()):
        path.unlink()
    last.rmdir()
    assert run(SCRIPT, *flags, cwd=tmp_path).returncode == 0
    assert [(last / name).read_bytes() for name in (file, "optimizer.safetensors")] == straight
    load = transformers.AutoModelForCausalLM.from_pretrained
    ids = torch.randint(257, (2, 32))
    if method == "full":
        assert torch.isfinite(load(last)(ids).logits).all()
        return
    if method == "qlora":
        return
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(load(tmp_path / "model"), last).eval()
    base = open_base(str(tmp_path / "model"), 32)
    ours, _ = base.load(torch.float32, quantise=False)
    lora.add_lora(ours, 2, 32.0, 0.1, within=base.blocks)
    from safetensors.torch import load_file

    with torch.no_grad():
        lora.load_adapters(ours, load_file(last / file))
        expected = ours.eval()(input_ids=ids, use_cache=False).logits
        assert (theirs(ids).logits - expected).abs().max() <= 1e-5
        words = ("merge", folder, tmp_path / "merged")
        result = run("recipes/q_lora/train_pretrain.py", *words, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert (load(tmp_path / "merged")(ids).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("config", "flags", "said"),
    [
        ("BloomConfig", {"hidden_size": 32, "n_layer": 1, "n_head": 2}, "takes no position_ids"),
        ("T5Config", {"d_model": 32, "num_layers": 1}, "has no causal language model"),
        ("GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 2}, "have no nn.Linear"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(tmp_path, config, flags, said):
    write_rows(tmp_path / "data", documents(90))
    kind = {"T5Config": transformers.T5Model}.get(config)
    made = getattr(transformers, config)(vocab_size=300, **flags)
    save_model(tmp_path / "model", made, kind)
    assert said in one_error_line(run(SCRIPT, *FLAGS, cwd=tmp_path), 2)
    assert not (tmp_path / "output").exists()


def test_missing_tensors_are_named_instead_of_made_up(tmp_path):
    folder = save_model(tmp_path / "model", KINDS["gpt_neox"]())
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["gpt_neox.final_layer_norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing tensors: gpt_neox.final_layer_norm.weight"):
        open_base(str(folder), 32).load(torch.float32, quantise=False)


class ReadsAhead(torch.nn.Module):
    """Logits of each token from the mean of the whole row."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(300, 8)

    def forward(self, input_ids, position_ids, use_cache):
        """As transformers' models."""
        mean = self.embedding(input_ids).mean(dim=1, keepdim=True)
        logits = mean.expand(-1, input_ids.shape[1], -1) @ self.embedding.weight.T
        return type("Output", (), {"logits": logits})


def test_a_model_that_reads_other_documents_is_refused():
    with pytest.raises(ValueError, match="a token reads other documents in its row"):
        check_reading(ReadsAhead(), "mean", 300)
