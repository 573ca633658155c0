"""Commands: when they take effect, what is written down, and that a refused one changes nothing."""

import os
import signal
import threading

import pytest
import torch
from torch import nn
from ways import same_weights

from trainkit.callback import Callback, CancelFit, CancelPause, On
from trainkit.callbacks.stopping import EarlyStopping
from trainkit.checkpoint import CheckpointError
from trainkit.journal import Journal
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.player import Player
from trainkit.schedule import Knob


def learner(n=64, batch=8, valid=True, cbs=(), schedule="cosine", **kw):
    torch.manual_seed(0)
    x = torch.randn(n, 1)
    data = torch.utils.data.TensorDataset(x, 3 * x + 1)
    loader = torch.utils.data.DataLoader(data, batch, shuffle=True)
    plan = OptimBuilder("adam", lr=0.1, schedule=schedule)
    dls = (loader, torch.utils.data.DataLoader(data, batch)) if valid else loader
    return Learner(nn.Linear(1, 1), dls, "mse", plan, front="none", cbs=cbs, seed=1, **kw)


def at(step, *commands, event="after_batch"):
    "A callback that sends commands, as a panel would, when a step is done for the first time."
    sent = []

    def send(learn):
        if learn.step == step and not sent:
            for what, values in commands:
                sent.append(learn.send(what, source="panel", **values))

    return On(event, send)


def told(learn, *what):
    return [(e.what, e.step, e.error) for e in learn.journal.entries if e.what in what]


class Seen(Callback):
    "Every event between the commands, with where the run was."

    def __init__(self):
        self.rows = []

    def before_pause(self, learn):
        self.rows.append(("before_pause", learn.step, learn.state))

    def after_command(self, learn):
        self.rows.append((learn.command.what, learn.step, learn.state))

    def cleanup_pause(self, learn):
        self.rows.append(("cleanup_pause", learn.step, learn.state))


@pytest.mark.parametrize("step", [1, 3, 8, 11])
def test_a_value_that_is_set_holds_from_the_next_step_on(step):
    learn = learner(cbs=[at(step, ("set", {"name": "lr", "value": 0.02}))], schedule="constant")
    learn.fit(epochs=2)
    steps, rates = learn.history.scalars["lr/model"]
    assert dict(zip(steps, rates)) == {1: 0.1, step + 1: 0.02}
    assert told(learn, "set") == [("set", step, "")]


def test_a_run_whose_knobs_are_turned_equals_one_whose_code_turns_them():
    steered = learner(cbs=[at(5, ("set", {"name": "lr", "value": 0.02})), at(9, ("release", {"name": "lr"}))])
    steered.fit(epochs=2)

    def turn(learn):
        schedule = learn.players[0].schedule
        if learn.step == 5:
            schedule.override(0.02)
        if learn.step == 9:
            schedule.release()

    by_code = learner(cbs=[On("after_batch", turn)])
    by_code.fit(epochs=2)
    same_weights(steered, by_code)


@pytest.mark.parametrize(("what", "values", "words"), [
    ("set", {"name": "lr", "value": 1.0, "player": "nobody"}, "there is no player 'nobody'"),
    ("release", {"name": "weight_decay"}, "no schedule that it could be given back to"),
    ("undo", {}, "nothing to undo"),
    ("resume", {}, "not paused"),
    ("sample", {}, "nobody draws samples here"),
    ("save", {}, "no run folder"),
    ("restore", {}, "no run folder"),
])  # fmt: skip
def test_what_cannot_be_done_is_answered_and_changes_nothing(what, values, words):
    sent = []

    def send(learn):
        if learn.step == 5:
            try:
                sent.append(learn.send(what, source="panel", **values))
            except ValueError as error:  # refused at once
                sent.append(error)

    learn, plain = learner(cbs=[On("after_batch", send)]), learner()
    learn.fit(epochs=2)
    plain.fit(epochs=2)
    reason = sent[0] if isinstance(sent[0], ValueError) else sent[0].error
    assert words in str(reason)
    same_weights(learn, plain)
    assert learn.state == "finished"


