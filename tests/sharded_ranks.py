"""What each rank of a test of sharded parameters does: `torchrun sharded_ranks.py FOLDER NAME…`, as ranks.py does for ddp."""
import contextlib
import copy
import os
import shutil
import signal
import sys
import threading
import warnings
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
import ranks  # noqa: E402
from ranks import VALID, Cancels, HalfWay, loader, net  # noqa: E402

from trainkit.attached import attach  # noqa: E402
from trainkit.callback import CancelEpoch, CancelFit, CancelValidate, On  # noqa: E402
from trainkit.callbacks.average import EMA  # noqa: E402
from trainkit.callbacks.clip import ClampWeights, ClipGradNorm, ClipGradValue  # noqa: E402
from trainkit.device import DTYPES  # noqa: E402
from trainkit.distributed import Distributed  # noqa: E402
from trainkit.gan.doctor import Doctor  # noqa: E402
from trainkit.gan.historical import HistoricalAverage  # noqa: E402
from trainkit.gan.norms import spectral_norm  # noqa: E402
from trainkit.optim import OptimBuilder  # noqa: E402
from trainkit.sharded import made_whole  # noqa: E402

FSDP = Distributed("fsdp", listen_every=0.0)
HOLD = Distributed("fsdp", listen_every=0.0, hold=True)
APART = Distributed("fsdp", listen_every=0.0, checkpoint="sharded")
ADAMW = OptimBuilder("adamw", lr=0.01, schedule="cosine")


def learner(model=None, dls=None, opt=None, **kw):
    return ranks.learner(model, dls, opt, **{"distributed": FSDP, **kw})


def told(learn, **more):
    "What every rank has, whole, and how much of it lies here."
    parts = {n: getattr(p, "to_local", lambda p=p: p)().numel() for n, p in learn.players[0].named_parameters()}
    found = made_whole(ranks.told_alone(learn))
    return learn.team.gather({**found, "parts": parts, **made_whole(more)})


def plain(folder):
    learn = learner(opt=OptimBuilder("sgd", lr=0.1, momentum=0.9, schedule="cosine"), metrics=["mae"])
    learn.fit(3)
    return told(learn, predicted=learn.predict(DataLoader(VALID, batch_size=5)))


def adamw(folder):
    learn = learner(opt=ADAMW, dls=loader(), cbs=ClipGradNorm(0.05))
    learn.fit(3)
    return told(learn)


def ddp(folder):
    learn = learner(opt=ADAMW, dls=loader(), cbs=ClipGradNorm(0.05), distributed=ranks.DDP)
    learn.fit(3)
    return told(learn)


def accumulated(folder):
    "Windows of four turns, six a epoch: two are left over at its end."
    learn = learner(dls=loader(), accumulate=4)
    learn.fit(2)
    return told(learn)


def under(how, scenario, *args, **kw):
    "What ranks.py does for ddp, with sharded parameters."
    was, ranks.DDP = ranks.DDP, how
    try:
        return scenario(*args, **kw)
    finally:
        ranks.DDP = was


def gan(folder, **kw):
    return under(kw.pop("distributed", FSDP), ranks.gan, folder, **kw)


def gan_penalty(folder):
    return gan(folder, penalties=[HalfWay()], distributed=HOLD)


def gan_norms(folder):
    "Each rank normalises with its own part of the batch, as under ddp."
    return {"fsdp": gan(folder, batch_norm=True), "ddp": gan(folder, batch_norm=True, distributed=ranks.DDP)}


def bounded(folder):
    learn = learner(cbs=[ClipGradValue(0.1), ClampWeights(0.4)])
    learn.fit(2)
    return told(learn)


def spectral(folder):
    learn = learner(spectral_norm(net()))
    learn.fit(2)
    return told(learn)


class Tied(nn.Module):
    "One weight in two places, of which the second rank has nothing."

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second, self.last = (nn.Linear(n, m).double() for n, m in ((3, 1), (3, 1), (2, 1)))
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.cat([self.first(x), self.second(x).tanh()], 1))


