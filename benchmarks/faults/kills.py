"SIGKILL, at random moments and at each operation that changes the disk; saves in the background, deletions included."

from __future__ import annotations

import builtins
import os
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trainkit.history
import trainkit.storage
from trainkit.checkpoint import CheckpointError, Checkpoints, read_checkpoint
from trainkit.history import History
from trainkit.learner import Learner

from .nursery import Nursery
from .row import Row
from .subjects import SUBJECTS, digest, go_on, saved_digests

BALLAST = 100_000  # numbers that only make the file larger, so that a good part of a life is spent in writing
LIFE = {"ballast": BALLAST, "save_every": 1}


# ------------------------------------------------------------------------------------------------------- in the child


def life(tell: Callable[..., None], run: str, subject: str, die_at: int = 0, count: bool = False, **kw: Any) -> None:
    "One life of a run: take up what is there, go on to the end. `tell` hears of what is promised, and of the end."
    _tell_of_renames(tell)
    operations = _watch(run, die_at) if die_at or count else [0]
    learn = SUBJECTS[subject](run, **kw)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _take_up(learn, tell)
        tell(said=_strange(said))
        go_on(learn)
    tell(end=digest(learn.state_dict()), said=_strange(said), operations=operations[0])


def _take_up(learn: Learner, tell: Callable[..., None]) -> None:
    try:
        entry = learn.restore("last")
    except CheckpointError:
        assert not len(learn.checkpoints), "there are checkpoints, and none can be restored"
        tell(restored=0)
    else:
        tell(restored=entry.step, digest=digest(learn.state_dict()))


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
        writing = event == "open" and isinstance(args[1], str) and args[1] != "r" and "b" != args[1] and set(args[1]) & set("wax+")
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


# ------------------------------------------------------------------------------------------------------ in the parent


class Reference:
    "The run that is never killed: what every checkpoint holds, how it ends, how long it takes."

    def __init__(self, nursery: Nursery, folder: Path, subject: str):
        self.nursery, self.folder, self.subject = nursery, folder, subject
        run = folder / "straight"
        begin = time.monotonic()
        told = nursery.start("kills", "life", run=str(run), subject=subject, count=True, **LIFE).done()
        self.seconds = time.monotonic() - begin
        self.end, self.operations = told[-1]["end"], told[-1]["operations"]
        self.steps = saved_digests(SUBJECTS[subject](run))
        self.history = History.read(run / "history.jsonl")

    def same_file(self, run: Path) -> None:
        "AssertionError unless the history on disk has the same numbers."
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a torn line is left out, which is what this is about
            found = History.read(run / "history.jsonl").scalars
        assert found.keys() == self.history.scalars.keys(), "the history on disk has other series"
        for name, (steps, values) in self.history.scalars.items():
            assert found[name][0].tolist() == steps.tolist(), f"the history on disk has other steps of {name}"
            assert found[name][1].tobytes() == values.tobytes(), f"the history on disk has other values of {name}"


def _promised(told: list[dict[str, Any]]) -> int:
    return max((line["promised"] for line in told if "promised" in line), default=0)


def _check_restart(told: list[dict[str, Any]], promised: int, reference: Reference) -> int:
    "What a life says of the state it took up; returns its step."
    restored = [line for line in told if "restored" in line]
    if not restored:
        return promised  # killed before it got so far
    step = restored[0]["restored"]
    assert step >= promised, f"step {promised} was safely on disk, the restart took up step {step}"
    assert not step or restored[0]["digest"] == reference.steps[step], f"the state taken up at step {step} is another one"
    said = [text for line in told for text in line.get("said", ())]
    assert not said, f"the restart says: {said}"
    return step


def _leavings(run: Path, row: Row) -> None:
    "What the kill left on disk."
    names = {path.name for path in (run / "checkpoints").glob("*")} if run.exists() else set()
    files = sorted(name for name in names if name.endswith(".pt"))
    row.met["with a temporary file"] += any(name.startswith(".tmp") for name in names)
    row.met["inside a deletion, or before a description"] += any(n.replace(".pt", ".json") not in names for n in files)
    row.met["before the first checkpoint"] += not files


