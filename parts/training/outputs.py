"""
What a run writes to its folder: run.json, metrics.jsonl, samples.txt, checkpoints, exports.

Only rank 0 writes. The other ranks make an Outputs too and call the same methods.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from dataclasses import asdict
from pathlib import Path

from parts.base.files import append_lines, make_folder, read_json, rename_durably, write_file
from parts.cli.launch import error_line, launch_facts
from parts.storage import checkpoint, run_folder
from parts.storage.writer import Writer
from parts.training.metrics import Journal
from parts.training.ranks import Ranks
from parts.training.resume import checkpoint_bytes


class Outputs:
    """
    The files of a run from `step` on, which is where it begins or resumes.

    resumed: the run folder has the checkpoint that is resumed; otherwise metrics and samples of an
    attempt without checkpoints are deleted. Raises ValueError if the folder cannot be written.
    """

    def __init__(self, job, config, ranks: Ranks, step: int, resumed: bool):
        self.job, self.ranks = job, ranks
        self.run_dir = Path(config.output_dir)
        self.master = ranks.rank == 0
        self.journal = self.wandb_id = None
        self.samples_file = self.run_dir / job.results / "samples.txt"
        self.eval_file = self.run_dir / job.eval_log if job.eval_log else None
        self.sampled = None  # step of the last sample, on rank 0
        self.samples = []  # not written yet, because the disk refused
        self.writer = Writer(checkpoint.save_checkpoint, self._not_saved)
        if not self.master:
            return
        self.wandb_id = start_run(self.run_dir, job, config, ranks)
        self.evaluations = self._read_evaluations(step) if resumed and job.eval_log else {}
        ranks.text_log = self.run_dir / job.text_log if job.text_log else None
        if not resumed:
            for path in (self.run_dir / "metrics.jsonl", self.samples_file):
                path.unlink(missing_ok=True)
        self.sampled = run_folder.trim_samples(self.samples_file, step)
        wandb = None
        if config.use_wandb:
            wandb = {"project": config.wandb_project, "name": config.run_name}
            wandb |= {"run_id": self.wandb_id, "config": asdict(config), "folder": self.run_dir}
        self.journal = Journal(self.run_dir, step, tensorboard=config.tensorboard, wandb=wandb)
        self.writer.reserve(checkpoint_bytes(job, config) + 2**20, ranks.device)

    def _not_saved(self, step: int, e: OSError) -> None:
        why = f"{e.filename}: {e.strerror}" if e.strerror else error_line(e)
        self.ranks.say(f"warning: step {step} is not saved: {why}; free some space")

    def last_record(self) -> dict:
        """The record of the step the run is at, perhaps incomplete; all ranks get rank 0's."""
        return dict(self.ranks.share(self.journal.last if self.master else None))

    def write(self, record: dict) -> None:
        """Write the record of a step, or complete the one that is there."""
        if self.master:
            self.journal.write(record)
            if self.eval_file and "val_loss" in record:
                shown = {name: v for name, v in record.items() if name.startswith("val_")}
                self.evaluations[record["step"]] = {"step": record["step"], **shown}
                self._write_evaluations()

    def _write_evaluations(self) -> None:
        """Write job.eval_log; a full disk costs a warning, not the run."""
        text = json.dumps(list(self.evaluations.values()), indent=1)
        try:
            write_file(self.eval_file, text.encode())
        except OSError as e:
            self.ranks.say(f"warning: {error_line(e)}")

    def _read_evaluations(self, step: int) -> dict[int, dict]:
        """{step: figures} of job.eval_log up to a step; a damaged file counts as none."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(self.eval_file.read_text(encoding="utf-8"))
            return {record["step"]: record for record in found if record["step"] <= step}
        return {}

    def histograms(self, step: int) -> None:
        """Distributions of parameters and gradients, to wandb."""
        if self.master:
            self.journal.histograms(step, self.job.model)

    def add_sample(self, step: int, text: str) -> None:
        """Print a sample, and append it to samples.txt."""
        if self.master:
            self.ranks.say(text.strip())
            self.samples.append(f"--- step {step}\n{text}\n")
            append_lines(self.samples_file, self.samples)
            self.sampled = step

    def rewind(self, step: int) -> None:
        """Drop records and samples of later steps."""
        if self.master:
            self.journal.rewind(step)
            self.samples.clear()
            if self.eval_file:
                self.evaluations = self._read_evaluations(step)
            self.sampled = run_folder.trim_samples(self.samples_file, step)

    def flush(self) -> None:
        """Write everything so far to the disk."""
        if self.master:
            self.journal.flush()
            if self.samples:
                append_lines(self.samples_file, self.samples)

    def close(self) -> None:
        """Finish writing checkpoints and metrics."""
        try:
            self.writer.wait()
        finally:
            if self.master:
                self.journal.close()

    def export(self, step: int, best_step: int | None) -> None:
        """
        Run job.export on the last and the best checkpoint: export/final and best, in job.results.

        Each is written under a temporary name and renamed. Raises OSError.
        """
        if not (self.master and self.job.export):
            return
        self.writer.wait()
        for name, of_step in (("final", step), ("best", best_step)):
            folder = (
                self.run_dir / "checkpoints" / self.job.checkpoint_name.format(step=of_step or 0)
            )
            if of_step is None or not folder.is_dir():
                continue
            exports = self.run_dir / self.job.results / "export"
            target, part = exports / name, exports / f".{name}.part"
            make_folder(exports)
            shutil.rmtree(part, ignore_errors=True)
            self.job.export(folder, part)
            shutil.rmtree(target, ignore_errors=True)
            rename_durably(part, target)
            self.ranks.say(f"exported step {of_step} to {target}")


def start_run(run_dir: Path, job, config, ranks: Ranks) -> str:
    """Write run.json and job.run_files; returns wandb's id, which a resumed run keeps."""
    path, wandb_id = run_dir / "run.json", secrets.token_hex(4)
    with contextlib.suppress(ValueError, KeyError):
        wandb_id = str(read_json(path)["wandb_id"])
    facts = {"config": asdict(config), "family": job.family, **job.facts}
    facts |= {"checkpoint_name": job.checkpoint_name}
    facts |= {**launch_facts(ranks.world, ranks.device), "wandb_id": wandb_id}
    try:
        write_file(path, json.dumps(facts, indent=1).encode())
        for name, data in job.run_files.items():
            write_file(run_dir / name, data)
        for path in (
            job.results,
            *(Path(log).parent for log in (job.text_log, job.eval_log) if log),
        ):
            make_folder(run_dir / path)
    except OSError as e:
        raise ValueError(f"--output_dir: {error_line(e)}; choose a writable folder") from e
    return wandb_id
