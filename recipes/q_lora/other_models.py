"""
A causal language model of any other family, computed by transformers.

It is built by AutoModelForCausalLM from a Hugging Face folder; code from a folder never runs.
Packed rows are kept apart by positions that begin at 0 in each document, which transformers
turns into a mask if no cache is used. `check_reading` tries that on the model itself, since an
architecture may ignore it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.base.text import one_line
from parts.cli.launch import print_notes
from parts.data.tokenizers import Tokenizer
from parts.model import nf4
from parts.storage import formats
from recipes.q_lora.bases import add_to_hash, has_tokenizer, model_files, no_tokenizer

SAMPLE_TOKENS = 80


@dataclass
class OtherBase:
    """A model that transformers computes; used as bases.Base."""

    name: str  # as --model_name has it
    folder: Path
    settings: object  # transformers' configuration
    tensors: dict  # name in the files -> Stored
    tokenizer: Tokenizer
    files: dict[str, bytes]  # config.json and the tokenizer's files, as they are

    @classmethod
    def open(cls, name: str, folder: Path, settings: dict, why: str) -> OtherBase:
        """
        The model of a Hugging Face folder with this config.json; reads shapes, not weights.

        why: what the Llama of this project does not compute. Raises ValueError if transformers has
        no causal language model for it, or is missing.
        """
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as e:
            fix = "pip install -r recipes/q_lora/requirements.txt"
            raise ValueError(f"{name} is {why}, which needs transformers: {fix}") from e
        try:
            read = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as e:  # noqa: BLE001  whatever a hostile config.json makes it raise
            raise ValueError(f"{name}: transformers cannot read it: {one_line(e, 150)}") from e
        if type(read) not in AutoModelForCausalLM._model_mapping:
            what = f"{name} is {why}, of which transformers has no causal language model"
            raise ValueError(f"{what}; give a Llama, Qwen2, Mistral or another decoder")
        if not has_tokenizer(folder):
            raise ValueError(no_tokenizer(name))
        print_notes([f"{name} is {why}: transformers computes it, which takes longer"])
        tokenizer = Tokenizer.load(folder)
        files = model_files(folder) | {"tokenizer.json": tokenizer.to_json()}
        return cls(name, folder, read, formats.read_folder(folder), tokenizer, files)

    @property
    def family(self) -> str:
        """The type of the model in its config.json."""
        return self.settings.model_type

    @property
    def vocab_size(self) -> int:
        """Ids that the model knows."""
        return self.settings.get_text_config().vocab_size

    @property
    def longest(self) -> int | None:
        """Positions that the model was made for; None: not said."""
        return getattr(self.settings.get_text_config(), "max_position_embeddings", None)

    @property
    def facts(self) -> dict:
        """JSON values that describe the shape."""
        return json.loads(self.settings.to_json_string(use_diff=False))

    @functools.cached_property  # it builds a model, and is asked for several times
    def blocks(self) -> tuple:
        """Classes of the blocks: of the longest list of modules in the model."""
        lists = [m for m in self.shell().modules() if isinstance(m, nn.ModuleList)]
        if not lists:
            raise ValueError(f"--model_name: {self.name} has no list of blocks; give a decoder")
        return tuple({type(block): None for block in max(lists, key=len)})

    def flops_per_token(self, T: int) -> int:
        """As bases.Base.flops_per_token, from numbers of parameters."""
        model, text = self.shell(), self.settings.get_text_config()
        n_weights = sum(p.numel() for p in model.parameters())
        if model.get_output_embeddings() is not model.get_input_embeddings():
            n_weights -= model.get_input_embeddings().weight.numel()
        return 6 * n_weights + 12 * text.num_hidden_layers * text.hidden_size * T

    def shell(self):
        """The model without memory."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_config(self.settings, trust_remote_code=False)

    def load(self, dtype: torch.dtype, quantise: bool, seed: int = 0) -> tuple[nn.Module, str]:
        """
        (model with its weights in `dtype`, hash of them as they are in the files).

        quantise: linear layers of the blocks in NF4, after the whole model was read. Raises
        ValueError for tensors that do not fit, and for a model that reads other documents.
        """
        from transformers import AutoModelForCausalLM

        with _quiet(), torch.random.fork_rng(devices=[]):
            try:
                model, info = AutoModelForCausalLM.from_pretrained(
                    self.folder, dtype=dtype, trust_remote_code=False, output_loading_info=True
                )
            except Exception as e:  # noqa: BLE001  whatever transformers raises for a folder
                raise ValueError(f"--model_name: {self.name}: {one_line(e, 200)}") from e
        # transformers fills what is missing with random numbers, and only warns
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if found := sorted(map(str, info.get(kind, ()))):
                what = f"{kind.replace('_keys', '')} tensors: {', '.join(found)[:200]}"
                raise ValueError(f"--model_name: {self.name} has {what}; download it again")
        model.config.use_cache = False
        check_reading(model, self.name, self.vocab_size)
        if quantise:
            nf4.quantise_linears(model, self.blocks)
        return model.train(), self.hash()

    def hash(self, seed: int = 0) -> str:
        """The hash that `load` returns."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            add_to_hash(digest, name, self.tensors[name].read())
        return digest.hexdigest()

    def loss(self, model, batch: dict) -> torch.Tensor:
        """fp32 sum of the cross-entropy over the targets; each document reads only itself."""
        positions = positions_of(batch["documents"])
        logits = model(input_ids=batch["inputs"], position_ids=positions, use_cache=False).logits
        targets = batch["targets"].flatten()
        logits = logits.flatten(0, 1).float()
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")

    def sampler(self):
        """(model, device, should_stop) -> a text, as Job.sample."""

        def sample(model, device, should_stop) -> str:
            from transformers import StoppingCriteriaList

            def stop(ids, _scores, **_) -> torch.Tensor:
                return torch.full((len(ids),), should_stop(), device=ids.device)

            ids = torch.tensor([[self.tokenizer.eot]], device=device)
            was_training = model.training
            model.eval()
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _quiet():
                torch.manual_seed(0)
                written = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAMPLE_TOKENS,
                    do_sample=True, temperature=0.8, top_k=50, eos_token_id=None, use_cache=True,
                    pad_token_id=self.tokenizer.eot, stopping_criteria=StoppingCriteriaList([stop]),
                )  # fmt: skip
            model.train(was_training)
            known = [i for i in written[0, 1:].tolist() if i < self.tokenizer.vocab_size]
            return self.tokenizer.decode(known)

        return sample


def positions_of(documents: torch.Tensor) -> torch.Tensor:
    """Position (B, T) of each token in its own document, from the documents' numbers (B, T)."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values