def tied(folder):
    learn = learner(Tied(), opt=ADAMW, run=folder / "tied")
    learn.fit(2)
    again = learner(Tied(), opt=ADAMW, run=folder / "tied")
    again.restore("last")
    apart = {"run": folder / "tied apart", "distributed": APART if learn.team.size > 1 else None}
    first, second = learner(Tied(), opt=ADAMW, **apart), learner(Tied(), opt=ADAMW, **apart)
    first.fit(2)
    second.restore("last")
    return told(again, second=made_whole(second.model.state_dict()))


def wrapped(folder):
    "As `adamw`, gathered layer by layer, and by numbers of parameters."
    found = []
    for wrap in nn.Linear, 20:
        how = Distributed("fsdp", listen_every=0.0, wrap=wrap)
        learn = learner(opt=ADAMW, dls=loader(), cbs=ClipGradNorm(0.05), distributed=how)
        learn.fit(3)
        found.append(told(learn))
    return found


LOOKING = [(CancelValidate, "before_validate"), (CancelValidate, "before_validate_batch"),
           (CancelValidate, "after_validate_batch"), (CancelEpoch, "before_validate_batch"),
           (CancelFit, "after_validate_batch"), (CancelFit, "after_validate")]  # fmt: skip


def cancels(folder):
    "One rank cancels while all look on, with metrics that want every batch in its turn, and without; and elsewhere."
    import torchmetrics

    found = {}
    for kind, event in ranks.places(LOOKING, 2):
        for metrics in None, {"r2": torchmetrics.R2Score()}:
            learn = learner(cbs=Cancels(kind, event), metrics=metrics)
            learn.fit(2)
            found[kind.__name__, event, metrics is None] = told(learn)
    for event in ranks.places(("before_batch", "after_forward", "before_step", "after_batch"), 2):
        learn = learner(cbs=Cancels(CancelEpoch, event))
        learn.fit(2)
        found["CancelEpoch", event, True] = told(learn)
    return found


def cancels_others(folder):
    "A test and a prediction that one rank cancels."
    words = []
    for what in "test", "predict":
        for event in f"before_{what}_batch", f"after_{what}_batch":
            learn = learner(cbs=Cancels(CancelFit, event, at=0))
            try:
                words.append((what, event, repr(getattr(learn, what)(DataLoader(VALID, batch_size=2)))))
            except BaseException as error:
                words.append((what, event, type(error).__name__))
    return learn.team.gather(words)


def interrupted(folder):
    "Somebody strikes Ctrl+C where rank 1 runs."
    last = int(os.environ.get("WORLD_SIZE", 1)) - 1
    struck = ranks.at("after_batch", 4, lambda learn: signal.raise_signal(signal.SIGINT), last)
    learn = learner(run=folder / "interrupted", cbs=struck, distributed=APART)
    try:
        learn.fit(9)
    except KeyboardInterrupt as error:
        said = str(error)
    state, step = learn.state, learn.step
    learn.restore("last")
    learn.fit()
    return told(learn, said=said, state=state, at=step)


class Commanding:
    "What somebody at another place asks for, one thing after the other, through the run's folder."

    def __init__(self, run):
        self.run, self.asked, self.saved = run, [], 0

    def __call__(self, learn):
        rate = learn.players[0].opt.param_groups[0]["lr"]
        if not self.asked and learn.step >= 2:
            self.ask("set", name="lr", value=0.025)
        elif self.asked == ["set"] and rate == 0.025:
            self.ask("save", note="from afar")
        elif self.asked == ["set", "save"] and any(e.info["note"] == "from afar" for e in learn.checkpoints):
            self.ask("stop")

    def ask(self, command, **values):
        attach(self.run).send(command, **values)
        self.asked.append(command)


