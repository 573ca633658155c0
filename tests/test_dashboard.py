"The dashboard: what it shows, what it leaves, that its thread ends, and that no step waits for it."
import json
import math
import subprocess
import sys
import threading
import time
import warnings
from base64 import b64decode
from types import SimpleNamespace as NS

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jupyter_client.manager import start_new_kernel
from standin import Run
from test_ui_kernel import SETUP, WIDGET, Kernel, environment
from torch import nn

from trainkit.callback import On
from trainkit.gan.doctor import Alarm, Doctor
from trainkit.gan.learner import GANLearner
from trainkit.history import History
from trainkit.ui import dashboard as module
from trainkit.ui.dashboard import SHARE, Dashboard, dashboard, last_words
from trainkit.ui.live import Sketch, Ticker, encode, epochs_table, status_from
from trainkit.ui.progress import Status, Table, Tracker
from trainkit.ui.samples import Samples
from trainkit.ui.view import View

# ---- words and pictures

def test_the_table_is_that_of_the_bars():
    "By the tracker, which saw every epoch when it ended."
    run = Run(batches=7, valid=1)
    run.emit("before_fit")
    tracker = Tracker(run)
    for epoch in range(3):
        for _ in range(7):
            run.step += 1
            run.history.add("train/generator/loss", math.sin(run.step), run.step)
        run.history.add("valid/score", run.step, run.step)
        if epoch == 1: run.history.add("valid/late", 1.0, run.step)
        run.epoch += 1
        run.history.mark("epoch", run.step, str(run.epoch))
        tracker.new_row(run)
    mine = epochs_table(run.history.snapshot(), Status(step=21, epoch=3), time.time() - 1)
    assert mine.columns == tracker.table.columns
    assert [{k: v for k, v in row.items() if k != "time"} for row in mine.rows] == \
        [{k: v for k, v in row.items() if k != "time"} for row in tracker.table.rows]


def test_epochs_of_earlier_fits_are_left_out_and_old_rows_not_computed():
    history = History()
    for epoch in range(1, 301):
        history.add("train/loss", 1 / epoch, epoch)
        history.mark("epoch", epoch, str(epoch))
    s = Status(step=300, start=100, epoch=300)
    table = epochs_table(history.snapshot(), s, time.time(), last=5)
    assert [row.get("epoch") for row in table.rows[-6:]] == [None, "296", "297", "298", "299", "300"]
    assert len(table.rows) == 200


@given(st.dictionaries(st.sampled_from(["state", "step", "steps", "rate", "eta", "memory", "losses", "epochs", "nonsense"]),
                       st.none()))
def test_a_status_may_lack_anything(told):
    s = status_from(told)
    assert (s.state, s.step, s.steps, s.left, s.memory, s.losses) == ("training", 0, None, None, None, {})


@pytest.mark.parametrize("steps, batches, made, epochs", [(600, 16, 0, 38), (600, 16, 599, 38), (600, 16, 600, 38),
                                                          (32, 16, 32, 2), (32, 16, 5, 2)])
def test_a_fit_of_steps_has_epochs_as_well(steps, batches, made, epochs):
    told = {"step": made, "start": 0, "steps": steps, "epoch": made // batches, "epochs": None, "batch": made % batches,
            "batches": batches}
    assert status_from(told).epochs == epochs


@given(st.integers(1, 40), st.integers(1, 60), st.booleans(), st.integers(0, 2**32 - 1), st.integers(800, 5000))
@settings(max_examples=30, deadline=None)
def test_a_picture_has_as_many_bytes_as_it_may(h, w, coloured, seed, most):
    from io import BytesIO

    from PIL import Image
    pixels = np.random.default_rng(seed).integers(0, 255, (4 * h, 4 * w, 3)).astype(np.uint8)
    kind, data = encode(pixels, most, coloured)
    assert len(data) <= most
    image = Image.open(BytesIO(data))
    assert f"image/{image.format.lower()}" == kind and image.width * h == pytest.approx(image.height * w, rel=0.3)


