"Errors and interrupts at every event and at random moments, while a checkpoint is being written."

from __future__ import annotations

import contextlib
import gc
import io
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainkit.callback import EVENTS, FIT, Callback
from trainkit.checkpoint import Checkpoints
from trainkit.learner import Learner

from .row import Row
from .subjects import EPOCHS, SUBJECTS, digest, go_on, saved_digests, slow_disk

FIT_EVENTS = [text for _, text in FIT.rows() if text in EVENTS]
KINDS = ("error", "interrupt", "one ctrl-c", "two ctrl-c", "error in a thread")


class Tally(Callback):
    "Counts how often each event comes."

    def __init__(self) -> None:
        self.seen = Counter[str]()
        for event in FIT_EVENTS:
            setattr(self, event, partial(self.note, event))

    def note(self, event: str, learn: Any) -> None:
        self.seen[event] += 1


class Strike(Callback):
    "Does something at the n-th occurrence of an event, once."

    order = 50

    def __init__(self, event: str, n: int, do: Callable[[], None]):
        self.left, self.do = n, do
        setattr(self, event, self.act)

    def act(self, learn: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.do()


def _raise(error: BaseException) -> None:
    raise error


def _press(times: int) -> None:
    behind = threading.current_thread() is not threading.main_thread()
    while behind and not _somebody_waits():
        time.sleep(0.001)
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
        if behind:
            time.sleep(0.05)  # until the main thread has taken note; two signals at once are one


def _somebody_waits() -> bool:
    "Is the main thread in `wait()`?"
    stack = traceback.walk_stack(sys._current_frames()[threading.main_thread().ident or 0])
    return any(frame.f_code.co_name == "join_listening" for frame, _ in stack)


DEEDS: dict[str, Callable[[], None]] = {
    "error": lambda: _raise(RuntimeError("struck")),
    "error in a thread": lambda: _raise(RuntimeError("struck")),
    "interrupt": lambda: _raise(KeyboardInterrupt()),
    "one ctrl-c": lambda: _press(1),
    "two ctrl-c": lambda: _press(2),
}


def writers(seconds: float = 5) -> list[str]:
    "The threads of trainkit's that don't end within so many seconds."
    end = time.monotonic() + seconds
    while (found := [t.name for t in threading.enumerate() if t.name.startswith("trainkit")]) and time.monotonic() < end:
        time.sleep(0.001)
    return found


def outside(learn: Learner) -> dict[str, Any]:
    "What a fit must leave as it found it: modes, frozen flags, hooks, handler, threads, autocast, gradients, callbacks."
    modules = [m for player in learn.players for module in player.modules.values() for m in module.modules()]
    return {
        "modes": [m.training for m in modules],
        "flags": [p.requires_grad for player in learn.players for p in player.parameters()],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules),
        "handler": signal.getsignal(signal.SIGINT),
        "threads": writers(),
        "grad mode": torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"),
        "callbacks": [cb.name for cb in learn.cbs],
        "open": (learn.player, learn.loss, learn.pred, learn.batch, learn._fitting),
    }


def _fit(learn: Learner) -> BaseException | None:
    "Fit to the end; what came out of it."
    try:
        go_on(learn)
    except BaseException as error:  # all of them are what this is about
        return error
    return None


def _fit_behind(learn: Learner) -> BaseException | None:
    "The same in the background, waited for; also after a second interrupt, which ends the waiting only."
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            go_on(learn, background=True)
    except BaseException as error:
        learn.wait()
        return error
    return None


def _fit_in_a_thread(learn: Learner) -> BaseException | None:
    caught: list[BaseException | None] = []
    thread = threading.Thread(target=lambda: caught.append(_fit(learn)))
    thread.start()
    thread.join()
    return caught[0]


WAYS: dict[str, Callable[[Learner], BaseException | None]] = {  # how a learner is made to fit: what comes out of it
    "foreground": _fit,
    "background": _fit_behind,
}


def _goes_on_exactly(run: Path, subject: str, reference: dict[int, str]) -> None:
    "A new learner takes up the newest checkpoint, and ends as the run that nothing happened to."
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is passed over
        found = Checkpoints(run / "checkpoints")
        for entry in found:
            state = found.load(entry)[0]
            validated = not state["position"]["drawn"]  # one from within a validation has no counterpart there
            assert not validated or digest(state) == reference[entry.step], f"checkpoint {entry.id} holds another state"
        learn = SUBJECTS[subject](run, save_every="none")
        if len(found):
            learn.restore("last")
            steps = learn.history.scalars["train/loss" if subject == "supervised" else "train/discriminator/loss"][0].tolist()
            assert steps == [*range(1, learn.step + 1)], "a batch was lost or repeated"
            go_on(learn)
            assert digest(learn.state_dict()) == reference[learn.step], "the restarted run ends otherwise"
    left = [path.name for path in (run / "checkpoints").glob(".tmp-*")]
    assert not left, f"temporary files are left: {left}"


def _events(learn: Learner) -> Counter[str]:
    "How often each event comes in a run that nothing happens to."
    learn.add(tally := Tally())
    learn.fit(epochs=EPOCHS)
    return tally.seen


