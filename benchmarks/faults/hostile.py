"Hostile files, and files mutated at random, are looked at in every way there is, by a process that is watched."

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainkit.checkpoint import CheckpointError, Checkpoints, read_checkpoint, read_entry
from trainkit.travel import read_weights

from .nursery import Nursery
from .payloads import NAMES, cases, zipped
from .row import Row
from .subjects import digest, supervised

NAME = "ckpt-000000024.pt"  # of the hostile file; it lies beside honest ones
GROWTH = 100  # MB that looking at a hostile file may cost, and twice its size
SECONDS = 60  # of computing, or three times as many of waiting, after which a process counts as hanging


# ------------------------------------------------------------------------------------------------------- in the child


def _memory() -> dict[str, int]:
    "Largest sizes so far, in MB: what was asked for, what was used."
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {key: int(lines[key].split()[0]) // 1024 for key in ("VmPeak", "VmHWM")}


def _guarded() -> None:
    "A process that takes too much or too long is ended by the kernel, so that the machine lives."
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * 2**30, resource.RLIM_INFINITY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)


def make(tell: Callable[..., None], folder: str, case: str) -> None:
    "A run with a hostile file in it; made by another process than the one whose memory is looked at."
    supervised(Path(folder) / "run", save_every="epoch").fit(epochs=1)
    cases()[case](Path(folder) / "run" / "checkpoints" / NAME, Path(folder) / "canary")
    (Path(folder) / "canary").unlink(missing_ok=True)


def look(tell: Callable[..., None], folder: str) -> None:
    "Everything that one may do with a hostile file that somebody sent."
    store, canary = Path(folder) / "run" / "checkpoints", Path(folder) / "canary"
    os.chdir(folder)
    path = store / NAME
    found = next((p for p in store.glob("ckpt-*24*.pt")), path)
    learn = supervised(Path(folder) / "run")
    before, size = digest(learn.state_dict()), min(found.stat().st_size if found.is_file() else 0, 2**28)
    start = _memory()
    _guarded()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answers = {name: _answer(act) for name, act in _ways(learn, store, found).items()}
    grown = {key: value - start[key] for key, value in _memory().items()}
    signal.setitimer(signal.ITIMER_PROF, 0)
    tell(answers=answers, same=digest(learn.state_dict()) == before, grown=grown, size=size >> 20, canary=canary.exists(),
         shown=_shown(store))  # fmt: skip


def _ways(learn: Any, store: Path, path: Path) -> dict[str, Callable[[], Any]]:
    foreign = store / "weights.pt"
    with contextlib.suppress(OSError):
        os.link(path, foreign)
    return {
        "list": lambda: (repr(Checkpoints(store)), Checkpoints(store)._repr_html_()),
        "entry": lambda: read_entry(path) if path.is_file() else None,
        "read": lambda: read_checkpoint(path),
        "weights": lambda: read_weights(foreign if foreign.exists() else path),
        "restore": lambda: learn.restore(path),
        "look": lambda: learn.at(path).__enter__(),
    }


def _answer(act: Callable[[], Any]) -> str:
    try:
        act()
    except CheckpointError as error:
        return f"refused: {str(error)[-300:]}"
    except ValueError as error:  # among them RestoreError
        return f"refused: {str(error)[-300:]}"
    except RecursionError:
        return "RecursionError"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "taken"


def _shown(store: Path) -> list[str]:
    "What a list lets through of what is meant for a terminal or a browser."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shelf = Checkpoints(store)
        return ["an escape sequence"] * ("\x1b" in repr(shelf)) + ["a script"] * ("<script" in shelf._repr_html_())


def unsafe(tell: Callable[..., None], folder: str, case: str) -> None:
    "The control: would the code have run, if it had been unpickled?"
    path, canary = Path(folder) / "x.pt", Path(folder) / "canary"
    Path(folder).mkdir(parents=True)
    cases()[case](path, canary)
    for handle in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), handle)
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    tell(ran=canary.exists())


def mutated(tell: Callable[..., None], folder: str, first: int, last: int) -> None:
    "Checkpoints whose pickled part has a few bytes changed at random, with checksums that are right."
    store = Path(folder) / "run" / "checkpoints"
    supervised(Path(folder) / "run", save_every="epoch").fit(epochs=1)
    learn, path = supervised(Path(folder) / "run"), store / "ckpt-000000006.pt"
    with zipfile.ZipFile(path) as file:
        records = [(name, file.read(name)) for name in file.namelist()]
    before, start = digest(learn.state_dict()), _memory()
    for seed in range(first, last):
        _guarded()
        tell(began=seed)
        rng = random.Random(seed)
        zipped(path, [(name, _mutant(data, rng) if name.endswith("data.pkl") else data) for name, data in records])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = _answer(partial(learn.restore, path))
        grown = max(value - start[key] for key, value in _memory().items())
        if answer == "taken":  # nothing that counts was hit, or a number was
            learn = supervised(Path(folder) / "run")
        tell(seed=seed, answer=answer, same=digest(learn.state_dict()) == before, grown=grown)


