"History: what was added is what is read, from memory, from the file and from a checkpoint."
import io
import json
import math
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit import history as module
from trainkit.history import History, fetch

names = st.sampled_from(["train/loss", "train/generator/loss", "valid/acc", "lr/main"])
numbers = st.one_of(st.floats(width=32), st.integers(-(2**31), 2**31 - 1), st.booleans())
steps = st.integers(0, 30)
adds = st.tuples(st.just("add"), names, numbers, steps, st.sampled_from(["number", "tensor", "numpy"]))
marks = st.tuples(st.just("mark"), st.sampled_from(["epoch", "checkpoint"]), steps)
rewinds = st.tuples(st.just("rewind"), steps)
looks = st.sampled_from([("drain",), ("flush",)])


def same(a, b):
    "Two histories (or dicts of columns) hold the same series; nan equals nan."
    a, b = (o.scalars if isinstance(o, History) else o for o in (a, b))
    return a.keys() == b.keys() and all(
        np.array_equal(x, y, equal_nan=True) for n in a for x, y in zip(a[n], b[n]))


class Model:
    "The reference: a plain list of what was said."

    def __init__(self): self.values, self.marks = [], []

    def columns(self):
        out = {}
        for name, value, step in self.values: out.setdefault(name, []).append((step, float(value)))
        return {n: (np.array([s for s, _ in c]), np.array([v for _, v in c])) for n, c in out.items()}

    def rewind(self, step):
        self.values = [o for o in self.values if o[2] <= step]
        self.marks = [o for o in self.marks if o[1] <= step]


def play(history, ops):
    model, wrap = Model(), {"number": lambda v: v, "tensor": torch.tensor, "numpy": np.asarray}
    for op in ops:
        if op[0] == "add":
            _, name, value, step, kind = op
            history.add(name, wrap[kind](value), step)
            model.values.append((name, value, step))
        elif op[0] == "mark":
            history.mark(op[1], op[2])
            model.marks.append(op[1:])
        elif op[0] == "rewind":
            history.rewind(op[1])
            model.rewind(op[1])
        else: getattr(history, op[0])()
    return model


@given(st.lists(st.one_of(adds, adds, adds, marks, rewinds, looks), max_size=40))
@settings(max_examples=60, deadline=None)
def test_memory_file_and_checkpoint_agree_with_a_list(tmp_path_factory, ops):
    path = tmp_path_factory.mktemp("run") / "history.jsonl"
    history = History(path)
    model = play(history, ops)
    assert same(history, model.columns())
    assert [(m.kind, m.step) for m in history.marks] == model.marks
    assert len(history) == len(model.values)

    history.close()
    if path.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = History.read(path)
        assert same(again, history)
        assert again.marks == history.marks

    buffer = io.BytesIO()
    torch.save(history.state_dict(), buffer)
    buffer.seek(0)
    loaded = History()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert same(loaded, history)
    assert loaded.marks == history.marks


some = st.lists(st.one_of(adds, marks, rewinds), max_size=20)


@given(some, some, st.booleans())
@settings(max_examples=40, deadline=None)
def test_file_follows_a_restore(tmp_path_factory, before, after, new_kernel):
    path = tmp_path_factory.mktemp("run") / "history.jsonl"
    history = History(path)
    play(history, before)
    state = history.state_dict()
    play(history, after)
    history.flush()
    if new_kernel: history = History(path)
    history.load_state_dict(state)
    history.add("train/loss", 0.125, 99)
    history.flush()
    again = History.read(path)
    assert same(again, history)
    assert again.marks == history.marks


def test_restoring_the_past_of_a_run_costs_one_line(tmp_path):
    history = History(tmp_path / "h.jsonl")
    for i in range(100): history.add("train/loss", i, i)
    state = history.state_dict()
    for i in range(100, 200): history.add("train/loss", i, i)
    history.close()
    lines = len(history.path.read_text().splitlines())
    resumed = History(tmp_path / "h.jsonl")
    resumed.load_state_dict(state)
    resumed.close()
    assert len(history.path.read_text().splitlines()) == lines + 2  # a rewind and the marks
    assert len(History.read(history.path)) == 100


def test_a_new_run_over_an_old_file_replaces_it_logically(tmp_path):
    for loss in (1.0, 2.0):
        history = History(tmp_path / "h.jsonl")
        history.add("train/loss", loss, 1)
        history.close()
    assert History.read(history.path).scalars["train/loss"][1].tolist() == [2.0]
    History(tmp_path / "h.jsonl").close()  # opening and closing writes nothing
    assert History.read(history.path).scalars["train/loss"][1].tolist() == [2.0]


