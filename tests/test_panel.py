"The panel without a browser: whatever hands do, it shows what the run says, and the run has what the hands did last."
import gc
import json
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit.callback import On
from trainkit.commands import Command, CommandQueue, check_command
from trainkit.controls import Control
from trainkit.gan.learner import GANLearner
from trainkit.journal import Entry, Journal
from trainkit.learner import Learner
from trainkit.ui.knobs import TIMES, Pen, Scale, accepted, exact, number_in, scale_of, slider
from trainkit.ui.panel import Panel
from trainkit.ui.presets import Presets
from trainkit.ui.tables import journal_table, timings, undoable

ipywidgets = pytest.importorskip("ipywidgets")
from ipywidgets.widgets.widget import _instances  # noqa: E402

SHOWN = (
    Control("lr", "generator", (1e-3,), ("0",), 0.0, 1.0, (1e-6, 1e-2), log=True, scheduled=True),
    Control("lr", "critic", (1e-3,), ("0",), 0.0, 1.0, (1e-6, 1e-2), log=True),
    Control("weight_decay", "critic", (0.1, 0.0), ("decay", "rest"), 0.0, float("inf"), (0.0, 0.2)),
    Control("n_critic", "critic", (1,), ("n",), 1.0, float("inf"), (1.0, 10.0), whole=True),
    Control("Smooth.eps", "", (0.1,), ("eps",), 0.0, 1.0, (0.0, 0.3)),
)


class Run:
    "An endpoint that carries out commands at once, or, while it `fits`, at its next step."

    def __init__(self, fits=False):
        self.knobs = {(c.name, c.player): c for c in SHOWN}
        self.queue, self.journal, self.fits, self.at = CommandQueue(), Journal(), fits, 0
        self.before, self.paused, self.checkpoints = [], False, None

    def send(self, what, /, source="code", **values):
        command = Command(what, check_command(what, values), source)
        if self.fits: return self.queue.put(command)
        self.do(command)
        return command

    def step(self):
        self.at += 1
        lr = self.knobs["lr", "generator"]
        self.knobs["lr", "generator"] = self.on_curve(lr)
        while (command := self.queue.take(self.at, 0)) is not None: self.do(command)

    def on_curve(self, lr):
        held, curve = lr.held or {}, 1e-3 * 0.9**self.at
        return replace(lr, values=(held.get("value", curve * held.get("times", 1)),))

    def do(self, command):
        error, old, new = "", None, None
        try: old, new = getattr(self, f"do_{command.name}", lambda **values: (None, None))(**command.values)
        except ValueError as e: error = str(e)
        values = {k: v for k, v in command.values.items() if v is not None}
        command.done(self.journal.add(Entry(command.name, values, self.at, 0, 0.0, command.source, old, new, error, command.id)))

    def do_set(self, name, player, value=None, times=None):
        c = self.knobs[name, player or ""]
        if c.whole and value is not None and value != round(value): raise ValueError(f"{name} takes whole numbers")
        if value is not None and not c.low <= value < c.high: raise ValueError(f"{name} must be >= {c.low} and < {c.high}")
        self.before.append(c)
        held = ({"times": times} if times is not None else {"value": value}) if c.scheduled else None
        new = replace(c, held=held, values=c.values if value is None else (value,) * len(c.values))
        self.knobs[name, player or ""] = self.on_curve(new) if c.scheduled else new
        return c.values[0], self.knobs[name, player or ""].values[0]

    def do_release(self, name, player):
        c = self.knobs[name, player or ""]
        if not c.scheduled: raise ValueError(f"{name} is moved by no schedule")
        self.before.append(c)
        self.knobs[name, player or ""] = self.on_curve(replace(c, held=None))
        return c.values[0], self.knobs[name, player or ""].values[0]

    def do_undo(self):
        if not self.before: raise ValueError("there is nothing to undo")
        c = self.before.pop()
        self.knobs[c.name, c.player] = self.on_curve(c) if c.scheduled else c
        return 0.0, c.values[0]

    def do_pause(self): self.paused = True; return None, None
    def do_resume(self): self.paused = False; return None, None
    def controls(self): return [*self.knobs.values()]

    def status(self):
        state = ("paused" if self.paused else "training") if self.fits else "idle"
        return {"state": state, "paused": self.paused, "step": self.at, "run": None, "error": "", "pending": len(self.queue)}