@pytest.mark.parametrize("columns, epochs", [(3, 10_000), (12, 2000), (60, 400), (300, 300)])
def test_what_stays_is_small_at_any_length(columns, epochs):
    table = Table()
    values = {f"valid/metric_of_kind_{i}": "0.123456" for i in range(columns)}
    table.rows = [{"epoch": f"{epoch}/{epochs}", **values, "time": "1:00:00"} for epoch in range(epochs)]
    table.columns = [*table.rows[0]]
    words = last_words(Status("finished"), table)
    assert len(words["text/html"]) < 90_000 and len(words["text/plain"]) < 60_000
    assert words["text/html"].count("<tr") > 4


# ---- the thread

def test_many_wakes_are_few_calls_and_the_last_is_heard():
    calls, seen, asked = [], threading.Event(), 0

    def job(woken):
        calls.append(asked)
        if asked == 500: seen.set()
    ticker = Ticker(job, every=0.05)
    ticker.start()
    for asked in range(1, 501):
        ticker.wake()
        time.sleep(0.0005)
    assert seen.wait(5) and len(calls) < 100
    ticker.close()
    assert not ticker.alive and ticker.error is None


def test_a_ticker_can_be_closed_by_its_own_job_and_before_it_began():
    ticker = Ticker(lambda woken: ticker.close(), every=0.01)
    ticker.start()
    for _ in range(100):
        if not ticker.alive: break
        time.sleep(0.02)
    assert not ticker.alive
    Ticker(lambda woken: None).close()


# ---- a fit

class Cell:
    "Stands for a place in a cell's output."
    made: list = []

    def __init__(self):
        self.shown, self.left, self.thread = 0, [], threading.get_ident()
        self.made.append(self)

    def show(self, root, pixels): self.shown += 1

    def leave(self, s, table, data, metadata): self.left.append((s, table, data))


@pytest.fixture
def cells(monkeypatch):
    "Cells instead of outputs, and widgets that somebody might see."
    import ipywidgets
    monkeypatch.setattr(Cell, "made", [])
    monkeypatch.setattr(module, "Spot", Cell)
    monkeypatch.setattr(module, "live_widgets", lambda: ipywidgets)
    return Cell.made


def drawing_threads():
    return [t for t in threading.enumerate() if t.name == "trainkit dashboard"]


def open_widgets():
    import ipywidgets
    return len(ipywidgets.widgets.widget._instances)


ENDS = [("finished", None), ("stopped", 13), (KeyboardInterrupt(), 13), (ValueError("bad <batch>"), 13)]


@pytest.mark.parametrize("end, at", ENDS)
def test_every_ending_leaves_a_word_and_a_picture_and_no_thread(cells, end, at):
    run = Run(Dashboard(), Samples(), batches=10)
    try: run.fit(2, end=end, at=at)
    except BaseException as error: assert error is end
    cell, = cells
    (s, table, data), = cell.left
    word = {"finished": "finished", "stopped": "stopped"}.get(end) if isinstance(end, str) else \
        "interrupted" if isinstance(end, KeyboardInterrupt) else "failed"
    assert (s.state, s.step, cell.shown) == (word, at or 20, 1)
    assert len(table.rows) == (1 if at else 2) and set(data) == {"image/png", "text/plain"}
    assert drawing_threads() == []


def test_a_second_fit_has_a_cell_of_its_own_and_few_widgets_stay(cells):
    run, counts = Run(Dashboard(), batches=3), []
    for n in range(1, 7):
        run.fit(1)
        assert [(c.shown, len(c.left)) for c in cells] == [(1, 1)] * n
        counts.append(open_widgets())
    grown = np.diff(counts)
    assert grown[-1] <= 4, counts  # those of the last three fits stay, and nothing of those before