def commanded(folder):
    run, rates = folder / "commanded", []
    learn = learner(run=run, distributed=APART, save_every="none")
    commanding = Commanding(run)
    learn.add(On("after_batch", lambda learn: None if learn.rank else commanding(learn)))
    learn.add(On("before_turn", lambda learn: rates.append((learn.step, learn.player.opt.param_groups[0]["lr"]))))
    learn.fit(steps=5000)
    changes = [(step, rate) for i, (step, rate) in enumerate(rates) if not i or rates[i - 1][1] != rate]
    return told(learn, changes=changes)


def kept(folder, name, **kw):
    kw = {"opt": ADAMW, "accumulate": 3, "cbs": EMA(0.9), "save_every": 4, "keep": "all", **kw}
    return learner(kw.pop("model", net()), run=folder / name, **kw)


def saved(folder):
    "Saves at step 8, in the middle of a window."
    learn = kept(folder, "saved")
    learn.fit(3)
    return told(learn)


def saved_apart(folder):
    learn = kept(folder, "apart", distributed=APART)
    learn.fit(3)
    return told(learn, files=sorted(p.name for p in (folder / "apart" / "checkpoints").glob("*-000000008*/*")))


def behind(folder):
    "Rank 1 takes its time to write while all go on training; then its disk is full."
    import torch.distributed.checkpoint as dcp

    write, gate, found = dcp.FileSystemWriter.write_data, threading.Event(), {"there": []}

    def patient(*args, **kw):
        gate.wait(60)
        return write(*args, **kw)

    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    def act(learn):
        if learn.step in (2, 8):
            dcp.FileSystemWriter.write_data = {(1, 2): patient, (1, 8): full}.get((learn.rank, learn.step), write)
            learn.save(f"after {learn.step}", background=True)
            found[learn.step] = made_whole(learn.model.state_dict())
        if learn.step == 5:
            found["there"] += sorted(p.name for p in (folder / "behind" / "checkpoints").glob("ckpt-*.pt"))
            learn.team.gather(0)
            gate.set()

    learn = learner(run=folder / "behind", distributed=APART, save_every="none", cbs=On("after_batch", act))
    learn.fit(2)
    found["problem"] = str(learn.checkpoints.problem(wait=True)) if learn.rank == 0 else ""
    dcp.FileSystemWriter.write_data = write
    learn.save("at last")
    learn.restore("after 2")
    found["back"] = made_whole(learn.model.state_dict())
    found["notes"] = [e.info["note"] for e in learn.checkpoints] if learn.rank == 0 else []
    found["files"] = sorted(p.name for p in (folder / "behind" / "checkpoints").glob("ckpt-*"))
    return learn.team.gather(found)


def falls_back(folder):
    "The newest checkpoints have lost something: all ranks take the one before; a certain one is refused by all."
    name = "connection closed by igloo"  # a folder may be called anything
    shutil.copytree(folder / "apart", folder / name) if int(os.environ["RANK"]) == 0 else None
    learn, found = kept(folder, name, model=net(seed=9), distributed=APART), []
    for harm in (lambda f: None, lambda f: (f / "__1_0.distcp").write_bytes(b"x"), lambda f: shutil.rmtree(f)):
        if learn.rank == 0:
            harm(learn.checkpoints.list()[-max(1, len(found))].path.with_suffix(".parts"))
        learn.team.gather(0)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            entry = learn.restore("last")
        words = [str(w.message) for w in said if "Going back" in str(w.message)]
        found.append((entry.step, learn.step, words, float(made_whole(learn.model.state_dict())["0.weight"].sum())))
    try:
        learn.restore(found[0][0])
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    return learn.team.gather(found)


def alone(folder):
    learn = kept(folder, "alone", distributed=None)
    learn.fit(3)
    return ranks.told_alone(learn)


def back(folder, name, which=8, **kw):
    learn = kept(folder, name, model=net(seed=9), **kw)
    learn.restore(which)
    start = learn.step
    learn.fit()
    return told(learn, start=start)


def resumed(folder):
    return back(folder, "saved")


def resumed_apart(folder):
    return back(folder, "apart", distributed=APART)


def resumed_alone(folder):
    "Goes on from what one process saved."
    return back(folder, "alone")


