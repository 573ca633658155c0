"Files that are not what was written: cut off, bits flipped, missing, exchanged, edited."

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trainkit.checkpoint import CheckpointError, Checkpoints
from trainkit.history import History
from trainkit.learner import Learner
from trainkit.state import RestoreError

from .row import Row
from .subjects import adversarial, digest, saved_digests, supervised

STEPS = (6, 12, 18)  # what lies there
NEWEST, MIDDLE, OLDEST = (f"ckpt-{step:09d}.pt" for step in reversed(STEPS))
WHICH = {"last": 18, "best": 12}  # by their scores


class Scene:
    "A run with three checkpoints, to be damaged again and again, and a learner in memory that must not notice."

    def __init__(self, folder: Path):
        self.folder, self.whole = folder, folder / "whole"
        learn = supervised(self.whole, save_every="epoch")
        learn.fit(epochs=len(STEPS))
        for step, score in zip(STEPS, (3.0, 1.0, 2.0)):  # so that best, last and first are three
            _rescore(learn.checkpoints, step, score)
        self.states = saved_digests(learn)
        self.run = folder / "run"
        self.learn = self.newcomer()
        self.size = (self.whole / "checkpoints" / NEWEST).stat().st_size

    def newcomer(self) -> Learner:
        "A learner that has trained a little by itself, before it looks at the run."
        shutil.rmtree(self.run, ignore_errors=True)
        learn = supervised(self.run, save_every="none")
        learn.fit(epochs=1)
        return learn

    def set(self) -> Path:
        "The whole run again; returns the folder of its checkpoints."
        self.learn.checkpoints.wait()
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.whole, self.run)
        return self.run / "checkpoints"

    def try_restore(self, which: Any) -> tuple[int | None, str, list[str]]:
        "The step that was restored, or None and the error; and what was said. The state must be that step's, or unchanged."
        before = digest(self.learn.state_dict())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                entry = self.learn.restore(which)
            except (CheckpointError, RestoreError) as error:
                assert digest(self.learn.state_dict()) == before, f"refused, and the memory has changed: {error}"
                return None, str(error), [str(w.message) for w in said]
        assert digest(self.learn.state_dict()) == self.states[entry.step], f"{entry} was taken, and its state is another one"
        return entry.step, "", [str(w.message) for w in said]


def _rescore(store: Checkpoints, step: int, score: float) -> None:
    "Write a checkpoint again as it would have been with another score."
    state, entry = store.load(step)
    content = torch.load(entry.path, weights_only=True)
    meta = json.loads(content["meta"])
    meta["info"]["score"], meta["info"]["mode"] = score, "min"
    torch.save(content | {"meta": json.dumps(meta)}, entry.path)
    entry.path.with_suffix(".json").unlink()
    assert store.find(step).score == score, "the description wasn't made anew from the checkpoint"


def _lists(store: Checkpoints) -> None:
    "A list is shown whatever lies there."
    assert repr(store) and store._repr_html_()


# ------------------------------------------------------------------------------------------- one checkpoint is damaged


def boundaries(path: Path) -> list[int]:
    "Where the parts of a checkpoint file begin and end: headers, data, directory."
    found = {0, path.stat().st_size}
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            end = record.header_offset + 30 + len(record.filename) + record.compress_size
            found |= {record.header_offset, end - record.compress_size, end}
        found |= {archive.start_dir}
    return sorted(found)


def _cut(at: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, at)


def _rewritten(change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)

    return act


