"In a process of its own: one of two ranks that save in parts, to be killed, or to look at what is left of a checkpoint."

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp  # here, and not in each child that is forked
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit import fsdp
from trainkit.callbacks.average import EMA
from trainkit.checkpoint import CheckpointError
from trainkit.distributed import Distributed
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.sharded import made_whole
from trainkit.state import RestoreError

from .life import _strange, _take_up, _tell_of_renames
from .subjects import EPOCHS, PER_EPOCH, X, Y, digest, go_on

RANKS = 2
STEPS = [PER_EPOCH * (i + 1) for i in range(EPOCHS)]  # of the checkpoints that are looked at
assert fsdp  # is loaded before the first fork


def learner(run: Any, seed: int = 0, width: int = 8, **kw: Any) -> Learner:
    "With weights, optimizer and average in parts; of one process, where there are no others."
    torch.manual_seed(seed)
    hidden = [nn.Linear(3, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(width, 1))
    data = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    opt = OptimBuilder("adamw", lr=0.02, schedule="cosine", warmup=2)
    how = Distributed("fsdp", listen_every=0.0, checkpoint="sharded") if "RANK" in os.environ else None
    kw = {"cbs": [EMA(0.9)], "front": "none", "keep": 99, "device": "cpu"} | kw
    return Learner(model, data, "mse", opt, run=run, seed=seed, distributed=how, **kw)


def whole(learn: Learner) -> dict[str, Any]:
    "The state, put together; all ranks ask at once. It is the suite that asks: if a rank is lost meanwhile, it says so itself."
    try:
        return made_whole(learn.state_dict())
    except RuntimeError as error:
        raise RuntimeError(f"a rank was lost while its state was looked at: {error}") from error


def whole_digest(learn: Learner) -> str:
    "Of everything in the state."
    return digest(whole(learn))


def parts_digests(learn: Learner) -> dict[str, str]:
    "Of each part of the state, to say what differs."
    state, fed = whole(learn), {}
    nothing = {"players": {}, "position": {}, "callbacks": {}, "rng": {}, "stream": {"batch_idx": 1}, "history": {"columns": {}}}
    for part in nothing:
        fed[part] = digest({**nothing, part: state[part]})
    return fed


def weights_digest(learn: Learner) -> str:
    "Of what must be the same on all ranks, and in one process."
    return digest_of_weights(whole(learn))


def digest_of_weights(state: dict[str, Any]) -> str:
    players = {name: {"modules": kept["modules"]} for name, kept in state["players"].items()}
    alike = {"players": players, "position": state["position"], "history": state["history"]}
    return digest(alike | {"stream": {"batch_idx": 1}, "callbacks": {}, "rng": {}})


def _join(rank: int, port: int) -> None:
    "What a launcher says to a rank."
    os.environ.update({"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{RANKS}", "LOCAL_WORLD_SIZE": f"{RANKS}",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"})  # fmt: skip


def life(tell: Callable[..., None], run: str, rank: int, port: int, look_back: bool = False, **kw: Any) -> None:
    "One life of a rank: take up what is there, go on to the end. `tell` hears of what is promised, and of the end."
    _join(rank, port)
    _tell_of_renames(tell)
    learn = learner(run, **kw)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _take_up(learn, tell, whole_digest)
        tell(said=_strange(said), at=time.monotonic())
        go_on(learn)
    tell(end=parts_digests(learn), alike=weights_digest(learn), said=_strange(said), at=time.monotonic())
    for step in range(1, learn.step + 1) if look_back else ():
        learn.restore(step)
        tell(step=step, digest=whole_digest(learn))


def attempt(learn: Learner, which: Any) -> dict[str, Any]:
    "A restore: the step and the state that were taken, or the error and whether the memory is as it was; what was said."
    before = whole_digest(learn)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            step, error = learn.restore(which).step, ""
        except (CheckpointError, RestoreError) as refusal:
            step, error = None, f"{type(refusal).__name__}: {refusal}"
    now = whole_digest(learn)
    return {"step": step, "error": error, "digest": now, "same": now == before, "alike": weights_digest(learn),
            "said": [str(w.message) for w in said]}  # fmt: skip


def look(tell: Callable[..., None], sound: str, run: str, rank: int, port: int, n: int | None, seed: int = 9) -> None:
    "Restore what is damaged, case by case, by its step and as the last."
    _join(rank, port)
    learn = learner(run, seed=seed, save_every="none")
    learn.fit(1)
    looked(tell, learn, Path(sound), n, rank, learn.team.gather)


def looked(
    tell: Callable[..., None],
    learn: Learner,
    sound: Path,  # the run as it was
    n: int | None,  # so many cases, or all
    rank: int = 0,  # the first is who damages
    meet: Callable[[Any], Any] = lambda x: x,  # until the other ranks are here, too
) -> None:
    "What becomes of restores in a sound run, and then in one damaged in each of the ways."
    from .sharded import cases

    none = ("none", lambda folder: None, "")
    for what, harm, _ in [none, *cases(sound / "checkpoints", n)]:
        if rank == 0:
            shutil.rmtree(learn.run, ignore_errors=True)
            shutil.copytree(sound, learn.run)
            harm(learn.run / "checkpoints")
        meet(0)
        which = STEPS if what == "none" else (STEPS[-1], "last")
        tell(what=what, found=[attempt(learn, each) for each in which])
        meet(0)