def test_a_command_that_became_impossible_is_in_the_journal_with_its_reason():
    cbs = [at(5, ("set", {"name": "ghost.amount", "value": 0.2}))]

    class Ghost(Callback):
        knobs = (Knob("amount", 0.0, 0.3),)
        amount = 0.1

        def after_command(self, learn):
            pass

    ghost = Ghost()
    learn = learner(cbs=[*cbs, ghost, On("after_batch", lambda learn: learn.step == 5 and learn.remove(ghost))])
    learn.fit(epochs=1)
    ((_, step, error),) = told(learn, "set")
    assert step == 5 and "ghost.amount" in error and ghost.amount == 0.1


def test_while_it_holds_no_step_is_made_and_commands_act():
    seen = Seen()
    learn = learner(cbs=[seen, at(4, ("pause", {}))])

    def visitor():
        paused.wait(20)
        touches = {"set": {"name": "lr", "value": 0.01}, "validate": {}, "note": {"text": "look"}, "step": {"n": 2}}
        for what, values in touches.items():
            learn.send(what, source="other", **values).wait(20)
        again.wait(20)
        learn.send("resume", source="other").wait(20)

    paused, again = threading.Event(), threading.Event()
    learn.add(On("before_pause", lambda learn: paused.set() if learn.step == 4 else again.set()))
    thread = threading.Thread(target=visitor)
    thread.start()
    learn.fit(epochs=1)
    thread.join(20)
    assert seen.rows == [
        ("pause", 4, "training"), ("before_pause", 4, "paused"), ("set", 4, "paused"), ("validate", 4, "paused"),
        ("note", 4, "paused"), ("step", 4, "paused"), ("cleanup_pause", 4, "paused"), ("before_pause", 6, "paused"),
        ("resume", 6, "paused"), ("cleanup_pause", 6, "paused")]  # fmt: skip
    assert learn.state == "finished" and learn.step == 8


@pytest.mark.parametrize("end", ["stop", "interrupt", "second interrupt", "cancel", "error"])
def test_a_paused_run_can_be_ended_in_every_way(end):
    def leave(learn):
        if end == "stop":
            learn.send("stop", source="panel")
        elif end == "cancel":
            raise CancelFit
        elif end == "error":
            raise OSError("disk on fire")
        else:
            signal.raise_signal(signal.SIGINT)
            if end == "second interrupt":
                signal.raise_signal(signal.SIGINT)

    learn = learner(cbs=[at(4, ("pause", {})), On("before_pause", leave)])
    try:
        learn.fit(epochs=1)
    except (KeyboardInterrupt, OSError) as error:
        assert ("interrupt" in end) == isinstance(error, KeyboardInterrupt)
    assert learn.state == {"stop": "stopped", "cancel": "stopped", "error": "failed"}.get(end, "interrupted")
    assert learn.step == 4 and not learn.paused and not learn._fitting
    learn.remove(On)
    plain = learner()
    plain.fit(epochs=1)
    learn.fit()
    same_weights(learn, plain)


