"""A fit in the background: the same run, the same endings, and a learner that others can use meanwhile."""

import atexit
import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import warnings
import weakref
from pathlib import Path

import nbformat
import pytest
import torch
from jupyter_client.manager import start_new_kernel
from steered import until
from test_ui_kernel import SETUP, Kernel, environment
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ways import ENDINGS, STATES, Ending, same, same_weights

from trainkit.background import HEADLESS, Errands, FitThread, headless, own_settings
from trainkit.callback import Callback, On
from trainkit.checkpoint import Checkpoints
from trainkit.finder import lr_find
from trainkit.gan.learner import GANLearner
from trainkit.learner import Learner

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, X.sum(1, keepdim=True))


def learner(run=None, cbs=(), workers=0, seed=1, sleep=0.0, **kw):
    torch.manual_seed(0)
    train = DataLoader(DATA, 8, shuffle=True, num_workers=workers)
    slow = [On("before_batch", lambda learn: time.sleep(sleep))] if sleep else []
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    return Learner(net, (train, DataLoader(DATA, 8)), "mse", "adam", front="none", run=run, cbs=[*cbs, *slow], seed=seed, **kw)


HOOKS = []  # what is registered for the interpreter's end


@pytest.fixture(autouse=True)
def hooks(monkeypatch):
    register, unregister = atexit.register, atexit.unregister
    monkeypatch.setattr(atexit, "register", lambda f, *a, **k: (HOOKS.append(f), register(f, *a, **k))[1])
    monkeypatch.setattr(atexit, "unregister", lambda f: (f in HOOKS and HOOKS.remove(f), unregister(f))[1])


@contextlib.contextmanager
def nothing_left(learn):
    "Inside, fits may run; afterwards no thread, handler, or exit hook is there that wasn't, and the learner is idle."
    hooks, handler, names = len(HOOKS), signal.getsignal(signal.SIGINT), {t.name for t in threading.enumerate()}
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in learn.modules()]
    yield
    until(lambda: {t.name for t in threading.enumerate() if t.name.startswith("trainkit")} <= names, 5)
    assert len(HOOKS) == hooks and signal.getsignal(signal.SIGINT) is handler
    assert flags == [(m.training, [p.requires_grad for p in m.parameters()]) for m in learn.modules()]
    assert not learn._fitting and learn.batch is None and learn.loss is None and learn._behind is None
    assert not len(learn._errands) and not len(learn.queue)


def somebody_waits():
    "Is the main thread in a fit, or in `wait()`?"
    main = threading.main_thread()
    stack = traceback.walk_stack(sys._current_frames()[main.ident])
    return threading.current_thread() is main or any(frame.f_code.co_name == "join_listening" for frame, _ in stack)


class Press(Callback):
    "Sends SIGINT to the process, once or twice, at an event."

    def __init__(self, event, times=1, at=1):
        self.left, self.times = at, times
        setattr(self, event, self.act)

    def act(self, learn):
        self.left -= 1
        if self.left == 0:
            until(somebody_waits, 10)
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
                until(lambda: learn._stopping == "interrupted", 10)  # two signals at once are one


def behind(learn, **kw):
    learn.fit(**kw, background=True)
    learn.wait()


# ---- the same run


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_run_as_in_the_foreground(seed, workers):
    one, other = learner(seed=seed, workers=workers), learner(seed=seed, workers=workers)
    torch.manual_seed(5)
    one.fit(epochs=2)
    after = torch.rand(3)
    torch.manual_seed(5)
    behind(other, epochs=2)
    assert torch.equal(torch.rand(3), after)
    same_weights(one, other)
    a, b = one.state_dict(), other.state_dict()
    for part in ("players", "rng", "stream", "position"):
        same(a[part], b[part], part)


def test_the_cell_returns_at_once_and_wait_joins():
    learn = learner(sleep=0.01)
    with nothing_left(learn):
        learn.fit(epochs=2, background=True)
        assert learn.step < 12 and learn.state != "finished"
        with pytest.raises(TimeoutError, match=r"not over after 0.02 s: it is at step \d+"):
            learn.wait(timeout=0.02)
        learn.wait(timeout=20)
        assert (learn.step, learn.state) == (12, "finished")
        learn.wait()  # nothing runs: at once
    learn.wait(0)
    learner().wait()