@torch.no_grad()
def check_reading(model, name: str, vocab_size: int) -> None:
    """
    Raises ValueError if a token reads later tokens, or those of another document in its row.

    Tried on 16 tokens: two documents in one row, and each alone.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        what = "takes no position_ids, so documents cannot be kept apart in a row"
        raise ValueError(f"--model_name: {name} {what}; give a model with rotary positions")
    was_training = model.training
    model.eval()
    ids = torch.randint(vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    whole = {"position_ids": torch.arange(8).repeat(2)[None], "use_cache": False}
    packed = model(input_ids=ids, **whole).logits.float()
    one = {"position_ids": torch.arange(8)[None], "use_cache": False}
    alone = [model(input_ids=part, **one).logits.float() for part in ids.split(8, dim=1)]
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % vocab_size
    later = model(input_ids=changed, **whole).logits.float()[:, :-1]
    model.train(was_training)
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2
    scale = packed.std().item()
    for what, difference in (
        ("other documents in its row", packed - torch.cat(alone, dim=1)),
        ("tokens after it", later - packed[:, :-1]),
    ):
        if not difference.abs().max().item() <= tolerance * scale:
            raise ValueError(f"--model_name: in {name} a token reads {what}; give another model")


@contextlib.contextmanager
def _quiet():
    """No progress bars and warnings of transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
