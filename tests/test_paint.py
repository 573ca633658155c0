"""A process that paints: the same picture as here, none waits for it, it harms nobody and outlives nobody."""
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standin import Run
from test_dashboard import ENDS, cells  # noqa: F401  the fixture
from test_ui_kernel import SETUP, Kernel, environment, start_new_kernel

from trainkit.history import History
from trainkit.ui.dashboard import Dashboard
from trainkit.ui.live import Sketch
from trainkit.ui.paint import CORNERS, Drawing, Face, Line, Painter, Painting, corner, end, styles
from trainkit.ui.plots import Draft
from trainkit.ui.view import View


def drawing_of(n=200, **how):
    history, rng = History(), np.random.default_rng(0)
    for step in range(1, n + 1):
        history.add("train/generator/loss", rng.normal(), step)
        history.add("train/discriminator/loss", rng.normal(), step)
        if step % 50 == 0: history.mark("epoch", step)
    history.mark("command", n // 2, "lr: 1 → $2")
    history.rewind(n - 20)
    history.add("train/generator/loss", 9.0, n - 10)
    return Draft(**how).drawing(history.snapshot())


def painted(drawing):
    painting = Painting()
    painting.paint(drawing)
    return painting.pixels()


def ready(painter, seconds=60):
    late = time.monotonic() + seconds
    while not painter.ready:
        assert time.monotonic() < late, "the painter's process doesn't begin"
        time.sleep(0.01)
    return painter


def gone(pid, seconds=20):
    "Is it over, or will be soon? Whether somebody has asked how it ended is another matter."
    late = time.monotonic() + seconds
    while time.monotonic() < late:
        try: state = psutil.Process(pid).status()
        except psutil.NoSuchProcess: return True
        if state == psutil.STATUS_ZOMBIE: return True
        time.sleep(0.02)
    return False


def test_who_is_gone_can_be_told():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert not gone(process.pid, 0.2) and not gone(os.getpid(), 0.1)
        process.stdin.close()
        assert gone(process.pid)  # nobody has waited for it yet
        process.wait()
        assert gone(process.pid, 1)


@pytest.fixture
def painter():
    painter = Painter(patience=60)
    yield ready(painter)
    painter.close()


def test_the_same_pictures_as_here(painter):
    "One after another, with other panels, on a logarithmic axis, and none."
    for drawing in (drawing_of(), drawing_of(90), drawing_of(log=True, smooth=0.0), Drawing((6.0, 2.8)), drawing_of()):
        np.testing.assert_array_equal(painter.paint(drawing), painted(drawing))


def test_styles_come_along(painter):
    import matplotlib
    before = painter.paint(drawing_of())
    with matplotlib.rc_context({"axes.facecolor": "black", "font.family": "monospace"}):
        assert {"axes.facecolor", "font.family"} <= styles().keys()
        dark = painter.paint(drawing_of())
        np.testing.assert_array_equal(dark, painted(drawing_of()))
    assert dark.mean() < before.mean() - 50
    np.testing.assert_array_equal(painter.paint(drawing_of()), before)


def test_what_cannot_be_painted_is_an_error_and_the_next_one_is_painted(painter):
    with pytest.raises(RuntimeError, match="AttributeError"): painter.paint("no drawing")
    assert painter.paint(Drawing()).shape == (280, 900, 3)


@pytest.mark.skipif(not hasattr(os, "nice"), reason="the system has no nice")
def test_the_process_is_small_stands_back_and_ignores_an_interrupt(painter):
    pid = painter._process.pid
    os.kill(pid, signal.SIGINT)
    assert painter.paint(Drawing()).shape == (280, 900, 3)
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
    if sys.platform == "linux": assert "libtorch" not in open(f"/proc/{pid}/maps").read()


@pytest.mark.parametrize("how", ["killed before", "killed while", "hangs", "closed while"])
def test_a_painter_that_fails_is_done_without(how):
    sketch, history = Sketch(), History()
    history.add("train/loss", 1.0, 1)
    here = sketch.draw(history.snapshot(), beside=False)
    sketch.leave()
    painter = sketch._painter
    pid = ready(painter)._process.pid
    if how == "killed before":
        os.kill(pid, signal.SIGKILL)
        painter._process.wait()
    else:
        os.kill(pid, signal.SIGSTOP)
        painter.patience = 0.2 if how == "hangs" else 60
        if how == "killed while": threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
        if how == "closed while": threading.Timer(0.2, sketch.stay).start()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2): np.testing.assert_array_equal(sketch.draw(history.snapshot(), beside=False), here)
    told = "curves are painted by the process that trains, which costs it time: the painter's process has ended, or"
    assert [str(w.message).startswith(told) for w in said] == [True] * (how != "closed while")
    assert sketch._painter is None and painter._process is None
    assert gone(pid)
    with pytest.raises(OSError, match="was closed"): painter.ready


