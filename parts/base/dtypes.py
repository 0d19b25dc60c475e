"""Number formats and the names they have: on our command line, in a safetensors file."""

from __future__ import annotations

import torch

# --dtype -> format of the factors of matrix products; weights, sums and losses are always fp32
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# format of a tensor in a checkpoint -> its name in a safetensors file
SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# formats that weights may have, by torch's name and by that in a safetensors file
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOAT_NAMES = {str(dtype) for dtype in FLOATS} | {SAFETENSORS_NAMES[dtype] for dtype in FLOATS}
