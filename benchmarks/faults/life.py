"In a process to be killed: a run's life, whose operations on the disk are counted, and torn where it is to die."

from __future__ import annotations

import builtins
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trainkit.checkpoint
import trainkit.history
import trainkit.storage
from trainkit.checkpoint import CheckpointError
from trainkit.learner import Learner

from .subjects import SUBJECTS, digest, go_on


def life(tell: Callable[..., None], run: str, subject: str, die_at: int = 0, count: bool = False, in_place: bool = False,
         **kw: Any) -> None:  # fmt: skip
    "One life of a run: take up what is there, go on to the end. `tell` hears of what is promised, and of the end."
    if in_place:
        trainkit.checkpoint.write_atomically = _write_in_place
    _tell_of_renames(tell)
    operations = _watch(run, die_at) if die_at or count else [0]
    learn = SUBJECTS[subject](run, **kw)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _take_up(learn, tell)
        tell(said=_strange(said))
        go_on(learn)
    tell(end=digest(learn.state_dict()), said=_strange(said), operations=operations[0])


def _write_in_place(path: Path, write: Callable[[Any], Any]) -> None:
    "As files are often written: under their final names from the beginning."
    with open(path, "wb") as file:
        write(file)


def _take_up(learn: Learner, tell: Callable[..., None], digested: Callable[[Learner], str] | None = None) -> None:
    try:
        entry = learn.restore("last")
    except CheckpointError:
        assert not len(learn.checkpoints or ()), "there are checkpoints, and none can be restored"
        tell(restored=0)
    else:
        tell(restored=entry.step, digest=digested(learn) if digested else digest(learn.state_dict()))


def _strange(said: list[warnings.WarningMessage]) -> list[str]:
    "Warnings other than the two that a kill may leave: a torn line of the history, a run that has no checkpoint yet."
    fine = ("unreadable of", "held another run")
    return [str(w.message) for w in said if not any(text in str(w.message) for text in fine)]


def _tell_of_renames(tell: Callable[..., None]) -> None:
    "A checkpoint is promised from the moment it has its name."
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        real(source, target)
        name = Path(target).name
        if name.startswith("ckpt-") and name.endswith(".pt"):
            tell(promised=int(name[5:14]))

    os.replace = replace


class Half:
    "A file of which a fatal write leaves one half."

    def __init__(self, file: Any, operation: Callable[[Callable[[], None]], None]):
        self.file, self.operation = file, operation

    def write(self, data: Any) -> int:
        def tear() -> None:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()

        self.operation(tear)
        return self.file.write(data)

    def __enter__(self) -> Half:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _watch(run: str, die_at: int) -> list[int]:
    "Counts what changes the disk (open, write, fsync, rename, remove, mkdir) and dies before the `die_at`-th."
    done, one = [0], threading.Lock()

    def operation(tear: Callable[[], None] = lambda: None) -> None:
        with one:
            done[0] += 1
            if done[0] == die_at:
                tear()
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple) -> None:
        writing = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if (writing or event in ("os.rename", "os.remove", "os.mkdir")) and str(args[0]).startswith(run):
            operation()

    def synced(handle: int, real: Callable[[int], None] = os.fsync) -> None:
        operation()
        real(handle)

    def opened(path: Any, mode: str = "r", *args: Any, **kw: Any) -> Any:
        file = builtins.open(path, mode, *args, **kw)
        return Half(file, operation) if set(mode) & set("wax+") and "b" in mode else file

    sys.addaudithook(hook)
    os.fsync = synced
    trainkit.storage.open = trainkit.history.open = opened  # type: ignore[attr-defined]
    return done
