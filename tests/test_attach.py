"A run that another process trains, steered and watched as if it were here."

import inspect
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from steered import end, train, until

import trainkit
from trainkit.attached import Attached, Refused, as_control, attach, find_run
from trainkit.checkpoint import CheckpointError, Checkpoints
from trainkit.commands import COMMANDS
from trainkit.controls import Control
from trainkit.followed import FollowedHistory
from trainkit.history import History
from trainkit.journal import Entry, Journal
from trainkit.learner import Learner
from trainkit.lines import Lines
from trainkit.mailbox import Mailbox, NotListening, read_status, strict, write_status


class Training:
    "A thread that takes commands, in a folder; `hold` keeps it from looking."

    def __init__(self, run):
        self.run, self.step, self.taken, self.says = Path(run), 0, [], lambda: ""
        self.journal, self.hold, self._stop = Journal(self.run / "journal.jsonl"), threading.Event(), threading.Event()
        self.mail = Mailbox(run, self.send, self.refuse, lambda: {"state": "training", "step": self.step, "paused": False})
        self.mail.every = 0.002
        self.thread = threading.Thread(target=self.listen)

    def listen(self):
        while not self._stop.wait(0.002):
            if not self.hold.is_set():
                self.step += 1
                self.mail.poll()

    def send(self, command):
        if command.name == "sample":
            raise ValueError("this learner draws no samples")
        self.taken.append(command)
        told = {"save": self.says, "validate": self.says, "restore": lambda: "7 (step 7)"}
        new = told.get(command.name, lambda: command.values.get("value", 2.0))()
        command.done(self.entry(command, old=1.0, new=new))

    def refuse(self, command, reason):
        self.entry(command, error=reason)

    def entry(self, command, **more):
        entry = Entry(command.name, command.values, self.step, source=command.source, id=command.id, **more)
        return self.journal.add(entry)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.hold.clear()
        self._stop.set()
        self.thread.join()
        self.mail.close()


# --- a real run -------------------------------------------------------------------------------------------------------

def test_a_script_is_attached_to(tmp_path):
    process = train(tmp_path / "run")
    try:
        first, second = attach(tmp_path / "run"), attach(str(tmp_path / "run"))
        first.pause().wait(30)
        until(lambda: first.paused and second.paused)
        step = first.status()["step"]
        lr = next(c for c in second.controls() if c.name == "lr")
        assert isinstance(lr, Control) and lr.values == (1e-3,) and lr.player == "model" and lr.high == float("inf")
        assert first.history.scalars["train/loss"][0].tolist() == [*range(1, step + 1)]
        drawn = first.history.version
        saved = first.save("from a notebook")
        assert (saved.step, saved.info["note"], saved.pinned) == (step, "from a notebook", True) and saved.path.exists()
        assert [entry.id for entry in second.checkpoints] == [saved.id]
        changed = second.set("lr", 0.01)
        assert changed.wait(30) == 0.01 and (changed.answer.old, changed.answer.step) == (1e-3, step)
        found = second.validate()
        steps, losses = first.history.scalars["valid/loss"]
        assert (found, steps[-1]) == ({"valid/loss": losses[-1]}, step)
        assert second.journal.entries[-1].new == f"valid/loss {losses[-1]:.4g}" != f"valid/loss {losses[-1]}"  # this is rounded
        with pytest.raises(Refused, match="nobody draws samples"):
            first.sample().wait(30)
        second.step_once(2).wait(30)
        until(lambda: first.status()["step"] == step + 2 and first.paused)
        assert first.history.version > drawn and first.history.scalars["train/loss"][0][-1] == step + 2
        assert "lr: 0.001 → 0.01" in [mark.text for mark in first.history.marks if mark.kind == "command"][0]
        assert first.restore(saved) == first.restore() == first.restore(step) == saved
        until(lambda: second.history.scalars["train/loss"][0][-1] == step)
        until(lambda: second.status()["step"] == step)
        assert second.history.tails
        assert "at step" in repr(first) and str(tmp_path / "run") in repr(first)
        assert {"terminal"}.isdisjoint(e.source for e in first.journal.entries)
        first.stop().wait(30)
        out = process.communicate(timeout=30)[0]
        assert out.split()[:2] == ["stopped", str(step)]
        assert not second.paused and second.state == "stopped" and "no fit is running" in repr(second)
        with pytest.raises(NotListening, match="pause was not sent .* no fit is running .stopped at step"):
            second.pause()
    finally:
        end(process)