def test_an_interrupt_while_the_thread_begins_asks_the_fit_to_stop(monkeypatch):
    "It strikes between the start of the thread and the end of `fit()`: the fit is not lost, and can be waited for."
    start, learn = FitThread.start, learner(sleep=0.01)

    def struck(self):
        start(self)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    monkeypatch.setattr(FitThread, "start", struck)
    with nothing_left(learn):
        learn.fit(epochs=2, background=True)
        with pytest.raises(KeyboardInterrupt, match="learn.fit.. goes on"):
            learn.wait(20)
        assert learn.state == "interrupted" and learn.step < 12
    monkeypatch.undo()
    behind(learn)
    assert (learn.step, learn.state) == (12, "finished")


def test_who_waits_at_once_waits():
    "The thread may have begun without having come as far as its first line."
    learn = learner()
    train = learn._train_behind

    def late(*how):
        time.sleep(0.3)
        train(*how)

    learn._train_behind = late
    with nothing_left(learn):
        behind(learn, epochs=2)
    assert (learn.step, learn.state) == (12, "finished")


def test_several_fits_one_after_another_go_on():
    straight, parts = learner(), learner()
    straight.fit(epochs=3)
    for background in (True, False, True):
        parts.fit(epochs=1, background=background)
        parts.wait()
    same_weights(straight, parts)


def test_a_fit_that_is_over_needs_no_wait():
    learn = learner()
    for _ in range(5):
        learn.fit(steps=2, background=True)
        until(lambda: not learn._fitting)
    learn.wait()
    assert learn.step == 10


def test_what_belongs_to_a_thread_goes_with_it():
    seen = []
    with torch.device("meta"):
        settings = own_settings()
    thread = threading.Thread(target=lambda: [seen.append(torch.ones(1).device.type) for _ in [0] if settings().__enter__()])
    thread.start()
    thread.join()
    assert seen == ["meta"]
    threads = torch.get_num_threads()
    learn = learner(cbs=[On("after_batch", lambda learn: seen.append(torch.get_num_threads()))])
    behind(learn, steps=2)
    assert seen[1:] == [threads] * 2 and torch.get_num_threads() == threads


# ---- what is refused is refused in the caller


@pytest.mark.parametrize(("kw", "error"), [({"epochs": 1, "steps": 1}, ValueError), ({"epochs": -1}, ValueError),
                                           ({}, ValueError), ({"epochs": 1, "validate_every": 0}, ValueError),
                                           ({"epochs": 1, "background": "yes"}, TypeError)])  # fmt: skip
def test_bad_arguments(kw, error):
    learn = learner()
    with nothing_left(learn), pytest.raises(error):
        learn.fit(**{"background": True, **kw})
    assert learn.step == 0


def test_what_cannot_be_trained(capsys):
    class Never(Callback):
        def setup(self, learn):
            assert threading.current_thread() is threading.main_thread()
            raise ValueError("not with me")

    for learn, text in [(Learner(nn.Linear(4, 1), front="none"), "no training loader"), (learner(cbs=[Never()]), "not with me")]:
        with nothing_left(learn), pytest.raises(ValueError, match=text):
            learn.fit(epochs=1, background=True)
        assert learn.step == 0 and learn.state == "idle"
    assert capsys.readouterr().err == ""


def test_setup_is_called_by_the_caller_and_the_rest_by_the_thread():
    names = {}

    class Names(Callback):
        def setup(self, learn):
            names["setup"] = threading.current_thread().name

        def before_fit(self, learn):
            names["before_fit"] = threading.current_thread().name

    behind(learner(cbs=[Names()]), steps=1)
    assert names == {"setup": "MainThread", "before_fit": "trainkit-fit"}


def test_a_second_fit_is_refused():
    learn = learner(sleep=0.01)
    with nothing_left(learn):
        learn.fit(epochs=50, background=True)
        for background in (True, False):
            with pytest.raises(RuntimeError, match=r"one fit at a time: learn.wait\(\) waits for it, learn.stop\(\) ends it"):
                learn.fit(epochs=1, background=background)
        learn.stop()
        learn.wait()
        assert learn.state == "stopped"
    learn.fit(steps=1)


