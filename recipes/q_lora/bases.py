"""
The model that a training continues: its shape, its weights, and how to train and sample it.

    base = open_base("Qwen/Qwen2.5-7B-Instruct", max_seq_length=2048)
    model, of_base = base.load(torch.bfloat16, quantise=True)

Llama, Qwen2 and Mistral are computed by the family of parts/model/llama.py; every other causal
model by transformers (other_models.py). `--model_name tiny` is a random Qwen2 of two layers.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from gpt_train import sampler
from parts.base.files import read_json
from parts.data.tokenizers import FILES as TOKENIZER_FILES
from parts.data.tokenizers import Tokenizer, byte_tokenizer
from parts.model import nf4
from parts.model.families import FAMILIES, shell, tensor_shapes
from parts.model.llama import Llama, LlamaBlock, LlamaConfig
from parts.storage import hf_llama
from parts.storage.formats import Stored
from parts.storage.hub import BESIDE_WEIGHTS, files_of, from_hub
from parts.training.plan import flops_per_token
from wt_load import open_weights

TINY = "tiny"  # a random Qwen2 of two layers, for trying


@dataclass
class Base:
    """A Llama, Qwen2 or Mistral to train."""

    name: str  # as --model_name has it
    shape: LlamaConfig
    tensors: dict[str, Stored] | None  # by their names in the files; None: random ones
    tokenizer: Tokenizer
    files: dict[str, bytes]  # config.json and the tokenizer's files, as they are

    blocks = (LlamaBlock,)

    @property
    def family(self) -> str:
        """What a checkpoint of all weights is called."""
        return self.shape.family

    @property
    def vocab_size(self) -> int:
        """Ids that the model knows, at least as many as the tokenizer has."""
        return self.shape.vocab_size

    @property
    def longest(self) -> int | None:
        """Positions that the model was made for; None: any number."""
        return self.shape.block_size

    @property
    def facts(self) -> dict:
        """JSON values that describe the shape."""
        return asdict(self.shape)

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations to train all weights on a token of rows of T tokens."""
        return flops_per_token(replace(self.shape, block_size=T))

    def shell(self):
        """The model without memory."""
        return shell(self.shape)

    def load(self, dtype: torch.dtype, quantise: bool, seed: int = 0) -> tuple[Llama, str]:
        """
        (model with its weights in `dtype`, hash of them as they are in the files).

        quantise: linear layers of the blocks in NF4, one block at a time, so that no more than the
        model and one block is in memory. seed: of a random model. Raises ValueError for weights
        that are not finite, if they are quantised.
        """
        if self.tensors is None:
            torch.manual_seed(seed)
            model = Llama(self.shape).to(dtype)
            if quantise:
                nf4.quantise_linears(model, self.blocks)
            return model, self.hash(seed)
        digest = hashlib.sha256()

        def read(name: str) -> torch.Tensor:
            tensor = self.tensors[name].read()
            add_to_hash(digest, name, tensor)
            return tensor.to(dtype)

        model = self.shell()
        fill(model, read, quantise)
        return model, digest.hexdigest()

    def hash(self, seed: int = 0) -> str:
        """The hash that `load` returns, for a process that has no weights."""
        if self.tensors is None:
            return f"random, seed {seed}"
        digest = hashlib.sha256()
        for name in names_by_block(self.shell()):
            add_to_hash(digest, name, self.tensors[name].read())
        return digest.hexdigest()

    def random(self, dtype: torch.dtype, quantise: bool) -> Llama:
        """A model of this shape, to measure its speed and memory without its weights."""
        shapes, model = tensor_shapes(self.shape), self.shell()

        def noise(name: str) -> torch.Tensor:
            return torch.randn(shapes[name], dtype=dtype) * 0.02

        fill(model, noise, quantise)
        return model

    def loss(self, model, batch: dict) -> torch.Tensor:
        """fp32 sum of the cross-entropy over the targets; each document reads only itself."""
        return model(batch["inputs"], batch["targets"], batch["documents"])

    def sampler(self):
        """(model, device, should_stop) -> a text, as Job.sample."""
        return sampler(self.tokenizer)


