"""
See it learn: a page in the browser that follows runs, trains small ones, looks into checkpoints and reckons what a size costs.

    marimo run notebook.py           # the page, in the browser
    marimo edit notebook.py          # the same page with its code, to change it
    python notebook.py               # all cells from top to bottom without a page: does everything work here?

It looks for runs in ./runs, and makes a tiny one there (runs/notebook-first, less than a minute on two CPU cores) where there is none.
Training is always pretraining_advanced.py in a process of its own, and what is drawn comes from the functions that trainers use.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="See it learn")

with app.setup:
    import contextlib
    import json
    import os
    import signal
    import subprocess
    import sys
    from functools import lru_cache
    from pathlib import Path

    import marimo as mo
    import numpy as np
    import torch

    import gpt_train
    from gpt_train import SIZES, GPTConfig
    from parts.base.files import write_file
    from parts.base.units import format_duration
    from parts.cli.launch import BAD_INPUT, error_line
    from parts.data.corpus import python_docs
    from parts.report import figures, interpret
    from parts.storage.checkpoint import list_checkpoints
    from parts.training.metrics import PEAK_FLOPS, read_metrics
    from parts.training.optim import learning_rate
    from parts.training.plan import Setting, count_parameters, flops_per_token, memory_of

    TRAINER = Path(gpt_train.__file__).with_name("pretraining_advanced.py")
    RUNS = Path("runs")
    SCHEDULES = ["cosine", "linear", "constant", "wsd"]
    MEASURED = "this one, as the first chosen run has measured"


@app.function
def or_why_not(make):
    """What make() gives to look at; where it cannot, the reason in a sentence, so that the page goes on working."""
    try:
        return make()
    except (*BAD_INPUT, OSError, RuntimeError, MemoryError) as e:
        return mo.callout(mo.Html(figures.paragraph(error_line(e))), kind="warn")


@app.function
def runs_in(folder) -> list[str]:
    """Names of the run folders in `folder`, those with the newest record first. Raises ValueError where there is none."""
    found = [
        p
        for p in Path(folder).glob("*")
        if any((p / name).exists() for name in ("metrics.jsonl", "run.json", "checkpoints"))
    ]
    if not found:
        raise ValueError(
            f"{folder}: no run here; train one (python pretraining_simple.py), or name another folder"
        )
    newest = {p: max(f.stat().st_mtime for f in (p, *p.glob("metrics.jsonl"))) for p in found}
    return [p.name for p in sorted(found, key=lambda p: -newest[p])]


@app.function
def signature(folder) -> tuple[tuple, tuple]:
    """Two values: another first one as soon as there is another run or checkpoint in `folder`, another second one with each record."""
    runs = sorted(Path(folder).glob("*"))
    facts = [
        (str(f), f.stat().st_mtime_ns)
        for p in runs
        for f in (p / "metrics.jsonl", p / "samples.txt")
        if f.exists()
    ]
    return tuple(str(f) for p in runs for f in (p, *list_checkpoints(p))), tuple(facts)


@app.function
def read_runs(folder, names, axis: str) -> tuple[dict, list[str]]:
    """({name: columns}, sentences about those that cannot be drawn against this axis); see parts/report/figures.py."""
    runs, said = {}, []
    for name in names:
        try:
            run = figures.columns(read_metrics(Path(folder) / name))
            figures.place(run, axis)
            runs[name] = run
        except (OSError, ValueError) as e:
            said.append(f"{name}: {error_line(e)}")
    return runs, said


@app.function
def small_run(
    max_lr=4e-3, warmup=20, batch=16, width=64, depth=2, schedule="cosine", steps=300
) -> tuple[Path, list]:
    """(run folder, flags of pretraining_advanced.py) of a small training; the same settings are the same run, which goes on."""
    name = f"notebook-lr{max_lr:g}-warmup{warmup}-batch{batch}-{depth}x{width}-{schedule}-{steps}"
    return RUNS / name, [
        *(
            "--model_size",
            "nano",
            "--n_layer",
            depth,
            "--n_embd",
            width,
            "--n_head",
            max(1, width // 32),
            "--context_length",
            64,
        ),
        *(
            "--max_lr",
            max_lr,
            "--warmup_steps",
            warmup,
            "--schedule",
            schedule,
            "--max_steps",
            steps,
            "--batch_size",
            batch,
        ),
        *(
            "--eval_freq",
            max(1, steps // 10),
            "--print_sample_iter",
            max(1, steps // 5),
            "--save_ckpt_freq",
            steps,
        ),
        *("--eval_tokens", 8192, "--val_share", 0.05, "--tokenizer", "bpe:1024", "--device", "cpu"),
    ]


@app.function
def small_corpus() -> Path:
    """What small runs read: the books in ./gutenberg_preprocessed, else the English that Python carries, as a file beside the runs."""
    if ((books := Path("gutenberg_preprocessed")) / "report.json").exists():
        return books
    path = RUNS / "notebook-text" / "python.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, "\n<|endoftext|>\n".join(python_docs()).encode())
    return path


@app.class_definition
class Training:
    """pretraining_advanced.py at work in a process of its own: how far it is, how it ended."""

    def __init__(self, run_dir: Path, flags: list):
        text, self.run_dir, self.max_steps = (
            small_corpus(),
            run_dir,
            flags[flags.index("--max_steps") + 1],
        )
        flags = [
            *flags,
            "--dataset_name",
            text,
            "--cache_dir",
            RUNS / "notebook-text",
            "--output_dir",
            run_dir,
        ]
        line = [sys.executable, str(TRAINER), *map(str, flags)]
        one_thread = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
        }  # small products gain nothing from more, and several may train at a time
        self.log = RUNS / "notebook-text" / f"{run_dir.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=one_thread
            )

    def stop(self) -> None:
        """Ask it to save and end, if it has not ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def told(self) -> tuple[int, str]:
        """(its last step, how far it is or how it ended in a line)."""
        step = max((record["step"] for record in read_metrics(self.run_dir)), default=0)
        code, where = self.process.poll(), f"step {step:,} of {self.max_steps:,}"
        if code is None:
            return step, where if step else "starting: reads the text and builds the model"
        if code in (0, 75, 130, -signal.SIGTERM):
            return (
                step,
                f"finished, {where}"
                if code == 0
                else f"stopped at {where}; the same settings go on from there",
            )
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return step, next(
            (line for line in reversed(lines) if line.startswith("error:")),
            f"ended with code {code}, see {self.log}",
        )