def _reference(subject: str, folder: Path) -> dict[int, str]:
    straight = SUBJECTS[subject](folder / f"{subject}-straight", save_every=1)
    straight.fit(epochs=EPOCHS)
    return saved_digests(straight)


def _one(way: str, kind: str, event: str, n: int, subject: str, run: Path, reference: dict[int, str], row: Row) -> None:
    learn = SUBJECTS[subject](run, save_every=1)
    before = outside(learn)
    learn.add(strike := Strike(event, n, DEEDS[kind]))
    with slow_disk(0.003):
        caught = (_fit_in_a_thread if kind == "error in a thread" else WAYS[way])(learn)
    assert strike.left <= 0, f"{event} didn't come {n} times"
    wanted = RuntimeError if kind.startswith("error") else KeyboardInterrupt
    assert isinstance(caught, wanted), f"out of fit came {caught!r}"
    assert learn.state in ("failed", "interrupted", "finished"), f"the learner is {learn.state}"
    learn.remove(strike)
    _left_nothing(learn, before)
    copied = run.with_name("copy")
    shutil.copytree(run, copied) if run.exists() else copied.mkdir()
    row.met["inside a batch"] += learn.broken
    _same_goes_on(learn, hard=kind != "one ctrl-c", reference=reference)
    _goes_on_exactly(copied, subject, reference)


def _left_nothing(learn: Learner, before: dict[str, Any]) -> None:
    "AssertionError unless everything outside of the learner is as it was, once what was being written is written."
    learn.checkpoints.wait()
    now = outside(learn)
    assert now == before, f"left behind: {[(key, before[key], now[key]) for key in now if now[key] != before[key]]}"


def _same_goes_on(learn: Learner, hard: bool, reference: dict[int, str]) -> None:
    "The learner that was struck goes on: from where it is, or after a hard ending from the newest checkpoint."
    if hard and not len(learn.checkpoints):
        learn.fit(steps=2)
        assert learn.state == "finished", f"after it, a fit ends {learn.state}"
        return
    if hard:
        learn.restore("last")
    go_on(learn)
    assert learn.epoch == EPOCHS and digest(learn.state_dict()) == reference[learn.step], "the same learner ends otherwise"


def at_events(folder: Path, every: int = 1, ways: tuple[str, ...] = tuple(WAYS)) -> Row:
    "Each kind of ending at each event, or each `every`-th of all these, while a checkpoint is being written."
    row = Row("error, KeyboardInterrupt, one and two Ctrl-C at every event, saves in the background",
              "learner usable, nothing left behind, resumed exactly, no batch lost or repeated")  # fmt: skip
    seen = {subject: _events(make()) for subject, make in SUBJECTS.items()}
    cases = [(way, kind, event, n, subject) for way in ways for subject in SUBJECTS for kind in KINDS for event in FIT_EVENTS
             for n in (1, 2) if seen[subject][event] >= n]  # fmt: skip
    references = {subject: _reference(subject, folder) for subject in SUBJECTS}
    for way, kind, event, n, subject in cases[::every]:
        with row.attempt(f"{subject}, {way}: {kind} at {event}, occurrence {n}"):
            _one(way, kind, event, n, subject, folder / "run", references[subject], row)
        for name in ("run", "copy"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return row


def at_random(n: int, folder: Path, subject: str = "supervised", seed: int = 0) -> Row:
    "Ctrl-C, once or twice, from outside and at a moment that nobody chose."
    row = Row("one and two Ctrl-C at a random moment, saves in the background", "as above")
    reference, rng, run = _reference(subject, folder), random.Random(seed), folder / "run"
    seconds = _seconds(subject, folder / "timed")
    for i in range(n):
        gc.collect()  # what an earlier interrupt left in cycles shall not be met by this one
        with row.attempt(f"{subject}: interrupt {i}"):
            times = 1 + i % 2
            learn = SUBJECTS[subject](run, save_every=1)
            before = outside(learn)
            caught = _interrupted(learn, rng.uniform(0, seconds), times)
            row.met["too late"] += caught is None
            row.met["inside a batch"] += learn.broken
            _left_nothing(learn, before)
            _goes_on_exactly(run, subject, reference)
        shutil.rmtree(run, ignore_errors=True)
    return row


def _seconds(subject: str, run: Path) -> float:
    begin = time.monotonic()
    with slow_disk(0.003):
        go_on(SUBJECTS[subject](run, save_every=1))
    return time.monotonic() - begin


def _interrupted(learn: Learner, seconds: float, times: int) -> BaseException | None:
    "Fit, and press Ctrl-C so often after so many seconds; presses that come too late are swallowed here."
    def press() -> None:
        for _ in range(times):
            if fitting.is_set():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.002)

    fitting, caught, timer = threading.Event(), None, threading.Timer(seconds, press)
    fitting.set()
    with slow_disk(0.003):
        try:
            timer.start()
            caught = _fit(learn)
            fitting.clear()
            timer.cancel()
            timer.join()
        except KeyboardInterrupt:
            timer.join()
    return caught
