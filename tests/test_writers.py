"A run as others see it: event files, trackers, tables and movies, read back and compared with the history."
import csv
import json
import logging
import math
import random
import shlex
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from ways import ENDINGS, end_by, same_weights

from trainkit.callback import On
from trainkit.callbacks.clip import ClipGradNorm
from trainkit.callbacks.running import RunningMeans
from trainkit.forks import Tail
from trainkit.history import History
from trainkit.learner import Learner
from trainkit.ui.movie import durations, evenly, frame, movie, pictures_on_disk
from trainkit.ui.telling import Told, Writer, diverged, noted, recalled
from trainkit.ui.view import save_png
from trainkit.ui.writers import EpochFile, MLflow, TensorBoard, Trackio, WandB, epochs_of, read_events, write_epochs

X = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))


def learner(*cbs, run=None, valid=False, **kw):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    data = (X, X.sum(1, keepdim=True))
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    return Learner(net, {"train": data, "valid": data} if valid else data, "mse", "adam", cbs=cbs, front="none", batch_size=8,
                   run=run, **kw)  # fmt: skip


def pictures(every=1):
    return On("after_epoch", lambda learn: learn.history.put("samples", np.full((4, 6, 3), learn.epoch, np.uint8), learn.step))


def warned(do):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        do()
    return [str(w.message) for w in caught if "switched off" in str(w.message)]


# ---- what is new

class Listener:
    "Somebody who can take back what he was told, or can't even hold it exactly."

    def __init__(self, dtype=np.float64):
        self.told, self.has, self.marks, self.dtype = Told(), {}, set(), dtype

    def hear(self, history):
        now = history.snapshot()
        if (step := self.told.back(now)) is not None:
            self.has = {name: [o for o in rows if o[0] <= step] for name, rows in self.has.items()}
        news = self.told.news(now, {})
        for step, values in news.rows():
            for name, value in values.items(): self.has.setdefault(name, []).append((step, value))
        assert not self.marks & {(m.kind, m.step, m.time) for m in news.marks}, "told twice"
        self.marks |= {(m.kind, m.step, m.time) for m in news.marks}

    def agrees(self, history):
        expected = {name: [*zip(s.tolist(), v.tolist())] for name, (s, v) in history.scalars.items()}
        assert {k: v for k, v in self.has.items() if v} == expected
        assert self.marks >= {(m.kind, m.step, m.time) for m in history.marks if m.kind != "epoch"}


acts = st.lists(st.tuples(st.sampled_from(["train", "train", "valid", "mark", "back", "look"]), st.integers(0, 3)), max_size=60)


@given(acts)
@settings(max_examples=150, deadline=None)
def test_whoever_listens_now_and_then_knows_the_history(acts):
    history, listener, step = History(), Listener(), 0
    for act, n in [*acts, ("look", 0)]:
        if act == "back": history.rewind(step := max(0, step - n))
        elif act == "look": listener.hear(history)
        elif act == "mark": history.mark("note", step, str(n))
        else:
            step += act == "train"
            history.add(act, n, step)  # so few values that another way often looks like the one that was left
    listener.agrees(history)


def test_a_state_from_elsewhere_is_compared_by_value():
    history, other, listener = History(), History(), Listener()
    for step in range(100): history.add("a", math.sin(step), step)
    listener.hear(history)
    for step in range(50): other.add("a", math.sin(step), step)
    history.load_state_dict(other.state_dict())
    for step in range(50, 60): history.add("a", 7.0, step)
    assert diverged(listener.told.scalars, history.snapshot().scalars) == 49
    listener.hear(history)
    listener.agrees(history)


def test_what_float32_can_hold_is_told_only_once():
    history = History()
    for step, value in enumerate([0.1, math.nan, 1e300, -math.inf, 1 / 3]): history.add("a", value, step)
    steps, values = history.scalars["a"]
    with np.errstate(all="ignore"): told = Told({"a": (steps.copy(), values.astype(np.float32))})
    assert told.back(history.snapshot()) is None and not told.news(history.snapshot(), {}).scalars