@app.function
@lru_cache(maxsize=2)
def load(path: str, stamp: tuple):
    """(model, tokenizer, state) of a run or checkpoint folder, on the CPU; another `stamp` when its files have changed."""
    return gpt_train.load_model(path, torch.device("cpu"))


@app.function
def reached(folder: Path, names) -> float:
    """FLOP/s that the first of these runs has reached by its own records. Raises ValueError where they do not tell."""
    if not names:
        raise ValueError(
            "no run is chosen above; choose one whose speed is to be used, or a device"
        )
    try:
        config = GPTConfig(
            **json.loads((folder / names[0] / "run.json").read_text(encoding="utf-8"))[
                "model_config"
            ]
        )
        return flops_per_token(config) * float(
            np.nanmedian(read_runs(folder, names[:1], "time")[0][names[0]]["tokens_per_s"])
        )
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"{names[0]}: does not tell how fast it was ({error_line(e)}); choose another run, or a device"
        ) from e


@app.cell
def _():
    trainings, memory = (
        {},
        {},
    )  # {name of the run: Training}; what was chosen, for when a control is made anew

    def _first():
        try:
            runs_in(RUNS)
        except ValueError:
            trainings["notebook-first"] = Training(RUNS / "notebook-first", small_run(steps=200)[1])
            if mo.app_meta().mode == "script":  # nobody looks again later
                trainings["notebook-first"].process.wait()
            return mo.md(
                f"There was no run in `{RUNS}`: a tiny one is trained now, `runs/notebook-first`, in less than a minute."
            )

    _what = """# See it learn
    What runs write to disk, drawn while they go on; small models, trained with settings of your choice; what goes on inside a
    checkpoint; and what a size costs. Where something is missing or damaged, a sentence in a box says so."""
    mo.vstack([mo.md(_what), or_why_not(_first) or mo.md("")])
    return memory, trainings


