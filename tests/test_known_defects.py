"""What four training systems got wrong, each as a test that their behaviour would fail.

The letter in a test's name says whose it was: A audiozen, B BasicTS, T torchgan, S super-resolution.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ways import same, same_weights

from trainkit.callback import Callback, CancelStep, On
from trainkit.callbacks.batches import AuxLoss
from trainkit.callbacks.clip import ClampWeights, ClipGradNorm
from trainkit.callbacks.stopping import EarlyStopping
from trainkit.gan.learner import GANLearner
from trainkit.gan.penalties import GradientPenalty
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.state import RestoreError

X = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def learner(loss="mse", opt=None, run=None, valid=False, **kw):
    torch.manual_seed(0)
    dls = DataLoader(TensorDataset(X, Y), batch_size=4)
    opt = opt or OptimBuilder("sgd", lr=0.05)
    return Learner(nn.Linear(3, 1), (dls, dls) if valid else dls, loss, opt, front="none", run=run, **kw)


def moved(learn, steps=8):
    before = learn.model.weight.detach().clone()
    learn.fit(steps=steps)
    return (learn.model.weight - before).norm().item()


def test_A1_clipping_reaches_the_update():
    assert moved(learner(cbs=ClipGradNorm(1e-9))) < 1e-8 < 1e-2 < moved(learner(cbs=ClipGradNorm(1e9)))


def test_A2_no_clipping_is_no_crash():
    learn = learner(cbs=ClipGradNorm(math.inf))
    learn.fit(steps=2)
    assert len(learn.history.scalars["train/grad_norm"][0]) == 2
    with pytest.raises(ValueError, match="max_norm"):
        ClipGradNorm(0)


def test_A3_the_schedule_counts_updates():
    learn = learner(opt=OptimBuilder("sgd", lr=1e-3, schedule="linear"), accumulate=2)
    rates = []
    learn.add(On("before_step", lambda l: rates.append(l.player.schedule.lr[0])))
    learn.fit(epochs=2)
    assert rates == pytest.approx([1e-3 * (1 - i / 8) for i in range(8)])  # and not 0 for the last of 16 batches


def test_A4_the_warm_up_wastes_no_update():
    learn = learner(opt=OptimBuilder("sgd", lr=0.1, warmup=4))
    learn.fit(steps=6)
    assert learn.history.scalars["lr/model"][1].tolist() == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])


def test_A5_steps_are_steps_not_epochs():
    learn = learner()
    learn.fit(steps=5)  # of 8 batches an epoch
    assert (learn.step, learn.epoch) == (5, 0)


def test_A6_an_unknown_schedule_is_said_when_it_is_typed():
    with pytest.raises(ValueError, match="unknown scheduler 'constant_with_warmup'; accepted: .*constant, cosine"):
        OptimBuilder("sgd", schedule="constant_with_warmup")


def test_B1_the_last_step_runs():
    for n in (1, 4, 20):
        learn = learner()
        learn.fit(steps=n)
        assert learn.step == n == learn.players[0].updates


def test_B2_an_auxiliary_loss_has_an_effect():
    def aux(learn):
        return 1000 * learn.model.weight.square().sum()

    plain, helped = learner(), learner(opt=OptimBuilder("sgd", lr=1e-4), cbs=AuxLoss(aux))
    plain.fit(steps=4)
    helped.fit(steps=4)
    assert not torch.equal(plain.model.weight, helped.model.weight)
    twin = nn.Linear(3, 1)
    twin.load_state_dict(learner().model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-4)
    for i in range(0, 16, 4):
        (F.mse_loss(twin(X[i : i + 4]), Y[i : i + 4]) + 1000 * twin.weight.square().sum()).backward()
        optimizer.step(); optimizer.zero_grad()
    torch.testing.assert_close(helped.model.weight, twin.weight)


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_B3_accumulation_is_the_mean_and_leaves_nothing_over(accumulate):
    learn = learner(accumulate=accumulate)
    learn.fit(epochs=1)
    twin = nn.Linear(3, 1)
    twin.load_state_dict(learner().model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    for i in range(0, 32, 4 * accumulate):
        rows = slice(i, i + 4 * accumulate)
        F.mse_loss(twin(X[rows]), Y[rows]).backward()
        optimizer.step(); optimizer.zero_grad()
    torch.testing.assert_close(learn.model.weight, twin.weight)
    assert learn.model.weight.grad is None and not learn.players[0].window


def test_B4_a_training_without_steps_ends():
    class NoStep(Callback):
        def after_loss(self, learn):
            raise CancelStep

    learn = learner(cbs=NoStep())
    assert moved(learn, steps=10) == 0 and (learn.step, learn.players[0].updates) == (10, 0)


def scaled_mse(pred, target, scale=2.0):
    return scale * F.mse_loss(pred, target)


def closure(scale):
    return lambda pred, target: scale * F.mse_loss(pred, target)


@pytest.mark.parametrize("loss", [F.mse_loss, scaled_mse, partial(scaled_mse, scale=2.0), closure(2.0), nn.MSELoss()])
def test_B6_any_callable_is_a_loss_with_its_defaults_and_closures(loss):
    learn = learner(loss)
    learn.fit(steps=1)
    expected = F.mse_loss(learner().model(X[:4]), Y[:4]).item() * (1 if loss is F.mse_loss or isinstance(loss, nn.Module) else 2)
    assert learn.history.last("train/loss") == pytest.approx(expected)


def test_B7_a_training_that_diverged_is_stopped():
    learn = learner(opt=OptimBuilder("sgd", lr=1e6), valid=True, cbs=EarlyStopping(patience=3))
    learn.fit(epochs=30)
    assert learn.state == "stopped" and learn.epoch < 30 and not math.isfinite(learn.history.last("valid/loss"))


def test_B8_a_checkpoint_that_lacks_a_part_is_refused_and_a_whole_one_resumes(tmp_path):
    opt = OptimBuilder("adam", lr=0.1, schedule={"name": "one_cycle"})
    straight, first = learner(opt=opt), learner(opt=opt, run=tmp_path / "run")
    straight.fit(steps=12)
    first.add(stop := On("after_batch", lambda l: l.stop() if l.step == 7 else None))
    first.fit(steps=12)
    first.remove(stop)
    second = learner(opt=opt, run=tmp_path / "run")
    state, _ = second.checkpoints.load()
    for part in ("optimizer", "schedules", "modules"):
        broken = {**state, "players": {"model": {k: v for k, v in state["players"]["model"].items() if k != part}}}
        before = [p.detach().clone() for p in second.model.parameters()]
        with pytest.raises((RestoreError, KeyError)):
            second.load_state_dict(broken)
        same(before, [p.detach().clone() for p in second.model.parameters()])
        assert second.step == 0
    second.restore()
    second.fit()
    same_weights(straight, second)


def test_B9_nothing_is_renamed_before_the_new_one_is_there(tmp_path, monkeypatch):
    learn = learner(run=tmp_path / "run")
    learn.fit(epochs=1)
    names = sorted(p.name for p in learn.checkpoints.folder.iterdir())
    monkeypatch.setattr("trainkit.storage.torch.save", lambda *a, **k: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(Exception, match="killed here"):
        learn.save()
    assert sorted(p.name for p in learn.checkpoints.folder.iterdir()) == names


def test_B10_a_debug_callback_and_more_epochs_change_no_identity(tmp_path):
    first = learner(run=tmp_path / "run")
    first.fit(epochs=1)
    second = learner(run=tmp_path / "run", cbs=On("after_batch", lambda learn: None))
    second.restore()
    second.fit(epochs=5)
    assert (second.step, second.epoch) == (48, 6)


@pytest.mark.parametrize("shape", ["cosine", "linear", "cosine_restarts", "polynomial", "wsd", "one_cycle"])
def test_B16_nothing_rises_behind_its_end(shape):
    learn = learner(opt=OptimBuilder("sgd", lr=0.1, schedule=shape, total=8))
    learn.fit(steps=8)
    last = learn.players[0].schedule.lr[0]
    seen = []
    learn.add(On("after_step", lambda l: seen.append(l.players[0].schedule.lr[0])))
    learn.fit(steps=4, schedule="hold")  # twelve updates: no multiple of the length, where the cosine would be back at 0
    assert seen == [last] * 4 and last <= 0.1 / 25 and learn.players[0].schedule.done


def test_T6_schedules_are_saved(tmp_path):
    plan = {"name": "MultiStepLR", "milestones": [2, 4], "gamma": 0.1, "by": "epoch"}
    first = learner(opt=OptimBuilder("sgd", lr=1.0, schedule=plan), run=tmp_path / "run")
    rates = []
    note = On("before_epoch", lambda l: rates.append(round(l.players[0].schedule.lr[0], 6)))
    first.add(note)
    first.fit(epochs=3)
    second = learner(opt=OptimBuilder("sgd", lr=1.0, schedule=plan), run=tmp_path / "run", cbs=note)
    second.restore()
    second.fit(epochs=3)
    assert rates == [1, 1, 0.1, 0.1, 0.01, 0.01]


def test_T10_n_critic_counts_steps_of_players_not_loss_objects():
    g, d = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    gan = GANLearner(g, d, [X[:8]] * 20, "wasserstein", OptimBuilder("sgd", lr=0.01), n_critic=4, latent=2, front="none",
                     penalties=[GradientPenalty(10.0)])  # fmt: skip
    order = []
    gan.add(On("after_step", lambda l: order.append(l.player.name[0])))
    gan.fit(steps=20)
    assert [p.updates for p in gan.players] == [20, 5] and "".join(order) == "ddddg" * 5


def test_T16_weights_are_inside_the_clamp_after_the_step():
    learn = learner(opt=OptimBuilder("sgd", lr=1.0), cbs=ClampWeights(0.01))
    seen = []
    learn.add(On("after_turn", lambda l: seen.append(max(p.abs().max().item() for p in l.model.parameters()))))
    learn.fit(steps=5)
    assert max(seen) == pytest.approx(0.01)


def test_S3_fewer_steps_than_are_done_is_no_endless_training():
    learn = learner()
    learn.fit(steps=6)
    learn.fit(steps=0)
    assert learn.step == 6
    with pytest.raises(ValueError, match="steps=…"):
        learn.fit(steps=-2)