def test_the_methods_are_those_of_a_learner():
    for name in ["send", *("step_once" if name == "step" else name for name in COMMANDS)]:
        mine, theirs = (inspect.signature(getattr(kind, name)) for kind in (Attached, Learner))
        shared = [p for p in theirs.parameters if p in mine.parameters]
        if name not in ("validate", "restore", "save", "send"):  # these take more between two fits
            assert [*mine.parameters] == [*theirs.parameters], name
        for p in set(shared) - {"source"}:  # who asks is another one
            here, there = mine.parameters[p], theirs.parameters[p]
            assert (here.kind, here.default) == (there.kind, there.default) or (name, here.kind) == ("send", here.POSITIONAL_ONLY)
        if name in ("pause", "resume", "step_once", "set", "release", "undo", "note", "validate"):
            assert mine.return_annotation == theirs.return_annotation, name
    for name in "status", "controls", "journal", "history", "checkpoints", "state", "paused", "run":
        assert hasattr(Attached, name) or name == "run"


def test_what_is_saved_is_waited_for_but_not_for_ever(tmp_path):
    with Training(tmp_path) as run:
        there = attach(tmp_path)
        there.patience = 0.2
        run.says = lambda: "7-1"  # and no file comes
        with pytest.raises(CheckpointError, match="7-1"):
            there.save()
        there.patience = 30
        run.says = lambda: threading.Timer(0.1, lambda: saved.append(store.save({}, 7, {"note": "late"}))).start() or "7"
        store, saved = Checkpoints(tmp_path / "checkpoints"), []
        mine = there.save("late")
        assert until(lambda: saved) == [mine] and mine.id == "7"
        assert there.restore("7") == saved[0]
    with pytest.raises(NotListening):
        there.save()


def test_what_was_found_has_all_its_digits_if_the_run_still_has_them(tmp_path):
    history = History(tmp_path / "history.jsonl")
    with Training(tmp_path) as run:
        def validated():
            for step in run.step - 1, run.step:
                for name, value in ("valid/loss", step / 3), ("valid.other/a b", step / 7): history.add(name, value, step)
            history.flush()
            return f"valid/loss {run.step / 3:.4g}, valid.other/a b {run.step / 7:.4g}, valid/gone 1.5, valid/odd nan"

        run.step, run.says, there = 10_000, validated, attach(tmp_path)
        found = there.validate()
        step = there.journal.entries[-1].step
        assert str(found.pop("valid/odd")) == "nan"
        assert found == {"valid/loss": step / 3, "valid.other/a b": step / 7, "valid/gone": 1.5} and step > 10_000
        run.says = lambda: ""  # cut short by a callback
        assert there.validate() == {}


# --- waiting for a run ------------------------------------------------------------------------------------------------

def test_attaching_waits_for_a_run_that_is_yet_to_begin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[trainkit]\nruns = all\n")
    process, made = None, []

    def begin():
        made.append(not (tmp_path / "all").exists())
        (tmp_path / "all" / "late").mkdir(parents=True)
        write_status(tmp_path / "all" / "late", {"state": "stopped", "step": 3, "listening": False})  # the day before
        time.sleep(0.1)
        made.append("stopped")
        with Training(tmp_path / "all" / "late"): over.wait(30)

    over, process = threading.Event(), threading.Thread(target=lambda: (time.sleep(0.1), begin()))
    process.start()
    try:
        there = trainkit.attach("late", wait=30)
        assert made == [True, "stopped"] and there.state == "training" and there.run == Path("all/late")
        there.pause().wait(30)
        assert trainkit.attach("late", 0).run == there.run  # who is there already isn't waited for
    finally:
        over.set()
        process.join()
    with pytest.raises(TimeoutError, match=r"within 0.1 s: in all.late, no fit is running \(training at step"):
        trainkit.attach("late", wait=0.1)
    with pytest.raises(TimeoutError, match="within 0 s: no run lies in all.lat or lat; in all there is: none"):
        trainkit.attach("lat", wait=0)
    for wrong in -1, float("nan"):
        with pytest.raises(ValueError, match="wait takes seconds >= 0; received"):
            attach("late", wait=wrong)
    assert attach("late").silence  # without wait, it is taken as it is


