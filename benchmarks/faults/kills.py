"SIGKILL, at random moments and at each operation that changes the disk; saves in the background, deletions included."

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

from trainkit.checkpoint import Checkpoints, read_checkpoint
from trainkit.history import History
from trainkit.storage import fault_of

from .nursery import Nursery
from .row import Row
from .subjects import SUBJECTS, digest, saved_digests

BALLAST = 100_000  # numbers that only make the file larger, so that a good part of a life is spent in writing
LIFE = {"ballast": BALLAST, "save_every": 1}


class Reference:
    "The run that is never killed: what every checkpoint holds, how it ends, how long it takes."

    def __init__(self, nursery: Nursery, folder: Path, subject: str):
        self.nursery, self.folder, self.subject = nursery, folder, subject
        run = folder / "straight"
        begin = time.monotonic()
        told = nursery.start("life", "life", run=str(run), subject=subject, count=True, **LIFE).done()
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
    told = reference.nursery.start("life", "life", run=str(run), subject=reference.subject, keep=2, **LIFE).done()
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


def at_random(n: int, folder: Path, nursery: Nursery, seed: int = 0) -> Row:
    "Kill a run again and again, every other time while a temporary file is seen; restart it until it is finished."
    row = Row("kill -9 at a random moment", "every restart resumes from a complete checkpoint; the end equals that of "
                     "the run that was never killed")  # fmt: skip
    rng = random.Random(seed)
    for subject in SUBJECTS:
        reference = Reference(nursery, folder / subject, subject)
        kills, run, wanted = 0, 0, n // len(SUBJECTS)
        while kills < wanted:
            run += 1
            kills += _killed_run(folder / subject / f"run{run}", reference, rng, wanted - kills, row)
    return row


def _killed_run(run: Path, reference: Reference, rng: random.Random, most: int, row: Row) -> int:
    "One run to its end through up to eight kills; returns how many there were."
    kills, promised, ended = 0, 0, False
    while kills < min(8, most) and not ended:
        with row.attempt(f"{reference.subject}, {run.name}, kill {kills + 1}"):
            child = reference.nursery.start("life", "life", run=str(run), subject=reference.subject, keep=2, **LIFE)
            time.sleep(rng.uniform(0, reference.seconds / 2))
            if row.tries % 2:
                wait_for_name(run, ".tmp", reference.seconds)
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


def in_place(n: int, folder: Path, nursery: Nursery, enough: int | None = None) -> Row:
    "The control: kill a run whose files are written under their final names, `n` times, or until `enough` kills met a write."
    row = Row("the same, if files were written in place", "kills leave files that can't be read: the kills are well aimed",
              control=True)  # fmt: skip
    reference, rng, run = Reference(nursery, folder, "supervised"), random.Random(0), folder / "run"
    while row.tries < n and (enough is None or row.met.total() < enough):
        child = nursery.start("life", "life", run=str(run), subject="supervised", keep=2, in_place=True, **LIFE)
        time.sleep(rng.uniform(0, reference.seconds / 2))
        if child.kill():
            row.tries += 1
            row.met["left a file that can't be read"] += any(map(fault_of, (run / "checkpoints").glob("ckpt-*.pt")))
        shutil.rmtree(run, ignore_errors=True)
    if not row.met.total():
        row.failures.append("no kill met a write")
    return row


def wait_for_name(run: Path, part: str, seconds: float) -> None:
    "Until something with this in its name is seen among the checkpoints, or for so long: it is being written."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(part in name for name in (os.listdir(run / "checkpoints") if (run / "checkpoints").exists() else ())):
            return


def at_operations(n: int | None, folder: Path, nursery: Nursery, subject: str = "supervised") -> Row:
    "Kill a run right before each (or `n` of all) of the operations that change the disk; in a write, after its half."
    row = Row("kill -9 before each operation on the disk (in a write: after half of it)", "as above")
    reference = Reference(nursery, folder, subject)
    every = range(1, reference.operations + 1)
    for k in every if n is None else [every[i * len(every) // n] for i in range(n)]:
        run = folder / f"at{k}"
        with row.attempt(f"{subject}, operation {k}"):
            child = nursery.start("life", "life", run=str(run), subject=subject, die_at=k, keep=2, **LIFE)
            if child.wait() == -signal.SIGKILL:
                _leavings(run, row)
                _finish(run, _promised(child.told()), reference)
            else:  # two threads don't take turns in the same way each time
                child.done()
                row.tries -= 1
        shutil.rmtree(run, ignore_errors=True)
    return row
