"""
A page in the browser: follow runs, train small ones, look inside a model, estimate costs.

    marimo run notebook.py     # the page
    marimo edit notebook.py    # the page and its code, to change it
    python notebook.py         # all cells from top to bottom without a page: does it work here?

Reads the runs in ./runs. If there is none, it trains a tiny one (runs/notebook-first, less than a
minute on two CPU cores). Training is always pretraining_advanced.py in a process of its own, and
the functions that draw are those of the trainers.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="See it learn")

with app.setup:
    import contextlib
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
    from parts.base.files import make_folder, read_json, write_file
    from parts.base.units import format_duration
    from parts.cli.launch import BAD_INPUT, error_line
    from parts.data.python_docs import python_docs
    from parts.model.families import FAMILIES, config_of, shape_of_size
    from parts.report import figures, interpret
    from parts.storage.checkpoint import list_checkpoints
    from parts.training.metrics import PEAK_FLOPS, read_metrics
    from parts.training.optim import learning_rate
    from parts.training.plan import Setting, count_parameters, flops_per_token, memory_of

    TRAINER = Path(gpt_train.__file__).with_name("pretraining_advanced.py")
    RUNS = Path("runs")
    SCHEDULES = ["cosine", "linear", "constant", "wsd"]
    MEASURED = "this one, as measured by the first chosen run"


@app.function
def or_why_not(make):
    """What make() returns; if it cannot, a box with the reason, so that the page keeps working."""
    try:
        return make()
    except (*BAD_INPUT, OSError, RuntimeError, MemoryError) as e:
        return warning(error_line(e))


@app.function
def warning(text: str):
    """A box with a sentence."""
    return mo.callout(mo.Html(figures.paragraph(text)), kind="warn")


@app.function
def image(figure, description: str):
    """A figure as an image of the page."""
    return mo.Html(figures.as_html(figure, description))


@app.function
def runs_in(folder) -> list[str]:
    """Names of the run folders in `folder`, the newest record first. Raises ValueError if none."""
    signs = ("metrics.jsonl", "run.json", "checkpoints")
    found = [p for p in Path(folder).glob("*") if any((p / sign).exists() for sign in signs)]
    if not found:
        fix = "train one (python pretraining_simple.py), or name another folder"
        raise ValueError(f"{folder}: no run here; {fix}")
    newest = {p: max(f.stat().st_mtime for f in (p, *p.glob("metrics.jsonl"))) for p in found}
    return [p.name for p in sorted(found, key=lambda p: -newest[p])]


@app.function
def signature(folder) -> tuple[tuple, tuple]:
    """(names, times): what a new run or checkpoint in `folder` changes, and what a new record."""
    runs = sorted(Path(folder).glob("*"))
    names = tuple(str(f) for p in runs for f in (p, *list_checkpoints(p)))
    files = [p / name for p in runs for name in ("metrics.jsonl", "samples.txt")]
    return names, tuple((str(f), f.stat().st_mtime_ns) for f in files if f.exists())


@app.function
def read_runs(folder, names, axis: str) -> tuple[dict, list[str]]:
    """({name: columns for parts/report/figures.py}, why runs that are left out cannot be drawn)."""
    runs, problems = {}, []
    for name in names:
        try:
            run = figures.columns(read_metrics(Path(folder) / name))
            figures.place(run, axis)
            runs[name] = run
        except (OSError, ValueError) as e:
            problems.append(f"{name}: {error_line(e)}")
    return runs, problems


@app.function
def small_run(
    max_lr=4e-3, warmup=20, batch=16, width=64, depth=2, schedule="cosine", steps=300
) -> tuple[Path, dict]:
    """(run folder, flags of pretraining_advanced.py) of a small training; the settings name it."""
    name = f"notebook-lr{max_lr:g}-warmup{warmup}-batch{batch}-{depth}x{width}-{schedule}-{steps}"
    return RUNS / name, {
        "model_size": "nano",
        "n_layer": depth,
        "n_embd": width,
        "n_head": max(1, width // 32),
        "context_length": 64,
        "max_lr": max_lr,
        "warmup_steps": warmup,
        "schedule": schedule,
        "max_steps": steps,
        "batch_size": batch,
        "eval_freq": max(1, steps // 10),
        "print_sample_iter": max(1, steps // 5),
        "save_ckpt_freq": steps,
        "eval_tokens": 8192,
        "val_share": 0.05,
        "tokenizer": "bpe:1024",
        "device": "cpu",
    }


@app.function
def small_corpus() -> Path:
    """Text for small runs: the books in ./gutenberg_preprocessed, or Python's documentation."""
    if ((books := Path("gutenberg_preprocessed")) / "report.json").exists():
        return books
    path = RUNS / "notebook-text" / "python.txt"
    if not path.exists():
        write_file(path, "\n<|endoftext|>\n".join(python_docs()).encode())
    return path