def test_file_is_strict_json_and_keeps_non_finite_values(tmp_path):
    history = History(tmp_path / "h.jsonl")
    for i, v in enumerate([math.nan, math.inf, -math.inf, 0.1]): history.add("train/loss", v, i)
    history.mark("command", 3, "lr", value=math.nan)
    history.close()

    def refuse(name): raise AssertionError(f"{name} is not JSON")
    for line in history.path.read_text().splitlines(): json.loads(line, parse_constant=refuse)
    values = History.read(history.path).scalars["train/loss"][1]
    np.testing.assert_array_equal(values, [math.nan, math.inf, -math.inf, 0.1])


@given(st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_torn_last_line(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("run") / "h.jsonl"
    history = History(path)
    for i in range(20): history.add("train/loss", i, i)
    history.close()
    data = path.read_bytes()
    kept = data[: len(data) - min(cut, len(data) - 40)]
    path.write_bytes(kept)
    whole = kept.count(b"\n") + (0 if kept.endswith(b"\n") else _complete(kept.rsplit(b"\n", 1)[-1]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = History.read(path)
    assert read.scalars["train/loss"][0].tolist() == list(range(whole))
    torn = not kept.endswith(b"\n") and not _complete(kept.rsplit(b"\n", 1)[-1])
    assert bool(caught) == torn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = History(path)  # a run that goes on after the crash does not glue its first line to the torn one
        after.load_state_dict(read.state_dict())
        after.add("train/loss", 7.0, 50)
        after.close()
        assert same(History.read(path), after)


def _complete(line):
    try: return int(isinstance(json.loads(line), dict))
    except ValueError: return 0


def test_not_a_history(tmp_path):
    (tmp_path / "x").write_text("hello\nworld\n")
    with pytest.raises(ValueError, match="is not a history"): History.read(tmp_path / "x")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_fetch_equals_item(dtype):
    values = [torch.tensor(i % 2 if dtype is torch.bool else i * 0.5).to(dtype) for i in range(10)]
    mixed = [o for v in values for o in (v, 0.25, v.float().reshape(1, 1), 3)]
    assert fetch(mixed) == [float(o.item()) if isinstance(o, torch.Tensor) else float(o) for o in mixed]


def test_fetch_survives_a_dead_device(monkeypatch):
    monkeypatch.setattr(module.torch, "stack", lambda ts: (_ for _ in ()).throw(RuntimeError("device-side assert")))
    with pytest.warns(UserWarning, match="device-side assert"): out = fetch([1.0, torch.tensor(2.0)])
    assert out[0] == 1.0 and math.isnan(out[1])


def test_pending_tensors_are_fetched_together(monkeypatch):
    "Tensors of an accelerator are kept as they are (here: faked) and read in one go per device and dtype."
    monkeypatch.setattr(module, "as_scalar", lambda value, name: value)
    calls, stack = [], torch.stack
    monkeypatch.setattr(module.torch, "stack", lambda ts: calls.append(len(ts)) or stack(ts))
    history = History()
    for i in range(100):
        history.add("train/loss", torch.tensor(float(i)), i)
        history.add("train/count", torch.tensor(i), i)
    assert calls == []
    assert history.scalars["train/loss"][1].tolist() == list(range(100))
    assert calls == [100, 100]
    for i in range(History.max_pending + 1): history.add("x", torch.tensor(1.0), i)
    assert calls[2:] == [History.max_pending + 1] and len(history._pending) == 0  # nobody looked: it drains itself


def test_an_interrupted_drain_loses_nothing(monkeypatch):
    history = History()
    for i in range(5): history.add("train/loss", i, i)
    with monkeypatch.context() as m:
        m.setattr(module, "fetch", lambda values: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): history.drain()
    assert history.scalars["train/loss"][1].tolist() == list(range(5))


def test_a_recorded_value_does_not_follow_the_tensor():
    history, running = History(), torch.zeros(())
    for i in range(3):
        running += 1
        history.add("train/loss", running, i)
    assert history.scalars["train/loss"][1].tolist() == [1, 2, 3]


@pytest.mark.parametrize("name, value, step, error", [
    ("x", "0.5", 1, TypeError), ("x", None, 1, TypeError), ("x", [1.0], 1, TypeError),
    ("x", torch.ones(2), 1, ValueError),
    ("x", torch.tensor(1j), 1, ValueError), ("x", 1 + 2j, 1, TypeError), ("x", np.ones(3), 1, TypeError),
    ("x", 1.0, -1, ValueError), ("x", 1.0, 2**63, ValueError), ("x", 1.0, 1.5, TypeError), (3, 1.0, 1, TypeError),
    ("x", 10**400, 1, OverflowError),
])
def test_bad_values_are_refused_and_change_nothing(name, value, step, error):
    history = History()
    history.add("x", 1.0, 0)
    with pytest.raises(error): history.add(name, value, step)
    assert same(history, {"x": (np.array([0]), np.array([1.0]))}) and history.version == 1


@pytest.mark.parametrize("image", [np.zeros((4, 4)), np.zeros(4, np.uint8), np.zeros((4, 4, 4), np.uint8), "picture"])
def test_bad_pictures(image):
    history = History()
    with pytest.raises(ValueError, match="HxW or HxWx3"): history.put("samples", image, 1)
    assert history.media == {}


def test_bad_marks_and_states_change_nothing():
    history = History()
    history.add("x", 1.0, 0)
    with pytest.raises(TypeError, match=r"data.model"): history.mark("command", 1, model=object())
    for state in ({}, {"columns": {"x": 3}, "marks": []}, {"columns": {}, "marks": [{"colour": 1}]},
                  {"columns": {"x": {"steps": torch.arange(2), "values": torch.ones(3)}}, "marks": []}):
        with pytest.raises(ValueError): history.load_state_dict(state)
    assert history.marks == [] and same(history, {"x": (np.array([0]), np.array([1.0]))})


def test_media_keeps_the_last_and_rewinds():
    history = History(keep=3)
    picture = np.zeros((2, 2, 3), np.uint8)
    for i in range(5):
        picture[:] = i
        history.put("samples", picture, i)
    assert [(s, int(a[0, 0, 0])) for s, a in history.media["samples"]] == [(2, 2), (3, 3), (4, 4)]
    history.rewind(3)
    assert [s for s, _ in history.media["samples"]] == [2, 3]


def test_snapshot_and_columns_do_not_change_afterwards():
    history = History()
    for i in range(70): history.add("train/loss", i, i)
    snapshot, columns = history.snapshot(), history.scalars
    history.rewind(3)
    for i in range(500): history.add("train/loss", -1.0, 4 + i)
    assert len(history) == 504
    for steps, values in (snapshot.scalars["train/loss"], columns["train/loss"]):
        assert values.tolist() == steps.tolist() == list(range(70))
    with pytest.raises(ValueError): snapshot.scalars["train/loss"][1][0] = 5.0
    with pytest.raises(TypeError): snapshot.scalars["x"] = 1


def test_version_grows_with_every_change():
    history, seen = History(), []
    for change in (lambda: history.add("x", 1.0, 5), lambda: history.mark("epoch", 5),
                   lambda: history.put("s", np.zeros((2, 2), np.uint8), 5), lambda: history.rewind(2),
                   lambda: history.load_state_dict(history.state_dict())):
        seen.append(history.version)
        change()
        assert history.version > seen[-1]
        assert history.snapshot().version == history.version


def test_threads_may_read_while_one_writes(tmp_path):
    history, n, stop, errors = History(tmp_path / "h.jsonl"), 20_000, threading.Event(), []

    def read():
        try:
            while not stop.is_set():
                for steps, values in history.snapshot().scalars.values():
                    assert np.array_equal(steps, values) and (np.diff(steps) == 1).all()
                history.flush()
        except BaseException as e: errors.append(e)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for t in readers: t.start()
    for i in range(n):
        history.add("a", i, i)
        history.add("b", torch.tensor(i), i)
    stop.set()
    for t in readers: t.join()
    assert not errors
    assert all(v.tolist() == list(range(n)) for _, v in history.scalars.values())
    history.close()
    assert same(History.read(history.path), history)


def test_memory_is_bounded():
    history = History()
    for i in range(30_000): history.add("train/loss", float(i), i)
    history.drain()
    assert 16 * 30_000 <= history.nbytes <= 20 * 30_000 + 2048


def test_long_runs_reach_the_file_before_the_epoch_ends(tmp_path):
    history = History(tmp_path / "h.jsonl")
    for i in range(30_000): history.add("train/loss", float(i), i)
    assert len(history._journal.waiting) <= 6 * History.max_pending
    assert len(History.read(history.path)) > 10_000


def test_a_full_disk_does_not_stop_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    history = History(tmp_path / "file" / "h.jsonl")  # its folder cannot be made
    history.add("x", 1.0, 1)
    with pytest.warns(UserWarning, match="in memory only"): history.flush()
    history.add("x", 2.0, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history.flush()
    assert history.scalars["x"][1].tolist() == [1, 2] and history._journal.waiting == []


def test_frame():
    pd = pytest.importorskip("pandas")
    history = History()
    for i in (1, 2, 2): history.add("train/loss", i / 2 + history.last("train/loss", 0.0), i)
    history.add("valid/acc", 0.5, 2)
    expected = pd.DataFrame({"train/loss": [0.5, 2.5], "valid/acc": [math.nan, 0.5]})
    expected.index = pd.Index([1, 2], name="step")
    pd.testing.assert_frame_equal(history.to_frame(), expected)
