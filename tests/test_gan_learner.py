"Two players: cadence, labels, reuse, resumption, and what torchgan's trainer got wrong."

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit.callback import CancelTurn, On
from trainkit.gan.learner import GANLearner
from trainkit.gan.losses import LossPair
from trainkit.gan.models import DCGANDiscriminator, DCGANGenerator
from trainkit.gan.penalties import R1, GradientPenalty
from trainkit.optim import OptimBuilder

G = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.rand(20, 1, 16, 16, generator=G) * 2 - 1, torch.arange(20) % 3
POINTS = torch.randn(40, 2, generator=G)


def flat_gan(dls=None, **kw):
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    d = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(8, 1), nn.Flatten(0))
    dls = DataLoader(TensorDataset(POINTS), batch_size=8, shuffle=True) if dls is None else dls
    return GANLearner(g, d, dls, **({"opt": OptimBuilder("adam", lr=1e-3), "latent": 2, "front": "none"} | kw))


def image_gan(num_classes=0, dls=None, **kw):
    torch.manual_seed(0)
    g = DCGANGenerator(8, out_size=16, out_channels=1, channels=4, num_classes=num_classes)
    d = DCGANDiscriminator(in_size=16, in_channels=1, channels=4, num_classes=num_classes)
    dls = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8) if dls is None else dls  # 8 + 8 + 4
    return GANLearner(g, d, dls, front="none", **kw)


def weights(learn):
    return [v.clone() for p in learn.players for m in p.modules.values() for v in m.state_dict().values()]


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(weights(a), weights(b)))


@pytest.mark.parametrize("penalties", [[], [GradientPenalty(10.0)], [GradientPenalty(10.0), R1(1.0)]])
@pytest.mark.parametrize("n_critic,n_gen,d,g", [(1, 1, 20, 20), (5, 1, 20, 4), (1, 4, 5, 20)])
def test_cadence_counts_steps_not_terms(penalties, n_critic, n_gen, d, g):
    "torchgan: with a penalty the generator moved twice as often, and the critic made two steps a batch (T10, T11)."
    gan = flat_gan(loss="wasserstein", penalties=penalties, n_critic=n_critic, n_gen=n_gen)
    moves = []
    gan.add(On("after_step", lambda learn: moves.append((learn.step, learn.player.name))))
    gan.fit(steps=20)
    assert [p.updates for p in gan.players] == [d, g]
    assert moves.count((0, "discriminator")) == (n_gen == 1)
    if n_critic == n_gen == 1:
        assert moves[:2] == [(0, "discriminator"), (0, "generator")]
    assert gan.step == 20


