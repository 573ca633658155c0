"The views: what they say, what they draw, and that they never harm a run."
import contextlib
import html
import io
import math
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from standin import Run

from trainkit.callback import On
from trainkit.history import History
from trainkit.learner import Learner
from trainkit.ui import front as front_module
from trainkit.ui import plots, progress
from trainkit.ui.front import front
from trainkit.ui.marks import name_of, places, wide
from trainkit.ui.plots import Curves, Finished, Plot, decimate, local_lines, plot_history, trend, view_limits
from trainkit.ui.progress import LogPlace, NotebookPlace, Progress, Status, Table, TerminalPlace
from trainkit.ui.samples import Samples, compare, comparison_grid, sample_grid, to_uint8, watching
from trainkit.ui.view import Budget, View, quietly

values_or_nan = st.floats(-1e6, 1e6) | st.just(math.nan)
curve = hnp.arrays(np.float64, st.integers(1, 3000), elements=values_or_nan, fill=st.floats(-1, 1))


# ---- reducing points

@given(curve, st.integers(2, 500))
@settings(max_examples=60, deadline=None)
def test_decimation_keeps_spikes_ends_and_order(values, points):
    steps = np.arange(len(values)) * 3
    x, y = decimate(steps, values, points)
    assert len(x) <= points + 2 and (np.diff(x) > 0).all()
    assert x[0] == steps[0] and x[-1] == steps[-1]
    np.testing.assert_array_equal(y, values[x // 3])  # nothing is invented
    if np.isfinite(values).any(): assert (np.nanmin(y), np.nanmax(y)) == (np.nanmin(values), np.nanmax(values))


@given(st.integers(1000, 5000), st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_decimated_points_stay_while_the_run_grows(n, more):
    values = np.sin(np.arange(n + more) ** 2)
    size = [plots.bucket_size(m, 150) for m in (n, n + more)]
    if size[0] != size[1]: return
    before, after = (set(decimate(np.arange(m), values[:m], 300)[0].tolist()) for m in (n, n + more))
    whole = min(n // size[0] * size[0], n - 1)  # the last stretch is still open, the last point is always drawn
    assert {s for s in before if s < whole} <= after


@given(hnp.arrays(np.float64, st.integers(5, 60), elements=st.floats(-10, 10) | st.just(math.nan)),
       st.floats(0.3, 0.99), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_local_lines_are_weighted_least_squares(values, weight, seed):
    "By numpy's polyfit at every point, on uneven steps with uneven masses."
    rng, known = np.random.default_rng(seed), np.isfinite(values)
    n = len(values)
    x, mass = rng.integers(1, 9, n).cumsum() + 1e5, rng.integers(1, 9, n).astype(float)
    if known.sum() < 2: return
    got = local_lines(x, values, mass, weight)
    np.testing.assert_array_equal(np.isnan(got), ~known)
    for i in known.nonzero()[0]:
        w = (mass * weight ** np.abs(np.arange(n) - i))[known]
        if np.sort(w)[-2] < 1e-4 * w.max(): continue  # no neighbours to speak of
        line = np.polyfit(x[known] - x[i], values[known], 1, w=np.sqrt(w))[1]
        np.testing.assert_allclose(got[i], np.clip(line, np.nanmin(values), np.nanmax(values)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n, every", [(64, 1), (1000, 1), (2003, 5), (100_000, 1)])
@pytest.mark.parametrize("first, last", [(0.7, 2.1), (2.0, 2.0), (3.0, -1.0)])
def test_trend_of_a_straight_line_is_that_line_to_its_ends(n, every, first, last):
    steps = 1 + every * np.arange(n)
    def line(x): return first + (last - first) * (x - 1) / (steps[-1] - 1)

    for forgotten in ([], [n // 2], [0, 1, n - 1]):
        values = line(steps)
        values[forgotten] = math.nan
        x, y = trend(steps, values)
        assert len(x) <= 400 and steps[0] <= x[0] and x[-1] <= steps[-1] and (np.diff(x) > 0).all()
        np.testing.assert_allclose(y[np.isfinite(y)], line(x[np.isfinite(y)]), atol=1e-9)
        assert np.isnan(y).sum() == (len(forgotten) if n <= 400 else 0)


def test_trend_reduces_noise_also_at_the_ends():
    rng, steps = np.random.default_rng(0), np.arange(300)
    off = np.stack([trend(steps, 0.01 * steps + rng.normal(size=300))[1] - 0.01 * steps for _ in range(300)])
    spread = off.std(0)
    assert np.abs(off.mean(0)).max() < 0.1 and spread[50:250].max() < 0.25 and spread.max() < 0.5


def test_trend_gives_an_open_stretch_the_weight_of_its_values():
    "401 values are 200 stretches of two and one of one: this one must not count double."
    steps, values = np.arange(401), np.zeros(401)
    values[-1] = 1.0
    twice = np.append(values, 1.0)
    assert trend(steps, values)[1][-1] < trend(np.arange(402), twice)[1][-1] - 0.05


def test_trend_stays_inside_of_the_values_and_so_positive():
    values = np.where(np.arange(100) < 3, 10.0, 0.01)
    assert trend(np.arange(100), values)[1].min() >= 0.01


# ---- one number for one thing

def test_bar_and_legend_show_the_same_number(monkeypatch):
    run, rng = Run(), np.random.default_rng(0)
    for step in range(1, 101):
        for player in ("discriminator", "generator"): run.history.add(f"train/{player}/loss", rng.normal(), step)
    run.history.add("valid/fid", 12.0, 50)
    run.history.add("valid/fid", 9.0, 100)
    plot, s = Plot(), progress.status_of(run, 1.0, 1.0, None)
    plot.update(run.history.snapshot())
    legends = [[t.get_text() for t in panel.legend.get_texts()] for panel, _ in plot.painting.panels]
    assert " · ".join(legends[0]) == progress.losses(s)
    assert legends[1] == ["valid 9.000"]
    values = run.history.scalars["train/generator/loss"][1]
    assert s.losses["generator"] == pytest.approx(values[-20:].mean())


def test_a_loss_of_a_player_that_seldom_has_its_turn_is_a_mean_as_well():
    steps, values = np.arange(0, 5000, 100), np.arange(50.0)
    assert progress.recent("train/generator/loss", steps, values) == 39.5
    assert progress.recent("train/accuracy", steps, values) == 49.0
    assert math.isnan(progress.recent("train/loss", steps, np.append(values[:-1], math.nan)))  # not hidden


def test_a_rate_that_is_typed_in_stays_in_view():
    "A held rate is one value beside hundreds of a schedule's, and the one that matters."
    history = History()
    for step in range(1, 200): history.add("lr/generator", 1e-3 * math.cos(step / 130), step)
    for step, rate in ((1, 1e-3), (120, 0.05)): history.add("lr/discriminator", rate, step)
    plot = Plot()
    plot.update(history)
    low, high = next(ax.get_ylim() for ax in plot.figure.axes if "learning rate" in ax.get_title(loc="left") + ax.get_title())
    assert low < 1e-4 and high > 0.05


@given(hnp.arrays(np.float64, st.integers(0, 200), elements=st.floats()), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_view_limits_are_always_drawable(values, log, whole):
    low, high = view_limits(values, log, whole)
    assert math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not log)


# ---- curves

def record(n=200, **extra):
    history = History()
    for step in range(1, n + 1):
        history.add("train/generator/loss", 1 / step, step)
        history.add("train/discriminator/loss", 1.0, step)
        for name, value in extra.items(): history.add(name.replace("__", "/"), value(step), step)
    return history


def test_figure_shows_the_data_and_reuses_its_artists():
    plot, history = Plot(), record()
    plot.update(history.snapshot())
    panel, lines = plot.painting.panels[0]
    artists = [(c.raw, c.line) for c in panel.curves]
    np.testing.assert_array_equal(panel.curves[0].raw.get_xdata(), np.arange(1, 201))
    np.testing.assert_allclose(panel.curves[0].raw.get_ydata(), 1 / np.arange(1, 201))
    history.add("train/generator/loss", 9.0, 201)
    history.mark("epoch", 201)
    plot.update(history.snapshot())
    assert [(c.raw, c.line) for c in plot.painting.panels[0][0].curves] == artists
    assert panel.curves[0].raw.get_ydata()[-1] == 9.0
    assert len(lines.epochs.get_segments()) == 1
    newest = np.append(1 / np.arange(182, 201), 9.0).mean()
    assert [t.get_text() for t in panel.legend.get_texts()] == [f"generator {newest:.4f}", "discriminator 1.000"]


def test_live_figure_never_changes_its_size():
    plot, history, shapes = Plot(width=6), History(), set()
    for step in range(1, 9):
        for k in range(step): history.add(f"valid/metric{k}", step, step)
        plot.update(history.snapshot())
        shapes.add(plot.pixels().shape)
    assert shapes == {(280, 600, 3)} and len(plot.painting.panels) == 3


def test_still_figure_has_every_panel():
    history = record(valid__fid=lambda s: s, valid__accuracy=lambda s: s, lr__generator=lambda s: s,
                     lr__discriminator=lambda s: 1)
    figure = plot_history(history)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["loss", "fid", "accuracy", "learning rate"]
    assert len(plot_history(history, names=["valid/*"]).axes) == 2
    rates = figure.axes[3].get_legend().get_texts()
    assert [t.get_text() for t in rates] == ["generator 200.0"]  # the other never changed


@pytest.mark.parametrize("values", [[math.nan] * 50, [math.inf, 1.0], [0.0] * 50, [-1.0, -2.0], [1e300, -1e300]])
@pytest.mark.parametrize("log", [False, True])
def test_odd_values_can_be_drawn(values, log):
    history = History()
    for step, value in enumerate(values): history.add("train/loss", value, step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot = Plot(log=log)
        plot.update(history.snapshot())
        assert plot.pixels().shape == (280, 900, 3)


def test_learning_rates_share_a_curve_until_they_differ():
    history, plot = record(lr__discriminator=lambda s: 1 / s, lr__generator=lambda s: 1 / s), Plot()
    def legend(): return [t.get_text() for t in plot.painting.panels[1][0].legend.get_texts()]

    plot.update(history.snapshot())
    assert legend() == ["discriminator, generator 0.005000"]
    history.add("lr/generator", 0.5, 201)
    plot.update(history.snapshot())
    assert legend() == ["discriminator 0.005000", "generator 0.5000"]
    of_losses, of_rates = ({c.name.split("/")[1]: c.line.get_color() for c in p.curves} for p, _ in plot.painting.panels)
    assert of_losses == of_rates  # a player has one colour


@pytest.mark.parametrize("panels", [1, 2, 3])
@pytest.mark.parametrize("players", [["generator"], ["discriminator", "generator"], ["a", "b"], ["a", "b", "c"],
                                     ["generator_of_faces", "discriminator"]])
def test_legend_covers_neither_title_nor_neighbour(panels, players):
    history, plot = History(), Plot()
    for step in range(1, 40):
        for k, player in enumerate(players, 1):
            history.add(f"train/{player}/loss", -1.2345678e-5 * k, step)
            if panels > 1: history.add(f"lr/{player}", 0.0001551234 * k + 1e-9 * step, step)
        if panels > 2: history.add("valid/score", -1.2345678e-5 * step, step)
    plot.update(history.snapshot())
    plot.pixels()
    renderer, inches = plot.canvas.get_renderer(), plot.figure.bbox
    assert len(plot.painting.panels) == panels
    for panel, _ in plot.painting.panels:
        title = next(t for t in panel.ax.findobj() if getattr(t, "get_text", str)() == panel.ax.get_title(loc="left"))
        legend = panel.legend.get_window_extent(renderer)
        assert not legend.overlaps(title.get_window_extent(renderer))
        assert legend.x1 <= inches.x1 and legend.y1 <= inches.y1 and legend.x0 > panel.ax.bbox.x0


# ---- marks

def names_of(lines):
    "What stands in the picture: (step, name, side)."
    return [(name.x, name.text, "left" if name.left else "right") for name in lines.written]


def test_marks_have_names_that_can_be_read():
    history, plot = record(valid__score=lambda s: s), Plot()
    for kind, step in [("interrupted", 3), ("checkpoint", 100), ("stopped", 150), ("checkpoint", 200), ("interrupted", 200)]:
        history.mark(kind, step)
    plot.update(history.snapshot())
    first, second = plot.painting.panels[0][1], [lines for _, lines in plot.painting.panels[1:]]
    assert names_of(first) == [(3, "interrupted", "left"), (100, "checkpoint", "right"), (150, "stopped", "right"),
                               (200, "checkpoint, interrupted", "right")]
    assert [names_of(lines) for lines in second] == [[]]
    for step in range(201, 400): history.add("train/generator/loss", 1.0, step)
    plot.update(history.snapshot())
    assert [step for step, *_ in names_of(first)] == [3, 100, 150, 200]


LONG = ["weights.gradient_penalty of discriminator: 10 → 5", "lr: 1 → 0.1", "a note\nof two lines, $x_$ and more than has room"]


@pytest.mark.parametrize("n", [1, 5, 50])
@pytest.mark.parametrize("where, width, panels", [("even", 9, 3), ("even", 9, 1), ("late", 6.2, 2), ("early", 9, 3),
                                                  ("at once", 9, 3)])
def test_names_of_marks_lie_apart_and_inside(n, where, width, panels):
    more = {f"valid__{k}": lambda s: s for k in range(panels - 1)}
    history, plot = record(**more), Plot(width=width)
    steps = {"even": np.linspace(2, 200, n), "late": np.linspace(170, 200, n), "early": np.linspace(0, 20, n),
             "at once": np.full(n, 120)}[where].astype(int).tolist()  # fmt: skip
    for i, step in enumerate(steps): history.mark("command", step, LONG[i % 3])
    plot.update(history.snapshot())
    assert plot.pixels().shape == (280, 100 * width, 3) and len(plot.painting.panels) == panels
    panel, lines = plot.painting.panels[0]
    boxes = [name.parts[1].get_window_extent() for name in lines.written]
    inside = panel.ax.bbox
    for box, name in zip(boxes, lines.written):
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 + 0.5 and inside.y0 < box.y0 and box.y1 < inside.y1, name.text
        edge = panel.ax.transData.transform((name.x, 0))[0]
        assert 0 < (box.x0 - edge if name.left else edge - box.x1) < 3  # beside its line
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))
    assert 1 <= len(boxes) <= min(n, 5) and (where != "even" or len(boxes) == min(n, 5))
    ticks = np.array(lines.ticks.get_xdata())
    assert set(ticks) <= set(steps) and all(np.abs(ticks - step).min() < 3 for step in steps)  # less than a point beside it
    told = [re.findall(r"(\d+) earlier| [+](\d+)$", name.text) for name in lines.written]
    earlier, others = (sum(int(f[k]) for found in told for f in found if f[k]) for k in (0, 1))
    named = sum(len([t for t in LONG if t[:5] in name.text]) for name in lines.written)
    assert earlier + others + named == n  # nothing is passed over in silence


@given(st.lists(st.integers(0, 1000), max_size=60), st.floats(1, 200))
def test_marks_share_places_that_have_room_for_a_name(steps, least):
    steps = np.array(sorted(steps), np.int64)
    shared = places(steps, least, 0.0)
    assert [i for begin, end in shared for i in range(begin, end)] == [*range(len(steps))]
    at = [int(steps[end - 1]) for _, end in shared]
    rooms = [(x, x + least) if x - least < 0 else (x - least, x) for x in at]  # on the right where the left is outside
    assert all(a[1] <= b[0] for a, b in zip(rooms, rooms[1:]))
    for (begin, end), x in zip(shared, at): assert x - steps[begin] < 2 * least or x < 3 * least


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(max_codepoint=0x250), max_size=70), min_size=1, max_size=5), st.floats(40, 200))
@example(["", "", "", "N\x1b\rbƬu"], 40.0)  # a gap between two letters is of neither
def test_names_are_no_longer_than_there_is_room(texts, room):
    name = name_of(texts, room)
    assert wide(name) <= room and "\n" not in name
    if len(texts) == 1 and wide(" ".join(texts[0].split())) <= room: assert name == " ".join(texts[0].split())


def test_a_dollar_is_no_mathematics():
    history = record()
    history.add("train/$x_$/loss", 1.0, 1)
    history.add("valid/$\\frac$", 1.0, 1)
    history.mark("note", 100, "costs $x_$ and $\\frac$")
    plot = Plot()
    plot.update(history.snapshot())
    assert plot.pixels().shape == (280, 900, 3)
    assert plot.painting.panels[0][1].written[0].text == "costs $x_$ and $\\frac$"


def test_marks_are_laid_out_again_only_when_they_change():
    history, plot = record(), Plot()
    history.mark("command", 100, "lr: 1 → 0.1")
    plot.update(history.snapshot())
    name, = plot.painting.panels[0][1].written
    history.add("train/generator/loss", 1.0, 201)
    plot.update(history.snapshot())
    assert plot.painting.panels[0][1].written == [name]
    history.mark("command", 201, "lr: 0.1 → 1")
    plot.update(history.snapshot())
    assert name not in plot.painting.panels[0][1].written and name.parts[0].axes is None  # taken away


@pytest.mark.parametrize("end", ["stopped", "interrupted"])
def test_a_stop_leaves_its_mark_on_the_still_picture(monkeypatch, tmp_path, end):
    drawn, update = [], Plot.update
    monkeypatch.setattr(Plot, "update", lambda self, snapshot: (drawn.append(self), update(self, snapshot))[1])
    run = Run(Curves(), run=tmp_path)
    run.fit(2, end=end, at=15)
    assert names_of(drawn[-1].painting.panels[0][1]) == [(15, end, "right")]
    run.fit(1)  # goes on
    assert names_of(drawn[-1].painting.panels[0][1]) == [(15, end, "right")]


def test_no_pyplot():
    "Neither importing nor drawing may load pyplot, or leave anything in its global state."
    code = ("import sys\nfrom trainkit.ui import front, plots, progress, samples\n"
            "heavy = {'matplotlib', 'ipywidgets', 'fastprogress', 'IPython', 'pandas', 'PIL'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
            "from trainkit.history import History\nh = History(); h.add('train/loss', 1.0, 1)\n"
            "p = plots.Plot(); p.update(h.snapshot()); p.pixels()\nassert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_curves_are_written_for_a_run(tmp_path):
    run = Run(Curves(), run=tmp_path)
    run.fit(1)
    with pytest.raises(ValueError): run.fit(1, end=ValueError("x"), at=13)
    from PIL import Image
    assert Image.open(tmp_path / "curves.png").size == (1350, 420)


# ---- text

@pytest.fixture
def eager(monkeypatch):
    "Draw at every opportunity."
    monkeypatch.setattr(Budget, "due", lambda self: True)


def test_table_takes_columns_as_they_come():
    table = Table()
    table.add({"epoch": "1", "loss": "0.5", "time": "0:01"})
    table.add({"epoch": "2", "valid loss": "0.7", "time": "0:01"})
    assert table.cells(5) == [["epoch", "loss", "valid loss", "time"],
                              ["1", "0.5", "", "0:01"], ["2", "", "0.7", "0:01"]]
    assert table.cells(1)[1:] == [["2", "", "0.7", "0:01"]]


@given(st.floats(-1e300, 1e300) | st.just(math.nan) | st.just(math.inf))
def test_digits_are_short_and_right(value):
    text = progress.digits(value)
    assert len(text) <= 11
    back = float(text)
    assert back == pytest.approx(value, rel=5e-4, abs=1e-300, nan_ok=True)


@pytest.mark.parametrize("state, word", [
    ("finished", "finished · step 300 · 1 epoch · 0:10"),
    ("stopped", "stopped at step 300 of 400 · 0:10 · 30 steps/s · learn.fit() goes on"),
    ("interrupted", "interrupted at step 300 of 400 · 0:10 · 30 steps/s · learn.fit() goes on"),
    ("failed", "failed at step 300 of 400 · ValueError: bad · 0:10 · learn.fit() goes on")])
def test_last_word(state, word):
    s = Status(state, 300, 0, 400, epoch=1, elapsed=10.0, error="ValueError: bad" if state == "failed" else "")
    assert progress.last_word(s).startswith(word)


SAID = "interrupted inside step 300 (epoch 1 of 2), saved as 300; learn.fit() goes on, learn.restore('last') goes back"


def test_last_word_is_the_learners_where_it_has_one():
    s = Status("interrupted", 300, 0, 400, epoch=1, elapsed=10.0, ending=SAID)
    where, then = SAID.split("; ")
    assert progress.last_word(s) == f"{where} · 0:10 · 30 steps/s · {then}"
    assert progress.last_word(Status("interrupted", 400, 0, 400, ending=SAID)).endswith("saved as 300 · 0:00")
    assert "learn.restore(&#x27;last&#x27;) goes back</div>" in progress.end_html(s)


class Said(list):
    "A place that keeps the last word, as a terminal and as a page show it."

    def update(self, s, table): assert not s.ending
    row = update
    def close(self, s, table): self.extend([progress.end_text(s, Table()), progress.end_html(s)])


@pytest.mark.parametrize("first", ["Progress", "AutoSave"])
@pytest.mark.parametrize("end", ["stopped", "interrupted"])
def test_the_last_word_tells_what_was_saved(tmp_path, eager, first, end):
    words = Said()
    view, data = Progress(lambda room: words, every=0), (torch.randn(64, 1), torch.randn(64, 1))
    learn = Learner(torch.nn.Linear(1, 1), (data, data), "mse", cbs=[view] if first == "Progress" else [], front="none",
                    run=tmp_path, batch_size=8)  # fmt: skip
    if first == "AutoSave": learn.add(view)
    order = [type(cb).__name__ for cb in learn.cbs if type(cb).__name__ in ("Progress", "AutoSave")]
    assert order == ["AutoSave", "Progress"]

    def broken_off(learn):
        if learn.step == 12: learn.stop() if end == "stopped" else learn._interrupted()

    learn.add(On("after_batch", broken_off))
    with contextlib.suppress(KeyboardInterrupt): learn.fit(epochs=3)
    assert (learn.state, learn.step, [e.step for e in learn.checkpoints]) == (end, 12, [8, 12])
    where, _, then = learn.ending.partition("; ")
    if end == "interrupted": assert "saved as 12" in where and "learn.restore('last') goes back" in then
    text, page = words
    assert text.startswith(where or "stopped at step 12 of 24 ·") and text.endswith(then or "learn.fit() goes on")
    assert text in html.unescape(page)


def test_last_word_promises_nothing_that_does_not_go_on():
    for s in (Status("stopped", 400, 0, 400), Status("failed", 5, 5, 400, error="TypeError: x"), Status("finished", 400)):
        assert "goes on" not in progress.last_word(s)


def test_status_without_any_length():
    s = Status(step=5, losses={"loss": math.nan}, elapsed=1.0)
    assert s.eta is None and progress.status_line(s) == "epoch 1 · step 5 · loss nan · 0:01"


class Screen(io.StringIO):
    "What a terminal shows: carriage returns overwrite."

    def lines(self):
        out = []
        for line in self.getvalue().split("\n"):
            cells = []
            for part in line.split("\r"): cells[: len(part)] = part
            out.append("".join(cells).rstrip())
        return out


def output(make, **kw):
    screen = Screen()
    with contextlib.redirect_stdout(screen): make(**kw)
    return screen


def test_log_has_whole_lines():
    screen = output(lambda: Run(Progress(place=lambda room: LogPlace())).fit(3))
    assert "\r" not in screen.getvalue()
    lines = screen.lines()
    row = r"epoch \d/3 · discriminator loss 1.000 · generator loss 0.5000 · valid score 0\.\d+ · time \d\.\d s"
    assert all(re.match(row, line) for line in lines[:3])
    assert lines[3].startswith("finished · step 30 · 3 epochs") and lines[4:] == [""]


def test_log_gives_a_sign_of_life_inside_a_long_epoch():
    view = Progress(place=lambda room: LogPlace(every=0.05), every=0.0)
    screen = output(lambda: Run(view, batches=20, seconds=0.01).fit(1))
    assert 1 <= sum(" · step " in line and line.startswith("epoch 1/1") for line in screen.lines()) <= 6


@pytest.mark.parametrize("columns", [40, 60, 100, 200])
def test_terminal_line_never_wraps_and_leaves_nothing(columns, monkeypatch, eager):
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = output(lambda: Run(Progress(place=lambda room: TerminalPlace())).fit(2))
    assert all(len(part) < columns for line in screen.getvalue().split("\n") for part in line.split("\r")
               if not line.endswith(part))
    lines = [line for line in screen.lines() if line]
    assert [line.split(" · ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2", "finished"]
    assert "█" not in "".join(lines)


def test_places_work_without_fastprogress(monkeypatch, eager):
    monkeypatch.setitem(sys.modules, "fastprogress", None)
    monkeypatch.setitem(sys.modules, "fastprogress.fastprogress", None)
    screen = output(lambda: Run(Progress(place=lambda room: TerminalPlace())).fit(1))
    assert screen.lines()[-2].startswith("finished")
    sent = notebook_messages(monkeypatch, lambda: Run(Progress(place=NotebookPlace)).fit(1))
    assert all(set(data) == {"text/plain"} for data in sent)
    assert sent[-1]["text/plain"].splitlines()[-1].startswith("finished")


def test_output_that_cannot_show_a_dot():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(out): Run(Progress(place=lambda room: LogPlace())).fit(1)
    out.seek(0)
    assert out.read().splitlines()[-1].startswith("finished | step 10")


# ---- in a notebook, seen through its messages

def notebook_messages(monkeypatch, make):
    "The bundles that displays and updates send."
    import IPython.display
    sent = []

    class Handle:
        def update(self, data, **kw): sent.append(data)

    monkeypatch.setattr(IPython.display, "display", lambda data, **kw: sent.append(data) or Handle())
    make()
    return sent


@pytest.mark.parametrize("end, at, kind", [
    ("finished", None, "finished"), ("stopped", 15, "stopped"), ("interrupted", 15, "interrupted"),
    (KeyboardInterrupt(), 15, "interrupted"), (ValueError("a < b"), 15, "failed")])
def test_notebook_ends_with_a_word_and_the_table_and_no_bar(monkeypatch, eager, end, at, kind):
    def make():
        with contextlib.suppress(KeyboardInterrupt, ValueError):
            Run(Progress(place=NotebookPlace)).fit(2, end=end, at=at)

    sent = notebook_messages(monkeypatch, make)
    live, last = [data["text/html"] for data in sent[:-1]], sent[-1]["text/html"]
    assert all(html.count("<progress") == 2 and "<style>" in html for html in live)
    assert "<progress" not in last and f'class="end {kind}"' in last and "<style>" in last
    assert last.count("<tr>") == (3 if at is None else 2)  # headings and one row for each finished epoch
    if kind == "failed": assert "ValueError: a &lt; b" in last
    assert sent[-1]["text/plain"].splitlines()[-1].startswith(kind)


def test_bars_are_fed_with_what_is_known(monkeypatch, eager):
    sent = notebook_messages(monkeypatch, lambda: Run(Progress(place=NotebookPlace), batches=4).fit(2))
    bars = [re.findall(r"<progress([^>]*)>", data["text/html"]) for data in sent[:-1]]
    fit = [re.search(r'value="(\d+)"', first).group(1) for first, _ in bars if "value" in first]
    assert [int(v) for v in fit] == sorted(map(int, fit)) and fit[0] == "0" and fit[-1] == "8"
    assert all('max="8"' in first for first, _ in bars)
    assert any("value" not in second for _, second in bars)  # validating: nobody knows how long
    unsized = notebook_messages(monkeypatch, lambda: Run(Progress(place=NotebookPlace), sized=False).fit(1))
    assert all("value" not in b for data in unsized[:-1] for b in re.findall(r"<progress([^>]*)>", data["text/html"]))


def test_table_in_progress_is_bounded(monkeypatch, eager):
    sent = notebook_messages(monkeypatch, lambda: Run(Progress(place=NotebookPlace), batches=1).fit(300))
    assert max(len(data["text/html"]) for data in sent[:-1]) < 8_000
    assert sent[-1]["text/html"].count("<tr>") == 201 and "100 earlier epochs" in sent[-1]["text/html"]


def test_an_epoch_that_was_cancelled_has_its_row():
    screen, run = Screen(), Run(Progress(place=lambda room: LogPlace()))
    with contextlib.redirect_stdout(screen):
        run.fit_start, run.fit_steps, run.state = 0, 20, "training"
        run.emit("before_fit")
        run._batch()
        run.epoch, run.batch_idx = 1, 0  # no after_epoch
        run.emit("before_epoch")
        run.emit("cleanup_fit")
    assert screen.lines()[0].startswith("epoch 1/2 · discriminator loss 1.000")


def test_validation_outside_of_a_fit_shows_nothing():
    view = Progress(place=lambda room: LogPlace())
    assert output(lambda: view.after_validate_batch(Run())).getvalue() == ""
    assert view.off is False


# ---- budget and harmlessness

@pytest.mark.parametrize("cost", [0.001, 0.2, 3.0])
def test_budget_holds_its_share(cost):
    now = [0.0]
    budget, times = Budget(every=0.5, share=0.02, credit=0.5, clock=lambda: now[0]), []
    while now[0] < 1000:
        if budget.due():
            times.append(now[0])
            with budget.spend(): now[0] += cost
        now[0] += 0.01
    spent = cost * len(times)
    assert spent <= 0.02 * now[0] + 0.5 + 2 * cost
    assert min(b - a for a, b in zip(times, times[1:])) >= 0.5 + cost - 1e-9
    if cost * 2 > 0.02: assert spent >= 0.9 * 0.02 * now[0]  # and uses it


def test_number_of_drawings_does_not_depend_on_steps(monkeypatch):
    few, many = (len(notebook_messages(monkeypatch, lambda n=n: Run(Progress(place=NotebookPlace), batches=n).fit(1)))
                 for n in (20, 3000))
    assert few <= 3 and many <= 8


@pytest.mark.parametrize("where_", ["before_fit", "after_batch", "after_epoch", "cleanup_fit"])
def test_a_broken_view_warns_once_and_lets_the_run_go_on(where_):
    class Broken(View):
        calls = 0

    def act(self, learn):
        self.calls += 1
        raise OSError("no display")

    act.__name__ = where_
    setattr(Broken, where_, quietly(act))
    view = Broken()
    with pytest.warns(UserWarning, match="Broken is switched off, the run goes on: OSError: no display") as caught:
        run = Run(view)
        run.fit(2)
    assert run.state == "finished" and view.calls == len(caught) == 1
    with pytest.warns(UserWarning): run.fit(1)  # a new fit is a new chance


def test_an_interrupt_passes_through_a_view():
    class Slow(View):
        @quietly
        def after_batch(self, learn): raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt): Run(Slow()).fit(1)


def test_a_drawing_error_leaves_the_last_picture(monkeypatch, eager):
    update, calls = Plot.update, []

    def fails_later(self, snapshot):
        calls.append(1)
        if len(calls) > 2: raise RuntimeError("font")
        update(self, snapshot)

    monkeypatch.setattr(Plot, "update", fails_later)
    with pytest.warns(UserWarning, match="Curves is switched off"):
        sent = notebook_messages(monkeypatch, lambda: Run(Curves(live=True, refresh=0.0), seconds=0.05).fit(1))
    assert "image/png" in sent[-1] and len(calls) == 3


# ---- samples

shapes = st.tuples(st.integers(1, 9), st.sampled_from([1, 3]), st.integers(1, 5), st.integers(1, 5))


@given(hnp.arrays(np.float32, shapes,
                  elements=st.floats(-2, 2, width=32)), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_grid_puts_every_image_in_its_place(images, nrow, pad):
    grid, flat = sample_grid(torch.from_numpy(images), nrow, pad), to_uint8(images)
    n, h, w, _ = flat.shape
    columns = min(nrow, n)
    assert grid.shape == (-(-n // columns) * (h + pad) + pad, columns * (w + pad) + pad, 3)
    for i in range(n):
        top, left = pad + i // columns * (h + pad), pad + i % columns * (w + pad)
        np.testing.assert_array_equal(grid[top : top + h, left : left + w], np.broadcast_to(flat[i], (h, w, 3)))
    if pad: assert (grid[:pad] == 255).all() and (grid[:, -pad:] == 255).all()


@pytest.mark.parametrize("images", [torch.zeros(4, 2), torch.zeros(0, 1, 4, 4), torch.zeros(2, 2, 4, 4),
                                    np.zeros((2, 4, 4), int)])
def test_what_is_not_images_is_refused(images):
    with pytest.raises(ValueError, match="images must be"): sample_grid(images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ranges(dtype):
    x = torch.tensor([[[[-1.0, 0.0], [1.0, 0.5]]]])
    np.testing.assert_array_equal(to_uint8(x.to(dtype)).ravel(), [0, 128, 255, 191])
    np.testing.assert_array_equal(to_uint8(x.abs().to(dtype)).ravel(), [255, 0, 255, 128])


def test_comparison_rows():
    x, y = torch.zeros(3, 1, 4, 4), torch.ones(3, 3, 8, 8)
    grid = comparison_grid(x, y, y)
    assert grid.shape == (3 * 10 + 2, 3 * 10 + 2, 3)
    assert (grid[2:10, 2:10] == 0).all() and (grid[12:20, 2:10] == 255).all()
    with pytest.raises(ValueError, match="got 3, 2"): comparison_grid(x, y[:2])


def test_looking_changes_nothing_of_the_model():
    from types import SimpleNamespace as NS
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.BatchNorm2d(1), torch.nn.Dropout(0.5))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    run = Run(pictures=False)
    run.model, run.players = net, [NS(modules={"model": net})]
    x, rng = torch.rand(4, 1, 8, 8), torch.get_rng_state()
    view = Samples(compare(x, x))
    run.cbs.add(view)
    run.fit(2)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training and all(m.training for m in net) and all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert run.history.media["samples"][-1][1].shape == (3 * 10 + 2, 4 * 10 + 2, 3)
    with pytest.raises(RuntimeError), watching(run): raise RuntimeError
    assert net.training


def test_samples_of_a_run(tmp_path):
    run = Run(Samples(), run=tmp_path)
    run.fit(2)
    steps = [step for step, _ in run.history.media["samples"]]
    assert sorted(o.name for o in (tmp_path / "samples").iterdir()) == [f"step_{step:07d}.png" for step in steps]
    assert steps[0] == 0 and steps[-1] == 20 and len(steps) == len(set(steps))
    with pytest.raises(ValueError): run.fit(1, end=ValueError("x"), at=25)
    assert [step for step, _ in run.history.media["samples"]][-1] < 25  # a failed model is not asked


def test_a_generator_of_points_is_left_alone():
    run = Run(Samples(), pictures=False)
    run.sample_fixed = lambda: torch.zeros(64, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.fit(1)
    assert run.history.media == {}


def test_a_wrong_source_is_reported():
    with pytest.warns(UserWarning, match=r"Samples is switched off.*got shape \(64, 2\)"):
        Run(Samples(source=lambda learn: torch.zeros(64, 2))).fit(1)


@pytest.mark.parametrize("every", ["batch", 0, -1.0, None])
def test_bad_every(every):
    with pytest.raises(ValueError, match="'epoch' or a number of seconds"): Samples(every=every)


# ---- front

ALL = ["Progress", "Curves", "Samples"]

@pytest.mark.parametrize("here, run, names", [
    ("notebook", False, ALL), ("notebook", True, [*ALL, "Thumbnails"]),
    ("terminal", False, ["Progress"]), ("ipython", False, ["Progress"]), ("script", False, ["Progress"]),
    ("terminal", True, [*ALL, "Thumbnails"]), ("script", True, [*ALL, "Thumbnails"])])
def test_front(here, run, names, monkeypatch, tmp_path):
    monkeypatch.setenv("TRAINKIT_WHERE", here)
    assert [type(cb).__name__ for cb in front(Run(run=tmp_path if run else None))] == names


def test_front_leaves_what_the_user_attached(monkeypatch):
    monkeypatch.setenv("TRAINKIT_WHERE", "notebook")
    assert [type(cb).__name__ for cb in front(Run(Curves(log=True), pictures=False))] == ["Progress"]


def test_front_says_what_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(front_module, "find_spec", lambda name: None)
    monkeypatch.setenv("TRAINKIT_WHERE", "notebook")
    words = r"matplotlib \(curves and samples\).*pip install fastprogress matplotlib ipywidgets"
    with pytest.warns(UserWarning, match=words) as caught:
        assert [type(cb).__name__ for cb in front(Run())] == ["Progress"]
    assert len(caught) == 1
    monkeypatch.setenv("TRAINKIT_WHERE", "script")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [type(cb).__name__ for cb in front(Run(run=tmp_path))] == ["Progress", "Thumbnails"]


@given(st.lists(st.tuples(st.integers(1, 900), st.booleans()), min_size=1, max_size=8))
def test_what_is_kept_of_finished_stretches_changes_nothing(moves):
    "A history grows, goes back now and then, and its curve is drawn each time."
    history, finished, rng = History(), Finished(), np.random.default_rng(0)
    for n, back in moves:
        start = len(history)
        if back and start: history.rewind(int(start * rng.random()))
        start = len(history)
        for step in range(start, start + n): history.add("train/loss", float(rng.normal()), step)
        steps, values = history.scalars["train/loss"]
        for drawn, plain in zip(decimate(steps, values, 100, finished), decimate(steps.copy(), values.copy(), 100)):
            np.testing.assert_array_equal(drawn, plain)