# --- answers ----------------------------------------------------------------------------------------------------------

def test_each_gets_its_own_answers(tmp_path):
    with Training(tmp_path) as run:
        ends = [attach(tmp_path) for _ in range(3)]
        sent = {}

        def ask(i):
            for n in range(15):
                command = ends[i % 3].send("note", source=f"thread-{i}", text=f"{i}.{n}")
                command.wait(30)
                sent[f"{i}.{n}"] = command

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    assert len(sent) == 90 == len(run.taken)
    assert all(command.answer.values["text"] == text and command.answer.id == command.id for text, command in sent.items())
    for i in range(6):
        assert [c.values["text"] for c in run.taken if c.source == f"thread-{i}"] == [f"{i}.{n}" for n in range(15)]
    assert not any(there.pending for there in ends) and len(ends[0].journal) == 90


def test_a_refusal_is_raised_and_what_makes_no_sense_is_not_sent(tmp_path):
    with Training(tmp_path) as run:
        there = attach(tmp_path)
        command = there.sample()
        with pytest.raises(Refused, match="draws no samples"):
            command.wait(30)
        assert command.answer.error == "this learner draws no samples"
        for wrong in lambda: there.set("lr"), lambda: there.step_once(0), lambda: there.send("fly"), lambda: there.stop("lunch"):
            with pytest.raises((ValueError, TypeError)):
                wrong()
    assert not run.taken


def test_a_dragged_slider_sends_what_it_ends_at(tmp_path):
    with Training(tmp_path) as run:
        there = attach(tmp_path)
        run.hold.set()
        time.sleep(0.05)  # it may be looking
        values = [float(v) for v in np.linspace(0.01, 1, 100)]
        commands = [there.set("lr", value) for value in values]
        other = there.set("lr", 5.0, player="generator")
        again = there.set("lr", 0.5)
        assert len(there.pending) <= 4
        run.hold.clear()
        assert (commands[-1].wait(30), other.wait(30), again.wait(30)) == (1.0, 5.0, 0.5)
        for command in commands[:-1]:
            command.wait(30)
    assert [c.values["value"] for c in run.taken][-3:] == [1.0, 5.0, 0.5] and len(run.taken) <= 5


def test_an_answer_is_found_although_the_journal_was_begun_anew(tmp_path):
    with Training(tmp_path) as run:
        there = attach(tmp_path)
        there.note("one").wait(30)
        run.hold.set()
        time.sleep(0.05)
        (tmp_path / "journal.jsonl").unlink()
        command = there.note("two")
        run.hold.clear()
        command.wait(30)
        assert [e.values["text"] for e in there.journal.entries] == ["two"]


def test_a_journal_with_damage_is_read_on(tmp_path):
    with Training(tmp_path):
        there = attach(tmp_path)
        with open(tmp_path / "journal.jsonl", "ab") as file:
            file.write(b'not JSON\n[1]\n{"what": 3}\n' + b"[" * 9000 + b"\n\xff\n")
        there.note("still there").wait(30)
        assert len(there.journal) == 1


# --- endings ----------------------------------------------------------------------------------------------------------

def test_waiting_ends_with_the_run(tmp_path):
    with Training(tmp_path) as run:
        there = attach(tmp_path)
        run.hold.set()
        time.sleep(0.05)
        command = there.note("nobody reads this")
        with pytest.raises(TimeoutError, match="not done within 0.05 s"):
            command.wait(0.05)
        write_status(tmp_path, {**read_status(tmp_path), "born": "1"})  # another process has its number now
        assert (there.state, there.paused) == ("gone", False) and "killed perhaps" in there.silence
        with pytest.raises(NotListening, match="note has no answer: process"):
            command.wait(30)


