"Two learners, or two processes, on one folder; readers beside a writer."

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from trainkit.callback import On
from trainkit.checkpoint import CheckpointError, Checkpoints
from trainkit.history import History
from trainkit.learner import Learner

from .nursery import Child, Nursery
from .row import Row
from .subjects import EPOCHS, STEPS, digest, go_on, saved_digests, supervised


def train(tell: Callable[..., None], run: str, seed: int, go: str, take_up: bool = False, pause: float = 0) -> None:
    "In a child: wait for the others, then train in the folder, whatever comes of it."
    learn = supervised(run, seed=seed, save_every=2)
    if pause:
        learn.add(On("after_batch", lambda learn: time.sleep(pause)))
    tell(ready=True)
    while not Path(go).exists():
        time.sleep(0.0005)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            if take_up:
                learn.restore("last")
            go_on(learn)
            how = "finished"
        except CheckpointError as error:
            how = str(error)
    texts = [str(w.message) for w in said if issubclass(w.category, UserWarning)]
    tell(how=how, digest=digest(learn.state_dict()), step=learn.step, said=texts)


def read(tell: Callable[..., None], run: str, end: str) -> None:
    "In a child: list and load again and again, until told to end; `tell` hears of everything that went wrong."
    store, looks, wrong = Path(run) / "checkpoints", 0, list[str]()
    while not Path(end).exists():
        looks += 1
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                shelf = Checkpoints(store)
                entries = shelf.list()
                assert repr(shelf) and shelf._repr_html_()
                if entries:
                    assert shelf.load("last")[1].step >= entries[-1].step
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")
        wrong += [str(w.message) for w in said]
    tell(looks=looks, wrong=wrong[:20])


def _start(nursery: Nursery, folder: Path, n: int, **kw: object) -> list[Child]:
    "Children that begin at the same moment."
    run, go = str(folder / "run"), str(folder / "go")
    children = [nursery.start("folders", "train", run=run, seed=seed, go=go, **kw) for seed in range(n)]
    while not all(child.told() for child in children):
        time.sleep(0.001)
    (folder / "go").touch()
    return children


def at_once(folder: Path, nursery: Nursery, rounds: int) -> Row:
    "Two processes start in one folder at the same moment."
    row = Row("two processes start in one folder at the same moment, new or with checkpoints",
              "one trains and its run is kept whole, the other is told (or kept beside it); no file mixes the two")  # fmt: skip
    straight = supervised(folder / "straight", save_every=2)
    straight.fit(epochs=EPOCHS)
    saved = saved_digests(straight)
    for i in range(rounds):
        here = folder / f"round{i}"
        here.mkdir(parents=True)
        existing = i % 2 == 1
        if existing:
            learn = supervised(here / "run", save_every=2)
            learn.add(On("after_batch", lambda learn: learn.step == 4 and learn.stop()))
            learn.fit(epochs=EPOCHS)
        with row.attempt(f"round {i}"):
            told = [child.done()[-1] for child in _start(nursery, here, 2, take_up=existing)]
            done = [line for line in told if line["how"] == "finished"]
            assert done, f"nobody trained: {[line['how'] for line in told]}"
            refused = [line["how"] for line in told if line["how"] != "finished"]
            assert all("is training in" in text or "belongs to another learner" in text for text in refused), refused
            for line in done:
                kept = [path for path in here.glob("run*") if _is_whole(path, line)]
                assert kept, f"a run was trained to its end, said {line['said']}, and isn't kept"
            if existing:
                for entry in (store := Checkpoints(here / "run" / "checkpoints")):
                    assert digest(store.load(entry)[0]) == saved[entry.step], f"{entry} is mixed"
            row.met["other refused" if refused else "both kept"] += 1
        shutil.rmtree(here)
    return row


def _is_whole(run: Path, line: dict) -> bool:
    "Is this the run that ended so: its last checkpoint, its history?"
    store = Checkpoints(run / "checkpoints")
    if not len(store) or digest(store.load("last")[0]) != line["digest"]:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return History.read(run / "history.jsonl").scalars["train/loss"][0].tolist() == [*range(1, line["step"] + 1)]


