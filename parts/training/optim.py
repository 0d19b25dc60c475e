"""
Which parameters are treated how: weight decay on matrices only, AdamW, GaLore or Muon for the blocks, and the learning rate.

    adamw       all parameters, one fused kernel (Loshchilov and Hutter 2019)
    galore      the blocks' matrices keep their moments in a low-rank subspace of the gradient (Zhao et al. 2024), the rest AdamW
    galore8bit  the same with the moments in 8 bits; needs CUDA
    muon        the blocks' matrices take orthogonalised momentum (Jordan et al. 2024), the rest AdamW
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial

import torch
from torch.optim.adamw import adamw

BETAS = (0.9, 0.95)
# Weights that are query, key and value in one product: three matrices to Muon, not one.
FUSED_QKV = ("c_attn.weight", "qkv.weight", "Wqkv.weight", "qkv_proj.weight")
WSD_DECAY_SHARE = 0.2  # of all steps


def learning_rate(
    step: int, schedule: str, max_lr: float, min_lr: float, warmup_steps: int, max_steps: int
) -> float:
    """
    Learning rate of optimizer step `step` (0 is the first, max_steps - 1 the last), as a closed form.

    Linear warmup to max_lr, then: "cosine" and "linear" fall to min_lr at the last step, "constant" stays, "wsd"
    (warmup, stable, decay; Hu et al. 2024) stays and falls linearly over the last fifth.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    start = (
        warmup_steps
        if schedule != "wsd"
        else max(warmup_steps, max_steps - int(max_steps * WSD_DECAY_SHARE) - 1)
    )
    done = min(
        1.0, max(0, step - start) / max(1, max_steps - 1 - start)
    )  # 0 at the start, 1 at the last step
    if schedule == "constant":
        return max_lr
    share = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return min_lr + (max_lr - min_lr) * share


def slice_like(parameter, value):
    """This rank's slice of a whole tensor, where the parameter lies in slices (fsdp) and the tensor has its shape; else the tensor."""
    if not hasattr(parameter, "placements") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value, parameter.device_mesh, parameter.placements, src_data_rank=None
    ).to(parameter.device)


