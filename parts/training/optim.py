"""
Optimizers and learning rate schedules. Weight decay applies to matrices only.

    adamw       all parameters, in one fused kernel (Loshchilov and Hutter 2019)
    galore      matrices of the blocks: moments in a low-rank subspace of the gradient
                (Zhao et al. 2024); the rest AdamW
    galore8bit  the same with moments of 8 bits; needs CUDA
    muon        matrices of the blocks: orthogonalised momentum (Jordan et al. 2024); the rest AdamW
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial

import torch
from torch.optim.adamw import adamw

BETAS = (0.9, 0.95)
EPS = 1e-8
# Weights that are query, key and value in one product: three matrices to Muon, not one.
FUSED_QKV = ("c_attn.weight", "qkv.weight", "Wqkv.weight", "qkv_proj.weight")
WSD_DECAY_SHARE = 0.2  # of all steps
# Entries of the state of a parameter, as torch.optim names them, that have the parameter's shape.
WHOLE = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def learning_rate(
    step: int,
    schedule: str,
    max_lr: float,
    min_lr: float,
    warmup_steps: int,
    max_steps: int,
    cycles: int = 1,
) -> float:
    """
    Learning rate of optimizer step `step` (0 is the first, max_steps - 1 the last), in closed form.

    Linear warmup to max_lr, then: "cosine" and "linear" fall to min_lr at the last step, "constant"
    stays, "wsd" (warmup, stable, decay; Hu et al. 2024) stays and falls linearly over the last
    fifth. "cosine_with_restarts" (Loshchilov and Hutter 2017) is that many `cycles` of the cosine,
    equally long, each of which begins at max_lr again.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return max_lr
    start = warmup_steps  # of the decay
    if schedule == "wsd":
        start = max(warmup_steps, max_steps - int(max_steps * WSD_DECAY_SHARE) - 1)
    length = max(1, max_steps - 1 - start)
    done = min(1.0, max(0, step - start) / length)  # 1 at the last step
    if schedule == "cosine_with_restarts" and done < 1:
        done = (step - start) * cycles % length / length  # of this cycle; whole numbers are exact
    share = 0.5 * (1 + math.cos(math.pi * done)) if schedule.startswith("cosine") else 1 - done
    return min_lr + (max_lr - min_lr) * share


def slice_like(parameter, value):
    """
    This rank's shard of a whole tensor if the parameter is sharded (fsdp), else the tensor itself.

    A tensor of another shape than the parameter's, such as a step counter, is never sharded.
    """
    if not hasattr(parameter, "placements") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    shard = distribute_tensor(value, mesh, placements, src_data_rank=None)
    return shard.to(parameter.device)


