"""Curves, bars and tables: from records and numbers to what a page shows."""

import numpy as np
import pytest
from run_records import advanced

from parts.report import figures

# ------------------------------------------------------------------------------------- from records


def test_records_of_one_step_become_one_row():
    simple = [
        {"step": 0, "val_loss": 6.0},
        {"step": 1, "tokens": 64, "train_loss": 5.5, "lr": 0.1},
        {"step": 1, "val_loss": 5.0},
    ]
    run = figures.columns(simple)
    assert run["step"].tolist() == [0, 1]
    assert run["val_loss"].tolist() == [6.0, 5.0] and run["train_loss"][1] == 5.5
    assert np.isnan(run["tokens"][0]) and np.isnan(run["tokens_per_s"]).all()


def test_what_is_no_number_is_a_gap_and_no_record_at_all_is_said():
    record = {"train_loss": None, "lr": 10**400, "tokens_per_s": "fast", "memory_gib": 1}
    run = figures.columns([{"step": 1, **record}])
    assert np.isnan([run[name][0] for name in ("train_loss", "lr", "tokens_per_s")]).all()
    assert run["memory_gib"][0] == 1
    with pytest.raises(ValueError, match="no record of a step"):
        figures.columns([])


def test_the_three_axes_by_hand():
    run = figures.columns([{"step": 0, "val_loss": 6.0}, *advanced(2)])
    assert figures.place(run, "steps").tolist() == [0, 1, 2]
    assert figures.place(run, "tokens").tolist() == [0, 100, 200]
    assert figures.place(run, "time").tolist() == [0, 2, 4]  # 100 tokens at 50 a second, twice
    simple = figures.columns([{"step": 1, "tokens": 64, "train_loss": 5.5}])
    with pytest.raises(ValueError, match="no tokens/s"):
        figures.place(simple, "time")


def test_smoothing_by_hand():
    assert figures.smoothed([4.0, 4.0, 4.0], 10).tolist() == pytest.approx([4, 4, 4])
    assert figures.smoothed([1.0, 4.0], 2).tolist() == pytest.approx([1, (0.5 * 1 + 4) / 1.5])
    assert figures.smoothed([1.0, 4.0], 1).tolist() == [1, 4]


def test_samples_are_found_by_their_steps():
    samples = figures.samples_of("--- step 5\nonce\n--- or twice\n\n--- step 10\nmore\n")
    assert samples == {5: "once\n--- or twice", 10: "more"}
    assert figures.samples_of("") == {} == figures.samples_of("--- step")


# --------------------------------------------------------------------------------------- to figures


def test_curves_carry_every_step_once_and_their_labels_have_units():
    runs = {"$_a b$": figures.columns(advanced(40)), "_b": figures.columns(advanced(1))}
    figure = figures.draw_runs(runs, "steps", 10, mark=7)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert len(labels) == 6 and labels[0] == "training loss (nats per token)"
    assert "tokens/s" in labels[4] and "GiB" in labels[5]
    assert {axes.get_xlabel() for axes in figure.axes} == {"optimizer steps"}
    raw = figure.axes[0].lines[0]
    assert raw.get_xdata().tolist() == list(range(1, 41))
    assert raw.get_ydata()[6] == pytest.approx(4.93)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["\\$_a b\\$", " _b"]
    image = figures.as_html(figure, "a & b")
    assert image.startswith('<img alt="a &amp; b" src="data:image/png;base64,')


def test_long_times_are_minutes_and_figures_leave_nothing_behind():
    import matplotlib.pyplot as plt

    figure = figures.draw_runs({"a": figures.columns(advanced(200))}, "time", 1, ["train_loss"])
    axes = figure.axes[0]
    assert axes.get_xlabel() == "time in training (min)"
    assert axes.lines[0].get_xdata()[-1] == pytest.approx(400 / 60)
    assert plt.get_fignums() == []


def test_stacked_bars_are_as_long_as_their_parts():
    parts = {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0, "y": 0.5}}
    axes = figures.draw_bars(parts, "memory (GB)").axes[0]
    boxes = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert boxes == [(0, 1), (0, 3), (1, 2), (3, 0.5)] and axes.get_xlabel() == "memory (GB)"


def test_text_of_any_script_is_drawn_without_a_warning(recwarn):
    maps = np.full((3, 2, 2), 0.5)
    figures.as_html(figures.draw_attention(maps, ["\u4eba$x", "\u0627_{"], 0, 2), "attention")
    assert not recwarn.list


def test_tables_and_texts_escape_what_they_show():
    shown = figures.table(["<a>"], [["<script>"]])
    shown += figures.paragraph("<script>")
    shown += figures.surprise([("<script>", '"><b', 1.5)])
    assert "<script>" not in shown and shown.count("&lt;script&gt;") == 3
    assert '"><b' not in shown and "1.50 nats" in shown
    assert "<b>" not in figures.progress("<b>", 10, 5, "<b>")
