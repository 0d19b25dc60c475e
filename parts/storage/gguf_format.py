"""A GPT as a GGUF file, the format of llama.cpp."""

from __future__ import annotations

import json

import torch


def write_gguf(file, config, tensors: dict, dtype, tokenizer, step: int) -> None:
    """
    Write a GPT's tensors and tokenizer to a GGUF file.

    config: a GPTConfig. dtype: torch.float32, torch.float16 or torch.bfloat16, of the matrices.
    Raises ValueError if the package gguf is missing.
    """
    try:
        import gguf
    except ImportError as e:
        raise ValueError("--to gguf: needs the package gguf; pip install gguf") from e
    c, writer = config, gguf.GGUFWriter(file, "gpt2")
    writer.add_name(f"gpt2-{c.n_layer}x{c.n_embd}-step-{step}")
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(True)  # a document begins with it, as in training
    spec = json.loads(tokenizer.to_json())
    pieces = {i: piece for piece, i in spec["model"]["vocab"].items()}
    special = {i: text for text, i in tokenizer.special.items()}
    texts = pieces | special
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(c.vocab_size)])
    types = dict.fromkeys(pieces, gguf.TokenType.NORMAL)
    types |= dict.fromkeys(special, gguf.TokenType.CONTROL)
    writer.add_token_types([types.get(i, gguf.TokenType.UNUSED) for i in range(c.vocab_size)])
    writer.add_token_merges([" ".join(merge) for merge in spec["model"]["merges"]])
    kinds = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    writer.add_file_type({torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[dtype])
    for name, t in tensors.items():
        # llama.cpp adds biases, norms and positions, and needs them in fp32
        t = t.float() if t.ndim < 2 or name == "wpe.weight" else t.to(dtype)
        raw = t.view(torch.int16).numpy().view("uint8") if t.dtype == torch.bfloat16 else t.numpy()
        writer.add_tensor(gguf_name(name), raw, raw_dtype=kinds[t.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_NAMES = {  # ours -> llama.cpp's
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "lm_head.weight": "output.weight",
    "ln_f.weight": "output_norm.weight",
    "ln_f.bias": "output_norm.bias",
}
GGUF_BLOCK_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of our tensors."""
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    _, i, *module, kind = name.split(".")
    return f"blk.{i}.{GGUF_BLOCK_NAMES['.'.join(module)]}.{kind}"