def test_wait_in_the_training_thread_is_refused():
    learn = learner(cbs=[On("after_batch", lambda learn: learn.wait())])
    learn.fit(steps=1, background=True)
    with pytest.raises(RuntimeError, match="would wait for itself"):
        learn.wait()


def test_no_thread_can_be_had(monkeypatch):
    learn = learner()

    def start(self):
        raise RuntimeError("can't start new thread")

    with nothing_left(learn):
        monkeypatch.setattr(FitThread, "start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            learn.fit(epochs=1, background=True)
        monkeypatch.undo()
        behind(learn, epochs=1)


# ---- endings


@pytest.mark.parametrize("where", ["script", "notebook"])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("workers", [0, 2])
def test_every_ending(ending, where, workers, tmp_path, monkeypatch, capsys):
    if workers and ending not in ("stop", "error", "interrupt", "interrupt_twice"):
        pytest.skip("no different")
    monkeypatch.setenv("TRAINKIT_WHERE", where)
    learn = learner(tmp_path / "run", workers=workers)
    times = {"interrupt": 1, "interrupt_twice": 2}.get(ending)
    with nothing_left(learn):
        learn.add(way := Press("before_step", times, 3) if times else Ending(ending, 3))
        raised = None
        try:
            behind(learn, epochs=3)
        except (RuntimeError, KeyboardInterrupt) as error:
            raised = error
        learn.wait()  # nothing is told twice
        learn.remove(way)
        assert learn.state == STATES.get(ending, "finished")
        travels = ending in ("error", "validation_error", "interrupt_twice") or (ending == "interrupt" and where == "script")
        assert (raised is not None) == travels
    out = capsys.readouterr()
    assert ("the fit in the background failed at step" in out.err) == ("error" in ending)
    assert out.err.count("Traceback") == ("error" in ending)
    line = r"interrupted at step 3 \(epoch 1 of 3\), saved as 3; learn.fit\(\) goes on, learn.restore\('last'\) goes back"
    if ending == "interrupt":
        assert len(re.findall(line, out.out if where == "notebook" else str(raised))) == 1
    if ending == "stop" or times:
        assert learn.step == (3 if times else 2) == Checkpoints(learn.run / "checkpoints").find("last").step
    if learn.state != "finished":
        learn.fit(background=True)
        learn.wait()
    assert learn.epoch == 3


@pytest.mark.parametrize("ending", ["stop", "interrupt"])
def test_left_and_gone_on_is_the_run_that_nothing_happened_to(ending, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINKIT_WHERE", "notebook")
    straight, learn = learner(), learner(tmp_path / "run")
    straight.fit(epochs=3)
    learn.add(way := Press("after_loss", at=4) if ending == "interrupt" else Ending("stop", 4))
    behind(learn, epochs=3)
    learn.remove(way)
    assert learn.step in (3, 4)
    again = learner(tmp_path / "run")
    again.restore("last")
    for one in (learn, again):
        behind(one)
        same_weights(straight, one)


class Plot(Callback):
    "Draws for a while, as a view would."

    order = 90

    def after_batch(self, learn):
        time.sleep(0.002)


POINTS = {"step": "after_loss", "validation": "after_validate_batch", "plot": "after_batch", "save": "save", "paused": "paused"}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_interrupts_wherever_they_come(point, times, background, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRAINKIT_WHERE", "notebook")
    straight = learner()
    straight.fit(epochs=2)
    learn = learner(tmp_path / "run", cbs=[Plot()], save_every=1)
    way = Press("act_itself", times, 2)
    if point == "save":
        real = learn.state_dict
        monkeypatch.setattr(learn, "state_dict", lambda: (way.act(learn), real())[1])
    elif point == "paused":
        learn.add(On("after_batch", lambda learn: learn.pause() if learn.step == 2 else None))
        way.left = 1
        learn.add(On("before_pause", way.act))
    else:
        learn.add(On(POINTS[point], way.act, order=95))
    with nothing_left(learn):
        with contextlib.suppress(KeyboardInterrupt):
            learn.fit(epochs=2, background=background)
            learn.wait()
        learn.wait()
        assert learn.state == "interrupted" and not learn.paused
        assert capsys.readouterr().out.count("learn.fit() goes on") == (not (times == 2 and background))
    monkeypatch.undo()
    monkeypatch.setenv("TRAINKIT_WHERE", "script")
    if learn.broken:
        learn.restore("last")
    for cb in [cb for cb in learn.cbs if isinstance(cb, On)]:
        learn.remove(cb)
    learn.fit()
    same_weights(straight, learn)


def test_an_interrupt_that_comes_when_it_is_over_does_no_harm():
    learn = learner()
    learn.fit(steps=1, background=True)
    until(lambda: not learn._fitting)
    learn._interrupted()
    learn.wait()
    learn.fit(steps=1)
    assert learn.state == "finished" and learn.step == 2


@pytest.mark.parametrize("by", ["wait", "fit"])
def test_an_error_is_shown_once_and_raised_once(by, capsys):
    learn = learner(cbs=[On("after_loss", lambda learn: 1 / 0 if learn.step == 2 else None)])
    learn.fit(epochs=1, background=True)
    until(lambda: not learn._fitting)
    with pytest.raises(ZeroDivisionError) as caught:
        learn.wait() if by == "wait" else learn.fit(epochs=1)
    assert caught.value is learn.error and learn.step == 3
    shown = capsys.readouterr().err
    assert shown.startswith("the fit in the background failed at step 3; learn.wait() raises it\nTraceback")
    assert shown.count("ZeroDivisionError: division by zero") == 1
    if sys.version_info >= (3, 11):
        assert shown.splitlines()[-1].startswith("(after_loss of On(") and "learn.replay_batch()" in shown
    learn.wait()
    learn.remove(On)
    learn.fit()
    assert learn.state == "finished"


# ---- the learner in other hands meanwhile


class Slow(Callback):
    "Half the steps are under way at any time; says when somebody else touches the model in one."

    def __init__(self):
        self.inside, self.torn = False, []

    def before_batch(self, learn):
        self.inside = True

    def before_step(self, learn):
        before = [p.detach().clone() for p in learn.players[0].parameters()]
        time.sleep(0.004)
        self.torn += [1 for p, b in zip(learn.players[0].parameters(), before) if not torch.equal(p, b)]
        self.torn += [1 for m in learn.modules() if not m.training]

    def cleanup_batch(self, learn):
        self.inside = False


def test_others_get_whole_answers_while_it_trains(tmp_path):
    learn, straight = learner(cbs=[slow := Slow()]), learner()
    straight.fit(epochs=60)
    learn.fit(epochs=60, background=True)
    before = learn.step
    states = []
    for _ in range(3):
        assert learn.predict(X).shape == (48, 1)
        states.append(learn.state_dict())
        assert learn.test(DataLoader(DATA, 8))["test/loss"] > 0
        assert learn.validate(DataLoader(DATA, 8))["valid/loss"] > 0
    learn.export_weights(tmp_path / "w.safetensors")
    with pytest.raises(TypeError, match="predict takes one loader"):
        learn.predict({"a": X, "b": X})
    assert before < learn.step < 360
    learn.wait()
    assert not slow.torn
    for state in states[::2]:  # a copy, of one moment: weights and optimizer agree
        n = state["position"]["step"]
        assert int(state["players"]["model"]["optimizer"]["state"][0]["step"]) == n == state["players"]["model"]["updates"]
        twin = learner()
        twin.load_state_dict({**state, "callbacks": {}})
        twin.fit()
        same_weights(twin, straight)
    same_weights(learn, straight)


def test_answers_come_while_it_is_paused_and_in_the_end():
    learn = learner(sleep=0.002)
    learn.fit(epochs=100, background=True)
    learn.pause()
    until(lambda: learn.state == "paused")
    step = learn.step
    assert learn.predict(X).shape == (48, 1) and learn.step == step and learn.state == "paused"
    learn.resume()
    answers, asked = [], threading.Event()

    def ask():
        for _ in range(200):
            asked.set()
            answers.append(learn.predict(X).shape)

    thread = threading.Thread(target=ask)
    thread.start()
    asked.wait()
    learn.stop()
    learn.wait()
    thread.join(30)
    assert len(answers) == 200  # some of them by the fit, the last ones in idleness


def test_what_would_change_it_is_refused_by_name(tmp_path):
    learn = learner(tmp_path / "run", sleep=0.005)
    learn.fit(epochs=1)
    state = learn.state_dict()
    learn.fit(epochs=50, background=True)
    tries = {
        "load_weights": lambda: learn.load_weights(nn.Linear(4, 1)), "load_state_dict": lambda: learn.load_state_dict(state),
        "at": lambda: learn.at("last").__enter__(), "branch": lambda: learn.branch("last", "other"),
        "add": lambda: learn.add(On("after_batch", print)), "remove": lambda: learn.remove(On),
    }  # fmt: skip
    for name, call in tries.items():
        with pytest.raises(RuntimeError, match=rf"{name}\(\) is for between two fits, and one is running \(step \d+\)"):
            call()
    with pytest.raises(RuntimeError, match="between two fits"):
        lr_find(learn)
    with pytest.raises(RuntimeError, match="between two fits"):
        learn.replay_batch()
    with pytest.raises(ValueError, match="between two fits"):
        learn.restore("last", only="weights")
    learn.stop()
    learn.wait()
    with learn.at("last"):
        pass


def test_commands_work_from_the_cell(tmp_path):
    learn = learner(tmp_path / "run", sleep=0.002)
    learn.fit(epochs=500, background=True)
    learn.set("lr", 0.5).wait(10)
    assert learn.players[0].opt.param_groups[0]["lr"] == 0.5
    entry = learn.save("here")
    assert learn.validate()["valid/loss"] > 0
    assert learn.restore(entry).id == entry.id
    learn.stop()
    learn.wait()
    assert learn.state == "stopped"


@pytest.mark.parametrize("background", [False, True])
def test_samples_are_drawn_between_two_steps(background):
    torch.manual_seed(0)
    threads = []

    class G(nn.Linear):
        latent_dim = 3

        def forward(self, z):
            threads.append(threading.current_thread().name)
            return super().forward(z)

    gan = GANLearner(G(3, 4), nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), DataLoader(DATA, 8), front="none", seed=4,
                     cbs=[On("before_batch", lambda learn: time.sleep(0.005))])  # fmt: skip
    gan.fit(epochs=30, background=True)
    threads.clear()
    assert gan.sample(5).shape == (5, 4) and gan.sample_fixed().shape == (64, 4)
    assert {*threads} == {"trainkit-fit"}
    gan.stop()
    gan.wait()
    assert gan.sample(5).shape == (5, 4) and threads[-1] == "MainThread"


def test_whoever_is_interrupted_while_asking_is_not_answered():
    errands = Errands()
    answer = errands.put(lambda: 1 / 0)
    assert answer.cancel()
    errands.run()
    assert answer.cancelled() and not len(errands)


def test_an_error_of_the_tidying_up_leaves_nobody_waiting():
    learn = learner(cbs=[On("after_batch", lambda learn: time.sleep(0.01))])
    learn.fit(epochs=50, background=True)
    until(lambda: learn.step > 2)
    learn.history.flush = lambda: 1 / 0
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(learn.predict(X).shape)) for _ in range(3)]
    for thread in threads:
        thread.start()
    learn.stop()
    with pytest.raises(ZeroDivisionError):
        learn.wait()
    for thread in threads:
        thread.join(10)
    assert len(answers) == 3 and not learn._fitting