@app.cell
def _():
    folder = mo.ui.text(value=str(RUNS), label="folder with runs")
    axis = mo.ui.radio(["steps", "tokens", "time"], value="steps", inline=True, label="against")
    n_smooth = mo.ui.slider(
        steps=[1, 3, 10, 30, 100], value=10, show_value=True, label="smoothed over steps"
    )
    refresh = mo.ui.refresh(
        options=["1s", "2s", "10s", "1m"], default_interval="2s", label="look again every"
    )
    get_names, set_names = mo.state(())
    get_records, set_records = mo.state(())
    mo.vstack(
        [
            mo.md("## 1. Training dynamics"),
            mo.hstack([folder, refresh, axis, n_smooth], justify="start", gap=2, wrap=True),
        ]
    )
    return axis, folder, get_names, get_records, n_smooth, refresh, set_names, set_records


@app.cell
def _(folder, get_names, get_records, refresh, set_names, set_records, trainings):
    _ = refresh.value  # what hangs on the two states is drawn anew only when something has changed
    with contextlib.suppress(
        OSError, ValueError
    ):  # a folder that is being moved, a name that cannot be; the next look finds it
        _names, _records = zip(*[signature(f) for f in (folder.value, RUNS)], strict=True)
        if _names != get_names():
            set_names(_names)
        if (
            _records := (_records, [t.process.poll() for t in trainings.values()])
        ) != get_records():
            set_records(_records)
    return


@app.cell
def _(folder, get_names, memory):
    get_names()
    _found = or_why_not(lambda: runs_in(folder.value))
    names = _found if isinstance(_found, list) else []
    _value = [n for n in memory.get("runs", names[:1]) if n in names]
    chosen = mo.ui.multiselect(
        names, value=_value, label="runs", on_change=lambda v: memory.update(runs=v)
    )
    mo.vstack([chosen if names else _found])
    return chosen, names


@app.cell
def _(chosen, folder, get_records, memory):
    get_records()
    _files = {n: Path(folder.value) / n / "samples.txt" for n in chosen.value}
    samples = {
        n: figures.samples_of(f.read_text(encoding="utf-8", errors="replace"))
        for n, f in _files.items()
        if f.is_file()
    }
    _steps = sorted({step for texts in samples.values() for step in texts}) or [0]
    _value = (
        memory.get("step") if memory.get("step") in _steps[:-1] else _steps[-1]
    )  # at the end it follows the run
    at_step = mo.ui.slider(
        steps=_steps,
        value=_value,
        show_value=True,
        label="step",
        on_change=lambda v: memory.update(step=v),
    )
    return at_step, samples


@app.cell
def _(at_step, axis, chosen, folder, get_records, n_smooth, samples):
    get_records()

    def _curves():
        runs, said = read_runs(folder.value, chosen.value, axis.value)
        boxes = [mo.callout(mo.Html(figures.paragraph(line)), kind="warn") for line in said]
        if not runs:
            return mo.vstack(boxes or [mo.md("*Choose a run above.*")])
        whole = figures.draw_runs(runs, axis.value, n_smooth.value)
        loss = figures.draw_runs(
            runs, axis.value, n_smooth.value, ["train_loss"], mark=at_step.value
        )
        texts = [
            f"{n}: {samples[n].get(at_step.value, '(nothing at this step)')}"
            for n in runs
            if n in samples
        ]
        written = [
            mo.md("**What was written** at the step of the dotted line"),
            at_step,
            *map(mo.Html, map(figures.paragraph, texts)),
        ]
        beside = mo.hstack(
            [mo.Html(figures.as_html(loss, "loss and step of the samples")), mo.vstack(written)],
            widths=[1, 1],
        )
        return mo.vstack(
            [*boxes, mo.Html(figures.as_html(whole, "curves of the chosen runs")), beside]
        )

    mo.vstack([or_why_not(_curves)])
    return


@app.cell
def _():
    # one by one: of a mo.ui.dictionary whose controls are moved while the page is at work, marimo keeps the last move only
    max_lr = mo.ui.slider(
        steps=[1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 1e-2, 0.1],
        value=4e-3,
        show_value=True,
        label="learning rate",
    )
    warmup = mo.ui.slider(0, 200, 10, value=20, show_value=True, label="warmup (steps)")
    batch = mo.ui.slider(
        steps=[1, 2, 4, 8, 16, 32, 64], value=16, show_value=True, label="batch (rows of 64 tokens)"
    )
    width = mo.ui.slider(32, 256, 32, value=64, show_value=True, label="width")
    depth = mo.ui.slider(1, 8, value=2, show_value=True, label="depth (blocks)")
    schedule = mo.ui.dropdown(SCHEDULES, value="cosine", label="schedule")
    steps = mo.ui.slider(50, 1000, 50, value=300, show_value=True, label="length (steps)")
    train_button, stop_button = (
        mo.ui.run_button(label="train it", kind="success"),
        mo.ui.run_button(label="stop", kind="warn"),
    )
    return batch, depth, max_lr, schedule, steps, stop_button, train_button, warmup, width