def panel_of(run, hold=0.0):
    panel = Panel(run)
    panel.hold = hold
    assert panel.widget is panel.widget
    return panel


def dials(panel): return {(key[1], key[0]): dial for key, dial in panel.view.deck.dials.items()}


def offered(panel):
    "Which of the two buttons has something to do."
    made = panel.view.buttons.made
    assert made["pause"].layout.display is made["resume"].layout.display is None and made["pause"].button_style == ""
    return {"": "pause", "primary": "resume"}[made["resume"].button_style]


def check(panel, run, chosen=False):  # chosen: a hand said what slider and field mean
    "Every widget says what the run says."
    found = dials(panel)
    assert found.keys() == run.knobs.keys()
    for key, c in run.knobs.items():
        dial, held = found[key], c.held or {}
        assert dial.pending is None
        if c.scheduled:
            text = held.get("times" if dial.mode.value else "value")
            assert dial.times.value == TIMES.position(held.get("times", 1.0)) and dial.back.disabled == (not held)
            if held and not chosen: assert ("times" in held) == dial.mode.value
        else: text = c.values[0] if len({*c.values}) == 1 else None
        assert dial.field.value == ("" if text is None else exact(text))
        assert text is None or float(dial.field.value) == text
        assert dial.slider.value == dial.scale.position(c.values[0])
    assert offered(panel) == ("resume" if run.paused else "pause")
    for name in ("pause", "resume"): assert panel.view.buttons.made[name].disabled == (not run.fits)  # whatever the run does
    assert panel.view.buttons.made["undo"].disabled == (undoable(run.journal.entries) is None)


KEYS = st.sampled_from([(c.name, c.player) for c in SHOWN])
TEXTS = st.one_of(st.sampled_from(["", "abc", "1e-4", "0.5", "-1", "nan", "1e999", "3", " 2e-3 ", "0,5"]),
                  st.floats(0, 20).map(repr))
DEEDS = st.one_of(
    st.tuples(st.just("drag"), KEYS, st.lists(st.integers(0, 400), min_size=1, max_size=4)),
    st.tuples(st.just("type"), KEYS, TEXTS),
    st.tuples(st.sampled_from(["mode", "back", "undo", "pause", "refresh", "step"])),
    st.tuples(st.just("elsewhere"), KEYS, st.floats(0, 2)),
    st.tuples(st.sampled_from(["store", "apply"]), st.sampled_from("ab")),
)


def press(panel, button):
    if not button.disabled: button.click()  # a browser doesn't send the other ones


def deed(panel, run, what, *how):
    if what == "drag":
        dial = dials(panel)[how[0]]
        bar = dial.times if dial.multiplies else dial.slider
        for place in how[1]: bar.value = min(place, bar.max)
    elif what == "type": dials(panel)[how[0]].field.value = how[1]
    elif what == "mode": dials(panel)["lr", "generator"].mode.value ^= True
    elif what == "back": press(panel, dials(panel)["lr", "generator"].back)
    elif what == "undo": press(panel, panel.view.buttons.made[what])
    elif what == "pause": press(panel, panel.view.buttons.made[offered(panel)])
    elif what == "elsewhere": run.send("set", name=how[0][0], player=how[0][1] or None, value=how[1])
    elif what in ("store", "apply"): panel.preset(what, how[0])
    elif what == "refresh": panel.refresh()
    else: run.step()


@given(st.booleans(), st.lists(st.tuples(st.integers(0, 1), DEEDS), max_size=25))
@settings(max_examples=40, deadline=None)
def test_widgets_say_what_the_run_says(fits, deeds):
    run = Run(fits)
    panels = [panel_of(run), panel_of(run)]
    for who, (what, *how) in deeds: deed(panels[who], run, what, *how)
    run.step()
    for panel in panels: panel.refresh()
    chosen = [any(who == i and what == "mode" for who, (what, *_) in deeds) for i in range(2)]
    for panel, hand in zip(panels, chosen): check(panel, run, hand)
    run.fits = run.paused = False
    for panel, hand in zip(panels, chosen): panel.refresh(); check(panel, run, hand); panel.close()


