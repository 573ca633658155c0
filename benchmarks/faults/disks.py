"A disk that is full, refuses, is slow, or goes away during a run."

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import trainkit.history
import trainkit.storage
from trainkit.callback import On
from trainkit.checkpoint import Checkpoints
from trainkit.history import History
from trainkit.learner import Learner

from .endings import writers
from .nursery import Nursery
from .row import Row
from .subjects import EPOCHS, STEPS, digest, saved_digests, supervised

ERRORS = {"no space": errno.ENOSPC, "quota": errno.EDQUOT, "I/O error": errno.EIO}
CALLS = {"fsync": errno.EIO, "replace": errno.EPERM, "unlink": errno.EPERM, "mkdir": errno.EACCES, "open": errno.EMFILE,
         "thread": errno.EAGAIN}  # fmt: skip
MODULES: tuple[Any, ...] = (trainkit.storage, trainkit.history)  # those that open files for a run
WRITTEN = ("history", "journal", "status.json", "control folder")  # by a run, beside its checkpoints
FIRST = 6  # until this step all is well


class Refusing:
    "A file whose writes may be refused."

    def __init__(self, file: Any, disk: Disk):
        self.file, self.disk = file, disk

    def write(self, data: Any) -> int:
        self.disk.write(self.file, data)
        return self.file.write(data)

    def __enter__(self) -> Refusing:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class Disk:
    "Refuses `n` writes from the `first` on, counted from when it is `on`; the first of them takes half of its data."

    def __init__(self, first: int, n: int, code: int):
        self.first, self.n, self.code, self.writes, self.on = first, n, code, 0, False

    def write(self, file: Any, data: Any) -> None:
        self.writes += self.on
        if self.on and self.first <= self.writes < self.first + self.n:
            file.write(bytes(data)[: len(data) // 2])
            raise OSError(self.code, os.strerror(self.code))

    def open(self, path: Any, mode: str = "r", *args: Any, **kw: Any) -> Any:
        file = builtins.open(path, mode, *args, **kw)
        return Refusing(file, self) if "b" in mode and set(mode) & set("wax+") else file

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        "Inside, what a run writes goes to this disk."
        for module in MODULES:
            module.open = self.open
        try:
            yield
        finally:
            for module in MODULES:
                del module.open


@contextlib.contextmanager
def refusing(call: str, code: int, since: Callable[[], bool]) -> Iterator[None]:
    "Inside, a call of the system fails once `since()`."
    owner: Any = os
    name, real = call, getattr(os, call, None)
    if call == "thread":
        owner, name, real = threading.Thread, "start", threading.Thread.start
    if call == "open":
        owner, real = None, builtins.open

    def refuse(*args: Any, **kw: Any) -> Any:
        harmless = call == "open" and "r" in (args[1] if len(args) > 1 else "r")
        if since() and not harmless:
            raise RuntimeError("can't start new thread") if call == "thread" else OSError(code, os.strerror(code))
        return real(*args, **kw)

    for module in MODULES if owner is None else (owner,):
        setattr(module, name, refuse)
    try:
        yield
    finally:
        for module in MODULES if owner is None else (owner,):
            setattr(module, name, real)


class Trial:
    "A run to which something happens after `FIRST` steps, and what must hold then."

    def __init__(self, run: Path, reference: dict[int, str], **kw: Any):
        self.reference = reference
        self.learn = supervised(run, save_every=2, **kw)
        self.store, self.struck = run / "checkpoints", False
        self.before: dict[str, bytes] = {}
        self.messages: list[str] = []

    def fit(self, strike: Callable[[], Any]) -> None:
        "The whole fit, with the strike in it."

        def act(learn: Learner) -> None:
            if learn.step == FIRST and not self.struck:
                learn.checkpoints.wait()
                learn.history.flush()
                self.before = self.files()
                self.struck = True
                strike()

        self.learn.add(On("after_batch", act, order=95))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.learn.fit(epochs=EPOCHS)
        self.messages = [str(w.message) for w in said if issubclass(w.category, UserWarning)]

    def files(self) -> dict[str, bytes]:
        "Every checkpoint that lies there."
        return {path.name: path.read_bytes() for path in self.store.glob("ckpt-*.pt")}

    def trained_on(self) -> None:
        "The training came to its end, and to the same one."
        assert (self.learn.state, self.learn.step) == ("finished", STEPS), f"{self.learn.state} at step {self.learn.step}"
        assert digest(self.learn.state_dict()) == self.reference[STEPS], "the training itself was changed"
        assert not writers(), "a thread is left"

    def nothing_lost(self) -> None:
        "Each earlier checkpoint is there to the last byte, each that lies there holds its state, no temporary file is left."
        now = self.files()
        lost = [name for name, data in self.before.items() if now.get(name) != data]
        assert not lost, f"lost or changed: {lost}"
        for entry in Checkpoints(self.store):
            assert digest(Checkpoints(self.store).load(entry)[0]) == self.reference[entry.step], f"{entry.id} holds another state"
        left = [path.name for path in self.store.glob(".tmp-*")]
        assert not left, f"temporary files are left: {left}"

    def said_once(self, words: str = "") -> None:
        "One message for each checkpoint that is missing, at most one for each other thing that a run writes, and no more."
        due = {*range(2, STEPS + 1, 2)}
        missing = due - {entry.step for entry in Checkpoints(self.store)}
        of_files = [text for text in self.messages if "checkpoint" in text and "history" not in text]
        others = [next((w for w in WRITTEN if w in text), text) for text in self.messages if text not in of_files]
        assert len(of_files) == len(missing), f"{sorted(missing)} are missing, said is: {of_files}"
        assert len({*others}) == len(others) and {*others} <= {*WRITTEN}, f"more is said: {others}"
        silent = [text for text in self.messages if words not in text]
        assert not silent, f"the message doesn't say {words!r}: {silent}"
        assert self.messages or not missing, "nobody says anything"

    def saves_again(self) -> None:
        "With the disk well again, the learner saves, and the history's file says what the learner holds."
        self.learn.save()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torn lines are left out
            found, held = History.read(self.learn.history.path).scalars, self.learn.history.scalars
        same = {n: v.tolist() for n, (_, v) in found.items()} == {n: v.tolist() for n, (_, v) in held.items()}
        assert same, "the history on disk isn't the one in memory"
        assert digest(self.learn.checkpoints.load("last")[0]) == digest(self.learn.state_dict()), "a later save doesn't hold"


def _refused_writes(row: Row, folder: Path, reference: dict[int, str], firsts: list[int], n: int) -> None:
    for name, code in ERRORS.items():
        for first in firsts:
            with row.attempt(f"{name} from write {first}, {n} writes long"):
                trial, disk = Trial(folder / "run", reference), Disk(first, n, code)
                with disk.mounted():
                    trial.fit(lambda disk=disk: setattr(disk, "on", True))
                row.met["writes refused"] += disk.writes >= first
                trial.trained_on()
                trial.nothing_lost()
                trial.said_once(os.strerror(code))
                trial.saves_again()
            shutil.rmtree(folder / "run", ignore_errors=True)


def _refused_calls(row: Row, folder: Path, reference: dict[int, str]) -> None:
    for call, code in CALLS.items():
        with row.attempt(f"{call} refused: {os.strerror(code)}"):
            trial = Trial(folder / "run", reference, keep=2 if call == "unlink" else 99)
            with refusing(call, code, lambda trial=trial: trial.struck):
                trial.fit(lambda: None)
            trial.trained_on()
            trial.nothing_lost()
            if call not in ("unlink", "mkdir"):
                trial.said_once("can't start new thread" if call == "thread" else os.strerror(code))
            trial.saves_again()
        shutil.rmtree(folder / "run", ignore_errors=True)


def full(folder: Path, nursery: Nursery, firsts: list[int]) -> Row:
    "Writes refused by a file that is not one, by the kernel's limit on a file's size, by a real small disk."
    row = Row("disk full at or from write k; quota; I/O error; fsync, rename, unlink, mkdir, open, a thread refused",
              "training goes on to the same end; nothing earlier lost; one message a checkpoint; "
              "the next save works")  # fmt: skip
    reference = reference_of(folder)
    _refused_writes(row, folder, reference, firsts, 1)
    _refused_writes(row, folder, reference, firsts[:2], 10**9)
    _refused_calls(row, folder, reference)
    for job in ("limited", "no_handles", "history_full", "small_disk"):
        with row.attempt(job.replace("_", " ")):
            told = nursery.start("troubles", "trial", kind=job, folder=str(folder / job)).done()
            row.met[told[-1]["met"]] += 1
    return row


def gone(folder: Path, nursery: Nursery) -> Row:
    "The folder is removed, moved, replaced, or read-only."
    row = Row("run folder removed, moved away, replaced by a file, read-only during a run or before it",
              "training goes on to the same end; what is left of earlier checkpoints untouched; messages")  # fmt: skip
    for job in ("removed", "checkpoints_removed", "moved", "replaced", "read_only", "read_only_from_the_start", "never_there"):
        with row.attempt(job.replace("_", " ")):
            told = nursery.start("troubles", "trial", kind=job, folder=str(folder / job)).done()
            row.met[told[-1]["met"]] += 1
    return row


def slow(folder: Path, delays: tuple[float, ...] = (0.005, 0.03)) -> Row:
    "A write takes longer than several steps."
    row = Row("disk slower than the training",
              "one write at a time; every checkpoint holds its step's state; nothing left over")  # fmt: skip
    reference = reference_of(folder)
    for delay in delays:
        with row.attempt(f"{delay} s a file"):
            trial, real, inside = Trial(folder / "run", reference), torch.save, [0, 0]

            def save(*args: Any, delay: float = delay, real: Any = real, inside: list[int] = inside, **kw: Any) -> None:
                inside[0] += 1
                inside[1] = max(inside)
                time.sleep(delay)
                real(*args, **kw)
                inside[0] -= 1

            torch.save = save
            try:
                trial.fit(lambda: None)
            finally:
                torch.save = real
            assert inside == [0, 1], f"{inside[1]} writes at a time"
            trial.trained_on()
            trial.nothing_lost()
            assert not trial.messages and len(trial.learn.checkpoints) == STEPS // 2
        shutil.rmtree(folder / "run", ignore_errors=True)
    return row


def reference_of(folder: Path) -> dict[int, str]:
    straight = supervised(folder / "straight", save_every=2)
    straight.fit(epochs=EPOCHS)
    found = saved_digests(straight)
    shutil.rmtree(folder / "straight")
    return found