def test_odd_paths_and_settings_do_no_harm(monkeypatch):
    "A path that is no text is passed over, as Python does; a setting that can't be sent is painted here."
    import matplotlib
    sketch, history = Sketch(), History()
    history.add("train/loss", 1.0, 1)
    here = sketch.draw(history.snapshot(), beside=False)
    monkeypatch.setattr(sys, "path", [*sys.path, Path("..")])
    sketch.leave()
    ready(sketch._painter)
    np.testing.assert_array_equal(sketch.draw(history.snapshot(), beside=False), here)
    assert sketch._painter is not None
    with matplotlib.rc_context():
        dict.__setitem__(matplotlib.rcParams, "path.effects", [lambda: None])
        assert sketch._painter is not None
        try:
            with pytest.warns(UserWarning, match="the process that trains, which costs it time: Can't (get|pickle)"):
                sketch.draw(history.snapshot(), beside=False)
        finally: sketch.stay()
    assert sketch._painter is None


def test_a_process_that_says_something_else_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('hello')\n")
    monkeypatch.syspath_prepend(tmp_path)
    painter = Painter()
    ready(painter)
    with pytest.raises(OSError): painter.paint(Drawing())
    painter.close()


def test_where_no_process_can_begin_it_is_painted_here(monkeypatch):
    sketch = Sketch()
    monkeypatch.setattr(sys, "executable", "")
    sketch.leave()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # even then it is painted
        assert sketch.draw(History().snapshot(), beside=False).shape == (280, 900, 3) and sketch._painter is None
    sketch.leave()
    with pytest.warns(UserWarning, match="no Python to be started"): sketch.draw(History().snapshot(), beside=False)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_no_painter_outlives_whom_it_paints_for(how):
    "Killed, terminated, or at an end without having closed it."
    code = ("import sys, time\nfrom trainkit.ui.paint import Painter\np = Painter()\n"
            "while not p.ready: time.sleep(0.01)\nprint(p._process.pid, flush=True)\nsys.stdin.readline()")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        pid = int(owner.stdout.readline())
        assert not gone(pid, 0.2)
        if how is None: owner.stdin.write("\n")
        else: owner.send_signal(how)
        owner.stdin.close()
        owner.wait(20)
    assert gone(pid)


# ---- no wait is for ever