def test_terms_make_one_step_on_their_sum():
    size = {"size": (lambda r: r.fake.square().mean(), 0.5)}
    gan = flat_gan(loss="wasserstein", penalties=[GradientPenalty(10.0)], generator_terms=size)
    gan.fit(steps=6)
    s = {name: values for name, (_, values) in gan.history.scalars.items()}
    d, g = "train/discriminator/", "train/generator/"
    np.testing.assert_allclose(s[d + "loss"], s[d + "adversarial"] + s[d + "gradient_penalty"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(s[g + "loss"], s[g + "adversarial"] + 0.5 * s[g + "size"], rtol=1e-5, atol=1e-6)


def test_penalty_sends_no_gradient_into_the_generator():
    gan = flat_gan(loss="wasserstein", penalties=[GradientPenalty(10.0)])
    seen = []
    gan.add(On("after_backward", lambda learn: seen.append(
        learn.player.name == "generator" or all(p.grad is None for p in learn.generator.parameters()))))
    gan.fit(steps=3)
    assert len(seen) == 6 and all(seen)


@pytest.mark.parametrize("labels", ["none", "dataset", "sampled"])
def test_labels(labels):
    gan = image_gan(0 if labels == "none" else 3, labels=labels)
    rounds = []
    gan.add(On("after_forward", lambda learn: rounds.append((learn.player.name, learn.pred))))
    gan.fit(epochs=2)
    assert gan.step == 6  # the last batch of an epoch holds 4 (torchgan T21)
    for _, r in rounds:
        assert len(r.fake) == len(r.real)
        if labels == "none":
            assert r.real_labels is None and r.fake_labels is None
        else:
            assert (labels == "dataset") == torch.equal(r.real_labels, r.fake_labels) or labels == "sampled"
            assert r.fake_labels.min() >= 0 and r.fake_labels.max() < 3
    assert gan.sample(5).shape == (5, 1, 16, 16)


def test_sampled_labels_differ_from_the_batchs():
    gan = image_gan(3, labels="sampled")
    differ = []
    gan.add(On("after_forward", lambda learn: differ.append(not torch.equal(learn.pred.real_labels, learn.pred.fake_labels))))
    gan.fit(epochs=2)
    assert any(differ)


def test_sampling_a_chosen_label():
    gan = image_gan(3, labels="dataset")
    seen = []
    hook = gan.generator.register_forward_pre_hook(lambda m, args: seen.append(args[1].tolist()))
    gan.sample(4, labels=2)
    gan.sample(2, labels=[0, 1])
    gan.sample(4)
    hook.remove()
    assert seen == [[2, 2, 2, 2], [0, 1], [0, 1, 2, 0]]


@pytest.mark.parametrize("dls", [
    lambda: DataLoader(TensorDataset(POINTS), batch_size=8), lambda: POINTS, lambda: POINTS.numpy(),
    lambda: [{"points": POINTS[:8]}, {"points": POINTS[8:16]}], lambda: [POINTS[:8], POINTS[8:11]], lambda: [(POINTS, None)],
])  # fmt: skip
def test_unlabelled_batches_of_every_kind(dls):
    gan = flat_gan(dls())
    before = weights(gan)
    gan.fit(epochs=2)
    assert gan.epoch == 2 and not torch.equal(before[0], weights(gan)[0])


def test_labels_that_are_missing_are_said():
    gan = image_gan(3, [IMAGES], labels="dataset")
    with pytest.raises(ValueError, match="needs labelled batches"):
        gan.fit(1)


def test_reuse_gives_the_generator_the_same_gradient_as_its_own_forward():
    "With the fakes reused, G's gradient is that of -log s(D(G(z))) for exactly those fakes, through the updated D."
    gan = flat_gan(reuse_forward=True)
    kept, checked = {}, []

    def keep(learn):
        kept[learn.player.name] = learn.pred.fake.detach().clone()

    def check(learn):
        if learn.player.name == "generator":
            assert torch.equal(kept["discriminator"], kept["generator"])
            fake = learn.pred.fake
            checked.append(all(p.grad is not None for p in learn.generator.parameters()) and fake.requires_grad)

    gan.add(On("after_forward", keep), On("after_backward", check))
    gan.fit(steps=5)
    assert checked == [True] * 5


def test_a_relativistic_pair_sees_the_real_logits():
    def worse(a, b):
        return nn.functional.softplus(b - a).mean()

    gan = flat_gan(loss=LossPair(lambda fake, real: worse(fake, real), worse))
    gan.fit(steps=3)
    assert np.isfinite(gan.history.last("train/generator/loss"))


def test_one_penalty_needs_no_list():
    gan = flat_gan(loss="wasserstein", penalties=GradientPenalty(1.0), opt={"generator": "sgd"})
    gan.fit(steps=1)
    assert "train/discriminator/gradient_penalty" in gan.history.names()
    assert [type(p.opt).__name__ for p in gan.players] == ["AdamW", "SGD"]


def test_nothing_is_kept_of_a_round_that_was_cut_short():
    gan = flat_gan(reuse_forward=True)
    gan.add(On("before_turn", lambda learn: (_ for _ in ()).throw(CancelTurn()) if learn.player.name == "generator" else None))
    gan.fit(steps=2)
    assert gan._kept is None


def test_each_player_its_optimizer():
    gan = flat_gan(opt={"generator": OptimBuilder("adam", lr=1e-4), "discriminator": OptimBuilder("sgd", lr=4e-4)})
    d, g = gan.players
    assert (type(d.opt).__name__, d.opt.param_groups[0]["lr"]) == ("SGD", 4e-4)
    assert (type(g.opt).__name__, g.opt.param_groups[0]["lr"]) == ("Adam", 1e-4)


@pytest.mark.parametrize("at", [3, 5, 8])
@pytest.mark.parametrize("kw", [
    {}, {"n_critic": 3, "loss": "wasserstein", "penalties": [GradientPenalty(10.0)]}, {"reuse_forward": True},
    {"opt": OptimBuilder("adam", lr=1e-3, schedule="cosine", total=10)},
])  # fmt: skip
def test_resume_is_exact(at, kw, tmp_path):
    straight = flat_gan(**kw)
    straight.fit(epochs=2)  # 5 batches each
    first = flat_gan(run=tmp_path / "run", **kw)
    first.add(On("after_batch", lambda learn: learn.stop() if learn.step == at else None))
    first.fit(epochs=2)
    torch.rand(9)
    second = flat_gan(run=tmp_path / "run", **kw)
    second.restore("last")
    assert second.step == at
    assert torch.equal(second.sample(16), first.sample(16)) and torch.equal(second.sample_fixed(), first.sample_fixed())
    second.fit()
    assert second.step == 10
    assert_same(straight, second)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision(precision):
    gan = image_gan(precision=precision)
    gan.fit(epochs=4)
    assert all(torch.isfinite(w).all() for w in weights(gan) if w.is_floating_point())
    assert gan.sample(4).dtype == torch.float32


def test_sampling_leaves_modes_and_gradients():
    gan = flat_gan()
    gan.sample(4)
    assert gan.generator.training and not gan.sample(4).requires_grad and gan.state == "idle"


def test_validation_has_both_players_losses():
    gan = flat_gan((DataLoader(TensorDataset(POINTS), batch_size=8), POINTS))
    gan.fit(1)
    assert {"valid/generator", "valid/discriminator"} <= {*gan.history.names()}


@pytest.mark.parametrize("kw,message", [
    ({"n_critic": 0}, "n_critic must be"), ({"n_critic": 2, "n_gen": 2}, "must move in every batch"),
    ({"labels": "all"}, "received 'all'"),
    ({"labels": "sampled"}, "needs num_classes"), ({"latent": None}, "how wide"), ({"loss": "hunge"}, "hinge"),
    ({"devise": "cpu"}, "device"),
])  # fmt: skip
def test_bad_arguments(kw, message):
    with pytest.raises((ValueError, TypeError), match=message):
        flat_gan(**kw)


def test_a_loss_or_penalty_that_is_a_callback_attaches_itself():
    from trainkit.gan.penalties import R1, Lazy

    lazy = Lazy(R1(10.0), every=2)
    learn = flat_gan(penalties=lazy)
    assert learn.cbs.get(Lazy) is lazy
    assert flat_gan(penalties=[lazy], cbs=lazy).cbs.get(Lazy) is lazy
