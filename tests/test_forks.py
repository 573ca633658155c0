"Forks: what a run left behind when it went back is what its history and its file tell."
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit.forks import MOST_TAILS, Tail, covered, cut, fork_step, kept, parts
from trainkit.history import History
from trainkit.learner import Learner


def pairs(tail):
    "A tail as plain data."
    return tail.step, {n: list(zip(s.tolist(), v.tolist())) for n, (s, v) in tail.scalars.items()}


def told(history):
    return [pairs(tail) for tail in history.tails]


def train(history, values):
    for step, value in values:
        history.add("train/loss", value, step)
        if step % 5 == 0:
            history.add("valid/loss", -value, step)
        history.add("lr/model", 0.1, step)  # says nothing of the ways


class Ways:
    "The reference: a run is a list of (step, a value no other way has)."

    def __init__(self):
        self.now, self.tails, self.saved, self.count = [], [], [[]], 0

    def train(self, n):
        new = []
        for _ in range(n):
            self.count += 1
            new.append((len(self.now) + len(new) + 1, float(self.count)))
        self.now = self.now + new
        return new

    def restore(self, i):
        to = self.saved[i]
        common = next((k for k, (a, b) in enumerate(zip(self.now, to)) if a != b), min(len(self.now), len(to)))
        if self.now[common:]:
            self.tails.append((common, self.now[common:]))
        self.now = to
        self.tails = [(step, left) for step, left in self.tails if not set(left) <= set(to)]

    def expected(self):
        out = []
        for step, left in self.tails:
            series = {"train/loss": left, "lr/model": [(s, 0.1) for s, _ in left],
                      "valid/loss": [(s, -v) for s, v in left if s % 5 == 0]}
            out.append((step, {n: v for n, v in series.items() if v}))
        return out


def same_tails(history, ways):
    def order(tails): return [(step, dict(sorted(series.items()))) for step, series in tails]
    return order(told(history)) == order(ways.expected())


ops = st.one_of(st.tuples(st.just("train"), st.integers(1, 9)), st.just(("save",)), st.just(("kill",)),
                st.tuples(st.just("restore"), st.integers(0, 5)), st.just(("flush",)))


@given(st.lists(ops, max_size=25), st.booleans())
@settings(max_examples=120, deadline=None)
def test_tails_are_what_was_left(tmp_path_factory, ops, on_disk):
    path = tmp_path_factory.mktemp("run") / "history.jsonl" if on_disk else None
    history, ways, states = History(path), Ways(), [History().state_dict()]
    killed = False
    for op, *how in ops:
        if killed and op != "restore":  # a new kernel knows nothing until it restores
            continue
        if op == "train": train(history, ways.train(*how))
        elif op == "save":
            states.append(history.state_dict())
            ways.saved.append(ways.now)
        elif op == "restore" and len(states) > 1:
            i = 1 + how[0] % (len(states) - 1)
            history.load_state_dict(states[i])
            ways.restore(i)
            killed = False
        elif op == "kill" and on_disk and len(states) > 1:
            history.flush()
            history, killed = History(path), True
        elif op == "flush": history.flush()
        if not killed:
            assert same_tails(history, ways)
            assert [v for _, v in ways.now] == history.scalars.get("train/loss", ((), np.array([])))[1].tolist()
    history.close()
    if on_disk and path.exists():
        again = History.read(path)
        assert same_tails(again, ways)
        if not killed:
            assert [t.time for t in again.tails] == [t.time for t in history.tails]


def test_a_rewind_leaves_a_tail_in_memory_and_file(tmp_path):
    history = History(tmp_path / "h.jsonl")
    train(history, [(s, float(s)) for s in range(1, 11)])
    history.rewind(7)
    train(history, [(8, 0.5)])
    history.close()
    expected = [(7, {"train/loss": [(8, 8.0), (9, 9.0), (10, 10.0)], "valid/loss": [(10, -10.0)],
                     "lr/model": [(8, 0.1), (9, 0.1), (10, 0.1)]})]
    read = History.read(history.path)
    for h in (history, read):
        assert [(step, {n: series[n] for n in expected[0][1]}) for step, series in told(h)] == expected
        assert h.snapshot().tails == tuple(h.tails)
    assert history.tails[0].time == read.tails[0].time > 1e9
    with pytest.raises(ValueError, match="read-only"):
        history.tails[0].scalars["train/loss"][1][0] = 0.0
    assert set(history.state_dict()) == {"columns", "marks"}  # a checkpoint has none of it