@pytest.mark.parametrize("place, said", [("script", True), ("terminal", True), ("notebook", False), ("ipython", False)])
@pytest.mark.parametrize("kept", [False, True])
def test_a_pause_that_nobody_sees_says_how_to_go_on(place, said, kept, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRAINKIT_WHERE", place)
    learn = learner(run=tmp_path / "a run" if kept else None)
    learn.add(On("after_batch", lambda learn: learn.step == 3 and learn.pause(), order=99),
              On("before_pause", lambda learn: learn.resume()))
    learn.fit(epochs=1)
    way = "a thread of this program may call learn.resume()"
    way = f"python -m trainkit.control '{tmp_path / 'a run'}' resume" if kept else way
    assert (f"paused at step 3: {way}" in capsys.readouterr().err) is said and learn.state == "finished"


def test_a_callback_may_end_a_pause():
    def go_on(learn):
        raise CancelPause

    learn = learner(cbs=[at(4, ("pause", {})), On("before_pause", go_on)])
    learn.fit(epochs=1)
    assert learn.state == "finished"


def test_stop_after_the_epoch_finishes_it_with_its_validation():
    learn = learner(cbs=[at(3, ("stop", {"after": "epoch"}))])
    learn.fit(epochs=3)
    assert (learn.state, learn.step, learn.epoch) == ("stopped", 8, 1)
    assert learn.history.scalars["valid/loss"][0].tolist() == [8]
    learn.fit()
    assert (learn.state, learn.epoch) == ("finished", 3)


def test_a_stop_is_heard_in_a_validation():
    def stop(learn):
        if learn.step == 8 and learn.state == "validating":
            learn.send("stop", source="panel")

    learn = learner(cbs=[On("after_validate_batch", stop)])
    learn.fit(epochs=2)
    assert (learn.state, learn.step, learn.epoch) == ("stopped", 8, 0)
    assert told(learn, "stop") == [("stop", 8, "")]


def test_what_comes_too_late_for_a_fit_is_done_behind_it_or_refused():
    def late(learn):
        learn.send("set", name="lr", value=0.5)
        learn.send("pause")

    learn = learner(cbs=[On("after_fit", late)])
    learn.fit(epochs=1)
    assert told(learn, "set") == [("set", 8, "")]
    assert "no fit is running" in told(learn, "pause")[0][2]
    assert learn.players[0].opt.param_groups[0]["lr"] == 0.5


def test_undo_takes_back_one_touch_after_the_other():
    learn = learner()
    for value in (0.5, 0.4, 0.3):
        learn.set("lr", value)
    learn.set("beta1", 0.5)
    learn.undo()
    assert learn.players[0].opt.param_groups[0]["betas"][0] == 0.9
    learn.undo()
    assert learn.players[0].schedule.overridden == {"value": 0.4}
    learn.undo()
    learn.undo()
    assert learn.players[0].schedule.overridden is None
    assert "nothing to undo" in learn.undo().answer.error


def test_knobs_of_callbacks_go_with_the_checkpoint(tmp_path):
    class Dim(Callback):
        knobs = (Knob("amount", 0.0, 0.3),)
        amount = 0.1

    learn = learner(cbs=[Dim()], run=tmp_path / "a")
    learn.set("dim.amount", 0.25)
    learn.fit(epochs=1)
    with pytest.raises(ValueError, match="from 0 to 0.3; received 0.4"):
        learn.set("dim.amount", 0.4)
    other = learner(cbs=[Dim()], run=tmp_path / "a")
    other.restore("last")
    assert other.cbs.get(Dim).amount == 0.25
    assert [e.what for e in other.journal.entries][:2] == ["set", "fit"]


def test_n_critic_is_a_knob():
    torch.manual_seed(0)
    two = [Player(name, nn.Linear(1, 1), step=lambda learn, batch: learn.player.modules[learn.player.name](batch[0]).mean())
           for name in ("critic", "actor")]  # fmt: skip
    learn = Learner(two, [(torch.ones(2, 1),)] * 20, opt="sgd", front="none", cbs=[
        at(4, ("set", {"name": "every", "player": "actor", "value": 4.0}))])  # fmt: skip
    learn.fit(epochs=1)
    assert learn.history.scalars["train/actor/loss"][0].tolist() == [1, 2, 3, 4, 8, 12, 16, 20]
    with pytest.raises(ValueError, match="must move in every batch"):
        learn.set("every", 2.0, player="critic")


class Back(Callback):
    "Saves at a step, and goes back there from a later one, once."

    def __init__(self, save, back):
        self.save, self.back, self.id = save, back, None

    def after_batch(self, learn):
        if learn.step == self.save and self.id is None:
            learn.send("save", source="panel")
        if learn.step == self.back and self.id != "gone":
            learn.send("restore", source="panel", which=self.save)
            self.id = "gone"


@pytest.mark.parametrize(("save", "back"), [(4, 6), (4, 11), (8, 9), (11, 20), (3, 23)])
def test_a_fit_that_goes_back_ends_as_one_that_never_left(tmp_path, save, back):
    plain = learner(run=tmp_path / "plain", save_every="none")
    plain.fit(epochs=3)
    learn = learner(run=tmp_path / "a", save_every="none", cbs=[Back(save, back)])
    learn.fit(epochs=3)
    assert (learn.state, learn.step, learn.epoch) == ("finished", 24, 3)
    same_weights(learn, plain)
    assert told(learn, "restore") == [("restore", save, "")]
    assert [m.step for m in learn.history.marks if m.kind == "restore"] == [save]
    everything = [e.what for e in Journal.read(tmp_path / "a" / "journal.jsonl").entries]
    assert everything == ["fit", "save", "restore", "end"]


def test_going_back_behind_the_beginning_of_a_fit_keeps_where_it_ends(tmp_path):
    learn = learner(run=tmp_path / "a", save_every="none", schedule="constant")
    learn.fit(steps=5)
    learn.save()
    learn.fit(steps=5)
    learn.add(at(14, ("restore", {"which": 5})))
    seen = []
    learn.add(On("after_batch", lambda learn: seen.append(learn.step)))
    learn.fit(steps=10, validate_every=4)
    assert learn.step == 20
    assert seen[:5] == [11, 12, 13, 14, 6] and seen[-1] == 20


def test_a_plan_that_cannot_be_made_from_there_refuses_the_restore(tmp_path, monkeypatch):
    learn, plain = learner(run=tmp_path / "a", save_every="none"), learner()
    learn.fit(steps=5)
    learn.save()
    learn.add(at(8, ("restore", {"which": 5})))
    plan, calls = learn._plan, []

    def once(target):
        calls.append(target)
        if len(calls) == 2:  # the first is the fit's own
            raise ValueError("the schedule ends before")
        plan(target)

    monkeypatch.setattr(learn, "_plan", once)
    learn.fit(steps=5, schedule="restart")
    plain.fit(steps=5)
    plain.fit(steps=5, schedule="restart")
    ((_, step, error),) = told(learn, "restore")
    assert step == 8 and "the schedule ends before" in error
    same_weights(learn, plain)
    assert learn.step == 10 and len(calls) == 3


def test_a_damaged_checkpoint_is_refused_and_the_fit_goes_on(tmp_path):
    learn = learner(run=tmp_path / "a", save_every="none")
    learn.fit(steps=4)
    path = learn.save().path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    learn.add(at(6, ("restore", {"which": 4})))
    learn.fit(steps=4, schedule="hold")
    plain = learner()
    plain.fit(steps=4)
    plain.fit(steps=4, schedule="hold")
    same_weights(learn, plain)
    assert learn.step == 8
    assert path.name in told(learn, "restore")[0][2]


def test_other_threads_get_what_they_ask_for(tmp_path):
    learn, got = learner(run=tmp_path / "a", save_every="none"), {}

    def visitor():
        started.wait(20)
        learn.pause().wait(20)
        got["loss"] = learn.validate()["valid/loss"]
        got["entry"] = learn.save("by hand")
        got["restored"] = learn.restore(got["entry"])
        try:
            learn.restore(99)
        except (CheckpointError, ValueError) as error:
            got["error"] = error
        learn.stop()

    started = threading.Event()
    learn.add(On("after_batch", lambda learn: started.set()))
    thread = threading.Thread(target=visitor)
    thread.start()
    learn.fit(epochs=500)
    thread.join(20)
    assert got["entry"].info["note"] == "by hand" and got["restored"].id == got["entry"].id
    assert got["loss"] > 0 and "99" in str(got["error"])
    assert learn.state == "stopped"
    assert [e.source for e in learn.journal.entries if e.what == "restore"] == ["code", "code"]


def test_a_signal_carries_a_command_where_it_was_asked_for():
    before = signal.getsignal(signal.SIGUSR1)
    learn = learner(signals="SIGUSR1=stop")
    learn.add(On("after_batch", lambda learn: os.kill(os.getpid(), signal.SIGUSR1) if learn.step == 3 else None))
    learn.fit(epochs=10_000)
    assert learn.state == "stopped"
    assert [(e.source, e.error) for e in learn.journal.entries if e.what == "stop"] == [("signal", "")]
    assert signal.getsignal(signal.SIGUSR1) is before


def test_one_may_look_back_from_inside_a_fit(tmp_path):
    seen = {}

    def look(learn):
        if learn.step == 12:
            with learn.at(4):
                seen["past"] = learn.validate(learn.loaders.valid["valid"])["valid/loss"]

    plain = learner(run=tmp_path / "plain", save_every=4)
    plain.fit(steps=4)
    seen["then"] = plain.validate(plain.loaders.valid["valid"])["valid/loss"]
    plain.fit(steps=20, schedule="stretch")
    learn = learner(run=tmp_path / "a", save_every=4, keep="all", cbs=[On("after_batch", look)])
    learn.fit(steps=4)
    learn.fit(steps=20, schedule="stretch")
    same_weights(learn, plain)
    assert seen["past"] == seen["then"]


def test_a_pause_holds_a_run_that_makes_single_steps():
    learn = learner(cbs=[at(2, ("step", {"n": 5})), at(4, ("pause", {}))])
    held = []
    learn.add(On("before_pause", lambda learn: (held.append(learn.step), learn.send("resume"))))
    learn.fit(epochs=2)
    assert held == [4] and learn.step == 16


def test_a_schedule_still_ends_with_the_fit_when_its_player_moves_more_often():
    def make(*cbs):
        torch.manual_seed(0)
        two = [Player(name, nn.Linear(1, 1), opt=OptimBuilder("sgd", lr=0.1, schedule="linear"), every=every, step=own)
               for name, every in (("critic", 1), ("actor", 4))]  # fmt: skip
        return Learner(two, [(torch.ones(2, 1),)] * 64, front="none", cbs=cbs)

    def own(learn, batch):
        return learn.player.modules[learn.player.name](batch[0]).mean()

    for value in (1.0, 2.0, 8.0):
        learn = make(at(16, ("set", {"name": "every", "player": "actor", "value": value})))
        learn.fit(epochs=1)
        schedule = learn.players[1].schedule
        assert schedule.update == schedule.total == 4 + 48 // value
    undone = make(at(16, ("set", {"name": "every", "player": "actor", "value": 1.0})), at(20, ("undo", {})))
    undone.fit(epochs=1)
    assert undone.players[1].schedule.update == undone.players[1].schedule.total == 4 + 4 + 11
    assert undone.players[1].every == 4


def test_a_look_counts_for_nobody_who_waits_for_something_better():
    def make(clicks):
        learn = learner(cbs=[EarlyStopping(patience=3), at(10, *[("validate", {})] * clicks)], schedule={
            "name": "plateau", "monitor": "valid/loss", "patience": 1})  # fmt: skip
        learn.fit(epochs=6)
        return learn

    quiet, nosy = make(0), make(8)
    same_weights(quiet, nosy)
    assert quiet.step == nosy.step
    assert nosy.history.scalars["valid/loss"][0].tolist().count(10) == 8


def test_what_a_person_saved_with_a_note_is_kept(tmp_path):
    learn = learner(run=tmp_path / "a")
    learn.fit(epochs=1)
    noted = learn.save("before the experiment")
    sent = learn.send("save", note="by a button").wait()
    learn.fit(epochs=6, schedule="restart")
    assert {noted.id, sent.id} <= {entry.id for entry in learn.checkpoints}


def test_the_end_after_an_epoch_can_be_asked_for_in_its_validation_and_taken_back():
    learn = learner(cbs=[On("after_validate", lambda learn: learn.stop(after="epoch"))])
    learn.fit(epochs=3)
    assert (learn.state, learn.epoch) == ("stopped", 1)
    learn = learner(cbs=[at(2, ("stop", {"after": "epoch"}), ("resume", {}))])
    learn.fit(epochs=3)
    assert (learn.state, learn.epoch) == ("finished", 3)
    with pytest.raises(ValueError, match="'step' or 'epoch'"):
        learn.stop(after="lunch")


def test_what_cannot_be_written_or_told_is_refused_at_once(tmp_path):
    learn = learner(run=tmp_path / "a")
    for bad in (lambda: learn.note("half an emoji \ud83d"), lambda: learn.save(note="\ud83d"),
                lambda: learn.send("note", text="x", at=3), lambda: learn.send("note", text="x", at=(3,)),
                lambda: learn.release("lrr"), lambda: learn.release("beta1")):  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            bad()
    with pytest.raises(ValueError, match="SIGFOO"):
        learner(signals="SIGFOO=save")
    learn.fit(epochs=1)
    assert learn.state == "finished"


def test_a_command_is_not_waited_for_by_the_thread_that_will_do_it():
    errors = []

    def wait(learn):
        if learn.step == 3:
            try:
                learn.set("lr", 0.02).wait()
            except RuntimeError as error:
                errors.append(str(error))

    learn = learner(cbs=[On("after_batch", wait)])
    learn.fit(epochs=1)
    assert len(errors) == 1 and "this thread" in errors[0]
    assert told(learn, "set") == [("set", 3, "")]


def test_undo_takes_back_the_last_touch_though_several_wait():
    touches = [("set", {"name": "lr", "value": v}) for v in (0.02, 0.03)]
    between = ("set", {"name": "weight_decay", "value": 0.5})
    learn = learner(cbs=[at(3, touches[0], between, touches[1], ("undo", {}))])
    learn.fit(epochs=1)
    assert learn.players[0].schedule.overridden == {"value": 0.02}
    assert learn.players[0].opt.param_groups[0]["weight_decay"] == 0.5


def test_two_learners_of_one_process_do_not_share_a_folder(tmp_path):
    errors = []

    def intrude(learn):
        if learn.step == 3:
            try:
                learner(run=tmp_path / "a").fit(epochs=1)
            except CheckpointError as error:
                errors.append(str(error))

    learn = learner(run=tmp_path / "a", cbs=[On("after_batch", intrude)])
    learn.fit(epochs=1)
    assert len(errors) == 1 and "another learner of this process" in errors[0]
    assert not (tmp_path / "a.1").exists()
    again = learner(run=tmp_path / "a")
    with pytest.warns(UserWarning, match="held another run"):
        again.fit(epochs=1)


def test_a_list_of_checkpoints_may_be_read_by_anybody_at_any_time(tmp_path):
    learn, errors, over = learner(run=tmp_path / "a"), [], threading.Event()
    learn.add(On("after_batch", lambda learn: learn.send("save")))

    def look():
        while not over.is_set():
            try:
                learn.checkpoints.list()
            except Exception as error:  # whatever it is
                errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    learn.fit(epochs=4)
    over.set()
    for thread in threads:
        thread.join(20)
    assert errors == [] and learn.state == "finished"


def test_weights_of_terms_are_knobs_whosever_turn_was_last():
    def own(learn, batch):
        out = learn.player.modules[learn.player.name](batch[0])
        return {f"{learn.player.name}1": out.pow(2).mean(), f"{learn.player.name}2": out.abs().mean()}

    torch.manual_seed(0)
    two = [Player(name, nn.Linear(1, 1), step=own, every=every) for name, every in (("critic", 1), ("actor", 2))]
    learn = Learner(two, [(torch.ones(2, 1),)] * 8, opt="sgd", front="none")
    for steps in (4, 1):
        learn.fit(steps=steps)
        names = {control.name for control in learn.controls()}
        assert {"weights.critic1", "weights.critic2", "weights.actor1", "weights.actor2"} <= names