@app.class_definition
class Training:
    """pretraining_advanced.py in a process of its own; the same run folder resumes."""

    def __init__(self, run_dir: Path, flags: dict):
        self.run_dir, self.max_steps = run_dir, flags["max_steps"]
        cache_dir = RUNS / "notebook-text"
        folders = {"dataset_name": small_corpus(), "cache_dir": cache_dir, "output_dir": run_dir}
        line = [sys.executable, str(TRAINER)]
        for name, value in (flags | folders).items():
            line += [f"--{name}", str(value)]
        # one thread: small products gain nothing from more, and several runs may train at a time
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        make_folder(cache_dir)
        self.log = cache_dir / f"{run_dir.name}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env
            )

    def stop(self) -> None:
        """Ask it to save and end, if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def progress(self) -> tuple[int, str]:
        """(its last step, a line about its progress or its end)."""
        step = max((record["step"] for record in read_metrics(self.run_dir)), default=0)
        code, done = self.process.poll(), f"step {step:,} of {self.max_steps:,}"
        if code is None:
            return step, done if step else "starting: reads the text and builds the model"
        if code == 0:
            return step, f"finished, {done}"
        if code in (75, 130, -signal.SIGTERM):
            return step, f"stopped at {done}; the same settings resume it"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        return step, errors[-1] if errors else f"failed with exit code {code}, see {self.log}"


@app.function
@lru_cache(maxsize=2)
def load(path: str, stamp: tuple):
    """(model, tokenizer, state) of a run or checkpoint folder, on the CPU; cached per `stamp`."""
    return gpt_train.load_model(path, torch.device("cpu"))


@app.function
def measured_flops(folder: Path, names) -> float:
    """FLOP/s of the first of these runs, by its own records. Raises ValueError without any."""
    if not names:
        raise ValueError("no run is chosen above; choose one for its speed, or a device")
    try:
        config = config_of(read_json(folder / names[0] / "run.json"))
        run = read_runs(folder, names[:1], "time")[0][names[0]]
        return flops_per_token(config) * float(np.nanmedian(run["tokens_per_s"]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"{names[0]}: its speed is unknown ({error_line(e)}); choose another run, or a device"
        ) from e


@app.cell
def _():
    trainings = {}  # name of the run -> Training
    choices = {}  # values of controls, for when a control is made again

    def _first():
        try:
            runs_in(RUNS)
        except ValueError:
            trainings["notebook-first"] = Training(RUNS / "notebook-first", small_run(steps=200)[1])
            if mo.app_meta().mode == "script":  # nobody will look at the page later
                trainings["notebook-first"].process.wait()
            return mo.md(
                f"`{RUNS}` has no run yet. A tiny one is being trained, `runs/notebook-first`; "
                "it takes less than a minute."
            )

    _title = """# See it learn
    Follow runs while they train, train small models with your own settings, look inside a
    checkpoint, and estimate what a size costs. A box says what is missing or damaged."""
    mo.vstack([mo.md(_title), or_why_not(_first) or mo.md("")])
    return choices, trainings


@app.cell
def _():
    folder = mo.ui.text(value=str(RUNS), label="folder with runs")
    axis = mo.ui.radio(["steps", "tokens", "time"], value="steps", inline=True, label="against")
    n_smooth = mo.ui.slider(
        steps=[1, 3, 10, 30, 100], value=10, show_value=True, label="smoothed over steps"
    )
    refresh = mo.ui.refresh(
        options=["1s", "2s", "10s", "1m"], default_interval="2s", label="refresh every"
    )
    get_names, set_names = mo.state(())
    get_records, set_records = mo.state(())
    _controls = mo.hstack([folder, refresh, axis, n_smooth], justify="start", gap=2, wrap=True)
    mo.vstack([mo.md("## 1. Training dynamics"), _controls])
    return axis, folder, get_names, get_records, n_smooth, refresh, set_names, set_records


@app.cell
def _(folder, get_names, get_records, refresh, set_names, set_records, trainings):
    _ = refresh.value  # cells that read the two states run again only if something has changed
    # a folder that is being moved, or an invalid name: the next refresh finds it
    with contextlib.suppress(OSError, ValueError):
        _names, _records = zip(*[signature(f) for f in (folder.value, RUNS)], strict=True)
        if _names != get_names():
            set_names(_names)
        _records = (_records, [t.process.poll() for t in trainings.values()])
        if _records != get_records():
            set_records(_records)
    return


@app.cell
def _(choices, folder, get_names):
    get_names()
    _found = or_why_not(lambda: runs_in(folder.value))
    names = _found if isinstance(_found, list) else []
    _value = [name for name in choices.get("runs", names[:1]) if name in names]
    chosen = mo.ui.multiselect(
        names, value=_value, label="runs", on_change=lambda v: choices.update(runs=v)
    )
    mo.vstack([chosen if names else _found])
    return chosen, names


@app.cell
def _(choices, chosen, folder, get_records):
    get_records()
    samples = {}  # name of the run -> {step: text}
    for _name in chosen.value:
        _file = Path(folder.value) / _name / "samples.txt"
        if _file.is_file():
            _text = _file.read_text(encoding="utf-8", errors="replace")
            samples[_name] = figures.samples_of(_text)
    _steps = sorted({step for texts in samples.values() for step in texts}) or [0]
    # at the last step it follows the run
    _value = choices["step"] if choices.get("step") in _steps[:-1] else _steps[-1]
    at_step = mo.ui.slider(
        steps=_steps,
        value=_value,
        show_value=True,
        label="step",
        on_change=lambda v: choices.update(step=v),
    )
    return at_step, samples


@app.cell
def _(at_step, axis, chosen, folder, get_records, n_smooth, samples):
    get_records()

    def _curves():
        runs, problems = read_runs(folder.value, chosen.value, axis.value)
        boxes = [warning(problem) for problem in problems]
        if not runs:
            return mo.vstack(boxes or [mo.md("*Choose a run above.*")])
        every = figures.draw_runs(runs, axis.value, n_smooth.value)
        loss = figures.draw_runs(
            runs, axis.value, n_smooth.value, ["train_loss"], mark=at_step.value
        )
        column = [mo.md("**Samples** at the step of the dotted line"), at_step]
        for name in runs:
            if name in samples:
                text = samples[name].get(at_step.value, "(none at this step)")
                column.append(mo.Html(figures.paragraph(f"{name}: {text}")))
        loss_and_samples = mo.hstack(
            [image(loss, "loss and step of the samples"), mo.vstack(column)], widths=[1, 1]
        )
        return mo.vstack([*boxes, image(every, "curves of the chosen runs"), loss_and_samples])

    mo.vstack([or_why_not(_curves)])
    return


@app.cell
def _():
    # Not in a mo.ui.dictionary: if its controls are moved while the page is busy, marimo keeps only
    # the last move.
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
    train_button = mo.ui.run_button(label="train it", kind="success")
    stop_button = mo.ui.run_button(label="stop", kind="warn")
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

    def _rate(step, kind):
        return learning_rate(step, kind, max_lr.value, max_lr.value / 10, warmup.value, steps.value)

    _steps = range(steps.value)
    _curves = {kind: (_steps, [_rate(step, kind) for step in _steps]) for kind in SCHEDULES}
    _figure = figures.draw_lines(_curves, schedule.value, "optimizer steps", "learning rate")
    _buttons = mo.hstack([train_button, stop_button], justify="start")
    _columns = [
        mo.vstack([*_sliders.values(), _buttons]),
        image(_figure, "learning rate over the steps"),
    ]
    mo.vstack([mo.md("## 2. Hyperparameters"), mo.hstack(_columns, widths=[1, 1])])
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
        names = [name for name in runs_in(RUNS) if name.startswith("notebook-")][:10]
        runs, _ = read_runs(RUNS, names, "steps")
        if not runs:
            return mo.md("*No small run has been trained yet.*")
        figure = figures.draw_runs(runs, "steps", 10, ["train_loss", "val_loss"])
        return image(figure, "losses of the small runs")

    _bars = [figures.progress(name, t.max_steps, *t.progress()) for name, t in trainings.items()]
    mo.vstack([mo.Html("".join(_bars)), or_why_not(_overlay)])
    return


@app.cell
def _(choices, folder, get_names, names):
    get_names()
    _options = {}  # label -> path, of runs and their checkpoints
    for _name in names:
        _run = Path(folder.value) / _name
        if _checkpoints := list_checkpoints(_run):
            for _path in (_run, *_checkpoints):
                _options[str(_path.relative_to(folder.value))] = str(_path)
    _labels = {path: label for label, path in _options.items()}
    picked = mo.ui.dropdown(
        _options,
        value=_labels.get(choices.get("picked"), next(iter(_options), None)),
        label="checkpoint",
        on_change=lambda v: choices.update(picked=v),
    )
    elsewhere = mo.ui.text(label="or a folder elsewhere", placeholder="runs/simple")
    return elsewhere, picked


@app.cell
def _(elsewhere, picked):
    def _load():
        if not (path := elsewhere.value or picked.value):
            raise FileNotFoundError(
                "no checkpoint yet; a run writes one when it ends or is stopped"
            )
        manifests = sorted(Path(path).glob("checkpoints/*/MANIFEST.json"))
        manifests += Path(path).glob("MANIFEST.json")
        return load(path, tuple((str(f), f.stat().st_mtime_ns) for f in manifests))

    _found = or_why_not(_load)
    model = tokenizer = None
    if isinstance(_found, tuple):
        model, tokenizer, _state = _found
        _n = count_parameters(model.config)
        _facts = f"step {_state['step']:,}, {_n:,} parameters, tokenizer {tokenizer.name}"
        _found = mo.md(_facts)
    _controls = mo.hstack([picked, elsewhere], justify="start")
    mo.vstack([mo.md("## 3. What the model does"), _controls, _found])
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
    _last = model.config.n_layer - 1
    layer = mo.ui.slider(0, _last, value=_last, show_value=True, label="layer")
    head = mo.ui.slider(0, model.config.n_head - 1, value=0, show_value=True, label="head")
    return head, layer


@app.cell
def _(head, layer, model, prompt, tokenizer):
    def _inside():
        ids, note = interpret.ids_of(prompt.value, tokenizer, model.config.block_size, last=True)
        # (L + 1, 6) each: the likeliest tokens after the embedding and after each layer
        log_p = interpret.logit_lens(model, ids, tokenizer.vocab_size)
        probabilities, best = log_p.exp().topk(6)
        lens = []
        for i, row in enumerate(best.tolist()):
            place = f"layer {i - 1}" if i else "embedding"
            lens.append([place, *(interpret.shown(tokenizer, token) for token in row)])
        likely = [
            (token, f"{p:.1%}")
            for token, p in zip(lens[-1][1:], probabilities[-1].tolist(), strict=True)
        ]
        near, cosines = interpret.neighbours(model, int(ids[-1]), 6, tokenizer.vocab_size)
        near = [
            (interpret.shown(tokenizer, token), f"{cosine:.2f}")
            for token, cosine in zip(near, cosines, strict=True)
        ]
        tables = [
            figures.table(
                ["next token", "probability"], likely, lambda i, j: j * probabilities[-1, i]
            ),
            figures.table(
                ["if it ended at", "likeliest", *"23456"],
                lens,
                lambda i, j: probabilities[i, j - 1] if j else 0,
            ),
            figures.table(["near the last token", "cosine"], near),
        ]
        maps = interpret.attention_maps(model, ids, layer.value).numpy()
        tokens = [interpret.shown(tokenizer, token) for token in ids.tolist()]
        attention = figures.draw_attention(maps, tokens, layer.value, head.value)
        return mo.vstack(
            [
                mo.md(note),
                mo.hstack(map(mo.Html, tables), justify="start", align="start", gap=2, wrap=True),
                mo.hstack([layer, head], justify="start"),
                image(attention, "attention of the heads"),
            ]
        )

    _title = mo.md("**Next token, logit lens, neighbours, attention**")
    mo.vstack([_title, prompt, or_why_not(_inside)])
    return


@app.cell
def _(model, passage, tokenizer):
    def _surprise():
        ids, note = interpret.ids_of(passage.value, tokenizer, model.config.block_size, last=False)
        losses = interpret.token_losses(model, ids).tolist()
        pieces = [
            (tokenizer.decode([token]), interpret.shown(tokenizer, token), loss)
            for token, loss in zip(ids[1:].tolist(), losses, strict=True)
        ]
        mean = f"{len(losses)} tokens, on average {np.mean(losses or [0]):.2f} nats each. {note}"
        return mo.vstack([mo.Html(figures.surprise(pieces)), mo.md(mean)])

    mo.stop(model is None)
    _title = mo.md("**Surprise**: the redder a token, the higher its loss; hover to read it")
    mo.vstack([_title, passage, or_why_not(_surprise)])
    return


@app.cell
def _(model, opening, seed, temperature, tokenizer, top_k, top_p):
    def _side_by_side():
        t, k, p = temperature.value, min(top_k.value, tokenizer.vocab_size), top_p.value
        ways = {  # title -> (temperature, top_k, top_p)
            "temperature 0": (0, None, None),
            f"temperature {t:g}": (t, None, None),
            f"{t:g} and top-k {k}": (t, k, None),
            f"{t:g} and top-p {p:g}": (t, None, p),
        }
        columns = []
        for title, way in ways.items():
            options = dict(zip(("temperature", "top_k", "top_p"), way, strict=True))
            (text,) = gpt_train.sample_text(
                model, tokenizer, "cpu", opening.value, 1, 50, seed=seed.value, **options
            )
            text = mo.Html(figures.paragraph(opening.value + text))
            columns.append(mo.vstack([mo.md(f"*{title}*"), text]))
        return mo.hstack(columns, widths="equal", gap=2)

    mo.stop(model is None)
    _controls = mo.hstack([opening, temperature, top_k, top_p, seed], justify="start", wrap=True)
    mo.vstack([mo.md("**Sampling**"), _controls, or_why_not(_side_by_side)])
    return


@app.cell
def _():
    _sizes = [name for kind in sorted(FAMILIES) for name in FAMILIES[kind].sizes]
    size = mo.ui.dropdown(_sizes, value="124M", label="size")
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
        measured = device.value == MEASURED
        if measured:
            flops_per_s = measured_flops(Path(folder.value), chosen.value)
        else:
            flops_per_s = PEAK_FLOPS[device.value] * share.value / 100
        configs, rows = {}, []
        shape = {"vocab_size": vocabulary.value, "block_size": context.value}
        for name in size.options:
            config = shape_of_size(name, shape)
            configs[name] = config
            n, per_token = count_parameters(config), flops_per_token(config)
            duration = format_duration(ratio.value * n * per_token / flops_per_s)
            rows.append((name, f"{n:,}", f"{per_token:.2e}", f"{ratio.value * n:.1e}", duration))
        titles = [
            "size",
            "parameters",
            "FLOPs per token",
            "tokens",
            f"time at {flops_per_s:.2g} FLOP/s",
        ]
        table = figures.table(titles, rows, lambda i, j: 0.2 * (rows[i][0] == size.value))
        kept = {
            "dtype": dtype.value,
            "optimizer": optimizer.value,
            "activation_checkpointing": recompute.value,
            "device": "cpu" if measured else "cuda",
        }
        parts = {
            b: memory_of(configs[size.value], Setting(b, **kept)) for b in (1, 2, 4, 8, 16, 32, 64)
        }
        bars = {}  # of each micro-batch: {part: GB}
        for b, n_bytes in parts.items():
            title = f"micro-batch {b}, at most {n_bytes['peak'] / 1e9:.3g} GB"
            bars[title] = {part: n / 1e9 for part, n in n_bytes.items() if part != "peak"}
        figure = figures.draw_bars(bars, "memory by part in training (GB); not all at one time")
        return mo.vstack(
            [mo.Html(table), image(figure, "memory by part for several micro-batches")]
        )

    _controls = [size, vocabulary, context, ratio, device, share, dtype, optimizer, recompute]
    _controls = mo.hstack(_controls, justify="start", gap=2, wrap=True)
    mo.vstack([mo.md("## 4. Scaling"), _controls, or_why_not(_costs)])
    return


if __name__ == "__main__":
    app.run()