@pytest.mark.parametrize("close", ["kills", "can't kill"])
def test_a_close_has_an_end(monkeypatch, close):
    "A process that hangs is killed; one that can't be is left alone after a while."
    painter = ready(Painter())
    process = painter._process
    os.kill(process.pid, signal.SIGSTOP)
    if close == "can't kill": monkeypatch.setattr(process, "kill", lambda: None)
    closing = threading.Thread(target=painter.close, args=() if close == "kills" else (0.2,), daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive() and painter._process is None
    assert gone(process.pid, 20 if close == "kills" else 0.2) == (close == "kills")
    monkeypatch.undo()
    end(process)
    assert gone(process.pid)


def test_a_process_that_never_gets_ready_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(60)\n")
    monkeypatch.syspath_prepend(tmp_path)
    painter = Painter(start=0.2)
    pid = (ready(painter, 20), painter._process.pid)[1]
    with pytest.raises(OSError, match="has ended"): painter.paint(Drawing())
    assert gone(pid)
    painter.close()


def test_what_is_closed_while_it_begins_is_ended(monkeypatch):
    begun, Popen = [], subprocess.Popen

    def slow(*args, **how):
        begun.append(Popen(*args, **how))
        painter.close()  # by another thread, say
        return begun[0]
    painter = Painter()
    monkeypatch.setattr(subprocess, "Popen", slow)
    assert painter.ready in (False, True) and gone(begun[0].pid)
    with pytest.raises(OSError): ready(painter).paint(Drawing())


# ---- forks

fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
warned = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def worker():
    "What a loader starts, which is a fork of this process."
    made = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    made.start()
    return made


def paints_and_ends(painter):
    "As quickly as if nobody else were there."
    assert painter.paint(Drawing()).shape == (280, 900, 3)
    painter._process.kill()
    answers = []
    reading = threading.Thread(target=lambda: answers.append(painter._process.stdout.read()), daemon=True)
    reading.start()
    reading.join(20)
    assert answers == [b""]  # the pipe is at its end
    painter.close()


@fork
@warned
@pytest.mark.parametrize("many", [2, 3])
def test_a_worker_forked_while_a_painter_begins_holds_nothing_of_it(monkeypatch, many):
    "In the very moment: there are pipes to it and from it, and the one by which Popen may learn that it has begun."
    monkeypatch.setattr(subprocess, "_USE_POSIX_SPAWN", False, raising=False)  # which goes without the third
    pipe, pipes, workers, asked, forked = os.pipe, [], [], threading.Event(), threading.Event()

    def slow():
        pipes.append(pipe())
        if len(pipes) == many:
            asked.set()
            forked.wait(0.5)
        return pipes[-1]
    painter = Painter(patience=60)
    monkeypatch.setattr(os, "pipe", slow)
    beginning = threading.Thread(target=lambda: painter.ready, daemon=True)
    beginning.start()
    assert asked.wait(20)
    monkeypatch.undo()
    workers.append(worker())
    forked.set()
    try:
        beginning.join(20)
        assert not beginning.is_alive(), "who begins it waits for the worker"
        paints_and_ends(ready(painter))
        assert workers[0].is_alive()
    finally: workers[0].kill()


@fork
@warned
def test_a_painter_ends_with_whom_it_paints_for_although_a_worker_stays():
    code = ("import os, sys, time\nfrom trainkit.ui.paint import Painter\np = Painter()\n"
            "while not p.ready: time.sleep(0.01)\n"
            "worker = os.fork()\nif not worker: time.sleep(60); os._exit(0)\n"
            "print(p._process.pid, worker, flush=True)\nsys.stdin.readline()")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        pid, forked = map(int, owner.stdout.readline().split())
        owner.kill()
    try: assert gone(pid) and not gone(forked, 0.1)
    finally: os.kill(forked, signal.SIGKILL)


# ---- a fit

class Painted(View):
    "Keeps a fit waiting at a step until a picture of it came from another process, and knows which one that was."

    order = 99

    def __init__(self, board, step): self.board, self.step, self.pids = board, step, []

    def after_batch(self, learn):
        if learn.step != self.step: return
        live, late, pictures = self.board.live, time.monotonic() + 60, []
        painter = live.drawing.sketch._painter

        def kept(drawing, paint=painter.paint):
            pictures.append(paint(drawing))
            return pictures[-1]
        painter.paint = kept
        while not pictures:
            assert time.monotonic() < late, "nothing is painted"
            learn.history.mark("note", learn.step, "something new")
            live.drawing.pictures.next = 0.0
            live.wake()
            time.sleep(0.05)
        assert pictures[0].ndim == 3
        self.pids.append(painter._process.pid)


@pytest.mark.parametrize("how, at", ENDS)
def test_a_fit_is_painted_by_a_process_that_ends_with_it(cells, how, at):  # noqa: F811
    run = Run(board := Dashboard(refresh=0.01), painted := Painted(board, 5), batches=10)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try: run.fit(2, end=how, at=at)
        except BaseException as error: assert error is how
    assert not [w for w in said if issubclass(w.category, UserWarning)] and len(cells[0].left) == 1
    pid, = painted.pids
    assert gone(pid)


def test_each_fit_has_a_painter_of_its_own(cells):  # noqa: F811
    run = Run(board := Dashboard(refresh=0.01), painted := Painted(board, 5), batches=10)
    for painted.step in (5, 15):
        run.fit(1)
        assert gone(painted.pids[-1])
    assert len(set(painted.pids)) == 2


def test_a_kernel_says_once_that_a_painter_died_and_leaves_none_behind():
    manager, client = start_new_kernel(kernel_name="python3", env=environment())
    try:
        k = Kernel(manager, client)
        assert k.run(SETUP).status == "ok"
        out = k.run("""
            import os
            def ready_one(live):
                live.drawing.pictures.next = 0.0
                live.wake()
                time.sleep(0.05)
                painter = live.drawing.sketch._painter
                return painter._process if painter and painter._ready.is_set() else None

            run = watched(batches=20)
            board = run.cbs.get("Dashboard")
            def kill(learn):
                while (process := ready_one(board.live)) is None: learn.history.mark("note", learn.step, "new")
                process.kill()
                while board.live.drawing.sketch._painter: ready_one(board.live), learn.history.mark("note", learn.step, "new")
            run.cbs.add(On("after_batch", lambda learn: kill(learn) if learn.step == 5 else None))
            run.fit(1)
            print(run.state)
            """)
        assert out.status == "ok" and out.streams.count("which costs it time") == 1 and "finished" in out.streams, out.streams
        client.execute("""
run = watched(batches=20)
board = run.cbs.get("Dashboard")
def stay(learn):
    while (process := ready_one(board.live)) is None: learn.history.mark("note", learn.step, "new")
    print("pids", os.getpid(), process.pid, flush=True)
    time.sleep(60)
run.cbs.add(On("after_batch", stay))
run.fit(1)
""", allow_stdin=True)
        while not (text := client.get_iopub_msg(timeout=60)["content"].get("text", "")).startswith("pids"): pass
        kernel, painter = map(int, text.split()[1:])
        os.kill(kernel, signal.SIGKILL)
        assert gone(kernel) and gone(painter)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# ---- a legend

@given(st.lists(st.floats(0, 100), min_size=2, max_size=30), st.floats(0.05, 1.2), st.floats(0.05, 0.6))
def test_a_legend_is_where_nothing_is_if_there_is_such_a_corner(values, wide, high):
    "By all points of the curve that lie under it."
    x, y = np.linspace(0, 1, 1000), np.interp(np.linspace(0, 1, 1000), np.linspace(0, 1, len(values)), values)
    face = Face([Line((np.linspace(0, 1, len(values)), np.array(values)))], ("train",), (0, 1), (0, 100))

    def hidden(place):
        inside = (x > 1 - wide if "right" in place else x < wide) & (y > 100 * (1 - high) if "upper" in place else y < 100 * high)
        return inside.mean()
    found = {place: hidden(place) for place in CORNERS}
    assert found[corner(face, wide, high)] <= min(found.values()) + 0.05


@pytest.mark.parametrize("log", [False, True])
def test_a_legend_hides_no_curve_that_rises(log):
    "By matplotlib's own measure of where the legend is."
    history = History()
    for step in range(1, 301):
        for name in ("hinge_loss", "gradient_penalty", "feature_matching"):
            history.add(f"train/discriminator/{name}", 1.01 - 2 ** (-step / 20), step)
    painting = Painting()
    painting.paint(Draft(smooth=0.0, log=log, width=3.0).drawing(history.snapshot()))
    painting.canvas.draw()
    (panel, _), = painting.panels
    assert panel.letters
    points = panel.ax.transData.transform(panel.curves[-1].line.get_xydata())
    assert panel.legend.get_window_extent().count_contains(points) < 0.1 * len(points)
    panel.legend.set_loc("upper right")
    painting.canvas.draw()
    assert panel.legend.get_window_extent().count_contains(points) > 0.3 * len(points)  # as it was