def test_a_learner_is_freed_after_it():
    learn = learner()
    behind(learn, steps=2)
    ref = weakref.ref(learn)
    del learn
    gc.collect()
    assert ref() is None


def test_a_learner_that_nobody_holds_trains_to_its_end(tmp_path):
    learn = learner(tmp_path / "run", sleep=0.005)
    learn.fit(epochs=2, background=True)
    ref = weakref.ref(learn)
    del learn
    until(lambda: not [t for t in threading.enumerate() if t.name == "trainkit-fit"])
    gc.collect()
    assert ref() is None
    assert Checkpoints(tmp_path / "run" / "checkpoints").find("last").step == 12


# ---- scripts


SCRIPT = """
import sys, time, torch
from torch import nn
from trainkit.callback import On
from trainkit.learner import Learner
torch.manual_seed(0)
x = torch.randn(48, 4)
learn = Learner(nn.Linear(4, 1), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :1]), 8, num_workers=WORKERS),
                "mse", run=sys.argv[1], front="none", cbs=[On("before_batch", lambda learn: time.sleep(0.01))])
"""


def script(tmp_path, code, workers=0, **kw):
    (tmp_path / "train.py").write_text(SCRIPT.replace("WORKERS", str(workers)) + textwrap.dedent(code))
    return subprocess.Popen([sys.executable, "train.py", str(tmp_path / "run")], cwd=tmp_path, env=environment(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)  # fmt: skip


@pytest.mark.parametrize("workers", [2])
def test_a_script_that_ends_without_waiting_saves(tmp_path, workers):
    code = "learn.fit(epochs=1000, background=True)\nwhile learn.step < 3: time.sleep(0.01)\n"
    out, err = script(tmp_path, code, workers).communicate(timeout=60)
    assert "the interpreter ends: the fit in the background was asked to stop. (learn.wait() waits for it.)" in err, err
    assert len(err.strip().splitlines()) == 1, err
    store = Checkpoints(tmp_path / "run" / "checkpoints")
    state, entry = store.load("last")
    assert entry.step >= 3 and state["position"]["step"] == entry.step
    assert not [*(tmp_path / "run" / "checkpoints").glob(".tmp-*")]
    marks = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert any("stopped" in json.dumps(m) for m in marks)


def test_a_script_that_waits_is_interrupted_as_one_that_trains(tmp_path):
    process = script(tmp_path, "learn.fit(epochs=1000, background=True)\nprint('on', flush=True)\nlearn.wait()\n")
    assert process.stdout.readline() == "on\n"
    until(lambda: (tmp_path / "run").exists())
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert re.search(r"KeyboardInterrupt: interrupted at step \d+ \(epoch \d+ of 1000\), saved as \d+; learn", err)


def test_a_script_that_trains_says_it_too(tmp_path):
    process = script(tmp_path, "print('on', flush=True)\nlearn.fit(epochs=1000)\n")
    assert process.stdout.readline() == "on\n"
    until(lambda: (tmp_path / "run").exists())
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert re.search(r"KeyboardInterrupt: interrupted at step \d+ \(epoch \d+ of 1000\), saved as \d+", err)


# ---- kernels


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel(kernel_name="python3", env=environment())
    k = Kernel(manager, client)
    first = k.run(SETUP)
    assert first.status == "ok", first.error
    yield k
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def gather(k, message, seconds=20, until_text=None):
    "What comes for the cell with this message id, until there is some text."
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            msg = k.client.get_iopub_msg(timeout=0.2)
            if msg["parent_header"].get("msg_id") == message:
                found.append(msg)
        if until_text and any(until_text in json.dumps(m["content"], default=str, ensure_ascii=False) for m in found):
            return found
    return found


def execute(k, code):
    message = k.client.execute(textwrap.dedent(code), allow_stdin=True)
    reply = k.client.get_shell_msg(timeout=20)
    while reply["parent_header"].get("msg_id") != message:
        reply = k.client.get_shell_msg(timeout=20)
    return message, reply["content"]


def test_what_it_says_lands_under_the_cell_that_started_it(kernel):
    first, reply = execute(kernel, """
        learn = line(seconds=0.02)
        learn.add(On("after_batch", lambda learn: print(f"step {learn.step}!") if learn.step in (1, 40) else None))
        learn.fit(epochs=1, background=True)""")
    assert reply["status"] == "ok"
    second, reply = execute(kernel, "print('meanwhile', learn.step < 40)")
    found = gather(kernel, first, until_text="step 40!")
    assert "step 40!" in json.dumps([m["content"] for m in found], default=str)
    third = kernel.run("learn.wait(); print(learn.state)")
    assert third.status == "ok" and third.streams.strip() == "finished" and "step" not in third.streams


def test_views_are_shown_by_that_cell_and_end_there(kernel):
    first, _ = execute(kernel, "learn = line(seconds=0.02); learn.fit(epochs=1, background=True)")
    execute(kernel, "pass")
    found = gather(kernel, first, until_text="finished · step 64")
    shown = [m for m in found if m["header"]["msg_type"] in ("display_data", "update_display_data")]
    assert "finished · step 64" in json.dumps([m["content"]["data"] for m in shown], ensure_ascii=False)


def test_a_second_fit_and_its_error(kernel):
    first, _ = execute(kernel, """
        def fail(learn):
            if learn.step == 30: raise ValueError("oh no")
        learn = line(seconds=0.02); learn.add(On("before_step", fail)); learn.fit(epochs=1, background=True)""")
    second, reply = execute(kernel, "learn.fit(epochs=1)")
    assert reply["status"] == "error" and "one fit at a time: learn.wait()" in reply["evalue"]
    found = gather(kernel, first, until_text="the fit in the background failed")
    errors = [m["content"]["text"] for m in found if m["header"]["msg_type"] == "stream" and m["content"]["name"] == "stderr"]
    assert "ValueError: oh no" in "".join(errors) and "batch 31 of 64" in "".join(errors)
    _, reply = execute(kernel, "learn.wait()")
    assert reply["status"] == "error" and reply["ename"] == "ValueError"


def test_the_stop_button_while_a_cell_waits(kernel):
    execute(kernel, "learn = line(seconds=0.03); learn._fronted = True; learn.fit(epochs=2, background=True)")
    threading.Timer(0.3, kernel.manager.interrupt_kernel).start()
    out = kernel.run("learn.wait()")
    assert out.status == "ok"
    assert re.fullmatch(r"interrupted at step \d+ \(epoch 1 of 2\); learn.fit\(\) goes on\n", out.streams), out.streams
    out = kernel.run("learn.remove(On); learn.fit(background=True); learn.wait(); print(learn.step)")
    assert out.streams.strip() == "128"


def test_in_the_foreground_it_says_how_to_go_on(kernel):
    kernel.run("learn = line(seconds=0.03); learn._fronted = True")
    threading.Timer(0.3, kernel.manager.interrupt_kernel).start()
    out = kernel.run("learn.fit(epochs=2)")
    assert out.status == "ok" and re.fullmatch(r"interrupted at step \d+ \(epoch 1 of 2\); learn.fit\(\) goes on\n", out.streams)


def test_messages_are_taken_in_while_a_cell_waits(kernel):
    execute(kernel, "learn = line(seconds=0.05); learn.fit(epochs=1, background=True)")
    kernel.client.execute("learn.wait()", allow_stdin=True)
    time.sleep(0.5)  # what comes before the cell begins is not in the pump's hands
    kernel.client.comm_info()
    kinds = [kernel.client.get_shell_msg(timeout=20)["header"]["msg_type"] for _ in range(2)]
    assert kinds == ["comm_info_reply", "execute_reply"]


def test_a_kernel_that_is_shut_down_saves_first(tmp_path):
    manager, client = start_new_kernel(kernel_name="python3", env=environment())
    try:
        k = Kernel(manager, client)
        code = f"""
            slow = On("before_batch", lambda learn: time.sleep(0.02))
            batches = [(torch.ones(1, 1),) * 2] * 1000
            learn = Learner(nn.Linear(1, 1), batches, "mse", run={str(tmp_path / 'run')!r}, cbs=[slow])"""
        assert k.run(SETUP + textwrap.dedent(code)).status == "ok"
        execute(k, "learn.fit(epochs=5, background=True)")
        k.run("while learn.step < 5: time.sleep(0.01)")
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    entry = Checkpoints(tmp_path / "run" / "checkpoints").find("last")
    assert entry.step >= 5


def test_a_program_that_executes_notebooks_gets_it_in_the_cell(monkeypatch):
    from nbclient import NotebookClient

    for name in [n for n in os.environ if n.startswith("TRAINKIT_")]:
        monkeypatch.delenv(name)
    code = "learn = line(); learn._fronted = True; learn.fit(epochs=1, background=True); print(learn.state, learn.step)"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (SETUP, code)])
    NotebookClient(nb, timeout=60, kernel_name="python3").execute()
    assert "".join(out.text for out in nb.cells[-1].outputs).splitlines() == [HEADLESS, "finished 64"]


def test_here_is_no_such_program(monkeypatch):
    assert not headless()
    monkeypatch.setenv("TRAINKIT_WHERE", "notebook")
    assert not headless()  # no kernel


def test_the_whole_file_leaves_no_thread():
    gc.collect()
    until(lambda: not [t for t in threading.enumerate() if t.name == "trainkit-fit"], 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Path(__file__).exists()
