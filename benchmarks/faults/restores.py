"Going back fails at each of its parts: all or nothing."

from __future__ import annotations

import contextlib
import copy
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ways import Stop, same

from trainkit.checkpoint import CheckpointError
from trainkit.history import History
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.state import RestoreError

from .endings import outside
from .row import Row
from .subjects import EPOCHS, PER_EPOCH, SUBJECTS, digest, supervised

MAKERS: dict[str, Callable[..., Learner]] = {
    **SUBJECTS, "with a scaler": lambda run=None, **kw: supervised(run, precision="fp16", **kw)}  # fmt: skip
ERRORS: dict[str, Callable[[], BaseException]] = {
    "error": lambda: ValueError("struck"), "memory": lambda: MemoryError("struck"), "interrupt": KeyboardInterrupt}  # fmt: skip
WAYS = {
    "restore": lambda learn, run: learn.restore(PER_EPOCH),
    "branch": lambda learn, run: learn.branch(PER_EPOCH, run.with_name("branch")),
    "at": lambda learn, run: _look(learn),
}


def _look(learn: Learner) -> None:
    with learn.at(PER_EPOCH):
        pass


def parts(learn: Learner) -> Iterator[tuple[str, Any, str]]:
    "Everything that is loaded when a learner goes back: its name, the object, the method."
    for player in learn.players:
        for name, module in player.modules.items():
            yield f"module {name}", module, "load_state_dict"
        for term in player.terms:
            if isinstance(term.fn, torch.nn.Module):
                yield f"loss {term.name} of {player.name}", term.fn, "load_state_dict"
        yield f"optimizer of {player.name}", player.opt, "load_state_dict"
        for name, schedule in player.schedules.items():
            yield f"schedule of {name} of {player.name}", schedule, "load_state_dict"
        if player.scaler is not None:
            yield f"scaler of {player.name}", player.scaler, "load_state_dict"
    yield "position", learn, "go_to"
    yield "place in the data", learn.stream, "load_state_dict"
    for key, cb in learn.cbs.keyed().items():
        if cb.state_dict():
            yield f"callback {key}", cb, "load_state_dict"
    yield "history", learn.history, "load_state_dict"
    yield "random state", learn.random, "load_state_dict"


@contextlib.contextmanager
def striking(owner: Any, name: str, error: Callable[[], BaseException], late: bool, always: bool) -> Iterator[list[int]]:
    "Inside, the first call (or every one) of a method fails, before it has done anything or after it has done all."
    real, calls = getattr(owner, name), [0]

    def strike(*args: Any, **kw: Any) -> Any:
        calls[0] += 1
        if calls[0] > 1 and not always:
            return real(*args, **kw)
        if late:
            real(*args, **kw)
        raise error()

    setattr(owner, name, strike)
    try:
        yield calls
    finally:
        delattr(owner, name)


def everything(learn: Learner) -> dict[str, Any]:
    "All that must be as it was: the state to the last bit, which objects hold it, what is outside of it, the run, the file."
    learn.history.flush()
    path = learn.run / "history.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on_disk = {name: values.tolist() for name, (_, values) in History.read(path).scalars.items()}
    state = copy.deepcopy(learn.state_dict())
    held = [id(p) for player in learn.players for group in player.opt.param_groups for p in group["params"]]
    return {"state": state, "held": held, "outside": outside(learn), "run": str(learn.run), "parent": learn.parent,
            "kept in": str(learn.checkpoints.folder), "history": id(learn.history), "how": learn.state, "on disk": on_disk,
            "files": sorted(p.name for p in learn.checkpoints.folder.iterdir()),
            "runs": sorted(p.name for p in path.parent.parent.iterdir()),
            "gradients": [p.grad for player in learn.players for p in player.parameters()]}  # fmt: skip


