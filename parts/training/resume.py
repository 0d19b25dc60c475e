"""
The checkpoints of a training: what is saved, which one is resumed, and rolling back to one.

`job`, `config` and `engine` are those of pretraining_advanced.train. Rank 0 alone reads and writes;
where the other ranks take part, the docstring says so.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from dataclasses import asdict
from pathlib import Path

from parts.base.text import one_line
from parts.cli.launch import StopRequest
from parts.storage import checkpoint, run_folder
from parts.storage.checkpoint import OPTIMIZER_FILE
from parts.storage.writer import enough_memory, offloaded_bytes
from parts.training.guard import Guard
from parts.training.optim import predicted_state_bytes
from parts.training.progress import Progress, Requests

RETRY_S = 60.0  # between two attempts to save while the disk refuses
POLL_S = 1.0  # between two looks at the clock and the signals in the wait at the end
# what earlier versions wrote in place of the family
SCRIPTS = {"pretraining_advanced.py": "gpt"}


def unique_weights(model) -> dict:
    """{name: tensor} of everything a model must save: each tensor once, tied ones by one name."""
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def checkpoint_bytes(job, config) -> int:
    """Bytes of weights, optimizer state and the files beside them."""
    weights = sum(tensor.nbytes for tensor in job.weights(job.model).values())
    files = sum(len(data) for data in job.files.values())
    state = predicted_state_bytes(job.model, job.blocks, config.optimizer, config.galore_rank)
    return weights + files + state


# ----------------------------------------------------------------------------------- saving


def save(job, config, engine, writer, progress: Progress, guard: Guard, extra: dict, at_once: bool):
    """
    Write a checkpoint; returns False if that failed at once. All ranks gather the tensors.

    A disk that refuses costs a warning, not the run. extra: further JSON values of the state.
    """
    tensors, numbers = engine.state()
    gathered = {
        job.weights_file: engine.whole(job.weights(job.model)),
        OPTIMIZER_FILE: engine.whole(tensors),
    }
    if engine.ranks.rank != 0:
        for pairs in gathered.values():
            list(pairs)  # this rank's part in gathering, in the same order
        return True
    state = {"family": job.family, "weights_file": job.weights_file, **progress.state(guard)}
    state |= {**extra, **numbers, "optimizer_tensors": sorted(tensors)}
    state |= {"config": asdict(config), **job.facts}
    keep = [progress.best["step"]] if progress.best else []
    return writer.save(
        Path(config.output_dir),
        progress.step,
        gathered,
        copy.deepcopy(state),  # the training changes it while a thread writes
        job.files,
        config.keep_last,
        keep,
        job.checkpoint_name,
        at_once=at_once,
    )


class Saves:
    """
    The checkpoints of this attempt. All ranks make one and call the same methods.

    step: of the newest one that is written, or is being written; due: the next one is due by the
    clock; failed: the last one of all could not be written. A save that the disk refuses is tried
    again every minute with the newest state, the last one for --save_retry_minutes; a run that
    cannot save for --max_unsaved_minutes is stopped.
    """

    def __init__(self, job, config, engine, outputs, progress: Progress):
        self.job, self.config, self.engine, self.outputs = job, config, engine, outputs
        self.ranks, self.writer = engine.ranks, outputs.writer
        self.step = progress.step
        self.best = progress.best  # as the newest checkpoint has it
        self.due = self.failed = self.gave_up = False
        self.tried = time.monotonic()

    def pending(self) -> dict[str, float]:
        """{"save", "give_up"} by the clock and the disk of rank 0, for the exchange of the step."""
        if self.ranks.rank != 0:
            return {"save": False, "give_up": False}
        config, now = self.config, time.monotonic()
        save = now - self.tried > 60 * config.save_ckpt_minutes
        since, give_up = self.writer.failing_since, False
        if since is not None and not self.writer.busy:
            save = save or (config.save_retry_minutes and now - self.tried > RETRY_S)
            limit_s = 60 * config.max_unsaved_minutes
            give_up = limit_s > 0 and now - since > limit_s
        return {"save": bool(save), "give_up": give_up}

    def agree(self, everyone: list[dict], requests: Requests) -> None:
        """Take over what rank 0 asks for; `everyone` is `pending` of all ranks, gathered."""
        self.due = any(rank["save"] for rank in everyone)
        if any(rank["give_up"] for rank in everyone):
            self.gave_up = requests.stop = True
            minutes = self.config.max_unsaved_minutes
            self.ranks.say(f"nothing could be saved for {minutes:g} minutes: the run stops")

    def save_step(
        self, progress: Progress, guard: Guard, record: dict, requests: Requests, last: bool
    ) -> None:
        """
        Write a checkpoint of this step unless there is one; consider it for the best, by `record`.

        If it is the last of this attempt (`last`, or a stop is requested), it is on the disk
        afterwards, or `failed` is true. Ranks exchange.
        """
        at_once = last or requests.stop
        if at_once or self.step != progress.step:
            self._settle(progress)
        progress.consider_best(record)
        if self.step == progress.step:
            return
        self.step = progress.step
        failed = self._attempt(progress, guard, at_once)
        if not at_once:
            return  # pending() sees whether it could be written
        self.failed = self.ranks.any(failed)
        if self.failed and self.config.save_retry_minutes and not self.gave_up:
            self._keep_trying(progress, guard)

    def _attempt(self, progress: Progress, guard: Guard, at_once: bool) -> bool:
        """Whether a save failed. All ranks gather the tensors."""
        self.outputs.flush()
        extra = {"wandb_id": self.outputs.wandb_id}
        self.tried, self.due = time.monotonic(), False
        job, config, engine = self.job, self.config, self.engine
        return not save(job, config, engine, self.writer, progress, guard, extra, at_once)

    def _settle(self, progress: Progress) -> None:
        """Wait for a checkpoint that is being written, and forget it if the disk refused it."""
        self.writer.wait()
        if self.ranks.any(self.writer.failing_since is not None):
            self.step, progress.best = None, self.best
        else:
            self.best = progress.best

    def _keep_trying(self, progress: Progress, guard: Guard) -> None:
        """Repeat the last save until it succeeds, the time is over or a signal arrives."""
        minutes, master = self.config.save_retry_minutes, self.ranks.rank == 0
        ends = time.monotonic() + 60 * minutes
        self.ranks.say(
            f"waiting for space in {self.config.output_dir}: the last step is saved as soon as "
            f"possible, in the next {minutes:g} minutes; Ctrl-C or SIGTERM ends the wait"
        )
        time.sleep(POLL_S)  # in which a signal is still the one that stopped the run, passed on
        with StopRequest() as enough:
            while self.failed:
                time.sleep(POLL_S)
                now = time.monotonic()
                over = master and now > ends
                retry = over or (master and now - self.tried > RETRY_S)
                mine = {"over": over, "retry": retry, "enough": bool(enough)}
                everyone = self.ranks.gather(mine)
                if any(rank["enough"] for rank in everyone):
                    return
                if everyone[0]["retry"]:
                    self.failed = self.ranks.any(self._attempt(progress, guard, at_once=True))
                if everyone[0]["over"]:
                    return


# --------------------------------------------------------------------------------- resuming


def open_run(job, config, ranks, begin_afresh) -> tuple[dict, dict | None]:
    """
    (state, tensors) of the checkpoint to resume, ({}, {}) to begin; other ranks get no tensors.

    begin_afresh: as check_start returned it. Raises ValueError if there is too little memory or
    disk, or the checkpoint does not fit. Ranks exchange.
    """
    run_dir, afresh = Path(config.output_dir), config.resume == "never"
    state = tensors = None
    with ranks.agree():
        if config.cpu_offload:
            n_weights = [p.numel() for p in job.model.parameters()]
            need = offloaded_bytes(n_weights, ranks.world, ranks.device.type == "cuda")
            need *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            what = "weights, gradients and two moments of this machine's ranks"
            enough_memory(need, what, "--cpu_offload")
        if ranks.rank == 0:
            n_bytes = checkpoint_bytes(job, config)
            run_folder.enough_disk(run_dir, n_bytes, config.keep_last, afresh)
            if afresh:
                begin_afresh()
            state = tensors = {}
            if found := find_checkpoint(config, run_dir, job.checkpoint_name):
                state, tensors = read_checkpoint(found, job)
    return ranks.share(state), tensors


def is_inside(folder, run_dir: Path) -> bool:
    """Whether a checkpoint folder belongs to this run."""
    return Path(folder).resolve().is_relative_to(run_dir.resolve())


def find_checkpoint(config, run_dir: Path, name: str) -> Path | None:
    """The checkpoint folder to resume, None to begin. Raises FileNotFoundError or ValueError."""
    own = None
    if checkpoint.list_checkpoints(run_dir, name):
        own = checkpoint.newest_checkpoint(run_dir, name)
    path = path_to_resume(config)
    if path is None:
        return own
    wanted = checkpoint.newest_checkpoint(path)
    if own and own.resolve() != wanted.resolve():  # so that the same command resumes after a stop
        print(
            f"{run_dir} has checkpoints of its own: resuming from there, not from "
            f"--resume {path}; to resume that one, give another --run_name",
            flush=True,
        )
    return own or wanted


def path_to_resume(config) -> Path | None:
    """The path that --resume names; None for auto and never. Raises FileNotFoundError."""
    if config.resume in ("auto", "never"):
        return None
    path = Path(config.resume)
    if not path.exists():
        raise FileNotFoundError(
            f"--resume: {path} does not exist; give a run folder or a checkpoint folder, "
            "or leave it out"
        )
    return path


def check_state(folder: Path, state: dict, job) -> None:
    """
    Raises ValueError if the state of a checkpoint is of another family, model or tokenizer.

    The vocabulary of a draft (see start.py) whose tokenizer is not known is not compared.
    """
    family = state.get("family") or SCRIPTS.get(state.get("script"))
    if family is None:
        raise ValueError(
            f"{folder}: written by {state.get('script', 'another program')}, which keeps no "
            "optimizer state; choose another --run_name"
        )
    if family != job.family:
        raise ValueError(
            f"{folder}: holds a model of the family {family!r}, this run trains {job.family!r}; "
            "choose another --run_name"
        )
    try:
        step = checkpoint.step_of(folder, job.checkpoint_name)
    except ValueError:
        step = state["step"]  # a copy under a name of the user's own
    if step != state["step"]:
        raise ValueError(
            f"{folder}: holds step {state['step']}, its name says otherwise; it is damaged, "
            "use another checkpoint"
        )
    now, then = job.facts["model_config"], state["model_config"]
    # an older version knew fewer settings; the shapes of the weights are compared below
    tokenizer = job.facts["tokenizer"]
    names = sorted({*then} - ({"dropout"} if tokenizer else {"dropout", "vocab_size"}))
    differs = [f"{n} {then[n]} then, {now.get(n)} now" for n in names if then[n] != now.get(n)]
    if differs:
        raise ValueError(
            f"{folder}: is of another model ({'; '.join(differs)}); "
            "give the same model flags, or another --run_name"
        )
    if tokenizer and state["tokenizer"] != tokenizer:
        raise ValueError(
            f"{folder}: was trained with another --tokenizer, whose ids mean other text; "
            "give the same one, or another --run_name"
        )
    for name in sorted({*job.facts} - {"model_config", "tokenizer", "data"}):
        if state.get(name) != job.facts[name]:
            then, now = (one_line(value, 60) for value in (state.get(name), job.facts[name]))
            raise ValueError(
                f"{folder}: is of another {name} ({then} then, {now} now); "
                "give the same one, or another --run_name"
            )


def read_checkpoint(folder: Path, job) -> tuple[dict, dict]:
    """
    (state, tensors of model and optimizer) of a verified checkpoint of the same job.

    Raises ValueError if it is of another family, model, tokenizer or row length, or if a weight is
    missing, unknown or of another shape.
    """
    weights, state = checkpoint.load_checkpoint(folder)
    check_state(folder, state, job)
    own = job.weights(job.model)
    check_names(folder / job.weights_file, set(weights), set(own), "model")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{folder / job.weights_file}: {name} has shape {list(tensor.shape)}, "
                f"the model has {list(own[name].shape)}; choose another --run_name"
            )
    tensors = {**weights, **checkpoint.load_tensors(folder / OPTIMIZER_FILE)}
    return {**state, "folder": str(folder)}, tensors


def check_names(file, found: set, wanted: set, owner: str) -> None:
    """Raises ValueError naming the tensors that a file lacks, or has beyond those of its owner."""
    for names, what in ((wanted - found, "lacks"), (found - wanted, "has")):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            but = "which this run needs"
            if what == "has":
                but = f"which this run's {owner} does not have"
            raise ValueError(
                f"{file}: {what} {shown}, {but}; the checkpoint is damaged or of another run, "
                "use another one"
            )


def keeps_optimizer(state: dict, config) -> bool:
    """Whether a checkpoint's optimizer state fits the optimizer of this attempt."""
    return all(
        state["config"][name] == getattr(config, name) for name in ("optimizer", "galore_rank")
    )


