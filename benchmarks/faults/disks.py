"A disk that is full, refuses, is slow, or goes away during a run."

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
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
from trainkit.checkpoint import CheckpointError, Checkpoints
from trainkit.learner import Learner

from .nursery import Nursery
from .endings import writers
from .row import Row
from .subjects import EPOCHS, STEPS, digest, go_on, saved_digests, supervised

ERRORS = {"no space": errno.ENOSPC, "quota": errno.EDQUOT, "I/O error": errno.EIO}
CALLS = {"fsync": errno.EIO, "replace": errno.EPERM, "unlink": errno.EPERM, "mkdir": errno.EACCES, "open": errno.EMFILE,
         "thread": errno.EAGAIN}  # fmt: skip
MODULES: tuple[Any, ...] = (trainkit.storage, trainkit.history)  # those that open files for a run
FIRST = 6  # until this step all is well
NOBODY = 65534


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
    owner, name, real = {"open": (None, "open", builtins.open), "thread": (threading.Thread, "start", threading.Thread.start)}.get(
        call, (os, call, getattr(os, call, None)))  # fmt: skip

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
        "One message for each checkpoint that is missing, at most one for the history, and no other."
        due = {*range(2, STEPS + 1, 2)}
        missing = due - {entry.step for entry in Checkpoints(self.store)}
        of_files = [text for text in self.messages if "checkpoint" in text and "history" not in text]
        others = [text for text in self.messages if text not in of_files]
        assert len(of_files) == len(missing), f"{sorted(missing)} are missing, said {len(of_files)} times: {[t[-250:] for t in of_files]}"
        assert len(others) <= 1 and all("history" in text for text in others), f"more is said: {others}"
        silent = [text for text in self.messages if words not in text]
        assert not silent, f"the message doesn't say {words!r}: {silent}"
        assert self.messages or not missing, "nobody says anything"

    def saves_again(self) -> None:
        "With the disk well again, the learner saves."
        self.learn.save()
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
    row = Row("disk full from write k on, or for one write; over quota; I/O error; fsync, rename, open refused",
              "training goes on to the same end; nothing earlier lost; one message a checkpoint; the next save works")  # fmt: skip
    reference = _reference(folder)
    _refused_writes(row, folder, reference, firsts, 1)
    _refused_writes(row, folder, reference, firsts[:2], 10**9)
    _refused_calls(row, folder, reference)
    for job in ("limited", "no_handles", "history_full", "small_disk"):
        with row.attempt(job.replace("_", " ")):
            told = nursery.start("disks", "trial", kind=job, folder=str(folder / job)).done()
            row.met[told[-1]["met"]] += 1
    return row


def gone(folder: Path, nursery: Nursery) -> Row:
    "The folder is removed, moved, replaced, or read-only."
    row = Row("run folder removed, moved away, replaced by a file, read-only during a run or before it",
              "training goes on to the same end; what is left of earlier checkpoints untouched; messages")  # fmt: skip
    for job in ("removed", "checkpoints_removed", "moved", "replaced", "read_only", "read_only_from_the_start", "never_there"):
        with row.attempt(job.replace("_", " ")):
            told = nursery.start("disks", "trial", kind=job, folder=str(folder / job)).done()
            row.met[told[-1]["met"]] += 1
    return row


def slow(folder: Path, delays: tuple[float, ...] = (0.005, 0.03)) -> Row:
    "A write takes longer than several steps."
    row = Row("disk slower than the training", "one write at a time; every checkpoint holds the state of its step; nothing left over")
    reference = _reference(folder)
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


def _reference(folder: Path) -> dict[int, str]:
    straight = supervised(folder / "straight", save_every=2)
    straight.fit(epochs=EPOCHS)
    found = saved_digests(straight)
    shutil.rmtree(folder / "straight")
    return found


# ------------------------------------------------------------------------------------------------------- in the child


def trial(tell: Callable[..., None], kind: str, folder: str) -> None:
    "One kind of trouble, in a process of its own."
    here = Path(folder)
    here.mkdir(parents=True)
    met = TROUBLES[kind](here, _reference(here))
    tell(met=met)


def _limited(here: Path, reference: dict[int, str]) -> str:
    "The kernel refuses files of more than 2 kB."
    trial = Trial(here / "run", reference)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    trial.fit(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    trial.trained_on()
    trial.nothing_lost()
    trial.said_once("File too large")
    trial.saves_again()
    return "by RLIMIT_FSIZE"


def _no_handles(here: Path, reference: dict[int, str]) -> str:
    "The process may not open any more files."
    trial = Trial(here / "run", reference)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    trial.fit(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, before[1])))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    trial.trained_on()
    trial.nothing_lost()
    trial.said_once("Too many open files")
    trial.saves_again()
    return "by RLIMIT_NOFILE"


def _history_full(here: Path, reference: dict[int, str]) -> str:
    "The history's file is /dev/full, where every write finds no space."
    trial = Trial(here / "run", reference)

    def strike() -> None:
        (here / "run" / "history.jsonl").unlink()
        (here / "run" / "history.jsonl").symlink_to("/dev/full")

    trial.fit(strike)
    trial.trained_on()
    trial.nothing_lost()
    trial.said_once("No space left on device")
    assert len(trial.messages) == 1, trial.messages
    return "by /dev/full"