def test_a_note_holds_for_what_it_was_made_of():
    history, told = History(), Told()
    history.add("b", 1, 0)
    for step in range(10): history.add("a", step, step)
    told.news(history.snapshot(), {})
    note = json.loads(json.dumps(noted(told)))
    assert recalled(note, history.snapshot()) is not None
    history.rewind(8)
    assert recalled(note, history.snapshot()) is None  # fewer
    history.add("a", 9.5, 9)
    assert recalled(note, history.snapshot()) is None  # others
    for garbage in (None, [], "x", {"series": {"a": 3}}, {"series": {}, "keys": 3}, {}):
        assert recalled(garbage, history.snapshot()) is None


# ---- TensorBoard

def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    logging.getLogger("tensorboard").setLevel(logging.CRITICAL)  # it tells of what it purges
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def agrees(folder, history):
    "Every curve that TensorBoard shows is the history's, value by value."
    files = events(folder)
    assert sorted(files.Tags()["scalars"]) == sorted(history.scalars)
    for name, (steps, values) in history.scalars.items():
        found = files.Scalars(name)
        assert [o.step for o in found] == steps.tolist(), name
        np.testing.assert_array_equal(np.float32([o.value for o in found]), values.astype(np.float32))
    tags = [t for t in files.Tags()["tensors"] if not t.startswith("hyper")]
    said = [(t.removesuffix("/text_summary"), o.step, o.wall_time) for t in tags for o in files.Tensors(t)]
    assert len(said) == len(set(said)) and set(said) >= {(m.kind, m.step, m.time) for m in history.marks if m.kind != "epoch"}
    return files


@pytest.mark.parametrize("ending", ENDINGS)
def test_tensorboard_has_everything_however_a_fit_ends(ending, tmp_path):
    learn = learner(TensorBoard(every=1e-6), pictures(), run=tmp_path / "run", valid=True)
    assert not warned(lambda: end_by(learn, ending, at=6))
    files = agrees(tmp_path / "run" / "tensorboard", learn.history)
    if ending == "finish":
        taken = files.Images("samples")
        assert [o.step for o in taken] == [4, 8, 12]
        import io
        for n, o in enumerate(taken, 1): assert (np.asarray(Image.open(io.BytesIO(o.encoded_image_string))) == n).all()
        table = files.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "| model/optimizer | Adam |" in table and "| model/lr | 0.001 |" in table


def test_tensorboard_follows_a_run_back_and_forth(tmp_path):
    learn = learner(TensorBoard(), pictures(), run=tmp_path / "run", valid=True, keep="all")
    folder = tmp_path / "run" / "tensorboard"
    learn.fit(epochs=4)
    agrees(folder, learn.history)
    learn.restore(8)
    learn.set("lr", 0.5)
    learn.fit(epochs=1)
    agrees(folder, learn.history)
    learn.restore(16)  # the way that was left, again
    learn.fit(epochs=1)
    agrees(folder, learn.history)
    other = learner(TensorBoard(), pictures(), run=tmp_path / "run", valid=True, keep="all")  # as in another process
    other.restore(4)
    other.fit(epochs=3)
    files = agrees(folder, other.history)
    assert [o.step for o in files.Images("samples")] == [4, 8, 12, 16]
    again = learner(TensorBoard(), run=tmp_path / "run", valid=True)
    again.restore("last")
    size = sum(p.stat().st_size for p in folder.iterdir())
    again.fit(epochs=1)
    agrees(folder, again.history)
    assert sum(p.stat().st_size for p in folder.iterdir()) - size < size / 2, "what was told is not told again"