def restore(state: dict, tensors: dict | None, job, config, engine, guard: Guard) -> None:
    """
    Put model, optimizer, loss scale, data cursor and guard where a checkpoint has them.

    All ranks take part; only rank 0 has the tensors, which are released. Raises ValueError on all
    ranks if the rows had another length, or an optimizer tensor is missing or unknown.
    """
    weights = job.weights(job.model)
    with_optimizer = keeps_optimizer(state, config)
    with engine.ranks.agree():
        # an older version did not save the length of the rows: that of the GPT's context
        cursor = {"tokens_per_row": state["config"].get("context_length"), **state["data_cursor"]}
        try:
            job.train_batches.load_state_dict(cursor)
        except ValueError as e:
            raise ValueError(f"{state['folder']}: {e}") from e
        if "guard" in state:  # older checkpoints have none
            guard.load_state_dict(state["guard"])
        if tensors is not None and with_optimizer:
            found = set(tensors) - set(weights)
            # an older version kept no list of the names
            wanted = set(state.get("optimizer_tensors", found)) - engine.unknown(found)
            check_names(Path(state["folder"]) / OPTIMIZER_FILE, found, wanted, "optimizer")
    if not with_optimizer:
        engine.ranks.say(
            "another --optimizer or --galore_rank than before: the optimizer's state starts anew"
        )
    engine.load(weights, tensors, state, with_optimizer)
    if tensors:
        tensors.clear()  # as much memory as weights and optimizer state


def last_good(run_dir: Path, job, why: str, rolled_back_to: int | None, ranks) -> tuple:
    """
    (state, tensors) of the newest checkpoint without a bad step before it; tensors on rank 0 only.

    rolled_back_to: step of an earlier roll-back. Raises RuntimeError if there is no such
    checkpoint, or if it is the one of the earlier roll-back, which did not help.
    """
    state, tensors = None, None
    if ranks.rank == 0:
        for folder in reversed(checkpoint.list_checkpoints(run_dir, job.checkpoint_name)):
            with contextlib.suppress(ValueError):
                checkpoint.verify_checkpoint(folder)
                found, tensors_found = read_checkpoint(folder, job)
                if not found.get("guard", {"bad": 0})["bad"]:
                    state, tensors = found, tensors_found
                    break
        if tensors is None:
            raise RuntimeError(
                f"{run_dir}: {why}, and there is no checkpoint to roll back to; "
                "begin again with a lower --max_lr"
            )
        if state["step"] == rolled_back_to:
            raise RuntimeError(
                f"{run_dir}: {why}, again since step {rolled_back_to}; "
                "resume from there with a lower --max_lr"
            )
    return state, tensors