class AdamW:
    """
    torch's fused AdamW kernel (Loshchilov and Hutter 2019), with state as in torch.optim.AdamW.

    That class imports the compiler when it is made, which costs every start a second, and divides
    gradients in a separate pass.
    """

    def __init__(self, groups: list[dict], fused: bool):
        self.param_groups = [{"lr": 0.0, "fused": fused, **group} for group in groups]
        self.state = defaultdict(dict)
        # allocated before the first step: otherwise the state takes the memory that its logits
        # leave, and the logits of the second step find no room of that size
        for p in (p for group in groups for p in group["params"]):
            self.state[p] = {
                "step": torch.zeros((), device=p.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    @torch.no_grad()
    def step(self, grad_scale: float) -> None:
        """One update from the gradients divided by grad_scale."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [_local(p.grad) for p in params]
            exp_avgs = [_local(self.state[p]["exp_avg"]) for p in params]
            exp_avg_sqs = [_local(self.state[p]["exp_avg_sq"]) for p in params]
            steps = [_local(self.state[p]["step"]) for p in params]
            scale = None
            if not group["fused"]:
                torch._foreach_div_(grads, grad_scale)
            elif grad_scale != 1:
                scale = torch.tensor(grad_scale)
            adamw(
                [_local(p) for p in params],
                grads,
                exp_avgs,
                exp_avg_sqs,
                [],  # of amsgrad
                steps,
                fused=group["fused"],
                grad_scale=scale,
                amsgrad=False,
                maximize=False,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                beta1=BETAS[0],
                beta2=BETAS[1],
                eps=EPS,
            )


def _local(tensor):
    """This rank's shard of a sharded tensor (fsdp), any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _matrices(model, blocks) -> list:
    """The trainable matrices inside the blocks, in the order of the model."""
    units = [module for module in model.modules() if isinstance(module, tuple(blocks))]
    inside = {id(p) for unit in units for p in unit.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) in inside]


def _shape_of(entry: str, p, group: dict) -> list | None:
    """Shape of an entry in the state of a parameter; None if it is not known beforehand."""
    if entry == "step":
        return []
    if entry in WHOLE and "rank" not in group:
        return list(p.shape)
    return None  # in GaLore's subspace, or in 8 bits


def check_kind(kind: str, device, sharded: bool) -> None:
    """Raises ValueError if an optimizer of this kind cannot run here, or on sharded matrices."""
    of_matrices = kind == "muon" or kind.startswith("galore")
    if sharded and of_matrices:
        raise ValueError(
            f"--optimizer {kind}: needs whole matrices, and this --parallel shards them; "
            "use adamw, or --parallel ddp"
        )
    if kind.startswith("galore"):
        _galore(kind, device)
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "muon" and not bf16:
        raise ValueError(
            "--optimizer muon: torch computes it in bf16, which this GPU does not have; "
            "use adamw or galore"
        )


class Optimizer:
    """
    One or two torch optimizers used as one, with state that is saved by parameter name.

    blocks: classes of modules, whose matrices GaLore and Muon take. Raises ValueError for a kind
    that cannot run with this model or on this device.
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
        self.kind = kind
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.views = []  # (parameter on some rows of a weight, the weight, the rows): for Muon
        matrices = _matrices(model, blocks) if kind != "adamw" else []
        check_kind(kind, device, any(hasattr(p, "placements") for p in matrices))
        in_blocks = {id(p) for p in matrices}
        others = [p for p in self.names if id(p) not in in_blocks]
        groups = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        if kind.startswith("galore"):
            low_rank = {
                "params": matrices,
                "weight_decay": weight_decay,
                "rank": galore_rank,
                "update_proj_gap": galore_update_gap,
                "scale": galore_scale,
                "proj_type": "std",
            }
            self.parts = [_galore(kind, device)([*groups, low_rank], lr=0.0, betas=BETAS)]
        else:
            self.parts = [AdamW(groups, fused=device.type != "mps")]
        if kind == "galore8bit":
            # galore-torch 1.0 passes two arguments by position that bitsandbytes 0.50 reads as
            # these: updates scaled by the size of the weights, and a zero bias never moves
            self.parts[0].args.max_unorm = 0.0
            self.parts[0].args.skip_zeros = False
        if kind == "muon":
            self.parts.append(self._muon(matrices, weight_decay))

    def _muon(self, matrices: list, weight_decay: float):
        """torch's Muon for these matrices. Raises ValueError if it cannot run."""
        if not matrices:
            raise ValueError(
                "--optimizer muon: no matrix in the blocks of this model is trainable; use adamw"
            )
        pieces = [piece for matrix in matrices for piece in self._pieces(matrix)]
        # with the same learning rate as AdamW's, updates are then as large as AdamW's
        # (Liu et al. 2025)
        adjust = "match_rms_adamw"
        muon = torch.optim.Muon(pieces, lr=0.0, weight_decay=weight_decay, adjust_lr_fn=adjust)
        for p in pieces:  # as torch does at the first gradient; see AdamW for why it is done here
            muon.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return muon

    def _pieces(self, weight):
        """A weight as Muon's matrices: itself, or query, key and value, which share its memory."""
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
        """Set the learning rate of the next step."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr

    def step(self, grad_scale: float = 1.0) -> None:
        """One update from the gradients divided by grad_scale, which clips and unscales them."""
        divides = len(self.parts) == 1 and isinstance(self.parts[0], AdamW)
        if grad_scale != 1 and not divides:
            torch._foreach_div_([p.grad for p in self.names if p.grad is not None], grad_scale)
            grad_scale = 1.0
        for view, weight, rows in self.views:
            view.grad = None if weight.grad is None else weight.grad[rows]
        for part in self.parts:
            if isinstance(part, AdamW):
                part.step(grad_scale)
            else:
                part.step()
            for state in part.state.values():
                if "projector" in state:
                    _drop_unused_vectors(state["projector"])

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self.names:
            p.grad = None

    def state_dict(self) -> tuple[dict, dict]:
        """(tensors, numbers), each `parameter|entry` -> value; GaLore's projector is a matrix."""
        tensors = {}
        numbers = {}
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
        """
        Put back what `state_dict` returned, or a part of it, for a model of the same shape.

        Raises ValueError for a parameter that is not here, or a moment of another shape than its
        parameter's.
        """
        owners = {
            self.names[p]: (part, group, p)
            for part in self.parts
            for group in part.param_groups
            for p in group["params"]
        }
        for key, value in values.items():
            name, _, entry = key.rpartition("|")
            if name not in owners:
                raise ValueError(
                    f"optimizer state {key}: the model has no such trainable parameter; "
                    "use a checkpoint of this model"
                )
            part, group, p = owners[name]
            shape = list(getattr(value, "shape", ()))
            wanted = _shape_of(entry, p, group)
            if wanted is not None and shape != wanted:
                raise ValueError(
                    f"optimizer state {key}: has shape {shape}, this run needs {wanted}; "
                    "use a checkpoint of this model"
                )
            if entry == "projector":
                value = _projector(group, value.to(p.device, copy=True))
            elif entry == "step" and torch.is_tensor(value) and not group.get("fused"):
                value = value.clone()  # AdamW counts its steps on the CPU unless it is fused
            elif torch.is_tensor(value):
                value = slice_like(p, value.to(p.device, copy=True))
            part.state[p][entry] = value

    def unknown(self, names) -> set[str]:
        """Those of the tensor names `parameter|entry` that belong to no parameter here."""
        own = set(self.names.values())
        return {name for name in names if name.rpartition("|")[0] not in own}

    def state_bytes(self) -> int:
        """Bytes of everything but the step counters."""
        return sum(t.nbytes for key, t in self.state_dict()[0].items() if not key.endswith("|step"))


# ------------------------------------------------------------------------------------ GaLore


def _galore(kind: str, device):
    """The class of galore-torch. Raises ValueError if it cannot be used here."""
    if kind == "galore8bit" and device.type != "cuda":
        raise ValueError(
            f"--optimizer galore8bit: needs CUDA, this run is on {device.type}; use galore or adamw"
        )
    try:
        import galore_torch  # here: it imports transformers and bitsandbytes, which cost seconds
    except ImportError as e:
        raise ValueError(
            f"--optimizer {kind}: needs the package galore-torch ({e}); pip install galore-torch"
        ) from e
    if kind == "galore8bit":
        return galore_torch.GaLoreAdamW8bit
    return partial(galore_torch.GaLoreAdamW, no_deprecation_warning=True)


def _projector(group: dict, matrix):
    """GaLore's projector of a parameter group with this matrix."""
    from galore_torch.galore_projector import GaLoreProjector

    gap, scale = group["update_proj_gap"], group["scale"]
    projector = GaLoreProjector(group["rank"], update_proj_gap=gap, scale=scale)
    projector.ortho_matrix = matrix
    return projector


def _drop_unused_vectors(projector) -> None:
    """
    Copy a projector's matrix if it is a view of all singular vectors, as galore-torch leaves it.

    The view keeps all of them in memory, and a product with a view rounds differently than with the
    copy that a resumed run reads.
    """
    matrix = projector.ortho_matrix
    if matrix.untyped_storage().nbytes() > matrix.nbytes:
        projector.ortho_matrix = matrix.clone(memory_format=torch.contiguous_format)


# -------------------------------------------------------------------------- bytes of the state


def predicted_state_bytes(model, blocks, kind: str, galore_rank: int = 128) -> int:
    """
    Bytes of fp32 optimizer state that a kind needs for the trainable parameters of a model.

    Two moments for AdamW, less for the others. blocks: classes whose matrices the others take.
    """
    matrices = _matrices(model, blocks)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_others = n_trained - sum(p.numel() for p in matrices)
    return state_bytes_of([tuple(p.shape) for p in matrices], n_others, kind, galore_rank)


def state_bytes_of(matrices: list[tuple], n_others: int, kind: str, galore_rank: int = 128) -> int:
    """The same from the shapes of the blocks' matrices and the number of all other parameters."""
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