def _finish(run: Path, promised: int, reference: Reference) -> None:
    "Let a run come to its end, and compare it with the one that was never killed."
    told = reference.nursery.start("kills", "life", run=str(run), subject=reference.subject, keep=2, **LIFE).done()
    _check_restart(told, promised, reference)
    assert told[-1]["end"] == reference.end, "weights, optimizer, random state or history differ at the end"
    reference.same_file(run)
    left = [path.name for path in (run / "checkpoints").glob(".tmp-*")]
    assert not left, f"temporary files are left: {left}"
    faults = [e.id for e in Checkpoints(run / "checkpoints") if digest_of(e) != reference.steps[e.step]]
    assert not faults, f"checkpoints {faults} hold another state"


def digest_of(entry: Any) -> str:
    "The digest of what a checkpoint holds."
    return digest(read_checkpoint(entry.path)["state"])


def at_random(n: int, folder: Path, nursery: Nursery, seed: int = 0, subjects: tuple[str, ...] = ("supervised", "adversarial"),
              row: Row | None = None) -> Row:  # fmt: skip
    "Kill a run again and again, every other time while a temporary file is seen; restart it until it is finished."
    row = row or Row("kill -9 at a random moment", "every restart resumes from a complete checkpoint; the end equals that of "
                     "the run that was never killed")  # fmt: skip
    rng = random.Random(seed)
    for i, subject in enumerate(subjects):
        reference = Reference(nursery, folder / subject, subject)
        kills, run = 0, 0
        while kills < n // len(subjects) + (i < n % len(subjects)):
            run += 1
            kills += _killed_run(folder / subject / f"run{run}", reference, rng, n // len(subjects) - kills, row)
    return row


def _killed_run(run: Path, reference: Reference, rng: random.Random, most: int, row: Row) -> int:
    "One run to its end through up to eight kills; returns how many there were."
    kills, promised, ended = 0, 0, False
    while kills < max(1, min(8, most)) and not ended:
        with row.attempt(f"{reference.subject}, {run.name}, kill {kills + 1}"):
            child = reference.nursery.start("kills", "life", run=str(run), subject=reference.subject, keep=2, **LIFE)
            time.sleep(rng.uniform(0, reference.seconds / 2))
            if row.tries % 2:
                _wait_for_writing(run, reference.seconds)
            if ended := not child.kill():
                row.tries -= 1  # it was over before
                child.done()
                break
            kills += 1
            _leavings(run, row)
            told = child.told()
            promised = max(_check_restart(told, promised, reference), _promised(told))
    with row.attempt(f"{reference.subject}, {run.name}, the end after {kills} kills"):
        row.tries -= 1  # it is the kills that are counted
        _finish(run, promised, reference)
    shutil.rmtree(run)
    return kills


def _wait_for_writing(run: Path, seconds: float) -> None:
    "Until a temporary file is seen, or for so long."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(name.startswith(".tmp") for name in (os.listdir(run / "checkpoints") if (run / "checkpoints").exists() else ())):
            return


def at_operations(n: int | None, folder: Path, nursery: Nursery, subject: str = "supervised") -> Row:
    "Kill a run right before each (or `n` of all) of the operations that change the disk; in a write, after its half."
    row = Row("kill -9 before each operation on the disk (in a write: after half of it)", "as above")
    reference = Reference(nursery, folder, subject)
    every = range(1, reference.operations + 1)
    for k in every if n is None else [every[i * len(every) // n] for i in range(n)]:
        run = folder / f"at{k}"
        with row.attempt(f"{subject}, operation {k}"):
            child = nursery.start("kills", "life", run=str(run), subject=subject, die_at=k, keep=2, **LIFE)
            if child.wait() == -signal.SIGKILL:
                _leavings(run, row)
                _finish(run, _promised(child.told()), reference)
            else:  # two threads don't take turns in the same way each time
                child.done()
                row.tries -= 1
        shutil.rmtree(run, ignore_errors=True)
    return row
