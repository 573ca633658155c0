"""A process that paints: the same picture as here, none waits for it, it harms nobody and outlives nobody."""
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from trainkit.history import History
from trainkit.ui.live import Sketch
from trainkit.ui.paint import Drawing, Painter, Painting, styles
from trainkit.ui.plots import Draft


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
    end = time.monotonic() + seconds
    while not painter.ready:
        assert time.monotonic() < end, "the painter's process doesn't begin"
        time.sleep(0.01)
    return painter


def gone(pid, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try: state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
        except FileNotFoundError: return True
        if state == "Z": return True
        time.sleep(0.02)
    return False


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
    np.testing.assert_array_equal(sketch.draw(history.snapshot(), beside=False), here)
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
        try: sketch.draw(history.snapshot(), beside=False)
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
    assert sketch.draw(History().snapshot(), beside=False).shape == (280, 900, 3) and sketch._painter is None


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_no_painter_outlives_whom_it_paints_for(end):
    "Killed, terminated, or at an end without having closed it."
    code = ("import sys, time\nfrom trainkit.ui.paint import Painter\np = Painter()\n"
            "while not p.ready: time.sleep(0.01)\nprint(p._process.pid, flush=True)\nsys.stdin.readline()")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        pid = int(owner.stdout.readline())
        assert not gone(pid, 0.2)
        if end is None: owner.stdin.write("\n")
        else: owner.send_signal(end)
        owner.stdin.close()
        owner.wait(20)
    assert gone(pid)
