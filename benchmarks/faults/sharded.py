"Checkpoints in parts, written by two ranks: one of them is killed; parts are damaged, exchanged, missing."

from __future__ import annotations

import os
import pickle
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trainkit.checkpoint import read_checkpoint
from trainkit.converter import PARTS
from trainkit.storage import sums_of

from .damage import flip
from .kills import _check_restart, _promised, wait_for_name
from .nursery import Child, Nursery
from .payloads import codes
from .rank import RANKS, STEPS, digest_of_weights, learner, looked
from .row import Row
from .subjects import digest

KEPT = {"width": 128, "save_every": 1}
NEWEST = f"ckpt-{STEPS[-1]:09d}"
Case = tuple[str, Callable[[Path], Any], str]  # what happens, in the folder of checkpoints, and what must be named; "": nothing


# ------------------------------------------------------------------------------------------------- a rank is killed


def together(nursery: Nursery, job: str, **kw: Any) -> list[Child]:
    "Ranks that know of each other."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [nursery.start("rank", job, rank=rank, port=port, **kw) for rank in range(RANKS)]


def all_done(children: list[Child]) -> list[list[dict[str, Any]]]:
    "What each rank told, once all have ended well."
    try:
        return [child.done(180) for child in children]
    finally:
        for child in children:
            child.kill()


class Reference:
    "The run of two ranks of which none is killed: what each restores at each step, how it ends, how long it takes."

    def __init__(self, nursery: Nursery, folder: Path):
        self.nursery, run = nursery, folder / "straight"
        told = all_done(together(nursery, "life", run=str(run), look_back=True, **KEPT))
        start, end = (line["at"] for line in told[0] if "at" in line)
        self.seconds = end - start
        self.steps = [{line["step"]: line["digest"] for line in theirs if "step" in line} for theirs in told]
        self.end = [next(line["end"] for line in theirs if "end" in line) for theirs in told]
        self.files = {entry.step: content_of(entry.path) for entry in learner(run).checkpoints}
        assert self.files.keys() == self.steps[0].keys(), "not every step was saved"


def content_of(path: Path) -> str:
    "The digest of a checkpoint and its parts, read by one process."
    return digest(read_checkpoint(path)["state"])


def check_lives(told: list[list[dict[str, Any]]], promised: int, reference: Reference) -> int:
    "What two ranks say of the state they took up; returns its step, or what was promised before."
    class Of:
        steps: dict[int, str]

    found = set()
    for theirs, Of.steps in zip(told, reference.steps):
        found.add(_check_restart(theirs, promised, Of))  # type: ignore[arg-type]
    took = {line["restored"] for theirs in told for line in theirs if "restored" in line}
    assert len(took) < 2, f"the ranks took up steps {took}"
    return max(found)


def begun(children: list[Child]) -> None:
    "Until both have taken up what is there, or one has ended."
    end = time.monotonic() + 60
    while not all(any("restored" in line for line in child.told()) for child in children) and time.monotonic() < end:
        time.sleep(0.005)


def at_random(n: int, folder: Path, nursery: Nursery, seed: int = 0) -> Row:
    "Kill one of two ranks again and again, every other time while parts are being written; restart both until they are done."
    row = Row("kill -9 of one of two ranks at a random moment of a run that saves in parts at each step",
              "the other rank ends by itself and says why; both restart from the same complete checkpoint; the end equals that "
              "of the run of which none was killed")  # fmt: skip
    reference, rng = Reference(nursery, folder), random.Random(seed)
    kills = run = 0
    while kills < n:
        run += 1
        kills += killed_run(folder / f"run{run}", reference, rng, n - kills, row)
    return row


def killed_run(run: Path, reference: Reference, rng: random.Random, most: int, row: Row) -> int:
    "One run to its end through up to six kills; returns how many there were."
    kills, promised, ended = 0, 0, False
    while kills < min(6, most) and not ended:
        with row.attempt(f"{run.name}, kill {kills + 1}"):
            children = together(reference.nursery, "life", run=str(run), **KEPT)
            begun(children)
            time.sleep(rng.uniform(0, reference.seconds / 2))
            if row.tries % 2:
                wait_for_name(run, ".new", reference.seconds)
            one = rng.randrange(RANKS)
            if ended := not children[one].kill():
                row.tries -= 1  # it was over before
                all_done(children)
                break
            kills += 1
            met(run, row)
            told = [child.told() for child in children]
            survives(children[1 - one], row)
            promised = max(check_lives(told, promised, reference), _promised(told[0]))
            whole_ones(run, reference, promised)
    with row.attempt(f"{run.name}, the end after {kills} kills"):
        row.tries -= 1  # it is the kills that are counted
        finish(run, promised, reference)
    shutil.rmtree(run, ignore_errors=True)
    return kills