def mixed(folder):
    "bf16 over ranks, and fp16 with a loss that is too large on one of them: all leave the same steps out."
    found = {}
    for how, name in ((ranks.DDP, "ddp"), (FSDP, "fsdp")):
        for precision in "bf16", "fp16":
            stepped, types = [], set()

            def spoil(learn):
                if learn.step == 2 and learn.rank == 1 and learn.precision.name == "fp16":
                    learn.loss = learn.loss * float("inf")

            data = DataLoader(TensorDataset(ranks.X.float(), ranks.Y.float()), batch_size=4)
            learn = learner(net().float(), data, OptimBuilder("sgd", lr=0.1), distributed=how, precision=precision)
            learn.add(On("before_backward", spoil))
            learn.add(On("before_step", lambda learn: types.update(str(p.grad.dtype) for p in learn.player.parameters())))
            learn.add(On("after_turn", lambda learn: stepped.append(learn.stepped)))
            learn.fit(2)
            scale = learn.players[0].scaler.get_scale() if learn.players[0].scaler else None
            weights = made_whole(learn.model.state_dict())
            found[name, precision] = {"stepped": stepped, "types": types, "scale": scale, "weights": weights}
    return learn.team.gather(found)


def narrow(folder):
    """Targets a few roundings of the narrow type away from what the model says: in it, errors are others than in float32.

    Steps are so small that weights, which begin at numbers of bf16, stay the same in the narrow type.
    """
    found, model = {}, net().float()
    start = {name: w.bfloat16().float() for name, w in model.state_dict().items()}
    model.load_state_dict(start)
    with torch.no_grad():
        told = model(ranks.X.float())
    for (mode, how), name in product((("ddp", ranks.DDP), ("fsdp", FSDP)), ("bf16", "fp16")):
        targets = told + torch.finfo(DTYPES[name]).eps * ranks.Y.float()
        for precision in (name, "fp32") if int(os.environ.get("WORLD_SIZE", 1)) == 1 else (name,):
            data = DataLoader(TensorDataset(ranks.X.float(), targets), batch_size=5, shuffle=True)
            learn = learner(copy.deepcopy(model), data, OptimBuilder("sgd", lr=2**-8), distributed=how, precision=precision)
            found[mode, name, precision] = moved(learn, start)
    return learn.team.gather(found)


def moved(learn, start):
    "Trains, with a loss that is infinite on the last rank in a step of half precision; how the weights moved."
    stepped = []

    def spoil(learn):
        if learn.step == 2 and learn.rank == learn.team.size - 1 and learn.precision.name == "fp16":
            learn.loss = learn.loss * float("inf")

    learn.add(On("before_backward", spoil))
    learn.add(On("after_turn", lambda learn: stepped.append(learn.stepped)))
    learn.fit(2)
    weights = made_whole(learn.model.state_dict())
    return torch.cat([(w - start[name]).flatten() for name, w in weights.items()]), stepped


def refused(folder):
    words = []

    def attempt(make):
        try:
            make()
            words.append("nothing")
        except Exception as error:
            words.append(f"{type(error).__name__}: {error}")

    from trainkit.callbacks.clip import AdaptiveClip

    attempt(lambda: learner(opt=OptimBuilder("adafactor", lr=0.01)))
    attempt(lambda: learner(compile=True))
    attempt(lambda: learner(cbs=AdaptiveClip())._prepare(None))
    attempt(lambda: learner(cbs=HistoricalAverage())._prepare(None))
    attempt(lambda: learner(cbs=Doctor())._prepare(None))
    attempt(lambda: learner().export_weights("x.safetensors"))
    attempt(lambda: learner().load_weights(net()))
    attempt(lambda: gan(folder, penalties=[HalfWay()]))
    return words  # the last one has ended the team