@app.cell
def _(batch, depth, max_lr, schedule, steps, stop_button, train_button, warmup, width):
    _sliders = {
        "max_lr": max_lr,
        "warmup": warmup,
        "batch": batch,
        "width": width,
        "depth": depth,
        "schedule": schedule,
        "steps": steps,
    }
    settings = {name: control.value for name, control in _sliders.items()}
    _at = range(steps.value)
    _lr = {
        k: [
            learning_rate(i, k, max_lr.value, max_lr.value / 10, warmup.value, steps.value)
            for i in _at
        ]
        for k in SCHEDULES
    }
    _figure = figures.draw_lines(
        {k: (_at, y) for k, y in _lr.items()}, schedule.value, "optimizer steps", "learning rate"
    )
    _controls = mo.vstack(
        [*_sliders.values(), mo.hstack([train_button, stop_button], justify="start")]
    )
    _schedule = mo.Html(figures.as_html(_figure, "learning rate over the steps"))
    mo.vstack([mo.md("## 2. Hyperparameters"), mo.hstack([_controls, _schedule], widths=[1, 1])])
    return (settings,)


@app.cell
def _(settings, stop_button, train_button, trainings):
    def _start():
        run_dir, flags = small_run(**settings)
        if run_dir.name not in trainings or trainings[run_dir.name].process.poll() is not None:
            trainings[run_dir.name] = Training(run_dir, flags)

    for _training in trainings.values() if stop_button.value else ():
        _training.stop()
    started = or_why_not(_start) if train_button.value else None
    mo.vstack([started or mo.md("")])
    return (started,)


@app.cell
def _(get_records, started, trainings):
    _ = get_records(), started

    def _overlay():
        runs, _ = read_runs(
            RUNS, [name for name in runs_in(RUNS) if name.startswith("notebook-")][:10], "steps"
        )
        if not runs:
            return mo.md("*No small run has been trained yet.*")
        return mo.Html(
            figures.as_html(
                figures.draw_runs(runs, "steps", 10, ["train_loss", "val_loss"]),
                "losses of the small runs",
            )
        )

    _bars = mo.Html(
        "".join(figures.progress(name, t.max_steps, *t.told()) for name, t in trainings.items())
    )
    mo.vstack([_bars, or_why_not(_overlay)])
    return


@app.cell
def _(folder, get_names, memory, names):
    get_names()
    _folders = [
        f
        for n in names
        if (_own := list_checkpoints(Path(folder.value) / n))
        for f in (Path(folder.value) / n, *_own)
    ]
    _options = {str(f.relative_to(folder.value)): str(f) for f in _folders}
    _value = (
        memory["picked"]
        if memory.get("picked") in _options.values()
        else next(iter(_options.values()), None)
    )
    _label = {path: label for label, path in _options.items()}.get(_value)
    picked = mo.ui.dropdown(
        _options, value=_label, label="checkpoint", on_change=lambda v: memory.update(picked=v)
    )
    elsewhere = mo.ui.text(label="or a folder elsewhere", placeholder="runs/simple")
    return elsewhere, picked


@app.cell
def _(elsewhere, picked):
    def _load():
        if not (path := elsewhere.value or picked.value):
            raise FileNotFoundError(
                "there is no checkpoint yet; a run writes one when it ends or is stopped"
            )
        manifests = [
            f
            for pattern in ("MANIFEST.json", "checkpoints/*/MANIFEST.json")
            for f in sorted(Path(path).glob(pattern))
        ]
        return load(path, tuple((str(f), f.stat().st_mtime_ns) for f in manifests))

    _found = or_why_not(_load)
    model, tokenizer, _state = _found if isinstance(_found, tuple) else (None, None, None)
    _told = model and mo.md(
        f"step {_state['step']:,}, {count_parameters(model.config):,} parameters, tokenizer {tokenizer.name}"
    )
    mo.vstack(
        [
            mo.md("## 3. What the model does"),
            mo.hstack([picked, elsewhere], justify="start"),
            _told or _found,
        ]
    )
    return model, tokenizer