class AdamW:
    """
    torch's fused AdamW kernel (Loshchilov and Hutter 2019) with the state beside it, laid out as torch.optim.AdamW has it.

    That class imports the compiler when it is made, which costs every start a second, and divides gradients in a pass of its own.
    """

    def __init__(self, groups: list[dict], fused: bool):
        self.param_groups = [{"lr": 0.0, "fused": fused, **group} for group in groups]
        self.state = defaultdict(dict)
        # before the first step, or they come to lie in the room of its logits, and those of the second find it taken
        for p in (p for group in groups for p in group["params"]):
            step = torch.zeros((), device=p.device if fused else "cpu")
            self.state[p] = {
                "step": step,
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    @torch.no_grad()
    def step(self, grad_scale: float) -> None:
        """One update from the gradients divided by grad_scale."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads, fused = [_local(p.grad) for p in params], group["fused"]
            if not fused:
                torch._foreach_div_(grads, grad_scale)
            entries = [
                [_local(self.state[p][name]) for p in params]
                for name in ("exp_avg", "exp_avg_sq", "step")
            ]
            options = {
                "lr": group["lr"],
                "weight_decay": group["weight_decay"],
                "beta1": BETAS[0],
                "beta2": BETAS[1],
                "eps": 1e-8,
            }
            scale = torch.tensor(grad_scale) if fused and grad_scale != 1 else None
            params = [_local(p) for p in params]
            adamw(
                params,
                grads,
                *entries[:2],
                [],
                entries[2],
                fused=fused,
                grad_scale=scale,
                amsgrad=False,
                maximize=False,
                **options,
            )


def _local(tensor):
    """This rank's slice of a tensor in slices (fsdp), else the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Optimizer:
    """
    One or two torch optimizers behind one face, with state that is saved by parameter name.

    Raises ValueError for a kind that cannot run on this device.
    """

    def __init__(
        self,
        model,
        blocks,
        kind: str,
        weight_decay: float,
        device,
        galore_rank=128,
        galore_update_gap=200,
        galore_scale=0.25,
    ):
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.views = []  # (parameter that is a stretch of rows, the weight, the rows): for Muon
        in_blocks = {
            id(p)
            for m in model.modules()
            if isinstance(m, tuple(blocks))
            for p in m.parameters()
            if p.ndim == 2
        }
        special = [p for p in self.names if id(p) in in_blocks] if kind != "adamw" else []
        if any(hasattr(p, "placements") for p in special):
            raise ValueError(
                f"--optimizer {kind}: needs whole matrices, and --parallel fsdp holds slices of them; use adamw, or --parallel ddp"
            )
        taken = {id(p) for p in special}
        rest = [p for p in self.names if id(p) not in taken]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        if kind.startswith("galore"):
            low_rank = {
                "rank": galore_rank,
                "update_proj_gap": galore_update_gap,
                "scale": galore_scale,
                "proj_type": "std",
            }
            galore = _galore(kind, device)
            self.parts = [
                galore(
                    [*groups, {"params": special, "weight_decay": weight_decay, **low_rank}],
                    lr=0.0,
                    betas=BETAS,
                )
            ]
            if kind == "galore8bit":
                # galore-torch 1.0 passes two arguments by position that bitsandbytes 0.50 reads as
                # these: updates scaled by the size of the weights, and a zero bias never moves
                self.parts[0].args.max_unorm = 0.0
                self.parts[0].args.skip_zeros = False
        else:
            self.parts = [AdamW(groups, fused=device.type != "mps")]
            if kind == "muon":
                if device.type == "cuda" and not torch.cuda.is_bf16_supported(
                    including_emulation=False
                ):
                    why = "torch computes it in bf16, which this GPU does not have"
                    raise ValueError(f"--optimizer muon: {why}; use adamw or galore")
                matrices = [piece for p in special for piece in self._pieces(p)]
                # the same learning rate as AdamW's then gives updates of the same size (Liu et al. 2025)
                self.parts.append(
                    torch.optim.Muon(
                        matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
                    )
                )

    def _pieces(self, weight):
        """The matrices that a weight is to Muon: itself, or query, key and value as parameters on the same memory."""
        name = self.names[weight]
        if not name.endswith(FUSED_QKV):
            return [weight]
        n = weight.shape[0] // 3
        for i, letter in enumerate("qkv"):
            rows = slice(i * n, (i + 1) * n)
            view = torch.nn.Parameter(weight.data[rows])
            self.names[view] = f"{name}.{letter}"
            self.views.append((view, weight, rows))
        return [view for view, _, _ in self.views[-3:]]

    def set_lr(self, lr: float) -> None:
        """The learning rate of the coming step."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr

    def step(self, grad_scale: float = 1.0) -> None:
        """One update from the gradients divided by grad_scale: what clipping and the loss scale of fp16 come to."""
        if grad_scale != 1 and (len(self.parts) > 1 or not isinstance(self.parts[0], AdamW)):
            torch._foreach_div_([p.grad for p in self.names if p.grad is not None], grad_scale)
            grad_scale = 1.0
        for view, weight, rows in self.views:
            view.grad = None if weight.grad is None else weight.grad[rows]
        for part in self.parts:
            part.step(grad_scale) if isinstance(part, AdamW) else part.step()
            for state in part.state.values():
                # galore-torch leaves a view of the whole singular vectors: the memory would not fall, and a product with
                # a view rounds differently than with the copy that a resumed run reads
                if (
                    "projector" in state
                    and (m := state["projector"].ortho_matrix).untyped_storage().nbytes() > m.nbytes
                ):
                    state["projector"].ortho_matrix = m.clone(memory_format=torch.contiguous_format)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self.names:
            p.grad = None

    def state_dict(self) -> tuple[dict, dict]:
        """(tensors, numbers), each `parameter|entry` -> value; GaLore's projector is its plain matrix."""
        tensors, numbers = {}, {}
        for part in self.parts:
            for p, state in part.state.items():
                for entry, value in state.items():
                    key = f"{self.names[p]}|{entry}"
                    if entry == "projector":
                        tensors[key] = value.ortho_matrix
                    elif torch.is_tensor(value):
                        tensors[key] = value
                    elif isinstance(value, int | float | bool):
                        numbers[key] = value
        return tensors, numbers

    def load_state_dict(self, values: dict) -> None:
        """What `state_dict` gave, or a part of it, for a model of the same shape. Raises ValueError for parameters that are not here."""
        owner = {
            self.names[p]: (part, group, p)
            for part in self.parts
            for group in part.param_groups
            for p in group["params"]
        }
        for key, value in values.items():
            name, _, entry = key.rpartition("|")
            if name not in owner:
                raise ValueError(f"the optimizer state has {key!r}, this run has no such parameter")
            part, group, p = owner[name]
            if entry == "projector":
                from galore_torch.galore_projector import GaLoreProjector

                projector = GaLoreProjector(
                    group["rank"], update_proj_gap=group["update_proj_gap"], scale=group["scale"]
                )
                projector.ortho_matrix = value.to(p.device, copy=True)
                value = projector
            elif torch.is_tensor(value):
                # AdamW counts its steps on the CPU, unless it is fused
                value = (
                    value.clone()
                    if entry == "step" and not group.get("fused")
                    else slice_like(p, value.to(p.device, copy=True))
                )
            part.state[p][entry] = value

    def unknown(self, names) -> set[str]:
        """Those of the tensor names `parameter|entry` that belong to no parameter here."""
        own = set(self.names.values())
        return {name for name in names if name.rpartition("|")[0] not in own}

    def state_bytes(self) -> int:
        """Bytes of everything but the step counters."""
        return sum(t.nbytes for key, t in self.state_dict()[0].items() if not key.endswith("|step"))


def _galore(kind: str, device):
    if kind == "galore8bit" and device.type != "cuda":
        raise ValueError(
            f"--optimizer galore8bit: needs CUDA, this run is on {device.type}; use galore or adamw"
        )
    try:
        import galore_torch  # here: it brings transformers and bitsandbytes, which cost seconds
    except ImportError as e:
        raise ValueError(
            f"--optimizer {kind}: needs the package galore-torch ({e}); pip install galore-torch"
        ) from e
    return (
        galore_torch.GaLoreAdamW8bit
        if kind == "galore8bit"
        else partial(galore_torch.GaLoreAdamW, no_deprecation_warning=True)
    )


def predicted_state_bytes(model, blocks, kind: str, galore_rank: int = 128) -> int:
    """
    Bytes of fp32 optimizer state that a kind needs for the trainable parameters of a model.

    Two moments for AdamW, less for the others. blocks: classes whose matrices the others take.
    """
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    in_blocks = {
        id(p)
        for module in model.modules()
        if isinstance(module, tuple(blocks))
        for p in module.parameters()
        if p.ndim == 2
    }
    matrices = [tuple(p.shape) for key, p in trained.items() if key in in_blocks]
    n_others = sum(p.numel() for key, p in trained.items() if key not in in_blocks)
    return state_bytes_of(matrices, n_others, kind, galore_rank)


def state_bytes_of(matrices: list[tuple], n_others: int, kind: str, galore_rank: int = 128) -> int:
    """The same of the shapes of the matrices in the blocks, and the number of all other parameters."""
    total = 2 * n_others
    for rows, columns in matrices:
        if kind == "adamw":
            total += 2 * rows * columns
        elif kind == "muon":
            total += rows * columns
        else:  # two moments of (long side, rank), and the projection (rank, short side)
            rank = min(galore_rank, rows, columns)
            total += 2 * rank * max(rows, columns) + rank * min(rows, columns)
    return 4 * total