def test_a_run_between_two_fits_is_heard_again(tmp_path):
    with Training(tmp_path):
        there = attach(tmp_path)
        there.pause().wait(30)
    with pytest.raises(NotListening):
        there.pause()
    with Training(tmp_path):
        there.pause().wait(30)
    assert len(there.journal) == 2


def test_runs_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[trainkit]\nruns = all\n")
    for place in "all/digits", "all/old/faces", "digits", "elsewhere/run":
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "history.jsonl").touch()
    assert find_run("digits") == Path("all/digits")  # as for a learner
    assert find_run("./digits") == find_run(Path("digits")) == Path("digits")
    assert find_run("elsewhere/run") == Path("elsewhere/run")
    for name, there in ("digit", "digits"), ("all/old/face", "faces"), ("nowhere/x", "none"):
        with pytest.raises(FileNotFoundError, match=f"there is: .*{there}"):
            attach(name)
    assert attach("digits").status()["silence"] == "no fit has ever listened there"
    assert attach("digits").state == "unknown" and attach("digits").controls() == []


# --- what is read -----------------------------------------------------------------------------------------------------

def test_nothing_is_read_twice(tmp_path):
    path = tmp_path / "history.jsonl"
    written, followed = History(path), FollowedHistory(path)
    for step in range(1, 400):
        written.add("train/loss", step, step)
    written.flush()
    assert len(followed.scalars["train/loss"][0]) == 399
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(b"\x00" * (size - 300))  # whoever reads this again understands nothing of it
    written.add("train/loss", 400, 400)
    written.flush()
    assert followed.scalars["train/loss"][1].tolist() == [float(i) for i in range(1, 401)]
    assert followed.version == followed.version


def test_a_followed_history_is_the_history(tmp_path):
    written, followed = History(tmp_path / "history.jsonl"), FollowedHistory(tmp_path / "history.jsonl")
    rng, step, saved = np.random.default_rng(0), 0, None
    for _ in range(60):
        step += 1
        written.add("train/loss", rng.normal(), step)
        written.add("lr/model", [float("nan"), 0.1][step % 2], step)
        if step % 7 == 0: written.mark("epoch", step, str(step // 7), score=step)
        if step == 20: saved = written.state_dict()
        if step == 33: written.rewind(step := 30)
        if step == 45: written.load_state_dict(saved); step = 20  # noqa: E702
        if rng.random() < 0.4: written.flush()
        followed.snapshot()
    written.flush()
    assert followed.marks == written.marks and len(followed.marks)
    assert [*followed.scalars] == [*written.scalars]
    for name, (steps, values) in written.scalars.items():
        np.testing.assert_array_equal(followed.scalars[name][0], steps)
        np.testing.assert_array_equal(followed.scalars[name][1], values)
    assert [t.step for t in followed.tails] == [t.step for t in written.tails]


def test_lines_come_whole_and_once_however_they_are_written(tmp_path):
    path, rng = tmp_path / "x", np.random.default_rng(1)
    text = b"".join(b"%d %s\n" % (i, b"x" * rng.integers(0, 40)) for i in range(200))
    lines, read, at = Lines(path), [], 0
    while at < len(text):
        n = int(rng.integers(1, 90))
        with open(path, "ab") as file:
            file.write(text[at:at + n])
        at += n
        read += lines.new()[1]
    assert read == text.splitlines() and lines.new() == (False, [])


def test_a_control_comes_back_as_it_left():
    lr = Control("lr", "g", (0.1, 0.2), ("a", "b"), 0.0, float("inf"), (1e-4, 1.0), True, scheduled=True, held={"times": 0.5})
    for control in (lr, Control("every", "", (3,), ("every",), 1.0, 9.0, (1.0, 9.0), whole=True)):
        assert as_control(json.loads(json.dumps(strict(control)))) == control