def _small_disk(here: Path, reference: dict[int, str]) -> str:
    "A file system in memory that is filled up by something else."
    (disk := here / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True)
    if mounted.returncode:
        return "not tried: nothing may be mounted here"
    try:
        trial = Trial(disk / "run", reference)

        def fill() -> None:
            with contextlib.suppress(OSError), open(disk / "other", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        trial.fit(fill)
        (disk / "other").unlink()
        trial.trained_on()
        trial.nothing_lost()
        trial.said_once("No space left on device")
        trial.saves_again()
    finally:
        subprocess.run(["umount", disk], check=True)
    return "by a full tmpfs"


def _removed(here: Path, reference: dict[int, str]) -> str:
    trial = Trial(here / "run", reference)
    trial.fit(lambda: (shutil.rmtree(here / "run"), trial.before.clear()))
    trial.trained_on()
    trial.nothing_lost()
    trial.saves_again()
    return "saved anew" if len(trial.learn.checkpoints) > 1 else "message"


def _checkpoints_removed(here: Path, reference: dict[int, str]) -> str:
    trial = Trial(here / "run", reference)
    trial.fit(lambda: (shutil.rmtree(here / "run" / "checkpoints"), trial.before.clear()))
    trial.trained_on()
    trial.nothing_lost()
    trial.saves_again()
    return "saved anew" if len(trial.learn.checkpoints) > 1 else "message"


def _moved(here: Path, reference: dict[int, str]) -> str:
    trial = Trial(here / "run", reference)
    trial.fit(lambda: (here / "run").rename(here / "moved"))
    trial.trained_on()
    old = {path.name: path.read_bytes() for path in (here / "moved" / "checkpoints").glob("ckpt-*.pt")}
    assert old == trial.before, "what was moved has changed"
    trial.before.clear()
    trial.nothing_lost()
    trial.saves_again()
    return "saved anew" if len(trial.learn.checkpoints) > 1 else "message"


def _replaced(here: Path, reference: dict[int, str]) -> str:
    trial = Trial(here / "run", reference)
    trial.fit(lambda: ((here / "run").rename(here / "moved"), (here / "run").write_text("a file")))
    trial.trained_on()
    assert trial.messages, "nobody says anything"
    assert (here / "run").read_text() == "a file"
    return "message"


def _as_nobody(folder: Path) -> None:
    "Root may write anywhere, so become somebody who may not."
    if os.getuid() == 0:
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, NOBODY, NOBODY)
        for parent in folder.parents:
            if not os.access(parent, os.X_OK):
                break
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def _reachable(here: Path) -> Path:
    "A folder that nobody, too, can reach."
    import tempfile

    found = Path(tempfile.mkdtemp(prefix="faults-"))
    found.chmod(0o755)
    return found


def _read_only(here: Path, reference: dict[int, str]) -> str:
    place = _reachable(here)
    _as_nobody(place)
    try:
        trial = Trial(place / "run", reference)
        trial.fit(lambda: [path.chmod(0o555) for path in (place / "run" / "checkpoints", place / "run")])
        trial.trained_on()
        trial.nothing_lost()
        trial.said_once("Permission denied")
        for path in (place / "run", place / "run" / "checkpoints"):
            path.chmod(0o755)
        trial.saves_again()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return "message"


def _read_only_from_the_start(here: Path, reference: dict[int, str]) -> str:
    place = _reachable(here)
    learn = supervised(place / "run", save_every=2)
    learn.add(On("after_batch", lambda learn: learn.step == FIRST + 2 and learn.stop()))
    learn.fit(epochs=EPOCHS)
    _as_nobody(place)
    try:
        everything = [*place.rglob("*")]
        for path in everything:
            path.chmod(0o555 if path.is_dir() else 0o444)
        learn = supervised(place / "run", save_every=2)
        learn.restore("last")
        assert digest(learn.state_dict()) == reference[learn.step], "a run that can't be written can't be restored"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            go_on(learn)
        assert digest(learn.state_dict()) == reference[STEPS], "the training itself was changed"
        assert any("Permission denied" in str(w.message) for w in said), [str(w.message) for w in said]
    finally:
        for path in (place / "run", place / "run" / "checkpoints"):
            path.chmod(0o755)
        shutil.rmtree(place, ignore_errors=True)
    return "message"


def _never_there(here: Path, reference: dict[int, str]) -> str:
    (here / "file").write_text("")
    learn = supervised(here / "file" / "run", save_every=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        learn.fit(epochs=EPOCHS)
    assert digest(learn.state_dict()) == reference[STEPS], "the training itself was changed"
    assert any("could not make the folder" in str(w.message) for w in said), [str(w.message) for w in said]
    with contextlib.suppress(CheckpointError):
        learn.save()
        raise AssertionError("a save into nowhere succeeds")
    return "message"


TROUBLES: dict[str, Callable[[Path, dict[int, str]], str]] = {
    "limited": _limited, "no_handles": _no_handles, "history_full": _history_full, "small_disk": _small_disk, "removed": _removed,
    "checkpoints_removed": _checkpoints_removed, "moved": _moved, "replaced": _replaced, "read_only": _read_only,
    "read_only_from_the_start": _read_only_from_the_start, "never_there": _never_there,
}  # fmt: skip