def _flip(bit: int) -> Callable[[Path], None]:
    return _rewritten(lambda data: data.__setitem__(bit // 8, data[bit // 8] ^ (1 << bit % 8)))


def _zero(start: int, n: int = 512) -> Callable[[Path], None]:
    return _rewritten(lambda data: data.__setitem__(slice(start, start + n), bytes(len(data[start : start + n]))))


def _holed(scene: Scene, name: str) -> Callable[[Path], None]:
    "Without a key of its state, checksums and all."

    def act(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        *way, last = name.split("/")
        inside = content["state"]
        for key in way:
            inside = inside[key]
        del inside[last]
        torch.save(content, path)

    return act


def _state_is(state: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(torch.load(path, weights_only=True) | {"state": state}, path)


def truncations(scene: Scene) -> Iterator[tuple[str, Callable[[Path], None]]]:
    "At every boundary of its parts, and one byte to each side."
    size = scene.size
    for at in sorted({at + d for at in boundaries(scene.whole / "checkpoints" / NEWEST) for d in (-1, 0, 1)}):
        if 0 <= at < size:
            yield f"cut off at byte {at} of {size}", _cut(at)


def flips(scene: Scene, n: int, rng: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    "Single bits."
    for bit in rng.sample(range(8 * scene.size), n):
        yield f"bit {bit % 8} of byte {bit // 8} flipped", _flip(bit)


def zeroed(scene: Scene) -> Iterator[tuple[str, Callable[[Path], None]]]:
    "Blocks that a failing disk gave back empty."
    for start in range(0, scene.size, 512):
        yield f"512 bytes from {start} zeroed", _zero(start)


def odd_files(scene: Scene) -> Iterator[tuple[str, Callable[[Path], None]]]:
    "What may stand under a checkpoint's name, and states that lack something."
    yield "a folder in its place", lambda path: (path.unlink(), path.mkdir())
    yield "a link to nothing", lambda path: (path.unlink(), path.symlink_to("nowhere"))
    yield "a text", lambda path: path.write_text("hello")
    yield "a byte at its end", lambda path: path.write_bytes(path.read_bytes() + b"x")
    yield "a byte at its start", lambda path: path.write_bytes(b"x" + path.read_bytes())
    yield "twice itself", lambda path: path.write_bytes(2 * path.read_bytes())
    yield "a later format", lambda path: torch.save(torch.load(path, weights_only=True) | {"format": 99}, path)
    yield "weights only", lambda path: torch.save({"weight": torch.ones(2)}, path)
    for what in ({}, [], None, "state", 3):
        yield f"a state that is {what!r}", _state_is(what)
    state = torch.load(scene.whole / "checkpoints" / NEWEST, weights_only=True)["state"]
    player = [f"players/model/{key}" for key in state["players"]["model"]]
    for name in [key for key in state if key != "versions"] + player:
        yield f"a state without {name}", _holed(scene, name)


def one_damaged(scene: Scene, cases: list[tuple[str, Callable[[Path], None]]], fault: str) -> Row:
    "The newest checkpoint is damaged: by its id it is refused, and 'last' is the one before."
    row = Row(fault, "noticed (or no byte that counts); the message names the file; memory untouched; 'last' is the one before")
    for what, damage in cases:
        with row.attempt(what):
            folder = scene.set()
            damage(folder / NEWEST)
            _lists(Checkpoints(folder))
            step, error, _ = scene.try_restore(str(STEPS[-1]))
            assert step or NEWEST in error, f"the message doesn't name the file: {error}"
            row.met["refused" if step is None else "bytes that nothing depends on"] += 1
            last, error, said = scene.try_restore("last")
            if step is None:
                assert any(NEWEST in text for text in [error, *said]), f"nobody says that {NEWEST} was passed over: {said}"
                assert last == STEPS[-2] or (last is None and "doesn't fit" in error), f"last is {last}: {error}"
            else:
                assert last == STEPS[-1], f"{NEWEST} can be restored by its id, and last is {last}"
    return row


# ------------------------------------------------------------------------------------------- several files are involved


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
    "newest missing, its description is there": (lambda f: (f / NEWEST).unlink(), NEWEST),
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
    "seq -5": {"seq": -5}, "seq 0": {"seq": 0}, "seq infinite": {"seq": 1e400}, "seq none": {"seq": None}, "seq text": {"seq": "x"},
    "seq list": {"seq": [1]}, "seq nan": {"seq": float("nan")}, "time text": {"time": "x"}, "time huge": {"time": 1e300},
    "time none": {"time": None}, "time -1": {"time": -1}, "info list": {"info": []}, "info none": {"info": None},
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
        yield f"description: bit {bit % 8} of byte {bit // 8} flipped", lambda f, bit=bit: _flip(bit)(f / side), side


def several(scene: Scene, cases: list[tuple[str, Callable[[Path], Any], str]], fault: str) -> Row:
    "After it, 'last' and 'best' are what they were, or something names the file; and training goes on."
    row = Row(fault, "the right checkpoint is taken, or the message names the file; memory untouched; training goes on")
    for what, damage, name in cases:
        with row.attempt(what):
            scene.learn = scene.newcomer()
            damage(folder := scene.set())
            taken = {which: scene.try_restore(which) for which in ("last", "best")}
            _lists(Checkpoints(folder))
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


# ---------------------------------------------------------------------------------------------------------------- rows


def rows(folder: Path, n: int | None = None, seed: int = 0) -> list[Row]:
    "Everything, with about 500 flips, or about `n` tries in all."
    scene, rng = Scene(folder), random.Random(seed)
    cuts, odd = [*truncations(scene)], [*odd_files(scene)]
    holes = [*zeroed(scene)]
    files = [(what, act, name) for what, (act, name) in FILES.items()]
    edits = [*edited(scene, 100 if n is None else 5, rng)]
    if n is not None:
        cuts, holes, odd = (rng.sample(some, min(len(some), n // 6)) for some in (cuts, holes, odd))
    bits = [*flips(scene, 500 if n is None else n // 3, rng)]
    return [
        one_damaged(scene, cuts, "truncation at every boundary of the parts, and a byte beside it"),
        one_damaged(scene, bits, "a single bit flipped"),
        one_damaged(scene, holes, "a block of 512 bytes zeroed"),
        one_damaged(scene, odd, "something else in the checkpoint's place, or a state that lacks a part"),
        several(scene, files, "files missing, exchanged, of another run; a damaged history"),
        several(scene, edits, "edited and damaged JSON"),
    ]
