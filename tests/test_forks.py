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