def test_files_of_one_second_are_read_in_the_order_of_writing(tmp_path):
    "TensorBoard reads them by name: the second, the host, the process, and a number in which 10 comes before 9."
    def make(): return learner(TensorBoard(), run=tmp_path / "run", keep="all")

    make().fit(epochs=3)
    folder = tmp_path / "run" / "tensorboard"
    (file,) = folder.glob("events.out.*")
    file.rename(folder / f"events.out.tfevents.{int(time.time()) + 1}.zzz")
    learn = make()
    learn.restore(8)
    learn.fit(epochs=1)
    agrees(folder, learn.history)
    assert min(path.name for path in folder.glob("events.out.*")).endswith("zzz")


def test_pictures_that_were_purged_are_told_again_by_another_process(tmp_path):
    def make(): return learner(TensorBoard(), pictures(), run=tmp_path / "run", keep="all")

    learn = make()
    learn.fit(epochs=4)
    learn.restore(8)
    learn.set("lr", 0.5)
    learn.fit(epochs=1)
    other = make()
    other.restore("last")
    other.fit(epochs=1)
    files = agrees(tmp_path / "run" / "tensorboard", other.history)
    assert [o.step for o in files.Images("samples")] == [4, 8, 12, 16]


def test_tensorboard_goes_on_after_a_crash(tmp_path):
    learn = learner(TensorBoard(), run=tmp_path / "run", save_every=3)
    learn.fit(steps=8)
    folder = tmp_path / "run" / "tensorboard"
    file = max(folder.iterdir(), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-150])  # torn
    lost = read_events(folder)
    assert len(lost.scalars["train/loss"][0]) <= 8
    other = learner(TensorBoard(), run=tmp_path / "run")
    other.restore(6)
    other.fit(steps=4)
    agrees(folder, other.history)


def test_a_branch_has_files_of_its_own(tmp_path):
    learn = learner(TensorBoard(), run=tmp_path / "run", keep="all")
    learn.fit(epochs=2)
    trunk = [p.read_bytes() for p in sorted((tmp_path / "run" / "tensorboard").iterdir())]
    learn.branch(4, "other")
    learn.fit(epochs=2)
    agrees(tmp_path / "other" / "tensorboard", learn.history)
    assert [p.read_bytes() for p in sorted((tmp_path / "run" / "tensorboard").iterdir())] == trunk


def test_looking_changes_nothing(tmp_path):
    def numbers(): return random.random(), float(np.random.rand()), torch.rand(2).tolist()

    plain, watched = learner(), learner(TensorBoard(tmp_path / "tb", every=1e-6), EpochFile(tmp_path / "e.csv"), pictures())
    found = []
    for learn in plain, watched:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        learn.fit(epochs=3)
        found.append(numbers())
    same_weights(plain, watched)
    assert found[0] == found[1]
    a, b = (dict(learn.history.scalars) for learn in (plain, watched))
    assert all(np.array_equal(a[n][1], b[n][1]) for n in a) and a.keys() == b.keys()


def test_a_tracker_that_draws_a_name_for_its_run_changes_nothing():
    class Drawing(Notes):
        def begin(self, about):
            return f"{random.random()} {np.random.rand()} {torch.rand(1)}"

    plain, watched = learner(), learner(Drawing())
    found = []
    for learn in plain, watched:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        learn.fit(epochs=1)
        found.append((random.random(), float(np.random.rand()), torch.rand(2).tolist()))
    same_weights(plain, watched)
    assert found[0] == found[1]