@app.cell
def _():
    prompt = mo.ui.text_area(
        "The first argument is the name of the",
        debounce=150,
        rows=2,
        label="text, read as you type",
        full_width=True,
    )
    passage = mo.ui.text_area(
        "If the file does not exist, an error is raised. My aunt keeps three parrots.",
        rows=4,
        full_width=True,
    )
    opening = mo.ui.text("The value", label="opening")
    temperature = mo.ui.slider(0, 2, 0.1, value=0.8, show_value=True, label="temperature")
    top_k = mo.ui.slider(
        steps=[1, 2, 5, 10, 20, 50, 100, 200], value=20, show_value=True, label="top-k"
    )
    top_p = mo.ui.slider(0.05, 1, 0.05, value=0.9, show_value=True, label="top-p")
    seed = mo.ui.slider(0, 20, value=0, show_value=True, label="seed")
    return opening, passage, prompt, seed, temperature, top_k, top_p


@app.cell
def _(model):
    mo.stop(model is None)
    layer = mo.ui.slider(
        0, model.config.n_layer - 1, value=model.config.n_layer - 1, show_value=True, label="layer"
    )
    head = mo.ui.slider(0, model.config.n_head - 1, value=0, show_value=True, label="head")
    return head, layer


@app.cell
def _(head, layer, model, prompt, tokenizer):
    def _inside():
        ids, note = interpret.ids_of(prompt.value, tokenizer, model.config.block_size, last=True)
        probabilities, best = (
            interpret.logit_lens(model, ids, tokenizer.vocab_size).exp().topk(6)
        )  # (L + 1, 6) each
        places = ["embedding", *(f"layer {i}" for i in range(model.config.n_layer))]
        lens = [
            [place, *(interpret.shown(tokenizer, i) for i in row)]
            for place, row in zip(places, best.tolist(), strict=True)
        ]
        likely = [
            (token, f"{p:.1%}")
            for token, p in zip(lens[-1][1:], probabilities[-1].tolist(), strict=True)
        ]
        near = zip(*interpret.neighbours(model, int(ids[-1]), 6, tokenizer.vocab_size), strict=True)
        tables = [
            figures.table(
                ["next token", "probability"], likely, lambda i, j: j * probabilities[-1, i]
            ),
            figures.table(
                ["if it ended at", "likeliest", *"23456"],
                lens,
                lambda i, j: probabilities[i, j - 1] if j else 0,
            ),
            figures.table(
                ["near the last token", "cosine"],
                [(interpret.shown(tokenizer, i), f"{cosine:.2f}") for i, cosine in near],
            ),
        ]
        tokens, maps = (
            [interpret.shown(tokenizer, i) for i in ids.tolist()],
            interpret.attention_maps(model, ids, layer.value).numpy(),
        )
        attention = figures.as_html(
            figures.draw_attention(maps, tokens, layer.value, head.value), "attention of the heads"
        )
        beside = mo.hstack(map(mo.Html, tables), justify="start", align="start", gap=2, wrap=True)
        return mo.vstack(
            [mo.md(note), beside, mo.hstack([layer, head], justify="start"), mo.Html(attention)]
        )

    mo.vstack(
        [mo.md("**Next token, logit lens, neighbours, attention**"), prompt, or_why_not(_inside)]
    )
    return


@app.cell
def _(model, passage, tokenizer):
    def _surprise():
        ids, note = interpret.ids_of(passage.value, tokenizer, model.config.block_size, last=False)
        losses = interpret.token_losses(model, ids).tolist()
        pieces = [
            (tokenizer.decode([i]), interpret.shown(tokenizer, i), x)
            for i, x in zip(ids[1:].tolist(), losses, strict=True)
        ]
        mean = f"{len(losses)} tokens, {np.mean(losses or [0]):.2f} nats each in the mean. {note}"
        return mo.vstack([mo.Html(figures.surprise(pieces)), mo.md(mean)])

    mo.stop(model is None)
    mo.vstack(
        [
            mo.md("**Surprise**: the redder a token, the higher its loss; the pointer tells it"),
            passage,
            or_why_not(_surprise),
        ]
    )
    return