def _mutant(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(out))
        how = rng.randrange(4)
        if how == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            out[at] = rng.choice(b"(.0123]}tQR\x85\x86\x87\x93\x81bcihjqrXK\x8aJM\x8dus")
        elif how == 2:
            out[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 5)))
        else:
            del out[at : at + rng.randrange(1, 9)]
    return bytes(out)


# ------------------------------------------------------------------------------------------------------ in the parent


HARMLESS = ("meta: ", "archive: a description of 3 GB", "archive: an owner of 3 GB")  # need only be listed without harm


def _judge(case: str, told: dict[str, Any], row: Row) -> None:
    assert not told["canary"], "its code was run"
    grown = max(told["grown"].values())
    assert grown <= GROWTH + 2 * told["size"], f"the memory grew by {grown} MB, the file has {told['size']} MB"
    wrong = {way: answer for way, answer in told["answers"].items() if not answer.startswith(("refused", "taken"))}
    assert not wrong, f"not refused in an orderly way: {wrong}"
    assert told["answers"]["list"] == "taken", f"a list can't be shown: {told['answers']['list']}"
    assert told["answers"]["entry"] == "taken", f"an entry can't be read: {told['answers']['entry']}"
    assert not told["shown"], f"a list shows {told['shown']}"
    assert case.startswith(HARMLESS) or told["answers"]["restore"].startswith("refused"), "it was restored"
    assert told["same"] or told["answers"]["restore"] == "taken", "refused, and the memory has changed"
    row.met["refused" if told["answers"]["restore"].startswith("refused") else "harmless"] += 1


def rows(folder: Path, nursery: Nursery, every: int = 1, mutants: int = 500) -> Iterator[Row]:
    "Each case (or each `every`-th), and so many mutants."
    row = Row("hostile pickles and archives: code, paths, gigantic sizes, depths, lies",
              f"refused without running code, growing by {GROWTH} MB or hanging; lists are shown; memory untouched")  # fmt: skip
    control = Row("the same code, unpickled by torch.load(weights_only=False)", "it runs: the payloads are real",
                  control=True)  # fmt: skip
    for case in [*cases()][::every]:
        with row.attempt(case):
            try:
                nursery.start("hostile", "make", folder=str(folder / "a"), case=case).done()
                _judge(case, nursery.start("hostile", "look", folder=str(folder / "a")).done(3 * SECONDS)[-1], row)
            finally:
                shutil.rmtree(folder / "a", ignore_errors=True)
        if case.removeprefix("code: ") in NAMES:
            control.tries += 1
            told = nursery.start("hostile", "unsafe", folder=str(folder / "b"), case=case).done()
            control.met["ran"] += told[-1]["ran"]
            shutil.rmtree(folder / "b")
    if not control.met["ran"] == control.tries > 0:
        control.failures.append(f"only {control.met['ran']} of {control.tries} run")
    yield row
    yield control
    yield _fuzz(folder, nursery, mutants)


def _fuzz(folder: Path, nursery: Nursery, n: int) -> Row:
    row = Row("the pickled part mutated at random, checksums right", "refused, or taken without harm; no crash, no other error")
    seed = 0
    while seed < n:
        child = nursery.start("hostile", "mutated", folder=str(folder / "m"), first=seed, last=n)
        with contextlib.suppress(TimeoutError):
            child.wait(3 * SECONDS + n)
        told = child.told()
        for line in (line for line in told if "seed" in line):
            with row.attempt(f"mutant {line['seed']}"):
                answer = line["answer"]
                row.met["refused" if answer.startswith("refused") else "taken"] += 1
                assert answer == "taken" or answer.startswith("refused"), answer
                assert line["same"], "the memory has changed"
                assert line["grown"] <= GROWTH, f"the memory grew by {line['grown']} MB"
        began = max((line["began"] for line in told if "began" in line), default=seed)
        if child.status != 0:
            with row.attempt(f"mutant {began}"):
                raise AssertionError(f"the process ended with {child.status}: {str(told[-1:])[-300:]}")
        seed = began + 1
        shutil.rmtree(folder / "m", ignore_errors=True)
    return row