def test_without_a_place_or_the_package(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="no run folder: TensorBoard"): learner(TensorBoard()).fit(1)
    with pytest.raises(ValueError, match="number of seconds > 0; received 0"): TensorBoard(every=0)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [n for n in sys.modules if n.startswith(("tensorboard.", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    learn = learner(TensorBoard(tmp_path / "tb"))
    said, = warned(lambda: learn.fit(2))
    assert "pip install tensorboard" in said and learn.state == "finished"


# ---- errors, and trackers that are slow

class Notes(Writer):
    "Writes into lists."

    def __init__(self, fails="", **kw):
        super().__init__(every=1e-6)
        self.fails, self.calls, self.rows = fails, [], []
        vars(self).update(kw)

    def _call(self, name, *values):
        self.calls.append((name, *values))
        if name == self.fails: raise OSError("no more room")

    def begin(self, about): self._call("begin", about.name, about.id); return f"id{len(self.calls)}"
    def image(self, name, pixels, step): self._call("image", name, step)
    def text(self, name, text, step, when): self._call("text", name, step)
    def flush(self): self._call("flush")
    def end(self, state): self._call("end", state)

    def scalars(self, rows):
        self.rows += rows
        self._call("scalars")


@pytest.mark.parametrize("what", ["begin", "scalars", "image", "text", "flush", "end"])
def test_an_error_is_said_once_and_the_run_goes_on(what, tmp_path):
    notes = Notes(what)
    learn = learner(notes, pictures(), run=tmp_path / "run")
    said, = warned(lambda: learn.fit(epochs=3))
    assert said == "Notes is switched off, the run goes on: OSError: no more room"
    assert (learn.state, learn.step) == ("finished", 12)
    notes.fails, notes.rows = "", []
    assert not warned(lambda: learn.fit(epochs=1))  # a new fit, a new chance; nobody knows what had arrived
    assert [step for step, values in notes.rows if "train/loss" in values] == [*range(1, 17)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_each_ending_is_told(ending):
    notes = Notes()
    learn = learner(notes)
    end_by(learn, ending)
    ends = [call for call in notes.calls if call[0] == "end"]
    assert ends == [("end", learn.state)]
    steps, values = learn.history.scalars["train/loss"]
    assert [(s, row["train/loss"]) for s, row in notes.rows if "train/loss" in row] == [*zip(steps.tolist(), values.tolist())]


def test_no_step_waits_for_a_slow_tracker():
    gate, trained = threading.Event(), []

    class Slow(Notes):
        def scalars(self, rows):
            assert gate.wait(20)
            super().scalars(rows)

    def over(learn):
        trained.append(learn.step)
        gate.set()

    notes = Slow()
    assert not warned(lambda: learner(notes, On("after_fit", over)).fit(epochs=5))
    assert trained == [20] and len(notes.rows) == 20


def test_a_tracker_that_never_answers_is_left_alone():
    gate = threading.Event()

    class Stuck(Notes):
        patience = 0.05

        def scalars(self, rows): gate.wait(20)

    learn = learner(Stuck())
    said, = warned(lambda: learn.fit(epochs=2))
    assert "more than 0.05 seconds" in said and learn.state == "finished"
    said, = warned(lambda: learn.fit(epochs=1))
    assert "still busy" in said and learn.step == 12
    gate.set()


def test_a_validation_outside_of_a_fit_is_not_told():
    notes = Notes()
    learn = learner(notes, valid=True)
    learn.validate()
    learn.fit(epochs=1)
    calls = len(notes.calls)
    learn.history.add("valid/other", 1.0, learn.step)
    time.sleep(0.01)
    learn.validate()
    assert len(notes.calls) == calls and notes.calls[-1] == ("end", "finished")


# ---- other trackers, as far as their documentation says what they do

class Server:
    "What all of them keep: runs with values by step."

    def __init__(self): self.runs = {}

    def curve(self, key, name="train/loss"):
        return [(row["step"], row[name]) for row in self.runs[key]["rows"] if name in row]


class Handle:
    def __init__(self, run, key):
        self.run, self.name, self.id, self.open = run, key, key, True

    def log(self, data, step=None):
        assert self.open and all(isinstance(k, str) for k in data)
        self.run["rows"].append({**data, **({} if step is None else {"step": step})})

    def define_metric(self, name, step_metric=None): self.run["axes"] = {**self.run.get("axes", {}), name: step_metric}

    def finish(self, exit_code=0): self.open, self.run["exit"] = False, exit_code


def trackio(server):
    def init(project, name=None, config=None, resume="never", **kw):
        assert (name in server.runs) == (resume == "must"), "a run is made once, and found again"
        run = server.runs.setdefault(name, {"rows": [], "config": config, "project": project, **kw})
        return Handle(run, name)

    return SimpleNamespace(init=init, Image=lambda value, caption=None: ("image", value.shape, caption), Markdown=str)


def wandb(server):
    def init(project=None, name=None, id=None, resume=None, config=None, **kw):
        assert (id is None) == (resume is None)
        key = id or f"w{len(server.runs)}"
        return Handle(server.runs.setdefault(key, {"rows": [], "name": name, "config": config, **kw}), key)

    return SimpleNamespace(init=init, Image=lambda value: ("image", value.shape), Html=lambda text: ("html", text))


def mlflow(server):
    class Client:
        def __init__(self, tracking_uri=None): pass
        def get_experiment_by_name(self, name): return None
        def create_experiment(self, name): return "7"

        def create_run(self, experiment_id, run_name=None):
            key = f"m{len(server.runs)}"
            server.runs[key] = {"rows": [], "name": run_name, "params": {}, "status": "RUNNING", "files": []}
            return SimpleNamespace(info=SimpleNamespace(run_id=key))

        def update_run(self, run_id, status): server.runs[run_id]["status"] = status
        def set_terminated(self, run_id, status): server.runs[run_id]["status"] = status

        def log_batch(self, run_id, metrics=(), params=()):
            assert len(metrics) <= 1000 and len(params) <= 100 and server.runs[run_id]["status"] == "RUNNING"
            server.runs[run_id]["params"] |= dict(params)
            server.runs[run_id]["rows"] += [{name: value, "step": step} for name, value, _, step in metrics]

        def log_image(self, run_id, image, key, step): server.runs[run_id]["files"].append((key, step, image.shape))
        def log_text(self, run_id, text, artifact_file): server.runs[run_id]["files"].append((artifact_file, text))

    entities = SimpleNamespace(Metric=lambda *a: a, Param=lambda *a: a)
    return SimpleNamespace(MlflowClient=Client, entities=entities)


TRACKERS = {"trackio": (trackio, Trackio), "wandb": (wandb, WandB), "mlflow": (mlflow, MLflow)}


@pytest.fixture(params=TRACKERS)
def tracker(request, monkeypatch):
    make, kind = TRACKERS[request.param]
    server = Server()
    monkeypatch.setitem(sys.modules, request.param, make(server))
    return server, kind


def test_trackers_have_every_way_as_a_run_of_its_own(tracker, tmp_path):
    server, kind = tracker
    learn = learner(kind("digits"), pictures(), run=tmp_path / "run", valid=True, keep="all")
    learn.fit(epochs=2)
    learn.fit(epochs=1)  # in the same run of the tracker's
    first, = server.runs
    def curve(history): return [*zip(*(a.tolist() for a in history.scalars["train/loss"]))]
    left = curve(learn.history)
    assert server.curve(first) == left
    learn.restore(4)
    learn.fit(epochs=1)
    old, new = server.runs
    assert server.curve(old) == left and server.curve(new) == curve(learn.history)
    assert server.curve(new, "valid/loss") == [*zip(*(a.tolist() for a in learn.history.scalars["valid/loss"]))]
    other = learner(kind("digits"), run=tmp_path / "run", valid=True)  # as in another process
    other.restore("last")
    other.fit(epochs=1)
    assert len(server.runs) == 2 and server.curve(new) == curve(other.history)
    file, = (tmp_path / "run" / "writers").iterdir()
    note = json.loads(file.read_text())
    file.write_text(json.dumps({"way": note["way"], "id": note["id"]}))  # as a process leaves it that dies
    third = learner(kind("digits"), run=tmp_path / "run", valid=True)
    third.restore("last")
    third.fit(epochs=1)
    *_, last = server.runs
    assert len(server.runs) == 3 and server.curve(last) == curve(third.history)


@pytest.mark.parametrize("ending", ["finish", "stop", "error", "interrupt_twice"])
def test_trackers_say_how_a_fit_ended(tracker, ending, tmp_path):
    server, kind = tracker
    learn = learner(kind(), pictures(), run=tmp_path / "run")
    end_by(learn, ending, at=6)
    run, = server.runs.values()
    if kind is MLflow:
        assert run["status"] == {"error": "FAILED", "interrupt_twice": "KILLED"}.get(ending, "FINISHED")
        assert run["params"]["model/optimizer"] == "Adam" and ("samples", 4, (4, 6, 3)) in run["files"]
        return
    assert run["exit"] == (kind is WandB and ending == "error")
    assert run["config"]["model/optimizer"] == "Adam"
    assert ("image", (4, 6, 3)) in [row["samples"][:2] for row in run["rows"] if "samples" in row]
    if kind is WandB: assert run["axes"] == {"step": None, "*": "step"} and run["dir"] == str(tmp_path / "run")


def test_a_tracker_that_is_missing_is_said_once(monkeypatch, tmp_path):
    for name, (_, kind) in TRACKERS.items():
        monkeypatch.setitem(sys.modules, name, None)
        learn = learner(kind())
        said, = warned(lambda: learn.fit(epochs=2))
        assert f"pip install {name}" in said and learn.state == "finished"


# ---- a table of epochs

@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_the_table_of_epochs_is_the_history(ending, suffix, tmp_path):
    path = tmp_path / "new" / f"epochs.{suffix}"
    learn = learner(EpochFile(path), valid=True)
    end_by(learn, ending, at=6)
    text = path.read_text()
    rows = [json.loads(line) for line in text.splitlines()] if suffix == "jsonl" else [*csv.DictReader(text.splitlines())]
    marks = [m.step for m in learn.history.marks if m.kind == "epoch"]
    assert [int(row["step"]) for row in rows] == marks
    steps, values = learn.history.scalars["train/loss"]
    for row, begin, end in zip(rows, [0, *marks], marks):
        assert float(row["train/loss"]) == values[(steps > begin) & (steps <= end)].mean()
        assert float(row["lr/model"]) == 0.001
        at, valid = learn.history.scalars["valid/loss"]
        if end in at: assert float(row["valid/loss"]) == valid[at == end][-1]


def test_a_row_for_each_epoch_after_a_way_back(tmp_path):
    learn = learner(EpochFile(), run=tmp_path / "run", keep="all")
    learn.fit(epochs=3)
    learn.restore(4)
    learn.fit(epochs=1)
    rows = [*csv.DictReader((tmp_path / "run" / "epochs.csv").open())]
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "4"), ("2", "8")]
    assert len(epochs_of(learn.history.snapshot())) == 2


def test_a_table_of_nothing_and_wrong_names(tmp_path):
    write_epochs(History().snapshot(), tmp_path / "e.csv")
    assert (tmp_path / "e.csv").read_text() == "\n"
    with pytest.raises(ValueError, match=r"takes a .csv or .jsonl file; received 'e.txt'"): EpochFile("e.txt")
    with pytest.raises(ValueError, match="no run folder: EpochFile"): learner(EpochFile()).fit(1)
    (tmp_path / "blocked").write_text("")
    learn = learner(EpochFile(tmp_path / "blocked" / "e.csv"))
    assert len(warned(lambda: learn.fit(epochs=2))) == 1 and learn.state == "finished"


# ---- movies

def run_folder(tmp_path, steps=range(0, 500, 50), side=40):
    noise = np.random.default_rng(0)
    for step in steps:
        picture = noise.integers(0, 256, (side, side, 3), np.uint8)
        picture[:4] = step // 2 % 256  # what a test can find again
        save_png(picture, tmp_path / "samples" / f"step_{step:07d}.png")
    return tmp_path


def shown(path):
    "(a number for each frame, milliseconds for each frame)"
    film, brightness, times = Image.open(path), [], []
    for i in range(film.n_frames):
        film.seek(i)
        film.load()
        times.append(film.info["duration"])
        brightness.append(float(np.asarray(film.convert("RGB"))[3, 3:-3].mean()))
    return np.array(brightness), times


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("captions", [True, False])
def test_a_movie_shows_the_pictures_in_order(suffix, captions, tmp_path):
    folder = run_folder(tmp_path)
    made = movie(folder, tmp_path / "out" / f"m{suffix}", seconds=5, captions=captions, longest=80)
    brightness, times = shown(made.path)
    assert made.steps == tuple(range(0, 500, 50)) and len(times) == 10
    np.testing.assert_allclose(brightness, np.arange(0, 500, 50) // 2, atol=8)  # 255 colours
    assert abs(sum(times) - 5000) <= 100 and max(times) == times[-1]
    film = Image.open(made.path)
    assert film.size == made.size == (80, 108 if captions else 80)
    assert film.info.get("loop", 0) == 0


def test_captions_are_steps():
    image = Image.new("RGB", (20, 20), "black")
    plain, one, two = (np.asarray(frame(image, (200, 200), text)) for text in ("", "step 1", "step 222"))
    assert plain.shape == (200, 200, 3) and one.shape == two.shape == (228, 200, 3)
    assert (plain == 0).all() and (one[:200] == 0).all() and 0 < (one[200:] < 200).sum() < (two[200:] < 200).sum()


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=200, unique=True), st.integers(2, 50))
@settings(max_examples=100, deadline=None)
def test_frames_are_chosen_evenly(steps, most):
    steps = sorted(steps)
    chosen = [steps[i] for i in evenly(steps, most)]
    assert chosen[0] == steps[0] and chosen[-1] == steps[-1] and len(chosen) <= max(most, 1)
    assert chosen == sorted(set(chosen)) and (len(steps) > most or chosen == steps)
    for at in np.linspace(steps[0], steps[-1], most):  # nobody waits longer for a picture than he must
        if len(steps) > most: assert min(abs(s - at) for s in chosen) == min(abs(s - at) for s in steps)


def test_a_movie_has_as_many_frames_as_its_time_allows_and_no_more_bytes(tmp_path):
    folder = run_folder(tmp_path, range(0, 4000, 50))
    made = movie(folder, tmp_path / "m.gif", seconds=2, rate=5, longest=40)
    assert len(made.steps) == 9 and all(abs(step - i * 3950 / 8) <= 25 for i, step in enumerate(made.steps))
    small = movie(folder, tmp_path / "s.gif", seconds=2, rate=5, longest=200, most_bytes=15_000)
    assert small.path.stat().st_size <= 15_000 and small.steps[0] == 0 and small.steps[-1] == 3950
    with pytest.raises(ValueError, match="most_bytes=100"):
        movie(folder, tmp_path / "no.gif", seconds=1, longest=60, most_bytes=100)
    assert not (tmp_path / "no.gif").exists()
    assert sum(durations(9, 2)) == pytest.approx(2) and durations(1, 2) == [2]


def test_pictures_of_a_way_that_was_left_are_not_shown(tmp_path):
    import os
    folder, now = run_folder(tmp_path, [0, 100, 200, 300]), time.time()
    for step, when in (0, -90), (100, -80), (200, -5), (300, -60):  # at -10 the run went back to step 100
        os.utime(folder / "samples" / f"step_{step:07d}.png", (0, now + when))
    went = Tail(100, {"train/loss": (np.array([300]), np.array([1.0]))}, now - 10)
    assert [step for step, _ in pictures_on_disk(folder / "samples", [went])] == [0, 100, 200]
    history = History(folder / "history.jsonl")
    for step in range(301): history.add("train/loss", 1.0, step)
    history.rewind(100, now - 10)
    history.add("train/loss", 2.0, 101)
    history.close()
    assert movie(folder, tmp_path / "m.gif").steps == (0, 100, 200)


def test_a_movie_of_a_learner_with_and_without_a_folder(tmp_path):
    learn = learner(pictures())
    with pytest.raises(ValueError, match="no pictures 'samples' of this learner"): movie(learn, tmp_path / "m.gif")
    learn.fit(epochs=12)
    made = movie(learn, tmp_path / "m.gif", seconds=4, longest=60)
    assert made.steps == tuple(range(20, 49, 4))  # the eight that are in memory
    assert "image/gif;base64" in made._repr_html_()
    folder = run_folder(tmp_path / "run")
    running = learner(run=folder)
    assert movie(running, tmp_path / "n.gif", longest=40).steps == movie(str(folder), tmp_path / "o.gif", longest=40).steps


def test_pictures_of_several_sizes_fill_one_frame(tmp_path):
    run_folder(tmp_path, [0], side=20)
    run_folder(tmp_path, [50], side=40)
    made = movie(tmp_path, tmp_path / "m.gif", longest=41, captions=False)
    assert made.size == (40, 40) and Image.open(made.path).n_frames == 2


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"longest": -1}, {"rate": 0}, {"most_bytes": 0}])
def test_wrong_numbers_of_a_movie(wrong, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=…"): movie(run_folder(tmp_path), tmp_path / "m.gif", **wrong)


def test_mp4_needs_ffmpeg_and_tells_it_the_truth(tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "run")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match="pip install imageio-ffmpeg"): movie(folder, tmp_path / "m.mp4")
    with pytest.raises(ValueError, match=r".gif, .webp or .mp4; received"): movie(folder, tmp_path / "m.avi")
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} {tmp_path / 'said.py'} \"$@\"\n")
    (tmp_path / "said.py").write_text("import sys\nsaid = ' '.join(sys.argv[1:-1]).encode()\n"
                                      "open(sys.argv[-1], 'wb').write(said + b'\\n' + sys.stdin.buffer.read())\n")  # fmt: skip
    program.chmod(0o755)
    made = movie(folder, tmp_path / "m.mp4", seconds=4, longest=40)
    said, pixels = made.path.read_bytes().split(b"\n", 1)
    w, h = made.size
    assert f"-s {w}x{h} -r 25".encode() in said and w % 2 == h % 2 == 0 and b"libx264" in said
    assert len(pixels) == w * h * 3 * 25 * 4  # four seconds
    program.write_text("#!/bin/sh\necho 'unknown codec' >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="ffmpeg failed: unknown codec"): movie(folder, tmp_path / "n.mp4")
    assert not Path(tmp_path / "n.mp4").exists()


# ---- running means

def test_running_means_are_means_and_the_same_after_a_resume(tmp_path):
    def make(run): return learner(RunningMeans(every=3, last=5), ClipGradNorm(math.inf), run=run)

    straight = make(None)
    straight.fit(steps=12)
    first = make(tmp_path / "run")
    first.fit(steps=5)
    other = make(tmp_path / "run")
    other.restore("last")
    other.fit(steps=7)
    for name in ("loss", "grad_norm"):
        _, values = straight.history.scalars[f"train/{name}"]
        steps, means = straight.history.scalars[f"running/{name}"]
        assert steps.tolist() == [3, 6, 9, 12]
        np.testing.assert_array_equal(means, [values[max(0, n - 5):n].mean() for n in steps])
        np.testing.assert_array_equal(other.history.scalars[f"running/{name}"], (steps, means))
    plain = learner()
    plain.fit(steps=12)
    same_weights(plain, straight)


@pytest.mark.parametrize("wrong", [{"every": 0}, {"last": 0}, {"every": 1.5}])
def test_wrong_running_means(wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))): RunningMeans(**wrong)