def test_steps_never_draw_and_never_wait(cells, monkeypatch):
    "Drawings last as long as the test allows; the fit is over long before them."
    threads, draw, go = [], Sketch.draw, threading.Event()

    def slow(self, snapshot, beside):
        threads.append(threading.get_ident())
        if len(threads) > 1: go.wait(10)
        return draw(self, snapshot, beside)
    monkeypatch.setattr(Sketch, "draw", slow)
    run = Run(Dashboard(refresh=0.01), batches=100, seconds=0.01)

    class Watch(View):
        order = 99

        def after_batch(self, learn):
            if learn.step < 100: return
            steps_done.append(len(threads))
            go.set()
    steps_done = []
    run.cbs.add(Watch())
    run.fit(1)
    assert steps_done == [2]  # the second drawing had begun and waits, and a hundred steps were made
    assert threads[0] == threading.get_ident() and threading.get_ident() not in threads[1:]


def test_an_error_while_drawing_switches_it_off_and_the_run_goes_on(cells, monkeypatch):
    draw, drawn = Sketch.draw, []

    def broken(self, snapshot, beside):
        drawn.append(1)
        if len(drawn) > 1: raise OSError("no display")
        return draw(self, snapshot, beside)
    monkeypatch.setattr(Sketch, "draw", broken)
    run = Run(Dashboard(refresh=0.01), batches=150, seconds=0.01)
    with pytest.warns(UserWarning, match="Dashboard is switched off, the run goes on: OSError: no display") as caught:
        run.fit(1)
    assert len([w for w in caught if "switched off" in str(w.message)]) == 1
    assert run.state == "finished" and drawing_threads() == [] and len(cells[0].left) == 1
    monkeypatch.setattr(Sketch, "draw", draw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.fit(1)  # a new fit, a new chance
    assert cells[1].left[0][0].state == "finished"


@pytest.mark.parametrize("broken", ["Spot", "Stage", "Panel"])
def test_an_error_in_the_beginning_does_no_harm(cells, monkeypatch, broken):
    def fails(*a): raise OSError("nothing works")
    monkeypatch.setattr(module, broken, fails)
    run, before = Run(Dashboard(), batches=5), open_widgets()
    with pytest.warns(UserWarning, match="nothing works"): run.fit(1)
    assert run.state == "finished" and drawing_threads() == [] and open_widgets() == before


def test_a_thread_of_its_own_shows_in_the_cell_that_starts_it(cells):
    run = Run(Dashboard(), batches=5)
    for cb in run.cbs: cb.setup(run)
    run.state, run.fit_steps = "training", 5
    worker = threading.Thread(target=lambda: [run.emit(e) for e in ("before_fit", "after_batch", "cleanup_fit")])
    worker.start()
    worker.join()
    assert [(c.thread, c.shown, len(c.left)) for c in cells] == [(threading.get_ident(), 1, 1)]


def test_commands_are_shown_at_once(cells, monkeypatch):
    "Pictures are drawn once an hour, and after a command."
    run = Run(board := Dashboard(refresh=3600.0), batches=10)
    for cb in run.cbs: cb.setup(run)
    run.state = "training"
    run.emit("before_fit")
    first = board.live.stage.curves.value
    run.step = 7
    run.history.add("train/generator/loss", 1.0, 7)
    time.sleep(0.6)
    assert board.live.stage.curves.value == first
    run.history.mark("command", 7, "lr 0.1 → 0.01")
    run.state, run.command, words = "paused", NS(what="set"), board.live.drawing.words
    words.next = math.inf  # else they come by themselves
    run.emit("after_command")
    for _ in range(100):
        if ">paused<" in board.live.stage.head.value: break
        time.sleep(0.02)
    time.sleep(0.6)
    assert ">paused<" in board.live.stage.head.value and board.live.stage.curves.value == first  # a slider says it often
    words.next, run.command = math.inf, NS(what="validate")
    run.emit("after_command")
    for _ in range(100):
        if board.live.stage.curves.value != first and ">paused<" in board.live.stage.head.value: break
        time.sleep(0.02)
    assert board.live.stage.curves.value != first and ">paused<" in board.live.stage.head.value
    run.state = "stopped"
    run.emit("cleanup_fit")


def test_a_doctor_has_a_tab_in_which_its_advice_is_taken(cells):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    critic = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1), nn.Flatten(0))
    opt, doctor, seen = {"name": "adam", "lr": 1e-3}, Doctor(every=10**6, warn=False), []
    gan = GANLearner(generator, critic, torch.randn(320, 2), latent=4, batch_size=32, opt=opt, cbs=[doctor], front="none")
    board = Dashboard()
    gan.add(board)

    def press(learn):
        if learn.step == 3:
            values = {"name": "lr", "player": "discriminator", "value": 2e-4}
            doctor.alarms.append(Alarm("saturation", 3, 1, {"doctor/separation": 9.0}, "it has won", "a paper", "set", values))
            tab = board.live.stage.doctor
            tab.show()
            seen.append((board.live.stage.panel.view.tabs.panes["doctor"] is tab.box, "saturation" in tab.rows[0].said.value))
            tab.rows[0].key.click()
            seen.append("on its way" in tab.rows[0].said.value)
        if learn.step == 5:
            tab = board.live.stage.doctor
            tab.show()
            row = tab.rows[0]
            seen.append(("applied at step 3" in row.said.value, row.key.disabled))

    gan.add(On("after_batch", press))
    gan.fit(steps=6)
    assert seen == [(True, True), True, (True, True)]
    assert [c.values[0] for c in gan.controls() if (c.name, c.player) == ("lr", "discriminator")] == [2e-4]
    assert [(e.what, e.source) for e in gan.journal.entries if e.what == "set"] == [("set", "doctor")]
    assert board._kept[-1].doctor is None and board._kept[-1].sliders == []