@app.cell
def _(model, opening, seed, temperature, tokenizer, top_k, top_p):
    def _side_by_side():
        t, k, p, cpu = (
            temperature.value,
            min(top_k.value, tokenizer.vocab_size),
            top_p.value,
            torch.device("cpu"),
        )
        ways = {"temperature 0": (0, None, None), f"temperature {t:g}": (t, None, None)}
        ways |= {f"{t:g} and top-k {k}": (t, k, None), f"{t:g} and top-p {p:g}": (t, None, p)}
        options = [
            dict(zip(("temperature", "top_k", "top_p"), way, strict=True)) | {"seed": seed.value}
            for way in ways.values()
        ]
        texts = [
            gpt_train.sample_text(model, tokenizer, cpu, opening.value, 1, 50, **o)[0]
            for o in options
        ]
        written = [mo.Html(figures.paragraph(opening.value + text)) for text in texts]
        return mo.hstack(
            [mo.vstack([mo.md(f"*{w}*"), text]) for w, text in zip(ways, written, strict=True)],
            widths="equal",
            gap=2,
        )

    mo.stop(model is None)
    _controls = mo.hstack([opening, temperature, top_k, top_p, seed], justify="start", wrap=True)
    mo.vstack([mo.md("**Sampling**"), _controls, or_why_not(_side_by_side)])
    return


@app.cell
def _():
    size = mo.ui.dropdown(list(SIZES), value="124M", label="size")
    vocabulary = mo.ui.slider(
        steps=[257, 1024, 4096, 16384, 50257, 131072],
        value=50257,
        show_value=True,
        label="vocabulary (tokens)",
    )
    context = mo.ui.slider(
        steps=[2**i for i in range(6, 14)], value=1024, show_value=True, label="context (tokens)"
    )
    ratio = mo.ui.slider(
        steps=[1, 5, 10, 20, 50, 100, 500],
        value=20,
        show_value=True,
        label="training tokens per parameter",
    )
    device = mo.ui.dropdown([MEASURED, *PEAK_FLOPS], value="H100", label="device")
    share = mo.ui.slider(5, 70, 5, value=40, show_value=True, label="of its peak (%)")
    dtype = mo.ui.dropdown(["fp32", "bf16", "fp16"], value="bf16", label="products in")
    optimizer = mo.ui.dropdown(["adamw", "galore", "muon"], value="adamw", label="optimizer")
    recompute = mo.ui.switch(label="activation checkpointing")
    return context, device, dtype, optimizer, ratio, recompute, share, size, vocabulary


@app.cell
def _(chosen, context, device, dtype, folder, optimizer, ratio, recompute, share, size, vocabulary):
    def _costs():
        rate = (
            reached(Path(folder.value), chosen.value)
            if device.value == MEASURED
            else PEAK_FLOPS[device.value] * share.value / 100
        )
        configs = {
            name: GPTConfig.of_size(name, vocab_size=vocabulary.value, block_size=context.value)
            for name in SIZES
        }
        rows = []
        for name, config in configs.items():
            n, each = count_parameters(config), flops_per_token(config)
            rows.append(
                (
                    name,
                    f"{n:,}",
                    f"{each:.2e}",
                    f"{ratio.value * n:.1e}",
                    format_duration(ratio.value * n * each / rate),
                )
            )
        head = ["size", "parameters", "FLOPs per token", "tokens", f"time at {rate:.2g} FLOP/s"]
        kept = {
            "dtype": dtype.value,
            "optimizer": optimizer.value,
            "activation_checkpointing": recompute.value,
        }
        kept["device"] = "cpu" if device.value == MEASURED else "cuda"
        parts = {
            b: memory_of(configs[size.value], Setting(b, **kept)) for b in (1, 2, 4, 8, 16, 32, 64)
        }
        named = {f"micro-batch {b}, at most {p['peak'] / 1e9:.3g} GB": p for b, p in parts.items()}
        bars = {
            name: {part: n / 1e9 for part, n in p.items() if part != "peak"}
            for name, p in named.items()
        }
        figure = figures.draw_bars(
            bars, "memory by part while training (GB); not all of it at one moment"
        )
        table = figures.table(head, rows, lambda i, j: 0.2 * (rows[i][0] == size.value))
        return mo.vstack(
            [
                mo.Html(table),
                mo.Html(figures.as_html(figure, "memory by part for several micro-batches")),
            ]
        )

    _controls = [size, vocabulary, context, ratio, device, share, dtype, optimizer, recompute]
    _controls = mo.hstack(_controls, justify="start", gap=2, wrap=True)
    mo.vstack([mo.md("## 4. Scaling"), _controls, or_why_not(_costs)])
    return


if __name__ == "__main__":
    app.run()