@given(KEYS, st.lists(st.integers(0, 400), min_size=1, max_size=9), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_last_value_of_a_drag_is_applied_exactly(key, places, times):
    run = Run(fits=True)
    panel = panel_of(run)
    dial = dials(panel)[key]
    times = times and dial.control.scheduled
    if times: dial.mode.value = True
    bar, scale, before = (dial.times, TIMES, 0) if times else (dial.slider, dial.scale, dial.control.values)
    places = [min(place, bar.max) for place in places]
    moved = any(place != bar.value for place in places)
    for place in places:
        bar.value = place
        assert len(run.queue) <= 1
    panel.view.deck.flush()
    run.step()
    panel.refresh()
    c, wanted = run.knobs[key], scale.value(places[-1])
    if not moved: assert c.values == before or c.scheduled
    elif times: assert c.held == {"times": wanted}
    else: assert c.values == (wanted,) * len(c.values)
    assert len(run.journal) == moved and bar.value == places[-1]
    check(panel, run)
    panel.close()


@given(st.floats(1e-9, 1e3), st.floats(1.01, 1e9), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_positions_and_numbers(low, ratio, log, whole):
    scale = Scale(low, low * ratio, log, whole and not log and low * (ratio - 1) > 2)
    values = [scale.value(p) for p in range(scale.steps + 1)]
    assert values == sorted({*values}) and values[0] >= low and values[-1] <= low * ratio and 1 <= scale.steps <= 400
    assert [scale.position(v) for v in values] == [*range(scale.steps + 1)]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_as_text(value):
    assert float(exact(value)) == value == number_in(f" {exact(value)} ")


@pytest.mark.parametrize("text", ["", "abc", "nan", "inf", "1e999", "0,5", "1", "-0.1", "1e-4x", "0x1"])
def test_what_is_accepted_is_said(text):
    with pytest.raises(ValueError, match=r"type a number >= 0 and < 1, like 0.0003 or 3e-4"): number_in(text, 0, 1)
    assert accepted(-float("inf"), float("inf")) == "a number, like 0.0003 or 3e-4"


def test_no_slider_ends_where_it_would_be_refused():
    for c in SHOWN:
        scale = scale_of(c)
        assert c.low <= scale.value(0) and scale.value(scale.steps) < c.high
    for low, high in ((0.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))): assert Scale(low, high).steps >= 1


def counted(monkeypatch):
    sent = []
    monkeypatch.setattr(ipywidgets.Widget, "_send", lambda self, msg, buffers=None: sent.append((type(self).__name__, msg)))
    return sent


def test_what_has_not_changed_is_not_sent_again(monkeypatch):
    run = Run(fits=True)
    panel = panel_of(run)
    run.send("set", name="lr", player="critic", value=0.5)
    run.step()
    for tab in ("knobs", "journal", "timings"):
        panel.view.tabs.show(tab)
        panel.refresh()
        sent = counted(monkeypatch)
        for _ in range(3): panel.refresh(run.status(), run.controls(), run.journal)
        assert sent == []
    panel.view.tabs.show("knobs")
    run.step()  # the schedule moves the generator's learning rate
    sent = counted(monkeypatch)
    panel.refresh()
    assert 1 <= len(sent) <= 3 and {kind for kind, _ in sent} <= {"IntSlider", "HTML"}
    panel.close()


def test_a_schedule_does_not_write_into_the_field():
    "Somebody may be typing there, and the kernel doesn't hear of it."
    run, heard = Run(fits=True), []
    panel = panel_of(run)
    dial = dials(panel)["lr", "generator"]
    dial.field.observe(heard.append)
    for _ in range(5): run.step(); panel.refresh()
    assert heard == [] and "on its schedule" in dial.said.value and exact(1e-3 * 0.9**5)[:6] in dial.said.value
    panel.close()


def test_the_handle_stays_under_the_hand():
    run = Run(fits=True)
    panel = panel_of(run, hold=60)
    dial = dials(panel)["lr", "critic"]
    dial.hold = 60
    run.do_set = lambda **values: (_ for _ in ()).throw(ValueError("not today"))
    dial.slider.value = 17
    assert dial.field.value == exact(dial.scale.value(17))
    panel.refresh()
    assert "pending" in dial.said.value
    run.step()
    panel.refresh()
    assert dial.slider.value == 17 and "refused: not today" in dial.said.value and "tk-bad" in dial.said.value
    assert "refused: not today" in panel.view.message.text
    dial.hold = 0  # it was let go
    panel.refresh()
    check(panel, run)
    panel.close()


def test_it_settles_by_itself(monkeypatch):
    run = Run()
    panel = panel_of(run)
    dial = dials(panel)["lr", "critic"]
    dial.hold = panel.hold = 0.05
    run.do_set = lambda **values: (_ for _ in ()).throw(ValueError("not today"))
    before = dial.slider.value
    dial.slider.value = 17
    assert dial.slider.value == 17
    timer = panel._timer
    while timer is not None: timer.join(5); timer = panel._timer
    assert dial.slider.value == before
    panel.close()


def test_states_of_buttons():
    run = Run(fits=True)
    panel = panel_of(run)
    made = panel.view.buttons.made
    assert made["save"].disabled and "keeps no checkpoints" in made["save"].tooltip and not made["stop"].disabled
    assert made["undo"].disabled and "nothing was changed" in made["undo"].tooltip
    made["pause"].click()
    assert panel.view.message.text == "pause: with the next step …" and offered(panel) == "pause"
    run.step()
    panel.refresh()
    assert offered(panel) == "resume" and panel.view.message.text == "Step 1: pause"
    made["resume"].click()
    run.step()
    panel.refresh()
    assert not run.paused and offered(panel) == "pause"
    run.paused = True  # by somebody else, while the press is on its way: it means what was to be read on the screen
    panel.refresh()
    made["pause"].click()
    assert run.queue.pending[-1].name == "pause"
    run.paused = False
    panel.refresh()
    made["resume"].click()
    assert run.queue.pending[-1].name == "resume" and not made["resume"].disabled
    panel.close()


def test_a_press_that_comes_too_late_changes_nothing():
    "A learner that is paused, and one that goes on already, at the moment in which a press arrives."
    x, seen = torch.randn(64, 1), []
    learn = Learner(nn.Linear(1, 1), ((x, x), (x, x)), "mse", batch_size=8, front="none")
    panel = panel_of(learn)
    made = panel.view.buttons.made

    def press(learn):
        panel.refresh()
        if learn.step == 3: made["resume"].click()
        if learn.step == 5: made["pause"].click(); made["pause"].click()

    def held(learn):
        panel.refresh()
        seen.append((learn.step, offered(panel), made["pause"].disabled))
        for name in ("pause", "resume", "resume"): made[name].click()

    learn.add(On("after_batch", press))
    learn.add(On("before_pause", held))
    learn.fit(steps=8)
    assert (learn.state, learn.step, seen) == ("finished", 8, [(5, "resume", False)])
    said = [(e.step, e.what, e.error) for e in learn.journal.entries if e.source == "panel"]
    late = "the fit is not paused"
    assert said == [(3, "resume", late), *2 * [(5, "pause", "")], (5, "pause", ""), (5, "resume", ""), (5, "resume", late)]
    panel.close()


def test_other_peoples_words_are_not_html():
    bad = "<img src=x onerror=alert(1)>"
    run = Run()
    run.journal.add(Entry("note", {"text": bad}, 1, source=bad))
    run.journal.add(Entry("set", {"name": "lr", "player": "critic", "value": 1}, 1, error=bad))
    run.status = lambda: {"state": "failed", "error": bad, "run": bad}
    panel = panel_of(run)
    for tab in ("journal", "timings", "knobs"):
        panel.view.tabs.show(tab)
        shown = (panel.view.journal, panel.view.timings, panel.view.message.line, dials(panel)["lr", "critic"].said)
        assert all("<img" not in part.value for part in shown) and any("&lt;img" in part.value for part in shown)
    panel.close()


def test_the_journal_is_bounded_and_newest_first():
    entries = [Entry("note", {"text": f"n{i}"}, i) for i in range(120)]
    table = journal_table(entries)
    assert table.count("<tr") == 51 and "and 70 older" in table and "n69<" not in table
    assert table.index("n119<") < table.index("n70<")
    assert timings({"losses": {"a": None, "b": 1.0}, "rate": None, "x": {"y": 1}, "z": "w", "controls": [1]}) == [
        ("loss of b", "1.000"), ("x: y", "1.000"), ("z", "w")]


def test_after_a_restore_the_journal_is_another_one():
    run = Run()
    panel = panel_of(run)
    for value in (0.1, 0.2, 0.3): run.send("set", name="lr", player="critic", value=value)
    panel.refresh()
    assert "applied" in dials(panel)["lr", "critic"].said.value
    other = Journal()
    other.add(Entry("restore", {"which": "best"}, 5, source="panel"))
    run.journal = other
    panel.refresh()
    assert panel.view.message.text.startswith("Step 5: restore") and "applied" not in dials(panel)["lr", "critic"].said.value
    assert panel.view.buttons.made["undo"].disabled
    panel.close()


def test_knobs_come_and_go():
    run = Run()
    panel = panel_of(run)
    kept, n = dials(panel)["lr", "critic"], len(_instances)
    extra = Control("weights.fit", "critic", (1.0,), ("fit",), 0.0, float("inf"), (0.0, 2.0))
    for _ in range(3):
        run.knobs["weights.fit", "critic"] = extra
        panel.refresh()
        check(panel, run)
        del run.knobs["weights.fit", "critic"]
        panel.refresh()
        check(panel, run)
    assert dials(panel)["lr", "critic"] is kept and len(_instances) == n
    panel.close()


def test_closing_takes_everything_along_but_what_is_others():
    gc.collect()
    before, run = len(_instances), Run()
    mine = ipywidgets.HTML("doctor")
    own = len(_instances)
    panel = Panel(run)
    panel.add_tab("doctor", mine)
    panel.widget.add_class("x")
    panel.view.tabs.show("doctor")
    assert panel.view.tabs.room.children[-1] is mine and mine.layout.display is None
    button = panel.view.buttons.made["validate"]
    panel.close()
    panel.close()
    gc.collect()
    assert before < own == len(_instances) and mine.comm is not None and panel.widget is None
    button._click_handlers(button)  # a click that was on its way
    panel.refresh()
    assert len(run.journal) == 0 and "closed" in repr(panel)
    mine.close()


def test_from_many_threads(capsys):
    run, errors = Run(), []
    panel = panel_of(run)

    def work(i):
        try:
            for n in range(25):
                dials(panel)["n_critic", "critic"].slider.value = (i + n) % 9
                panel.refresh()
                dials(panel)["lr", "generator"].mode.value ^= True
                panel.view.tabs.show(("knobs", "journal")[n % 2])
        except Exception as error: errors.append(error)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(30)
    assert not errors and not any(thread.is_alive() for thread in threads)
    panel.view.tabs.show("knobs")
    panel.refresh()
    check(panel, run)
    panel.close()
    assert capsys.readouterr() == ("", "")


def test_a_pen_tells_whose_echo_it_is():
    pen, heard = Pen(), []
    with pen.writing():
        with pen.writing(): pass
        thread = threading.Thread(target=lambda: heard.append(pen.echo))
        thread.start(); thread.join()
        heard.append(pen.echo)
    assert heard == [False, True] and not pen.echo


def test_what_is_impossible_is_said(monkeypatch):
    class Works:
        closed = False
        def close(self): self.closed = True
    learn, pump = learner(), Works()
    monkeypatch.setenv("TRAINKIT_WHERE", "notebook")
    monkeypatch.setattr("trainkit.ui.panel.Pump.here", lambda: None)
    panel = panel_of(learn)
    assert any("only when the running cell has ended" in getattr(part, "value", "") for part in panel.widget.children)
    panel.close()
    monkeypatch.setattr("trainkit.ui.panel.Pump.here", lambda: pump)
    panel = panel_of(learn)
    assert pump.closed and not any("running cell" in getattr(part, "value", "") for part in panel.widget.children)
    panel.close()


# ---- with a learner

def learner(run=None, **kw):
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    kw = {"batch_size": 8, "seed": 1, "front": "none", "opt": {"name": "adamw", "lr": 0.05, "schedule": "cosine"}} | kw
    return Learner(nn.Linear(3, 1), ((x, x.sum(1, keepdim=True)),) * 2, "mse", run=run, **kw)


def test_a_panel_does_not_keep_a_learner():
    learn = learner()
    learn.fit(steps=2)
    panel = panel_of(learn)
    there = weakref.ref(learn)
    del learn
    gc.collect()
    assert there() is None
    panel.view.buttons.made["validate"].click()
    assert "is gone" in panel.view.message.text
    panel.close()


def test_a_fit_is_steered_from_another_thread(tmp_path):
    learn, panel, errors = learner(tmp_path / "run", save_every=4), None, []

    def hand():
        try:
            dials(panel)["lr", "model"].field.value = "0.0123"
            panel.view.buttons.note.value = "by hand"
            panel.view.buttons.made["save"].click()
            panel.view.buttons.made["stop"].click()
        except Exception as error: errors.append(error)

    def refresh(learn):
        if learn.step == 4:
            thread = threading.Thread(target=hand)
            thread.start(); thread.join()
        panel.refresh()
    learn.add(On("after_batch", refresh))
    panel = Panel(learn)
    panel.hold = 0
    assert panel.widget is not None
    learn.fit(steps=12)
    panel.refresh()
    assert not errors and learn.step == 4 and learn.state == "stopped"
    assert learn.players[0].opt.param_groups[0]["lr"] == 0.0123
    assert [e.what for e in learn.journal.entries if e.source == "panel"] == ["set", "save", "stop"]
    assert learn.checkpoints.find("last").info["note"] == "by hand"
    assert "0.0123 held; applied at step 4" in dials(panel)["lr", "model"].said.value
    assert panel.view.buttons.which.options[:2] == ("last", "best") and len(panel.view.buttons.which.options) > 2
    assert panel.view.buttons.made["stop"].tooltip == "nothing is being trained"
    panel.view.buttons.which.value = "4"
    panel.view.buttons.made["restore"].click()
    assert "restore" in panel.view.message.text
    panel.open_gallery()
    assert len(panel.view.gallery.children) == 1
    panel.close()


def test_presets_lie_in_the_folder_of_the_run(tmp_path):
    learn = learner(tmp_path / "run")
    learn.fit(steps=4)
    one, two = panel_of(learn), panel_of(learn)
    learn.set("lr", times=0.5)
    one.refresh()
    one.preset("store", "half")
    learn.set("weight_decay", 0.3)
    learn.release("lr")
    one.preset("store", "plain")
    path = tmp_path / "run" / "presets.json"
    assert json.loads(path.read_text())["half"][0] == {"name": "lr", "player": "model", "times": 0.5}
    two.preset("apply", "half")
    held = {c.name: c.held or c.values for c in learn.controls()}
    assert held["lr"] == {"times": 0.5} and held["weight_decay"] != (0.3,)
    two.preset("apply", "quarter")
    assert two.view.message.text == "Not done: there is no preset 'quarter'; there are: half, plain"
    two.preset("forget", "half")
    assert two.view.presets.name.options == ("plain",)
    path.write_text("{")
    two.preset("apply", "plain")
    assert "can't be read" in two.view.message.text and path.read_text() == "{"
    for panel in (one, two): panel.close()


@pytest.mark.parametrize("content", ["[]", '{"a": 3}', '{"a": [{"name": "lr"}]}', "\x00",
                                     '{"a": [{"name": "lr", "player": "", "value": true}]}',
                                     '{"a": [{"name": "lr", "player": "", "value": 1, "times": 2}]}'])
def test_damaged_presets_are_refused(tmp_path, content):
    (tmp_path / "presets.json").write_text(content)
    with pytest.raises(ValueError, match="can't be read"): Presets(tmp_path / "presets.json").save("x", SHOWN)
    assert (tmp_path / "presets.json").read_text() == content


def test_every_knob_of_a_gan_has_a_dial():
    generator = nn.Sequential(nn.Linear(4, 16), nn.Unflatten(1, (1, 4, 4)))
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0))
    gan = GANLearner(generator, discriminator, torch.rand(32, 1, 4, 4), latent=4, batch_size=8, front="none",
                     opt={"name": "adam", "lr": 1e-3})
    gan.fit(steps=2)
    panel = panel_of(gan)
    assert dials(panel).keys() == {(c.name, c.player) for c in gan.controls()}
    for key, dial in dials(panel).items():
        for place in (0, dial.slider.max, dial.slider.max // 2): dial.slider.value = place
        dial.flush()
        if "must move in every batch" in dial.said.value: continue  # whoever moves less often
        assert "refused" not in dial.said.value, key
        assert next(c for c in gan.controls() if (c.name, c.player) == key).values[0] == dial.scale.value(dial.slider.max // 2)
    panel.close()


def test_a_drag_sends_few_commands_and_the_last_value_by_itself():
    run = Run(fits=True)
    panel = panel_of(run)
    dial, sent = dials(panel)["lr", "critic"], []
    send, dial.send = dial.send, lambda *args, **values: (sent.append(values["value"]), send(*args, **values))
    dial.pace = 2
    for place in range(40): dial.slider.value = place
    assert len(sent) == 1 or time.monotonic() > dial._next
    for _ in range(1000):
        if sent[-1] == dial.scale.value(39): break
        threading.Event().wait(0.01)
    assert sent[-1] == dial.scale.value(39) and len(sent) < 20
    panel.close()


def test_other_pages_hear_of_a_slider_when_the_hand_rests(monkeypatch):
    sent = []
    monkeypatch.setattr(ipywidgets.Widget, "_send", lambda self, msg, buffers=None: sent.append((self, msg)))
    for made, echo in (ipywidgets.IntSlider(), [5]), (slider(ipywidgets, Scale(0, 1), "x"), []):
        del sent[:]
        made.set_state({"value": 5})
        assert made.value == 5 and [msg["state"]["value"] for _, msg in sent if "value" in msg["state"]] == echo
    run = Run(fits=True)
    panel = panel_of(run, hold=60)
    dial = dials(panel)["lr", "critic"]
    dial.hold = 60

    def told():
        positions = [msg["state"]["value"] for widget, msg in sent if widget is dial.slider and "value" in msg["state"]]
        del sent[:]
        return positions

    told()
    dial.slider.set_state({"value": 5})
    run.step()
    panel.refresh()
    assert told() == [] and run.knobs["lr", "critic"].values[0] == dial.scale.value(5)
    dial.hold = 0
    for _ in range(3): panel.refresh()
    assert told() == [5]
    panel.close()


def test_what_is_pressed_after_a_drag_comes_after_it():
    run = Run(fits=True)
    panel = panel_of(run)
    dial = dials(panel)["lr", "critic"]
    dial.pace = 60
    for place in (3, 5): dial.slider.value = place
    panel.send("note", text="now")
    run.step()
    assert [entry.what for entry in run.journal.entries][-2:] == ["set", "note"]
    assert run.knobs["lr", "critic"].values[0] == dial.scale.value(5)
    for place in (7, 9): dial.slider.value = place
    panel.close()
    run.step()
    assert run.knobs["lr", "critic"].values[0] == dial.scale.value(9)


def test_what_the_training_thread_hears_is_pending_until_the_next_step():
    "In a cell that trains, messages are taken in by the thread that makes the steps."
    learn = Learner(nn.Linear(2, 1), [(torch.rand(4, 2), torch.rand(4, 1))] * 4, "mse", {"name": "sgd", "lr": 0.1}, front="none")
    learn.fit(steps=1)
    panel, seen, refreshed = panel_of(learn), [], []
    dial = dials(panel)["lr", "model"]
    refresh, panel.refresh = panel.refresh, lambda *args: (refreshed.append(learn.step), refresh(*args))

    def turn(learn):
        if learn.step == 3:
            dial.slider.value = 7
            seen.append((dial.pending is not None, "pending" in dial.said.value, [*refreshed]))

    learn.add(On("after_batch", turn))
    learn.fit(steps=3)
    assert seen == [(True, True, [])] and learn.controls()[0].values == (dial.scale.value(7),)
    panel.refresh()
    assert dial.pending is None and "applied at step 3" in dial.said.value
    panel.close()


def test_it_follows_by_itself():
    run = Run(fits=True)
    panel = panel_of(run)
    panel.follow(0.01)
    assert panel.follow(0.01) is panel
    named = [thread for thread in threading.enumerate() if thread.name == panel._name]
    run.send("set", name="lr", player="critic", value=0.5)
    run.step()
    for _ in range(500):
        if dials(panel)["lr", "critic"].field.value == "0.5": break
        threading.Event().wait(0.01)
    assert dials(panel)["lr", "critic"].field.value == "0.5" and len(named) == 1
    panel.close()
    named[0].join(5)
    assert not named[0].is_alive()