def add_to_hash(digest, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor's name, dtype, shape and bytes to a hash."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().view(torch.uint8).numpy().data)


def names_by_block(model: Llama) -> list[str]:
    """Names of all tensors of a model, those of the blocks first."""
    names = list(model.state_dict())
    prefix = f"{FAMILIES['llama'].blocks}."
    return sorted(names, key=lambda name: not name.startswith(prefix))


def fill(model: Llama, read, quantise: bool) -> None:
    """
    Give a model without memory the tensors that read(name) returns, block by block.

    quantise: linear layers of the blocks in NF4, each block as soon as it is read.
    """
    for i, block in enumerate(model.model.layers):
        prefix = f"{FAMILIES['llama'].blocks}.{i}."
        block.load_state_dict({k: read(prefix + k) for k in block.state_dict()}, assign=True)
        if quantise:
            nf4.quantise_linears(block, (LlamaBlock,))
    rest = {name: read(name) for name, t in model.state_dict().items() if t.is_meta}
    model.load_state_dict(rest, assign=True, strict=False)


def tiny_config(vocab_size: int, block_size: int) -> LlamaConfig:
    """The shape of a Qwen2 of two layers."""
    return LlamaConfig(
        vocab_size, block_size, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_hidden=128,
        head_dim=16, qkv_bias=True, tied=True,
    )  # fmt: skip


def open_base(name: str, max_seq_length: int) -> Base:
    """
    The model that --model_name names: `tiny`, a folder, or a name on the hub.

    Reads shapes, not weights. Raises FileNotFoundError or ValueError if there is none, if it is no
    causal language model, or if its tokenizer or its context does not fit.
    """
    base = _tiny(max_seq_length) if name == TINY else _open(name)
    ids, V = base.tokenizer.vocab_size, base.vocab_size
    if ids > V:
        what = f"its tokenizer has {ids:,} ids, the model only {V:,}"
        raise ValueError(f"--model_name: {name}: {what}; give the model's own")
    if base.longest and max_seq_length > base.longest:
        longest = f"{base.longest:,} positions that the model was made for"
        raise ValueError(f"--max_seq_length: {max_seq_length:,} is more than the {longest}")
    return base


def _tiny(max_seq_length: int) -> Base:
    tokenizer = byte_tokenizer()
    shape = tiny_config(tokenizer.vocab_size, max_seq_length)
    files = {"config.json": _config_json(shape), "tokenizer.json": tokenizer.to_json()}
    return Base(TINY, shape, None, tokenizer, files)


def _config_json(shape: LlamaConfig) -> bytes:
    return json.dumps(hf_llama.settings_of_config(shape), indent=2).encode()


def _open(name: str) -> Base:
    try:
        folder = Path(name) if os.path.lexists(name) else from_hub(name)
        settings = {}
        if (folder / "config.json").is_file():
            settings = read_json(folder / "config.json", "download it again")
        if why := _why_not_ours(settings):
            from recipes.q_lora.other_models import OtherBase

            return OtherBase.open(name, folder, settings, why)
        weights = open_weights(str(folder))
    except (ValueError, FileNotFoundError) as e:
        raise type(e)(f"--model_name: {e}") from e
    if weights.config.family != "llama":
        what = f"{name} is a {weights.config.family} of this project"
        raise ValueError(f"--model_name: {what}; export it with wt_load.py, or give another model")
    if weights.tokenizer_path is None:
        raise ValueError(f"--model_name: {no_tokenizer(name)}")
    tokenizer = Tokenizer.load(weights.tokenizer_path)
    files = {"config.json": _config_json(weights.config)}  # of a run folder, which has none
    files |= model_files(Path(weights.tokenizer_path)) | {"tokenizer.json": tokenizer.to_json()}
    return Base(name, weights.config, weights.tensors, tokenizer, files)


def _why_not_ours(settings: dict) -> str:
    """Why the Llama of this project does not compute a model with this config.json; "": it does."""
    kind = settings.get("model_type")
    if kind is None:  # weights without a config.json, or a run folder
        return ""
    if kind not in hf_llama.MODEL_TYPES:
        return f"a model of type {str(kind)[:50]}"
    try:
        hf_llama.config_of_settings(settings)
    except ValueError as e:
        return str(e).split(";")[0]
    return ""


def no_tokenizer(name: str) -> str:
    """The message about a folder without a tokenizer."""
    return f"{name} has no tokenizer; put its tokenizer.json beside the weights"


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file that `Tokenizer.load` reads."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def model_files(folder: Path) -> dict[str, bytes]:
    """What a folder has besides weights that belongs to the model."""
    return files_of(folder, ("config.json", *BESIDE_WEIGHTS))