def beside(folder: Path, nursery: Nursery) -> Row:
    "A learner comes to a folder in which another one trains, or has trained."
    row = Row("a second learner or process comes to a folder in which one trains, has trained, or was killed",
              "clear message; the first one's files intact; a killed one's lock holds nobody up")  # fmt: skip
    for take_up in (False, True):
        with row.attempt(f"while another process trains, {'restoring' if take_up else 'anew'}"):
            here = folder / f"while{take_up}"
            here.mkdir(parents=True)
            first = _start(nursery, here, 1, pause=0.05)[0]
            while not any((here / "run" / "checkpoints").glob("ckpt-*.pt")):
                time.sleep(0.001)
            second = supervised(here / "run", seed=1)
            if take_up:
                second.restore("last")
            try:
                second.fit(epochs=EPOCHS, schedule="hold") if take_up else second.fit(epochs=EPOCHS)
            except CheckpointError as error:
                assert f"process {first.pid} is training in" in str(error), str(error)
            else:
                raise AssertionError("two processes train in one folder")
            told = first.done()[-1]
            assert told["how"] == "finished" and not told["said"] and _is_whole(here / "run", told), told
            assert [path.name for path in here.glob("run*")] == ["run"], "a folder was moved"
    with row.attempt("after another process was killed"):
        here = folder / "killed"
        here.mkdir()
        first = _start(nursery, here, 1, pause=0.05)[0]
        while len([*(here / "run" / "checkpoints").glob("ckpt-*.pt")]) < 2:
            time.sleep(0.001)
        assert first.kill()
        second = supervised(here / "run")
        second.restore("last")
        go_on(second)
        assert second.step == STEPS
    with row.attempt("after a save by a learner that is still there"):
        here = folder / "saved"
        idle = supervised(here / "run", save_every="none")
        idle.add(On("after_batch", lambda learn: learn.step == 4 and learn.stop()))
        idle.fit(epochs=EPOCHS)
        idle.save()
        told = _start(nursery, here, 1, take_up=True)[0].done()[-1]
        assert told["how"] == "finished", f"an idle learner keeps others out: {told['how']}"
        assert idle.checkpoints is not None
    with row.attempt("two learners in one process, step by step"):
        _interleaved(folder / "interleaved")
    return row


def _interleaved(here: Path) -> None:
    "The younger is refused while the older trains; afterwards it may take over, and the older keeps out."
    old, new = supervised(here / "run", save_every=2), supervised(here / "run", seed=0, save_every=2)
    refusals: list[str] = []

    def take(learn: Learner) -> None:
        if learn.step == 4:
            learn.checkpoints.wait()
            new.restore("last")
            for ask in (new.save, new.fit):
                try:
                    ask()
                except CheckpointError as error:
                    refusals.append(str(error))

    old.add(On("after_batch", take, order=95), stop := On("after_batch", lambda learn: learn.step == 8 and learn.stop()))
    old.fit(epochs=EPOCHS)
    assert len(refusals) == 2 and all("another learner of this process is training in" in text for text in refusals), refusals
    old.remove(stop)
    new.restore("last")
    go_on(new)
    try:
        old.fit()
    except CheckpointError as error:
        assert "belongs to another learner" in str(error), error
    else:
        raise AssertionError("the older one trained on in a folder that is another's")
    assert new.checkpoints.load("last")[1].step == STEPS
    found = History.read(here / "run" / "history.jsonl").scalars["train/loss"][0].tolist()
    assert found == [*range(1, STEPS + 1)], f"the older one wrote into the history: {found}"


def readers(folder: Path, nursery: Nursery, n: int = 2) -> Row:
    "Others look while one writes and deletes at each step."
    row = Row("readers in other processes beside a run that saves and deletes at each step",
              "no error or warning on either side; nothing is left of what was deleted")  # fmt: skip
    folder.mkdir(parents=True)
    looking = [nursery.start("folders", "read", run=str(folder / "run"), end=str(folder / "end")) for _ in range(n)]
    with row.attempt("the writer"):
        learn = supervised(folder / "run", save_every=1, keep=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            learn.fit(epochs=3 * EPOCHS)
        digests = [entry.step for entry in learn.checkpoints]
        assert digests[-1] == 3 * STEPS
    (folder / "end").touch()
    for i, child in enumerate(looking):
        with row.attempt(f"reader {i}"):
            told = child.done()[-1]
            row.met["looks"] += told["looks"]
            assert not told["wrong"], f"{len(told['wrong'])} times: {told['wrong'][0]}"
    with row.attempt("what is left"):
        names = {path.stem for path in (folder / "run" / "checkpoints").glob("ckpt-*.pt")}
        orphans = [path.name for path in (folder / "run" / "checkpoints").glob("ckpt-*.json") if path.stem not in names]
        assert not orphans, f"descriptions of nothing: {orphans}"
        assert not [*(folder / "run" / "checkpoints").glob(".tmp-*")], "temporary files are left"
    return row
