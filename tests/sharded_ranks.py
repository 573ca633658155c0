"""What each rank of a test of sharded parameters does: `torchrun sharded_ranks.py FOLDER NAME…`, as ranks.py does for ddp."""
import faulthandler
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
import ranks  # noqa: E402
from ranks import VALID, Half, HalfWay, Steering, loader, net  # noqa: E402

from trainkit.callback import On  # noqa: E402
from trainkit.callbacks.average import EMA  # noqa: E402
from trainkit.callbacks.clip import ClipGradNorm  # noqa: E402
from trainkit.distributed import Distributed  # noqa: E402
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


def whole_numbers(folder):
    torch.manual_seed(0)
    x, y = torch.randint(-4, 5, (16, 3)).float(), torch.randint(-4, 5, (16, 1)).float()
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0, 2.0]])), model.bias.zero_()
    learn = learner(model, DataLoader(TensorDataset(x, y), batch_size=8), OptimBuilder("sgd", lr=0.125))
    learn.fit(1)
    return told(learn)


def unused(folder):
    learn = learner(Half(), loader(), OptimBuilder("adamw", lr=0.01, weight_decay=0.1), distributed=HOLD)
    learn.fit(2)
    return told(learn)


def gan(folder, **kw):
    was, ranks.DDP = ranks.DDP, kw.pop("distributed", FSDP)
    try:
        return ranks.gan(folder, **kw)
    finally:
        ranks.DDP = was


def gan_every(folder):
    return gan(folder, n_critic=2)


def gan_at_once(folder):
    return gan(folder, updates="simultaneous")


def gan_penalty(folder):
    return gan(folder, penalties=[HalfWay()], distributed=HOLD)


def gan_norms(folder):
    return gan(folder, batch_norm=True)


def averaged(folder):
    learn = learner(cbs=EMA(0.9, warmup=False))
    learn.fit(2)
    ema = learn.cbs.get(EMA)
    return told(learn, averages=ema.averages["model"], counts=ema.counts)


def steered(folder):
    learn = learner(run=folder / "steered", cbs=Steering())
    rates = []
    learn.add(On("after_turn", lambda learn: rates.append((learn.step, learn.player.opt.param_groups[0]["lr"]))))
    learn.add(On("after_batch", lambda learn: learn.cbs.get(Steering) and learn.step == 8 and learn.remove(Steering)))
    learn.fit(9)
    asked = [(e.what, e.step, e.error) for e in learn.journal.entries if e.id and e.source == "panel"]
    return told(learn, rates=rates, asked=asked)


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


SCENARIOS = {f.__name__: f for f in (
    plain, adamw, ddp, accumulated, whole_numbers, unused, gan_every, gan_at_once, gan_penalty, gan_norms, averaged, steered,
    saved, saved_apart, alone, resumed, resumed_apart, resumed_alone, mixed, refused, dies)}  # fmt: skip


def main():
    faulthandler.dump_traceback_later(300, exit=True)
    folder, *names = sys.argv[1:]
    ranks.told = told
    for name in names:
        found = SCENARIOS[name](Path(folder))
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(found, Path(folder, f"{name}.pt"))


if __name__ == "__main__":
    main()