def test_smoothing_and_refresh_belong_to_the_display(cells):
    run = Run(board := Dashboard(refresh=2.0), batches=5)
    run.state = "training"
    run.emit("before_fit")
    smooth, refresh = board.live.stage.sliders[0].children
    smooth.value, refresh.value = 0.99, 0.25
    drawing = board.live.drawing
    assert drawing.sketch.smooth == 0.99 and drawing.pictures.every == 0.25 and drawing.pictures.share == pytest.approx(8 * SHARE)
    refresh.value = 30.0
    assert (drawing.pictures.every, drawing.pictures.share) == (30.0, SHARE) and len(run.journal.entries) == 0
    run.state = "stopped"
    run.emit("cleanup_fit")


def test_a_refused_fit_leaves_a_place_for_the_next_one_in_the_cell(cells, monkeypatch):
    number = [3]
    monkeypatch.setattr(module, "kernel", lambda: NS(shell=NS(execution_count=number[0])))
    run = Run(board := Dashboard(), batches=2)
    board.setup(run)  # and then another callback finds that the fit can't work
    run.fit(1)
    run.fit(1)
    assert [(c.shown, len(c.left)) for c in cells] == [(1, 1), (1, 1)]
    board.setup(run)
    number[0] = 4
    run.fit(1)  # not in the place of an older cell
    assert [(c.shown, len(c.left)) for c in cells] == [(1, 1), (1, 1), (0, 0), (1, 1)]


def test_taken_away_in_a_fit_it_ends_with_it(cells, monkeypatch):
    monkeypatch.setattr(module.Ticker.__init__, "__defaults__", (0.01,))
    run = Run(board := Dashboard(), batches=2)
    run.state = "training"
    run.emit("before_fit")
    run.cbs.remove(board)
    run.state = "stopped"
    for _ in range(200):
        if not drawing_threads(): break
        time.sleep(0.02)
    assert drawing_threads() == [] and len(cells[0].left) == 1


def test_a_single_error_is_forgiven():
    calls = []

    def job(woken):
        calls.append(1)
        if len(calls) in (2, 30): raise RuntimeError("dictionary changed size during iteration")
    ticker = Ticker(job, every=0.001)
    ticker.start()
    for _ in range(500):
        if len(calls) > 60: break
        time.sleep(0.01)
    assert ticker.alive and ticker.error is None
    ticker.close()


# ---- another cell, another process

class Far:
    "A run of another process."

    def __init__(self): self.history, self.state, self.step, self.journal = History(), "training", 3, ()

    def status(self): return {"state": self.state, "step": self.step, "run": None, "elapsed": 1.0}

    def controls(self): return []


