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
from trainkit.learner import Learner
from trainkit.state import RestoreError

from .row import Row
from .subjects import digest, saved_digests, supervised

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
        "The step that was restored, or None and the error; and what was said. The state is that step's, or unchanged."
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
    entry = store.load(step)[1]
    content = torch.load(entry.path, weights_only=True)
    meta = json.loads(content["meta"])
    meta["info"]["score"], meta["info"]["mode"] = score, "min"
    torch.save(content | {"meta": json.dumps(meta)}, entry.path)
    entry.path.with_suffix(".json").unlink()
    assert store.find(step).score == score, "the description wasn't made anew from the checkpoint"


def shows_lists(store: Checkpoints) -> None:
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


def flip(bit: int) -> Callable[[Path], None]:
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
        yield f"bit {bit % 8} of byte {bit // 8} flipped", flip(bit)


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
            shows_lists(Checkpoints(folder))
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


OTHERS = (None, "x", -1, 2**70, float("nan"), [], {}, [[1]], {"a": 1}, torch.zeros(3), torch.ones(2, dtype=torch.bool))


def leaves(x: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    "The ways to everything in a nest, the nests included."
    for key, value in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield (*way, key)
        yield from leaves(value, (*way, key))


def _put(way: tuple[Any, ...], value: Any) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        inside = content["state"]
        for key in way[:-1]:
            inside = inside[key]
        inside[way[-1]] = value
        torch.save(content, path)

    return act


def odd_values(scene: Scene, n: int, rng: random.Random) -> Row:
    "Something of another kind anywhere in a state; the file is as somebody wrote it."
    row = Row("something of another kind at some place of the state, checksums right",
              "refused, the message names the file, memory untouched; or taken, and the next restore works")  # fmt: skip
    ways = [*leaves(torch.load(scene.whole / "checkpoints" / NEWEST, weights_only=True)["state"])]
    for _ in range(n):
        way, value, before = rng.choice(ways), rng.choice(OTHERS), len(row.failures)
        with row.attempt(f"{'/'.join(map(str, way))} is {value!r}"):
            folder = scene.set()
            _put(way, value)(folder / NEWEST)
            here = digest(scene.learn.state_dict())
            try:
                scene.learn.restore(str(STEPS[-1]))
            except (CheckpointError, RestoreError) as error:
                assert digest(scene.learn.state_dict()) == here, f"refused, and the memory has changed: {error}"
                assert NEWEST in str(error), f"the message doesn't name the file: {error}"
                row.met["refused"] += 1
            else:
                row.met["taken"] += 1
            found = scene.try_restore(str(STEPS[0]))
            assert found[0] == STEPS[0], f"after it, a sound checkpoint isn't restored: {found[1]}"
        if len(row.failures) > before:
            scene.learn = scene.newcomer()
    return row


def of_one_file(scene: Scene, rng: random.Random, n: int | None = None) -> Iterator[Row]:
    "The newest checkpoint damaged in every way, with 500 flipped bits; or in about `n` ways."
    cuts, holes, odd = [*truncations(scene)], [*zeroed(scene)], [*odd_files(scene)]
    if n is not None:
        cuts, holes, odd = (rng.sample(some, min(len(some), n // 6)) for some in (cuts, holes, odd))
    yield one_damaged(scene, cuts, "truncation at every boundary of the parts, and a byte beside it")
    yield one_damaged(scene, [*flips(scene, 500 if n is None else n // 3, rng)], "a single bit flipped")
    yield one_damaged(scene, holes, "a block of 512 bytes zeroed")
    yield one_damaged(scene, odd, "something else in the checkpoint's place, or a state that lacks a part")
    yield odd_values(scene, 300 if n is None else n // 4, rng)
