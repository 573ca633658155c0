"Runs beside each other: what is told of them, and what is drawn."

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from trainkit import provenance
from trainkit.compare import Outcome, as_run, best_of_row, compare, diff, differing, labels, means, outcome
from trainkit.history import History
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.runs import Run, runs, start_of, trunk_of
from trainkit.ui.compare import best_first, in_epochs, overlaid, plot_runs
from trainkit.ui.plots import COLOURS, trend

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def learner(run, lr=0.1, **kw):
    torch.manual_seed(0)
    dls = {"train": TensorDataset(X, Y), "valid": TensorDataset(X, Y)}
    return Learner(nn.Linear(3, 1), dls, "mse", OptimBuilder("sgd", lr=lr), batch_size=4, front="none", run=run, keep="all", **kw)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two runs, and a branch of the first that was given another rate."
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "repository_of", lambda folder: {})  # somebody may be editing it meanwhile
        learner(root / "slow", 0.01).fit(3)
        learner(root / "quick", 0.1).fit(4)
        other = learner(root / "slow", 0.01)
        other.restore(12)
        other.branch(12, "warmer")
        other.set("lr", 0.05)
        other.fit(2)
    return root


# ---- what is different

values = st.one_of(st.none(), st.integers(0, 2), st.sampled_from(["a", "b"]))
identities = st.dictionaries(st.sampled_from("xyz"), st.dictionaries(st.sampled_from("abc"), values, max_size=3), max_size=3)