def dies(folder):
    "Rank 1 is killed while it writes its part of the second checkpoint."
    import torch.distributed.checkpoint as dcp

    learn = learner(run=folder / "dies", distributed=APART, save_every="none")
    learn.fit(1)
    learn.save("first")
    if learn.rank == 0:
        torch.save(learn.step, folder / "step.pt")
    learn.fit(1)
    if learn.rank == 1:
        dcp.FileSystemWriter.write_data = lambda *a, **kw: os.kill(os.getpid(), 9)
    try:
        learn.save("second")
    except Exception as error:
        Path(folder, f"dies.{learn.rank}.txt").write_text(f"{type(error).__name__}: {error}")
        raise


def stay(folder, name, others):
    "Until each of these ranks has told its end: nobody shall hear of one by this one's own. Who never did goes to a file."
    end, missing = ranks.time.monotonic() + 60, others
    while missing and ranks.time.monotonic() < end:
        ranks.time.sleep(0.02)
        missing = {rank for rank in others if not (folder / f"{name}.{rank}.txt").exists()}
    Path(folder, f"{name} without.{os.environ['RANK']}.txt").write_text(f"{sorted(missing)}")


def killed(folder):
    "Rank 1 is killed while it writes its part of the second checkpoint behind the training."
    import torch.distributed.checkpoint as dcp

    def fault(learn):
        if learn.rank == 1 and learn.step == 7:
            dcp.FileSystemWriter.write_data = lambda *a, **kw: ranks.time.sleep(0.2) or os.kill(os.getpid(), 9)

    learn = learner(run=folder / "killed", distributed=APART, save_every=6, cbs=On("before_batch", fault))
    try:
        learn.fit(steps=10**6)
    except Exception as error:
        Path(folder, f"killed.{learn.rank}.txt").write_text(f"{type(error).__name__}: {error}\n{learn.step}")
        stay(folder, "killed", {*range(learn.team.size)} - {1})
        raise


def fails_behind(folder):
    "Rank 1 fails while all write behind the training; all have another learner, as a notebook has those of other cells."
    import torch.distributed.checkpoint as dcp

    write, kept = dcp.FileSystemWriter.write_data, learner()
    kept.fit(1)

    def act(learn):
        if learn.step == 6:
            dcp.FileSystemWriter.write_data = lambda *a, **kw: ranks.time.sleep(learn.rank > 0) or write(*a, **kw)
            learn.save("in flight", background=True)

    def fault(learn):
        if learn.step == 7 and learn.rank == 1:
            raise RuntimeError("no process group puts the disk out")  # no word of torch's

    cbs = [On("before_batch", act), On("after_forward", fault)]
    learn = learner(run=folder / "fails_behind", distributed=APART, save_every="none", cbs=cbs)
    try:
        learn.fit(steps=100)
    except Exception as error:
        Path(folder, f"fails_behind.{learn.rank}.txt").write_text(f"{type(error).__name__}: {error}")
    stay(folder, "fails_behind", {*range(learn.team.size)})
    raise SystemExit(1)


def fails_and_killed(folder):
    "Two ends of the same processes, one after the other, each while parts are written behind the training."
    import torch.distributed.checkpoint as dcp

    write = dcp.FileSystemWriter.write_data
    with contextlib.suppress(SystemExit):
        fails_behind(folder)
    dcp.FileSystemWriter.write_data = write
    ranks.anew(folder, "killed")
    killed(folder)


THERE = {FSDP: ("whole_numbers", "gan_every", "gan_at_once", "early", "bad_steps", "averaged", "steered", "asked_for"),
         HOLD: ("unused", "frozen_turns")}  # as ranks.py has them
SCENARIOS = {name: partial(under, how, ranks.SCENARIOS[name]) for how, names in THERE.items() for name in names} | {
    f.__name__: f for f in (
        plain, adamw, ddp, accumulated, gan_penalty, gan_norms, bounded, spectral, tied, wrapped, cancels, cancels_others,
        interrupted, commanded, saved, saved_apart, behind, falls_back, alone, resumed, resumed_apart, resumed_alone, mixed,
        narrow, refused, dies, fails_and_killed)}  # fmt: skip


if __name__ == "__main__":
    ranks.told = told
    ranks.main(SCENARIOS)
