"Files of a run that are missing, exchanged, of another run, or edited: several are involved."

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainkit.checkpoint import Checkpoints
from trainkit.history import History
from trainkit.learner import Learner

from .damage import NEWEST, OLDEST, STEPS, WHICH, Scene, flip, shows_lists
from .row import Row
from .subjects import adversarial, supervised


def _exchange(folder: Path, a: str, b: str) -> None:
    os.rename(folder / a, folder / "x")
    os.rename(folder / b, folder / a)
    os.rename(folder / "x", folder / b)


def _side(name: str) -> str:
    return name.replace(".pt", ".json")


def _from_elsewhere(make: Callable[..., Learner], **kw: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        other = make(folder.parent.with_name("other"), save_every="epoch", **kw)
        other.fit(epochs=len(STEPS))
        for name in (NEWEST, _side(NEWEST)):
            shutil.copy(other.run / "checkpoints" / name, folder / name)
        shutil.rmtree(other.run)

    return act


def _append_history(line: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        with open(folder.parent / "history.jsonl", "a") as file:
            file.write(line + "\n")

    return act


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {  # what happens, and the file that must be named; "": none need be
    "newest missing, its description is there": (lambda f: (f / NEWEST).unlink(), _side(NEWEST)),
    "newest missing, and its description": (lambda f: [(f / name).unlink() for name in (NEWEST, _side(NEWEST))], ""),
    "all descriptions missing": (lambda f: [path.unlink() for path in f.glob("*.json")], ""),
    "owner and lock missing": (lambda f: [(f / name).unlink(missing_ok=True) for name in ("owner.json", "lock")], ""),
    "history missing": (lambda f: (f.parent / "history.jsonl").unlink(), ""),
    "two checkpoints exchanged": (lambda f: _exchange(f, NEWEST, OLDEST), NEWEST),
    "two descriptions exchanged": (lambda f: _exchange(f, _side(NEWEST), _side(OLDEST)), _side(NEWEST)),
    "two checkpoints exchanged, and their descriptions": (
        lambda f: [_exchange(f, NEWEST, OLDEST), _exchange(f, _side(NEWEST), _side(OLDEST))], OLDEST),
    "newest is a copy of the oldest": (lambda f: shutil.copy(f / OLDEST, f / NEWEST), NEWEST),
    "a checkpoint under a later step's name": (lambda f: shutil.copy(f / OLDEST, f / "ckpt-000000024.pt"), ""),
    "newest is of another run": (_from_elsewhere(supervised, seed=5), NEWEST),
    "newest is of another run with another model": (_from_elsewhere(supervised, ballast=7), NEWEST),
    "newest is of a GAN": (_from_elsewhere(adversarial), NEWEST),
    "a history of text": (lambda f: (f.parent / "history.jsonl").write_text("hello\n" * 9), ""),
    "a history of another run": (lambda f: (f.parent / "history.jsonl").write_text('{"step": 3, "values": {"x": 1}}\n'), ""),
    "a history cut off inside a line": (lambda f: os.truncate(f.parent / "history.jsonl", 333), ""),
    "a history with a step of 31 digits": (_append_history('{"step": 1%s, "values": {"train/loss": 1}}' % ("0" * 30)), ""),
    "a history with a line nested 100,000 deep": (_append_history("[" * 100_000), ""),
    "a history with a mark at no step": (_append_history('{"mark": {"kind": "epoch", "step": "x"}}'), ""),
    "a history with a rewind to nowhere": (_append_history('{"rewind": "x"}'), ""),
    "a folder in the history's place": (
        lambda f: ((f.parent / "history.jsonl").unlink(), (f.parent / "history.jsonl").mkdir()), ""),
}  # fmt: skip


EDITS: dict[str, Any] = {  # in the newest's description
    "seq -5": {"seq": -5}, "seq 0": {"seq": 0}, "seq infinite": {"seq": 1e400}, "seq none": {"seq": None},
    "seq text": {"seq": "x"}, "seq list": {"seq": [1]}, "seq nan": {"seq": float("nan")}, "time text": {"time": "x"},
    "time huge": {"time": 1e300}, "time none": {"time": None},
    "time -1": {"time": -1}, "info list": {"info": []}, "info none": {"info": None},
    "score text": {"info": {"score": "high"}}, "score list": {"info": {"score": [1]}}, "best score": {"info": {"score": -1e9}},
    "mode turned": {"info": {"score": 2.0, "mode": "max"}}, "mode number": {"info": {"score": 2.0, "mode": 3}},
    "pinned text": {"info": {"pinned": "no"}}, "note list": {"info": {"note": [[]]}}, "epoch dict": {"info": {"epoch": {}}},
    "note that is HTML": {"info": {"note": "<script>alert(1)</script>"}}, "thumbnail not base64": {"thumbnail": "@@"},
    "thumbnail number": {"thumbnail": 5}, "an unknown key": {"more": 1},
}  # fmt: skip
TEXTS = {"empty": "", "torn": '{"seq": 2, "ti', "a list": "[]", "a number": "5", "null": "null", "no UTF-8": "\udcff\udcfe",
         "nested 100,000 deep": "[" * 100_000, "a very long number": "1" * 10_000}  # fmt: skip


def _edit(**changes: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        side = folder / _side(NEWEST)
        side.write_text(json.dumps(json.loads(side.read_text()) | changes))

    return act


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text.encode(errors="surrogateescape"))


def edited(scene: Scene, flips: int, rng: random.Random) -> Iterator[tuple[str, Callable[[Path], Any], str]]:
    "Descriptions and the owner's file by hand, and with flipped bits."
    side = _side(NEWEST)
    for what, changes in EDITS.items():
        yield f"description: {what}", _edit(**changes), side
    for what, text in TEXTS.items():
        yield f"description: {what}", _write(side, text), side
        yield f"owner: {what}", _write("owner.json", text), "owner.json"
    for what in ('{"token": 5}', '{"token": "x", "time": "y"}', '{"token": "x", "time": 1e300}', '["ab"]'):
        yield f"owner: {what}", _write("owner.json", what), "owner.json"
    size = (scene.whole / "checkpoints" / side).stat().st_size
    for bit in rng.sample(range(8 * size), flips):
        yield f"description: bit {bit % 8} of byte {bit // 8} flipped", lambda f, bit=bit: flip(bit)(f / side), side


def several(scene: Scene, cases: list[tuple[str, Callable[[Path], Any], str]], fault: str) -> Row:
    "After it, 'last' and 'best' are what they were, or something names the file; and training goes on."
    row = Row(fault, "the right checkpoint is taken, or the message names the file; memory untouched; training goes on")
    for what, damage, name in cases:
        with row.attempt(what):
            scene.learn = scene.newcomer()
            damage(folder := scene.set())
            taken = {which: scene.try_restore(which) for which in ("last", "best")}
            shows_lists(Checkpoints(folder))
            texts = [text for _, error, said in taken.values() for text in (error, *said) if text]
            wrong = [f"{which} is step {taken[which][0]}" for which, right in WHICH.items() if taken[which][0] != right]
            named = bool(name) and any(name in text for text in texts)
            falsified = name.endswith(".pt")
            assert named or not falsified, f"{name} isn't what it says, and nobody says so; {wrong}"
            assert named or not wrong or not name, f"{', '.join(wrong)}, and nobody names {name}: {texts}"
            row.met["said" if named else "another one taken" if wrong else "of no effect"] += 1
            _goes_on(scene)
    return row


def _goes_on(scene: Scene) -> None:
    "The learner takes a checkpoint up and trains in the damaged folder; nothing that could be read before is lost by it."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        readable = [entry.step for entry in scene.learn.checkpoints if scene.try_restore(entry)[0] is not None]
        step = scene.try_restore("last")[0]
        assert step or not readable, f"last can't be restored, and {readable} can"
        if step is None:
            return
        scene.learn.fit(epochs=1, schedule="hold")
        scene.learn.save()
        path, held = scene.run / "history.jsonl", scene.learn.history.scalars
        found = History.read(path).scalars if path.is_file() else held
        assert {n: v.tolist() for n, (_, v) in found.items()} == {n: v.tolist() for n, (_, v) in held.items()}, "another history"
        lost = [old for old in readable if scene.try_restore(str(old))[0] is None]
        assert not lost, f"after some training, {lost} can't be restored any more"


def of_several_files(scene: Scene, rng: random.Random, n: int | None = None) -> Iterator[Row]:
    "Everything, or about `n` cases."
    files = [(what, act, name) for what, (act, name) in FILES.items()]
    edits = [*edited(scene, 100 if n is None else 5, rng)]
    if n is not None:
        files, edits = (rng.sample(some, min(len(some), n // 4)) for some in (files, edits))
    yield several(scene, files, "files missing, exchanged, of another run; a damaged history")
    yield several(scene, edits, "edited and damaged JSON")