@given(st.lists(identities, min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_what_differs_is_told_and_nothing_else(found):
    rows = {(s, n): v for s, n, v in differing(found)}
    for s in "xyz":
        for n in "abc":
            told = [i.get(s, {}).get(n) for i in found]
            assert rows.get((s, n)) == (told if len(set(told)) > 1 else None)


def test_two_runs_in_words(folder):
    assert diff(folder / "slow", folder / "quick") == ["configuration: model/lr: 0.01 → 0.1"]
    assert diff(folder / "slow", str(folder / "slow")) == [] == diff(folder / "slow", folder / "warmer")


@pytest.mark.parametrize("wrong,error,said", [
    (3, TypeError, "received 3"), ("no-such-run", FileNotFoundError, "no-such-run"),
    (None, TypeError, "received None")])  # fmt: skip
def test_what_is_no_run(wrong, error, said):
    with pytest.raises(error, match=said): as_run(wrong)
    with pytest.raises(ValueError, match="received none"): compare()


# ---- what came of it

@given(st.lists(st.one_of(st.floats(-100, 100), st.just(math.nan)), min_size=1, max_size=60), st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_means_are_means_of_the_values_that_are_numbers(numbers, most):
    a, found = np.array(numbers), means(np.array(numbers), most)
    for i, value in enumerate(found):
        near = a[max(0, i - most + 1) : i + 1]
        assert np.isnan(value) if np.isnan(a[i]) else value == pytest.approx(near[np.isfinite(near)].mean(), abs=1e-9)


def test_an_infinite_value_spoils_its_own_mean_only():
    assert means(np.array([1.0, math.inf, 3.0]), 2).tolist() == [1, math.inf, 3]


@pytest.mark.parametrize("name,best,step", [("valid/loss", 1, 20), ("valid/accuracy", 3, 30), ("valid/psnr", 3, 30),
                                            ("valid/odd", None, None)])  # fmt: skip
def test_the_best_is_the_best_by_the_word_of_the_name(name, best, step):
    found = outcome(name, np.array([10, 20, 30, 40]), np.array([2.0, 1.0, 3.0, math.nan]))
    assert math.isnan(found.last) and found.step == step and (found.best == best if best else math.isnan(found.best))


def test_the_best_run_of_a_row():
    assert best_of_row("valid/loss", [Outcome(0, 2.0, 1), Outcome(0, 1.0, 1)]) == 1
    assert best_of_row("valid/accuracy", [Outcome(0, 2.0, 1), Outcome(0, 1.0, 1)]) == 0
    assert best_of_row("valid/loss", [Outcome(0, 2.0, 1), Outcome(0), None]) is None


# ---- the table

def test_the_table_says_what_the_runs_say(folder):
    found = runs(folder).compare("slow", "quick", "warmer")
    frame = found.to_frame()
    assert list(frame.index) == ["slow", "quick", "warmer"]
    assert frame["configuration/model/lr"].tolist() == [0.01, 0.1, 0.01]
    assert frame["step"].tolist() == [18, 24, 24] and frame["branch of"].tolist()[2] == "slow/12"
    assert frame["commands"].tolist()[:2] == [0, 0] and frame["commands"].tolist()[2] >= 1
    assert (frame["seconds"] > 0).all()
    for name in frame.index:
        history = History.read(folder / name / "history.jsonl")
        steps, values = history.scalars["valid/loss"]
        assert frame["valid/loss"][name] == values[-1] and frame["valid/loss best"][name] == values.min()
        assert frame["valid/loss best step"][name] == steps[values.argmin()]
        assert frame["train/loss"][name] == pytest.approx(history.scalars["train/loss"][1][-20:].mean())
    best = frame["valid/loss best"].idxmin()
    line = next(line for line in repr(found).splitlines() if "valid/loss" in line)
    place = line.index(" *")
    assert abs(line[:place].count("best") - 1 - ["slow", "quick", "warmer"].index(best)) == 0
    assert "seed" not in repr(found) and "configuration" in repr(found)


def test_html_is_escaped_and_marks_the_best(tmp_path):
    for name, loss in ("<a>", 2.0), ("b&c", 1.0):
        history = History(tmp_path / name / "history.jsonl")
        history.add("valid/<loss>", loss, 1)
        history.close()
        (tmp_path / name / "identity.json").write_text(json.dumps({"sessions": [{"configuration": {"x": f"<b>{name}"}}]}))
    text = runs(tmp_path).compare()._repr_html_()
    assert "<a>" not in text and "&lt;a&gt;" in text and "b&amp;c" in text and "&lt;b&gt;&lt;a&gt;" in text
    assert "<b>1 (best 1 at 1)</b>" in text


def test_runs_that_say_nothing_are_named(folder, tmp_path):
    history = History(tmp_path / "old" / "history.jsonl")
    history.add("train/loss", 1.0, 1)
    history.close()
    text = repr(compare(folder / "slow", tmp_path / "old"))
    assert "(not said what it was made with: old)" in text and "–" in text
    empty = compare(tmp_path / "old", names=["train/*"])
    assert empty.outcomes[0][0] == "train/loss"
    with pytest.raises(ValueError, match="no series matches 'train/lss'; there are: train/loss"):
        compare(tmp_path / "old", names=["train/lss"])


def test_without_pandas(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"): compare(folder / "slow").to_frame()


# ---- branches

def test_where_a_branch_begins(folder):
    found = runs(folder)
    assert start_of(found["warmer"]) == 12 and start_of(found["slow"]) == 0
    assert trunk_of(found["warmer"], [*found]) is found["slow"] and trunk_of(found["warmer"], [found["warmer"]]) is None
    twins = [Run("x/slow", folder / "x" / "slow"), found["slow"]]
    assert trunk_of(found["warmer"], twins) is found["slow"], "the one beside it"


# ---- the picture

def lines(figure, colour=None):
    return [line for ax in figure.axes for line in ax.lines if colour in (None, line.get_color()) and line.get_marker() != "o"]


def test_each_run_has_its_colour_in_each_panel(folder):
    figure = runs(folder).plot("slow", "quick", smooth=0)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["valid/loss", "train/loss"]
    for colour, name in zip(COLOURS, ["slow", "quick"]):
        history = History.read(folder / name / "history.jsonl")
        for line, series in zip(lines(figure, colour), ["valid/loss", "train/loss"]):
            np.testing.assert_array_equal(line.get_data(), history.scalars[series])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["slow", "quick"]


@pytest.mark.parametrize("names", [["slow", "warmer"], ["warmer"]])
def test_a_branch_begins_at_a_ring(folder, names):
    figure = runs(folder).plot(*names, names=["valid/loss"], smooth=0)
    steps, values = History.read(folder / "warmer" / "history.jsonl").scalars["valid/loss"]
    ring, = (line for line in figure.axes[0].lines if line.get_marker() == "o")
    assert ring.get_xydata().tolist() == [[12, values[steps == 12][0]]]
    own = lines(figure, COLOURS[len(names) - 1])[0]
    assert own.get_xdata().tolist() == steps[steps >= 12].tolist()
    pasts = [line for line in lines(figure) if line.get_color() not in COLOURS]
    assert [line.get_xdata().tolist() for line in pasts] == ([] if "slow" in names else [steps[steps <= 12].tolist()])


def test_smoothing_is_that_of_the_other_pictures(tmp_path):
    history, noise = History(tmp_path / "a" / "history.jsonl"), np.random.default_rng(0)
    for step in range(200): history.add("train/loss", noise.normal() + 5, step)
    history.close()
    figure = plot_runs(tmp_path / "a", smooth=0.8)
    faint, line = sorted(lines(figure), key=lambda line: line.get_linewidth())
    np.testing.assert_allclose(line.get_data(), trend(*history.scalars["train/loss"], 0.8))
    assert faint.get_alpha() == 0.25


def test_epochs_are_another_axis(folder):
    figure = runs(folder).plot("quick", names=["valid/loss"], by="epoch")
    assert lines(figure)[0].get_xdata().tolist() == [1, 2, 3, 4] and figure.axes[0].get_xlabel() == "epoch"
    history = History()
    for step, epoch in (7, 3), (9, 4): history.mark("epoch", step, str(epoch))
    assert in_epochs(history.snapshot())(np.array([0.0, 7, 8, 9, 11])).tolist() == [0, 3, 3.5, 4, 5]


def many(root, n=20):
    for i in range(n):
        history = History(root / f"run-{i:02d}" / "history.jsonl")
        for step in range(5): history.add("valid/loss", (i * 7) % n + 1.0 / (step + 1), step)
        history.close()
    return runs(root)


def test_of_many_runs_the_best_are_in_colour(tmp_path):
    figure = many(tmp_path).plot()
    coloured = {line.get_color(): line.get_ydata()[-1] for line in lines(figure) if line.get_color() in COLOURS}
    grey = [line.get_ydata()[-1] for line in lines(figure) if line.get_color() not in COLOURS]
    assert len(coloured) == 7 and len(grey) == 13 and max(coloured.values()) < min(grey)
    assert [t.get_text() for t in figure.legends[0].get_texts()][-1] == "13 others"


def test_runs_without_the_series_come_last_and_nan_is_no_best():
    def snapshot(**series):
        history = History()
        for name, numbers in series.items():
            for step, value in enumerate(numbers): history.add(f"valid/{name}", value, step)
        return history.snapshot()

    found = [snapshot(), snapshot(loss=[math.nan]), snapshot(loss=[3]), snapshot(loss=[1, math.nan]), snapshot(accuracy=[1])]
    assert best_first(found, "valid/loss")[:2] == [3, 2]
    names = [Run(str(i), Path(str(i))) for i in range(5)]
    assert [one.colour for one in overlaid(names, found, "valid/loss", 2)] == ["", "", COLOURS[0], COLOURS[1], ""]


def test_odd_values_and_names_can_be_drawn(tmp_path):
    history = History(tmp_path / "$a$" / "history.jsonl")
    for step, value in enumerate([math.nan, math.inf, -1.0, 0.0, 2.0]): history.add("valid/$x_loss", value, step)
    history.add("lr/model", 0.1, 0)
    history.close()
    for log in (False, True):
        picture = plot_runs(tmp_path / "$a$", names=["*"], log=log)._repr_png_()
        assert np.asarray(Image.open(io.BytesIO(picture)).convert("L")).std() > 5


@pytest.mark.parametrize("wrong,said", [({"by": "hour"}, "received 'hour'"), ({"smooth": 1}, "0 <= smooth < 1"),
                                        ({"names": ["valid/lost"]}, "there are: valid/loss")])  # fmt: skip
def test_what_cannot_be_drawn(folder, wrong, said):
    with pytest.raises(ValueError, match=said): runs(folder).plot(**wrong)


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="received none"): plot_runs()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "history.jsonl").write_text("")
    with pytest.raises(ValueError, match="none of these 1 runs has a series"): plot_runs(tmp_path / "a")


def test_pyplot_is_not_loaded(folder):
    import subprocess
    code = ("import sys; from trainkit.runs import runs; found = runs(sys.argv[1]); assert 'torch' not in sys.modules; "
            "found.plot(); assert 'matplotlib.pyplot' not in sys.modules; "
            "found.compare(); assert 'pandas' not in sys.modules")  # fmt: skip
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


# ---- names

def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path):
    for place in ("one/exp", "two/exp", "two/other"): learner(tmp_path / place).fit(1)
    found = compare(tmp_path / "one" / "exp", tmp_path / "two" / "exp", tmp_path / "two" / "other")
    assert found.names == ["one/exp", "two/exp", "other"] == [*found.to_frame().index]
    assert repr(found).splitlines()[0].split() == found.names and all(f">{name}<" in found._repr_html_() for name in found.names)
    figure = plot_runs(tmp_path / "one" / "exp", tmp_path / "two" / "exp")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one/exp", "two/exp"]


paths = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map("/".join)


@given(st.lists(paths, min_size=1, max_size=5, unique=True))
@settings(max_examples=150, deadline=None)
def test_labels_tell_runs_apart_and_end_with_their_names(found):
    some = [Run(Path(path).name, Path("/root", path)) for path in found]
    told = labels(some)
    assert all(f"/root/{path}".endswith(label) for path, label in zip(found, told))
    assert all(Path(label).name == run.name for label, run in zip(told, some)) and len({*told}) == len(told)