def test_files_from_before_there_were_tails(tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text('{"step": 1, "values": {"train/loss": 1.0}}\n{"step": 2, "values": {"train/loss": 2.0}}\n'
                    '{"rewind": 1}\n{"marks": []}\n{"step": 2, "values": {"train/loss": 3.0}}\n')
    history = History.read(path)
    assert told(history) == [(1, {"train/loss": [(2, 2.0)]})] and history.tails[0].time == 0
    path.write_text(path.read_text() + '{"clear": true}\n{"step": 1, "values": {"train/loss": 9.0}}\n')
    assert History.read(path).tails == []  # another run has begun in this file


def test_a_new_run_over_an_old_file_has_no_tails(tmp_path):
    for _ in range(2):
        history = History(tmp_path / "h.jsonl")
        train(history, [(1, 1.0), (2, 2.0)])
        history.rewind(1)
        history.close()
    assert len(History.read(history.path).tails) == 1


def test_a_refused_state_leaves_no_tail():
    history = History()
    train(history, [(1, 1.0), (2, 2.0)])
    with pytest.raises(ValueError):
        history.load_state_dict({"columns": {}})
    assert history.tails == [] and len(history) == 4


def test_when_the_disk_fails_memory_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    history = History(tmp_path / "file" / "h.jsonl")
    train(history, [(1, 1.0)])
    state = history.state_dict()
    train(history, [(2, 2.0)])
    with pytest.warns(UserWarning, match="in memory only"):
        history.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history.load_state_dict(state)
    assert [step for step, _ in told(history)] == [1]


def test_what_tails_occupy_is_bounded():
    history = History()
    for way in range(MOST_TAILS + 10):
        train(history, [(s, way + s / 10) for s in range(1, 4)])
        history.rewind(1)
    assert len(history.tails) == MOST_TAILS and history.tails[-1].scalars["train/loss"][1].tolist() == pytest.approx(
        [way + 0.2, way + 0.3])
    long = Tail(0, {"train/loss": (np.arange(100), np.arange(100.0))})
    assert [t.size for t in kept([long] * 9, values=250)] == [100, 100]
    assert [t.size for t in kept([long], values=50)] == [100]  # the newest stays, `cut` has thinned it


@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_a_long_tail_is_thinned_and_keeps_its_end(n, step, most):
    steps = np.arange(1, n + 1)
    tail = cut({"a": (steps, steps * 2.0), "b": (steps[::3], steps[::3] * 1.0)}, step, most=most)
    left = int((steps > step).sum() + (steps[::3] > step).sum())
    assert tail.size <= left and (tail.size == left or tail.size <= most + 2)
    for name, factor in (("a", 2.0), ("b", 1.0)):
        if name in tail.scalars:
            s, v = tail.scalars[name]
            assert s[0] > step and s[-1] == (steps if name == "a" else steps[::3])[-1] and np.array_equal(v, s * factor)


def test_tails_take_16_bytes_a_value():
    history = History()
    train(history, [(s, float(s)) for s in range(1, 10_001)])
    history.drain()
    before = history.nbytes
    history.rewind(0)
    tail, = history.tails
    assert tail.size == 22_000 and sum(a.nbytes for series in tail.scalars.values() for a in series) == 16 * tail.size
    assert all(a.base is None for series in tail.scalars.values() for a in series)  # and keep nothing larger alive
    assert history.nbytes == 16 * tail.size < before


def columns(**series):
    return {name: (np.array([s for s, _ in c]), np.array([v for _, v in c], float)) for name, c in series.items()}


def test_where_ways_part():
    nan = float("nan")
    old = columns(a=[(1, nan), (2, 2), (3, 3)], b=[(2, 1)])
    assert fork_step(old, columns(a=[(1, nan), (2, 2)], b=[(2, 1)]), 2) == 2
    assert fork_step(old, columns(a=[(1, nan), (2, 2), (3, 4)], b=[(2, 1)]), 3) == 2
    assert fork_step(old, columns(a=[(1, nan), (2, 2), (3, 3)], b=[(2, 5)]), 3) == 1  # the earliest difference counts
    assert fork_step(old, columns(a=[(1, nan), (2, 2)]), 2) == 2  # saved before b was recorded at step 2


def test_the_same_way_again_is_no_other_way():
    tail = cut(columns(a=[(1, 1), (2, 2), (3, 3), (4, 4)]), 2)
    once_more, half, other = (columns(a=[(1, 1), (2, 2), *rest]) for rest in ([(3, 3), (4, 4)], [(3, 3)], [(3, 7)]))
    assert [parts(tail, now) for now in (once_more, half, other, {})] == [False, False, True, False]
    assert [covered(tail, now) for now in (once_more, half, other, {})] == [True, False, False, False]
    sparse = columns(a=[(2, 2), (4, 4)])  # a series that is recorded elsewhere now
    assert not parts(tail, sparse) and parts(tail, columns(a=[(2, 2), (4, 5)]))


# ---- as a learner does it

def learner(run=None, **kw):
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    return Learner(nn.Linear(3, 1), (x, x.sum(1, keepdim=True)), "mse", opt={"name": "sgd", "lr": 0.05}, batch_size=8, seed=1,
                   front="none", run=run, **kw)


def test_a_learner_goes_back_and_takes_another_way(tmp_path):
    learn = learner(tmp_path / "run", save_every=4)
    learn.fit(steps=12)
    was = learn.history.scalars["train/loss"][1][4:]
    learn.restore(4)
    for group in learn.players[0].opt.param_groups: group["lr"] = 0.001
    learn.fit(steps=6)
    tail, = learn.history.tails
    assert tail.step == 4 and tail.scalars["train/loss"][0].tolist() == [*range(5, 13)]
    assert np.array_equal(tail.scalars["train/loss"][1], was)
    assert told(History.read(tmp_path / "run" / "history.jsonl")) == told(learn.history)
    again = learner(tmp_path / "run")
    again.restore("last")
    assert told(again.history) == told(learn.history)  # also in a new kernel


def test_a_resumed_run_is_one_way(tmp_path):
    "Killed at step 11 and gone on from step 8: the same values, so nothing that is worth showing."
    killed = learner(tmp_path / "run", save_every=4)
    killed.fit(steps=11)
    for path in (tmp_path / "run" / "checkpoints").glob("ckpt-000000011*"): path.unlink()
    learn = learner(tmp_path / "run", save_every=4)
    learn.restore("last")
    assert [t.step for t in learn.history.tails] == [8]
    learn.fit(steps=8)
    scalars = learn.history.scalars
    assert not any(parts(t, scalars) for t in learn.history.tails)
    learn.restore("last")
    assert learn.history.tails == []  # covered by what the run has become


def test_a_branch_begins_without_tails(tmp_path):
    learn = learner(tmp_path / "run", save_every=4)
    learn.fit(steps=8)
    learn.branch(4, "other")
    assert learn.history.tails == []
    learn.fit(steps=2)
    assert History.read(tmp_path / "other" / "history.jsonl").tails == []
    assert History.read(tmp_path / "run" / "history.jsonl").tails == []


def test_a_failed_restore_leaves_no_trace(tmp_path):
    learn = learner(tmp_path / "run", save_every=4)
    learn.fit(steps=8)
    before = told(learn.history), len(learn.history)
    state, _ = learn.checkpoints.load(4)
    state["rng"] = {}
    with pytest.raises(ValueError):
        learn.load_state_dict(state)
    assert (told(learn.history), len(learn.history)) == before
    learn.history.flush()
    assert told(History.read(learn.history.path)) == before[0]


# ---- as the curves show it

def drawn(plot, panel=0):
    "What a panel shows: the curve's paler past, the present, the tails (separated by nan), the rings."
    panel, _ = plot.painting.panels[panel]
    curve, ghosts = panel.curves[0], panel.ghosts
    return [tuple(np.asarray(a, float).tolist() for a in line.get_data())
            for line in (curve.past, curve.line, ghosts.lines, ghosts.rings)]


def epochs(history, values, first=1):
    for step, value in enumerate(values, first): history.add("valid/loss", value, 10 * step)


def test_old_ways_are_drawn_behind_the_present_one():
    from trainkit.ui.paint import pale
    from trainkit.ui.plots import Plot
    history, plot = History(), Plot()
    epochs(history, [5, 4, 3, 2])
    plot.update(history.snapshot())
    assert drawn(plot) == [([], []), ([10, 20, 30, 40], [5, 4, 3, 2]), ([], []), ([], [])]
    history.rewind(20)
    plot.update(history.snapshot())  # back, and not yet on another way: the tail, from where it starts
    past, now, tails, rings = drawn(plot)
    assert (past, now, rings) == (([], []), ([10, 20], [5, 4]), ([], []))
    np.testing.assert_array_equal(tails, ([20, 30, 40, np.nan], [4, 3, 2, np.nan]))
    assert plot.painting.panels[0][0].ax.get_xlim()[1] >= 40
    epochs(history, [9], first=3)
    plot.update(history.snapshot())
    past, now, again, rings = drawn(plot)
    assert (past, now, rings) == (([10, 20], [5, 4]), ([20, 30], [4, 9]), ([20], [4]))
    np.testing.assert_array_equal(again, tails)
    panel = plot.painting.panels[0][0]
    curve, ghosts = panel.curves[0], panel.ghosts
    assert curve.past.get_color() == pale(curve.line.get_color()) != curve.line.get_color()
    assert ghosts.lines.get_lw() < curve.line.get_lw() and ghosts.lines.get_zorder() < curve.line.get_zorder()
    assert [t.get_text() for t in panel.legend.get_texts()] == ["valid 9.000"]
    assert panel.legend.legend_handles[0].get_color() == curve.line.get_color()
    low, high = panel.ax.get_ylim()
    assert low < 2 and high > 9  # tails are part of the view
    history.rewind(10)  # once more, to before the first fork: that one lies on a way that was left
    epochs(history, [1], first=2)
    plot.update(history.snapshot())
    past, now, tails, rings = drawn(plot)
    assert (past, now, rings) == (([10], [5]), ([10, 20], [5, 1]), ([10], [5]))
    np.testing.assert_array_equal(tails, ([20, 30, 40, np.nan, 10, 20, 30, np.nan], [4, 3, 2, np.nan, 5, 4, 9, np.nan]))


def test_a_resumed_run_shows_no_fork():
    from trainkit.ui.plots import Plot
    history, plot = History(), Plot()
    epochs(history, [5, 4, 3])
    history.rewind(10)
    epochs(history, [4, 3, 2], first=2)
    plot.update(history.snapshot())
    past, now, _, rings = drawn(plot)
    assert (past, now, rings) == (([], []), ([10, 20, 30, 40], [5, 4, 3, 2]), ([], []))


@pytest.mark.parametrize("log", [False, True])
def test_tails_of_noisy_series_are_trends_of_few_points(log):
    from trainkit.ui.plots import Plot, plot_history
    history, rng = History(), np.random.default_rng(0)
    def go(first, last, level):
        for step in range(first, last + 1):
            history.add("train/loss", level + rng.normal(), step)
            history.add("lr/model", level / step, step)
    go(1, 20_000, 5)
    history.rewind(10_000)
    go(10_001, 12_000, 8)
    plot = Plot(log=log)
    plot.update(history.snapshot())
    losses, rates = drawn(plot)[2], drawn(plot, 1)[2]
    assert len(losses[0]) < 700 and len(rates[0]) < 1300 and losses[0][0] > 10_000
    assert np.nanstd(losses[1]) < 0.3 and abs(np.nanmean(losses[1]) - 5) < 0.3  # of the noise of 1, little is left
    assert np.nanmax(rates[0]) == 20_000 and drawn(plot, 1)[3] == ([], [])
    assert plot.painting.panels[1][0].curves[0].line.get_xdata()[-1] == 12_000  # the present rate is not drawn into the future
    x, now = drawn(plot)[1]
    assert x[0] <= 10_000 < x[1] and abs(np.mean(now[-20:]) - 8) < 0.5
    assert len(plot_history(history, log=log).axes) == 2
    left = plot.draft.contents[0].left
    before = left.lines
    history.add("train/loss", 8.0, 12_001)
    plot.update(history.snapshot())
    assert left.lines is before  # what was seen is not looked at anew


def test_of_many_tails_the_newest_are_drawn():
    from trainkit.ui.plots import Plot, Ways
    history, plot = History(), Plot()
    for way in range(20):
        epochs(history, [way, way, way], first=1 if not way else 2)
        history.rewind(10)
    plot.update(history.snapshot())
    assert np.isnan(drawn(plot)[2][0]).sum() == Ways.most


def test_odd_tails_can_be_drawn():
    from trainkit.ui.plots import Plot
    nan, inf = float("nan"), float("inf")
    for values in ([nan, nan], [inf, -1.0], [1e300, -1e300]):
        history = History()
        epochs(history, [1.0, *values])
        history.rewind(10)
        epochs(history, [2.0], first=2)
        for log in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                plot = Plot(log=log)
                plot.update(history.snapshot())
                assert plot.pixels().shape == (280, 900, 3)


def test_the_picture_of_a_run_shows_its_tails(tmp_path):
    from trainkit.ui.plots import Curves, Plot
    learn, drawn_ = learner(tmp_path / "run", save_every=4, cbs=[Curves()]), []
    learn.fit(steps=12)
    learn.restore(4)
    learn.players[0].opt.param_groups[0]["lr"] = 0.001
    update = Plot.update
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Plot, "update", lambda self, snapshot: (drawn_.append(self), update(self, snapshot))[1])
        learn.fit(steps=3)
    assert drawn_[-1].draft.ways.forks == [4] and (tmp_path / "run" / "curves.png").exists()