def met(run: Path, row: Row) -> None:
    "What the kill left on disk."
    names = {path.name for path in (run / "checkpoints").glob("*")} if run.exists() else set()
    row.met["with parts that have no name yet"] += any(name.endswith(".parts.new") for name in names)
    row.met["with parts, and no file that speaks of them"] += any(
        name.endswith(".parts") and name.replace(".parts", ".pt") not in names for name in names)  # fmt: skip
    row.met["before the first checkpoint"] += not any(name.endswith(".pt") for name in names)


def survives(other: Child, row: Row) -> None:
    "The other rank ends by itself, saying that one was lost (in our words, or gloo's); or it had come to its end."
    status = other.wait(60)
    failed = (other.told() or [{}])[-1].get("failed", "")
    assert status == 0 or "lost" in failed or "by peer" in failed, f"the other rank ended with {status}: {failed}"
    row.met["after which the other rank had gloo's words only"] += status != 0 and "lost" not in failed
    row.met["at the very end"] += status == 0


def whole_ones(run: Path, reference: Reference, promised: int) -> None:
    "What has its name is complete and right, and what was promised is there, or something later."
    entries = learner(run).checkpoints.list()
    wrong = [entry.step for entry in entries if content_of(entry.path) != reference.files[entry.step]]
    assert not wrong, f"checkpoints {wrong} hold another state"
    assert max((entry.step for entry in entries), default=0) >= promised, f"step {promised} was on disk and is gone"


def finish(run: Path, promised: int, reference: Reference) -> None:
    "Let a run come to its end, and compare it with the one of which no rank was killed."
    told = all_done(together(reference.nursery, "life", run=str(run), **KEPT))
    check_lives(told, promised, reference)
    lines = [next(line for line in theirs if "end" in line) for theirs in told]
    differ = {part for line, end in zip(lines, reference.end) for part in end if line["end"][part] != end[part]}
    if told[0][0]["restored"] == max(reference.files):  # ranks but the first make their random numbers anew at each step
        differ -= {"rng"} if lines[0]["end"]["rng"] == reference.end[0]["rng"] else set()
    assert not differ, f"at the end, {', '.join(sorted(differ))} of the state are other ones"
    assert len({line["alike"] for line in lines}) == 1, "the ranks differ at the end"
    whole_ones(run, reference, max(reference.files))
    names = {path.name for path in (run / "checkpoints").iterdir()}
    orphans = {name for name in names if name.endswith(".parts") and name.replace(".parts", ".pt") not in names}
    left = orphans | {name for name in names if name.startswith(".tmp") or name.endswith(".new")}
    assert not left, f"something is left over: {left}"


# --------------------------------------------------------------------------------------------- parts are damaged


def cases(folder: Path, n: int | None = None, seed: int = 0) -> list[Case]:
    "What can happen to the parts of the newest checkpoint, in order and at random places; or `n` of it."
    rng, parts = random.Random(seed), folder / f"{NEWEST}.parts"
    found = [*of_files(parts, rng), *of_folders(), *hostile(folder.parent / "canary")]
    return found if n is None else rng.sample(found, n)


def on(name: str, act: Callable[[Path], Any]) -> Callable[[Path], None]:
    "Something done to a file of the newest's parts."
    return lambda folder: act(folder / f"{NEWEST}.parts" / name)


def of_files(parts: Path, rng: random.Random) -> Iterator[Case]:
    "Each file cut off, with bits flipped, a byte longer, missing, of an older checkpoint."
    older = f"ckpt-{STEPS[0]:09d}.parts"
    for path in sorted(parts.iterdir()):
        name, size = path.name, path.stat().st_size
        yield f"{name} missing", on(name, Path.unlink), name
        yield f"{name} is a folder", on(name, lambda file: (file.unlink(), file.mkdir())), name
        yield f"{name} a byte longer", on(name, lambda file: file.write_bytes(file.read_bytes() + b"x")), name
        yield f"{name} of an older checkpoint", on(name, lambda f: shutil.copy(f.parents[1] / older / f.name, f)), name
        for at in (0, 1, size - 1, *rng.sample(range(2, size - 1), 5)):
            yield f"{name} cut off at byte {at} of {size}", on(name, lambda file, at=at: os.truncate(file, at)), name
        for bit in rng.sample(range(8 * size), 20):
            yield f"bit {bit % 8} of byte {bit // 8} of {name} flipped", on(name, flip(bit)), name
    first, second = (f"__{rank}_0.distcp" for rank in range(RANKS))
    yield "the parts of two ranks exchanged", on(first, lambda file: swap(file, file.with_name(second))), "distcp"


def swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second), b.write_bytes(first)


def of_folders() -> Iterator[Case]:
    "The folder of parts missing, empty, something else; others beside it."
    name, older = f"{NEWEST}.parts", f"ckpt-{STEPS[0]:09d}.parts"
    yield "no parts", lambda f: shutil.rmtree(f / name), name
    yield "an empty folder of parts", lambda f: (shutil.rmtree(f / name), (f / name).mkdir()), name
    yield "a file in their place", lambda f: (shutil.rmtree(f / name), (f / name).write_text("x")), name
    yield "a link to nothing in their place", lambda f: (shutil.rmtree(f / name), (f / name).symlink_to("nowhere")), name
    yield "the parts of an older checkpoint", lambda f: (shutil.rmtree(f / name), shutil.copytree(f / older, f / name)), name
    yield "parts that have no name yet", lambda f: (f / name).rename(f / f"{name}.new"), name
    yield "parts of nobody beside them", lambda f: shutil.copytree(f / older, f / "ckpt-000000099.parts"), ""
    yield "unfinished parts beside them", lambda f: (f / "ckpt-000000099.parts.new").mkdir(), ""
    yield "a strange file among them", lambda f: (f / name / "more").write_text("x"), ""


def hostile(canary: Path) -> Iterator[Case]:
    "Torch's description of the parts is code; sizes and checksums fit."
    for kind, payload in codes(canary):
        yield f"a description that calls {kind}", described_by(pickle.dumps(payload)), f"{NEWEST}.parts"


def described_by(data: bytes) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        parts, path = folder / f"{NEWEST}.parts", folder / f"{NEWEST}.pt"
        (parts / ".metadata").write_bytes(data)
        content = torch.load(path, weights_only=True)
        content["state"][PARTS]["files"] |= sums_of(parts, [".metadata"])
        torch.save(content, path)

    return act


def damaged(folder: Path, nursery: Nursery, n: int | None) -> Row:
    "Case by case: two ranks restore by step and as the last, and one process does the same."
    row = Row("parts cut off, flipped, missing, exchanged, of another checkpoint, or code; two ranks restore, and one process",
              "refused on all ranks, the message names the part, memory untouched, no code run; 'last' is the one before")
    whole, mine = folder / "whole", list[dict[str, Any]]()
    all_done(together(nursery, "life", run=str(whole), save_every="epoch"))
    ranks = all_done(together(nursery, "look", sound=str(whole), run=str(folder / "run"), n=n))
    alone = learner(folder / "alone", seed=9, save_every="none")
    alone.fit(1)
    looked(lambda **line: mine.append(line), alone, whole, n)
    every = [*ranks, mine]
    right = [{step: found["digest"] for step, found in zip(STEPS, theirs[0]["found"])} for theirs in every]
    kept = {step: digest_of_weights(read_checkpoint(whole / "checkpoints" / f"ckpt-{step:09d}.pt")["state"]) for step in STEPS}
    for (what, _, name), *said in zip(cases(whole / "checkpoints", n), *(theirs[1:] for theirs in every)):
        with row.attempt(what):
            assert {line["what"] for line in said} == {what}
            for line, steps in zip(said, right):
                check_case(*line["found"], name, steps, kept)
            silent = [i for i, line in enumerate(said) if name and i != 1 and name not in " ".join(line["found"][1]["said"])]
            assert not silent, f"nobody says why the newest was passed over: {said}"
            row.met["refused" if name else "of no effect"] += 1
    with row.attempt("no code has run"):
        row.tries -= 1
        assert not (whole / "canary").exists(), "code has run"
    return row


def check_case(newest: dict[str, Any], last: dict[str, Any], name: str, steps: dict[int, str], kept: dict[int, str]) -> None:
    "One rank's restores: by step and of the last."
    if not name:
        assert newest["step"] == last["step"] == STEPS[-1] and newest["digest"] == steps[STEPS[-1]], (newest, last)
        return
    assert newest["step"] is None and newest["same"], f"taken, or the memory has changed: {newest}"
    assert name in newest["error"] and NEWEST in newest["error"], f"the message doesn't name {name}: {newest['error']}"
    assert last["step"] == STEPS[-2], f"last is {last['step']}: {last['error']}"
    assert last["digest"] == steps[STEPS[-2]], "another state was taken"
    assert last["alike"] == kept[STEPS[-2]], "other weights were taken than those on disk"