def _scene(make: Callable[..., Learner], run: Path) -> Learner:
    "A learner in the middle of its second epoch, with a checkpoint behind it."
    learn = make(run, save_every="epoch")
    learn.add(stop := Stop(PER_EPOCH * 3 // 2))
    learn.fit(epochs=EPOCHS)
    learn.remove(stop)
    return learn


def _one(row: Row, way: str, learn: Learner, twin: str, part: str, error: str, late: bool, always: bool, run: Path) -> None:
    owner, name = next((owner, name) for what, owner, name in parts(learn) if what == part)
    before, made = everything(learn), ERRORS[error]
    with warnings.catch_warnings(record=True), striking(owner, name, made, late, always) as calls:
        warnings.simplefilter("always")
        try:
            WAYS[way](learn, run)
        except KeyboardInterrupt:
            assert error == "interrupt", "an interrupt came from nowhere"
        except Exception as caught:
            assert error != "interrupt", f"an interrupt became {caught!r}"
            if way != "at":  # where the error itself comes out
                assert isinstance(caught, (RestoreError, CheckpointError)) and "ckpt-" in str(caught), f"no file in {caught!r}"
        else:
            assert not calls[0], "it went through"
            row.met["don't load this part"] += 1
            row.tries -= 1
            return
    row.met[way] += 1
    if always:  # the part itself can't be put back by anybody; all others must be
        before["state"].pop("callbacks"), (now := everything(learn))["state"].pop("callbacks")
    else:
        now = everything(learn)
    same(before, now)
    learn.fit()
    assert digest(learn.state_dict()) == twin, "it goes on otherwise than if nobody had tried"


def rows(folder: Path, every: int = 1) -> Iterator[Row]:
    "Each part of each way of going back, or each `every`-th."
    row = Row("restore, branch and a look back failing at each of their parts, before and after the part was loaded",
              "all or nothing: state, objects, files and the steps that follow bit for bit as if nobody had tried")  # fmt: skip
    cases = []
    for name, make in MAKERS.items():
        names = [part for part, _, _ in parts(make(None))]
        cases += [(name, way, part, error, late, False) for way in WAYS for part in names for error in ERRORS
                  for late in (False, True) if (way, part) != ("at", "position")]  # fmt: skip
        cases += [(name, way, part, "error", True, True) for way in WAYS for part in names if part.startswith("callback")]
    twins = {}
    for name, make in MAKERS.items():
        learn = _scene(make, folder / "twin")
        learn.fit()
        twins[name] = digest(learn.state_dict())
        shutil.rmtree(folder / "twin")
    for name, way, part, error, late, always in cases[::every]:
        when = "always" if always else "after" if late else "before"
        with row.attempt(f"{name}: {way}, {error} {when} {part}"):
            learn = _scene(MAKERS[name], folder / "run")
            _one(row, way, learn, twins[name], part, error, late, always, folder / "run")
        for left in folder.iterdir():
            shutil.rmtree(left)
    yield row
    yield _full_disk(folder)
    yield _misfits(folder)


def _full_disk(folder: Path) -> Row:
    "The branch's own first checkpoint can't be written."
    row = Row("branch on a full disk", "as above")
    for name, make in MAKERS.items():
        with row.attempt(name):
            learn = _scene(make, folder / "run")
            before, real = everything(learn), torch.save

            def save(*args: Any, **kw: Any) -> None:
                raise OSError(28, "No space left on device")

            torch.save = save
            try:
                learn.branch(PER_EPOCH, "branch")
            except CheckpointError as error:
                assert "No space left" in str(error), str(error)
            else:
                raise AssertionError("it went through")
            finally:
                torch.save = real
            same(before, everything(learn))
        shutil.rmtree(folder / "run", ignore_errors=True)
    return row


def _misfits(folder: Path) -> Row:
    "Checkpoints of other learners."
    row = Row("a checkpoint of another model, optimizer, schedule, players, without a callback",
              "refused with a list of what differs; bit for bit as before")  # fmt: skip
    others: dict[str, Callable[[Path], Learner]] = {
        "another shape": lambda run: supervised(run, ballast=5),
        "another optimizer": lambda run: _with_optimizer(run, OptimBuilder("sgd", lr=0.1, schedule="cosine", warmup=2)),
        "another schedule": lambda run: _with_optimizer(run, OptimBuilder("adamw", lr=0.02, schedule="linear", warmup=2)),
        "no average": lambda run: supervised(run, cbs=[]),
        "two players": SUBJECTS["adversarial"],
    }
    for name, make in others.items():
        for way in WAYS:
            with row.attempt(f"{name}: {way}"):
                supervised(folder / "run", save_every="epoch").fit(epochs=EPOCHS)
                learn = make(folder / "run")
                before = _state(learn)
                try:
                    WAYS[way](learn, folder / "run")
                except ValueError as error:
                    assert "ckpt-000000006.pt" in str(error) and "\n" in str(error), f"no list of differences: {error}"
                else:
                    raise AssertionError("it was taken")
                same(before, _state(learn))
                assert sorted(p.name for p in folder.iterdir()) == ["run"], "a folder was left"
            shutil.rmtree(folder)
    return row


def _state(learn: Learner) -> dict[str, Any]:
    return copy.deepcopy({"state": learn.state_dict(), "run": str(learn.run), "outside": outside(learn) | {"handler": 0}})


def _with_optimizer(run: Path, opt: Any) -> Learner:
    learn = supervised(None)
    dls = learn.loaders.train, learn.loaders.valid["valid"]
    loss, cbs = learn.players[0].terms[0].fn, [*learn.cbs]
    return Learner(learn.model, dls, loss, opt, accumulate=2, cbs=cbs, front="none", run=run, seed=0)