def test_another_cell_shows_the_same_widgets(cells):
    run = Run(board := Dashboard(), batches=5)
    run.state = "training"
    run.emit("before_fit")
    for _ in range(2): dashboard(run)._ipython_display_()
    assert len(drawing_threads()) == 1 and len(board.live.spots) == 3
    run.state = "finished"
    run.emit("cleanup_fit")
    assert [(c.shown, len(c.left)) for c in cells] == [(1, 1)] * 3
    dashboard(run)._ipython_display_()  # now it is over
    assert (cells[3].shown, cells[3].left[0][0].state) == (0, "finished")


def test_a_far_run_is_followed_until_it_ends(cells):
    far = Far()
    window = dashboard(far)
    window._ipython_display_()
    window._ipython_display_()
    assert len(drawing_threads()) == 1 and [c.shown for c in cells] == [1, 1]
    far.step, far.state = 9, "failed"
    for _ in range(200):
        if not drawing_threads(): break
        time.sleep(0.05)
    assert drawing_threads() == [] and [[left[0].step for left in c.left] for c in cells] == [[9], [9]]
    far.state = "training"
    window._ipython_display_()  # it goes on
    assert cells[2].shown == 1
    far.state = "gone"


def test_in_a_terminal_it_is_text():
    run = Run(batches=3)
    run.fit(1)
    text = repr(dashboard(run))
    assert "finished" in text and "generator loss" in text


def test_importing_and_drawing_load_no_pyplot():
    code = ("import sys\nfrom trainkit.ui import dashboard, live\n"
            "heavy = {'matplotlib', 'ipywidgets', 'fastprogress', 'IPython', 'pandas', 'PIL'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
            "from trainkit.history import History\nh = History(); h.add('train/loss', 1.0, 1)\n"
            "s = live.Sketch(); s.draw(h.snapshot(), True); s.still(h.snapshot(), None)\n"
            "assert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- in a kernel

@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel(kernel_name="python3", env=environment())
    k = Kernel(manager, client)
    first = k.run(SETUP + "from trainkit.ui.dashboard import dashboard\nimport threading")
    assert first.status == "ok", first.error
    yield k
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_one_display_is_live_and_then_still(kernel):
    out = kernel.run("run = watched(batches=20, seconds=0.05); run.fit(2)")
    assert out.status == "ok" and out.streams == ""
    first, second = out.shown.values()
    assert [WIDGET in b for b in first] == [False, True, False] and "image/png" in first[1]
    assert set(first[-1]) == {"text/html", "text/plain"} and set(second[-1]) == {"image/png", "text/plain"}
    assert sum(kind == "comm_msg" for kind, _ in out.messages) > 5
    assert kernel.run("print([t.name for t in threading.enumerate() if 'trainkit' in t.name])").streams.strip() == "[]"


def test_the_file_does_not_grow_with_the_run(kernel):
    sizes = [sum(len(json.dumps(b)) for b in kernel.run(f"watched(batches=5).fit({epochs})").last) for epochs in (210, 600)]
    assert sizes[1] < 1.1 * sizes[0] and max(sizes) < 300_000


def test_another_cell_is_live_while_a_thread_trains_and_both_end(kernel):
    kernel.run("run = watched(batches=40, seconds=0.05, pictures=False)")
    start = kernel.run("""
        for cb in run.cbs: cb.setup(run)
        thread = threading.Thread(target=run.fit, args=(1,))
        thread.start()
        time.sleep(0.5)""")
    other = kernel.run("display(dashboard(run)); thread.join()")
    shown = [bundles for bundles in other.shown.values()]
    ended = [b for bundles in shown for b in bundles if 'class="end finished"' in str(b.get("text/html"))]
    assert any(WIDGET in b for bundles in shown for b in bundles) and ended and start.error is None
    assert kernel.run("print(repr(dashboard(run)).split()[0])").streams.strip() == "finished"


def test_a_picture_that_stays_can_be_read(kernel):
    from io import BytesIO

    from PIL import Image
    out = kernel.run("watched(batches=20).fit(1)")
    assert Image.open(BytesIO(b64decode(out.last[1]["image/png"]))).size[0] == 1350
