"Learners of more than two networks: who moves when, against loops written by hand, and resumption to the bit."

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset
from ways import resumes

from trainkit.callback import CancelBatch, CancelTurn, On
from trainkit.gan.aae import AAELearner
from trainkit.gan.codes import Codes, code_surprise
from trainkit.gan.game import GameLearner
from trainkit.gan.learner import GANLearner, find_loss
from trainkit.gan.pairs import Joined, MetricGANLearner, Pix2PixLearner
from trainkit.gan.penalties import R1, R2, GradientPenalty, Lazy
from trainkit.gan.schemes import InfoGANLearner, WGANGPLearner
from trainkit.gan.several import D2GANLearner, GMANLearner, hardened
from trainkit.gan.unpaired import CycleGANLearner, ImagePool, Unpaired
from trainkit.optim import OptimBuilder
from trainkit.player import Player

G = torch.Generator().manual_seed(0)
A, B, LABELS = torch.randn(40, 2, generator=G), torch.randn(40, 2, generator=G) + 1, torch.arange(40) % 3
ADAM = OptimBuilder("adam", lr=1e-2, betas=(0.5, 0.9), fused=False)
CODES = Codes(noise=2, categorical=(3,), continuous=1)


def generator(n_in=2, n_out=2):
    return nn.Sequential(nn.Linear(n_in, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, n_out))


def judge(n_in=2):
    return nn.Sequential(nn.Linear(n_in, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1), nn.Flatten(0))


class Body(nn.Module):
    "A discriminator with features, and a head that reads codes from them."

    def __init__(self, outputs=0, talks=True):
        super().__init__()
        self.body, self.logit = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2)), nn.Linear(8, 1)
        self.q, self.talks, self.calls = (nn.Linear(8, outputs) if outputs else None), talks, 0

    def features(self, x):
        self.calls += 1
        return self.body(x)

    def codes(self, x):
        return self.q(self.features(x))

    def forward(self, x):
        h = self.features(x)
        logits = self.logit(h).flatten()
        return (logits, {"codes": self.q(h)}) if self.q is not None and self.talks else logits


class Conditional(nn.Module):
    latent_dim, num_classes = 2, 3

    def __init__(self):
        super().__init__()
        self.net = generator(5)

    def forward(self, z, labels):
        return self.net(torch.cat([z, F.one_hot(labels, 3).float()], 1))


def loader(*data, **kw):
    return DataLoader(TensorDataset(*data), batch_size=8, shuffle=True, **kw)  # 5 batches


def distance(candidates, references):
    return [max(0.0, 1 - int(10 * d) / 10) for d in (candidates - references).norm(dim=1).tolist()]


def infogan(**kw):
    d = Body(CODES.parameters)
    return InfoGANLearner(generator(CODES.width), d, loader(A), codes=CODES, q=d.q, **kw)


def infogan_apart(**kw):
    return InfoGANLearner(generator(CODES.width), Body(), loader(A), codes=CODES, q=nn.Linear(8, CODES.parameters), **kw)


def acgan(**kw):
    d = Body(3)
    told = {"classes": lambda r: F.cross_entropy(r.fake_outputs["codes"], r.fake_labels)}
    return GANLearner(Conditional(), d, loader(A, LABELS), labels="sampled", discriminator_labels=False,
                      generator_terms=told, discriminator_terms=told, **kw)  # fmt: skip


def cyclegan(**kw):
    return CycleGANLearner(generator(), generator(), judge(), judge(), Unpaired(A, B[:30]), pool=12, batch_size=8, **kw)


SCHEMES = {
    "gan": lambda **kw: GANLearner(generator(), judge(), loader(A), latent=2, **kw),
    "gan, both at once": lambda **kw: GANLearner(generator(), judge(), loader(A), latent=2, updates="simultaneous", **kw),
    "WGAN-GP": lambda **kw: WGANGPLearner(generator(), judge(), loader(A), latent=2, n_critic=3, **kw),
    "ACGAN": acgan,
    "InfoGAN": infogan,
    "InfoGAN, head apart": infogan_apart,
    "GMAN": lambda **kw: GMANLearner(generator(), [judge(), judge()], loader(A), latent=2, hardness=1.0, **kw),
    "GMAN, one player": lambda **kw: GMANLearner(generator(), [judge(), judge()], loader(A), latent=2, together=True, **kw),
    "D2GAN": lambda **kw: D2GANLearner(generator(), judge(), judge(), loader(A), latent=2, n_critic=2, **kw),
    "pix2pix": lambda **kw: Pix2PixLearner(generator(), Joined(judge(4)), loader(A, B), **kw),
    "MetricGAN": lambda **kw: MetricGANLearner(generator(), Joined(judge(4)), loader(A, B), distance, score_inputs=True, **kw),
    "CycleGAN": cyclegan,
    "CycleGAN, both at once": lambda **kw: cyclegan(updates="simultaneous", **kw),
    "AAE": lambda **kw: AAELearner(generator(2, 1), generator(1, 2), judge(1), loader(A), latent=1, penalties=R1(0.1), **kw),
}


def make(name, run=None, **kw):
    torch.manual_seed(0)
    return SCHEMES[name](**({"opt": ADAM, "seed": 3, "run": run, "front": "none"} | kw))


# --- every scheme -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_resume_is_exact(name, tmp_path):
    resumes(lambda run: make(name, run), tmp_path, steps=8, at=(4,))


def test_resume_with_gradients_that_wait(tmp_path):
    resumes(lambda run: make("gan, both at once", run, accumulate=2), tmp_path, steps=8, at=(3,))


def gradients(learn):
    return {id(p): None if p.grad is None else p.grad.clone() for player in learn.players for p in player.parameters()}


def norms(learn):
    return {id(m): (m, copy.deepcopy(m.state_dict())) for m in learn.modules() if isinstance(m, _BatchNorm)}


def moved(state, now):
    return any(not torch.equal(state[key], now[key]) for key in ("running_mean", "running_var", "num_batches_tracked"))


@pytest.mark.parametrize("name", SCHEMES)
def test_frozen_exactly_when_it_is_not_its_players_turn(name):
    learn, before, turns = make(name), {}, []

    def begin(learn):
        before.update(grads=gradients(learn), norms=norms(learn))

    def backward(learn):
        own = {id(p) for p in learn.player.parameters()}
        every = {id(p): p for player in learn.players for p in player.parameters()}
        assert all(p.requires_grad == (i in own) for i, p in every.items())
        now = gradients(learn)
        strange = [i for i in every if i not in own]
        assert strange
        for i in strange:
            was = before["grads"][i]
            assert (was is None and now[i] is None) or torch.equal(was, now[i])
            assert was is None or learn.updates == "simultaneous"
        assert any(now[i] is not None and now[i].abs().sum() > 0 for i in own)

    def end(learn):
        own = {id(m) for module in learn.player.modules.values() for m in module.modules()}
        changed = {i for i, (m, state) in before["norms"].items() if moved(state, m.state_dict())}
        assert changed <= own
        turns.append((learn.player.name, bool(changed)))

    learn.add(On("before_turn", begin), On("after_backward", backward), On("after_turn", end))
    learn.fit(steps=6)
    assert {player.name for player in learn.players} == {name for name, changed in turns if changed}
    assert all(p.requires_grad for player in learn.players for p in player.parameters())
    assert all(m.track_running_stats for m, _ in norms(learn).values())


@pytest.mark.parametrize("name", SCHEMES)
def test_every_player_moves_and_every_term_is_on_record(name):
    learn = make(name)
    learn.fit(steps=6)
    assert {p.name: p.updates for p in learn.players} == {p.name: 6 // p.every for p in learn.players}
    for player in learn.players:
        total = sum(player.weights.get(term, 1.0) * learn.history.last(f"train/{player.name}/{term}") for term in player.seen)
        assert math.isclose(total, learn.history.last(f"train/{player.name}/loss"), rel_tol=1e-4, abs_tol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_validation_on_held_out_samples(name):
    learn = make(name)
    held_out = {"ACGAN": (A, LABELS)}.get(name, (A, B) if name.startswith(("pix", "Metric", "Cycle")) else (A,))
    found = learn.validate(DataLoader(TensorDataset(*held_out), batch_size=8))
    assert len(found) >= len(learn.players) and all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("name", ["gan", "InfoGAN", "AAE", "D2GAN", "ACGAN"])
def test_samples_change_nothing(name):
    looked, alone = make(name), make(name)
    looked.add(On("after_batch", lambda learn: (learn.sample(3), learn.sample_fixed(5))))
    looked.fit(steps=4)
    alone.fit(steps=4)
    assert torch.equal(looked.sample_fixed(), looked.sample_fixed()) and looked.sample(4).shape == (4, 2)
    for a, b in zip(looked.players, alone.players):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def weighted(learn, name):
    "What a player's loss on record should be, from its terms' values and weights."
    player = learn.player_named(name)
    return sum(player.weights.get(t, 1.0) * learn.history.last(f"train/{name}/{t}") for t in player.seen)


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_and_cadence_are_set_while_it_trains(name):
    learn, last = make(name), make(name).players[-1].name
    several = [p.name for p in learn.players if len(p.weights) > 1]
    called = getattr(learn, "cadences", {}).get(last, "every")

    def turn(learn):
        if learn.step == 3:
            for player in several:
                learn.set(f"weights.{[*learn.player_named(player).weights][-1]}", 0.125, player=player)
            learn.set(called, 4, player=last)

    learn.add(On("after_batch", turn))
    learn.fit(steps=12)
    for player in several:
        assert 0.125 in learn.player_named(player).weights.values()
        found = learn.history.last(f"train/{player}/loss")
        assert math.isclose(found, weighted(learn, player), rel_tol=1e-4, abs_tol=1e-5)
    assert learn.player_named(last).updates == 3 // make(name).player_named(last).every + 3  # then in steps 4, 8 and 12


@pytest.mark.parametrize("name", SCHEMES)
def test_resume_in_low_precision_with_gathered_gradients(name, tmp_path):
    gathered = {"accumulate": 3}
    if name in ("InfoGAN", "AAE"):  # whose players share parameters, and can't both leave a gradient there
        with pytest.raises(ValueError, match="their gradients would mix"):
            make(name, **gathered)
        gathered = {}
    resumes(lambda run: make(name, run, precision="bf16", **gathered), tmp_path, steps=7, at=(4,))


@pytest.mark.parametrize("name", ["gan, both at once", "InfoGAN", "CycleGAN"])
def test_compiled_it_trains_the_same(name):
    plain, compiled = make(name), make(name, compile={"backend": "eager"})
    for learn in plain, compiled:
        learn.fit(steps=3)
    for a, b in zip(plain.players, compiled.players):
        assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("name,kept", [("gan", "_kept"), ("GMAN", "_shared"), ("CycleGAN", "_made")])
@pytest.mark.parametrize("error", [CancelTurn, CancelBatch, ValueError])
def test_nothing_is_kept_for_the_next_batch(name, kept, error):
    "What one player leaves for the next belongs to one batch, however that ended."
    learn, seen = make(name, **({"reuse_forward": True} if name == "gan" else {})), []

    def strike(learn):
        seen.append(getattr(learn, kept) is not None)
        if learn.player is learn.players[-1]:
            raise error

    learn.add(On("before_turn", strike))
    if error is ValueError:
        with pytest.raises(ValueError):
            learn.fit(steps=1)
    else:
        learn.fit(steps=2)
    assert any(seen) and getattr(learn, kept) is None


# --- against loops written by hand ------------------------------------------------------------------------------------


def plain(n_in=2, n_out=2):
    return nn.Sequential(nn.Linear(n_in, 8), nn.Tanh(), nn.Linear(8, n_out))


def flat(n_in=2):
    return nn.Sequential(plain(n_in, 1), nn.Flatten(0))


def adam(*nets):
    return torch.optim.Adam([p for net in nets for p in net.parameters()], lr=1e-2, betas=(0.5, 0.9))


def descend(loss, opt, *all_opts):
    loss.backward()
    opt.step()
    for o in (opt, *all_opts):
        o.zero_grad()


def agree(ours, by_hand):
    for a, b in zip(ours, by_hand, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def twins(*nets):
    return copy.deepcopy(nets)


KW = {"opt": ADAM, "seed": 0, "front": "none"}
BATCHES = [A[:8], A[8:16], A[16:24]]
PAIRS = [(A[i : i + 8], B[i : i + 8]) for i in (0, 8, 16)]


def test_wgan_gp_is_one_step_on_the_sum():
    g, d = plain(), flat()
    hand_g, hand_d = twins(g, d)
    learn = WGANGPLearner(g, d, BATCHES * 2, latent=2, n_critic=2, weight=3.0, **KW)
    backwards = []
    learn.add(On("after_backward", lambda learn: backwards.append(learn.player.name)))
    learn.fit(epochs=1)
    opt_g, opt_d = adam(hand_g), adam(hand_d)
    torch.manual_seed(0)
    for step, x in enumerate(BATCHES * 2):
        fake = hand_g(torch.randn(8, 2)).detach()
        real_score, fake_score = hand_d(x), hand_d(fake)
        eps = torch.rand(8, 1)
        between = (eps * x + (1 - eps) * fake).requires_grad_()
        slope = torch.autograd.grad(hand_d(between).sum(), between, create_graph=True)[0].norm(dim=1)
        descend(fake_score.mean() - real_score.mean() + 3 * ((slope - 1) ** 2).mean(), opt_d)
        if step % 2:
            descend(-hand_d(hand_g(torch.randn(8, 2))).mean(), opt_g, opt_d)
    agree([g, d], [hand_g, hand_d])
    assert backwards == ["discriminator", "discriminator", "generator"] * 3


def test_wgan_gp_defaults_are_the_papers():
    learn = WGANGPLearner(plain(), flat(), BATCHES, latent=2, front="none")
    group = learn.players[0].opt.param_groups[0]
    assert [p.every for p in learn.players] == [1, 5] and (group["lr"], group["betas"]) == (1e-4, (0.0, 0.9))


@pytest.mark.parametrize("inside", [True, False])
def test_infogan_by_hand(inside):
    codes, g = Codes(noise=2, categorical=(3,), continuous=1), plain(6)
    d = Body(codes.parameters if inside else 0)
    d.body = plain(2, 8)
    q = d.q if inside else nn.Linear(8, codes.parameters)
    hand_g, hand_d, hand_q = twins(g, d, q)
    hand_q = hand_d.q if inside else hand_q
    learn = InfoGANLearner(g, d, BATCHES, codes=codes, q=q, weight=0.7, **KW)
    learn.fit(epochs=1)
    opt_g, opt_d = adam(hand_g, hand_q), adam(hand_d)
    torch.manual_seed(0)

    def logits(x):
        return hand_d.logit(hand_d.body(x)).flatten()

    for x in BATCHES:
        fake = hand_g(codes(8)).detach()
        descend(F.softplus(-logits(x)).mean() + F.softplus(logits(fake)).mean(), opt_d)
        z = codes(8)
        fake = hand_g(z)
        said = hand_q(hand_d.body(fake))
        descend(F.softplus(-logits(fake)).mean() + 0.7 * code_surprise(said, z, codes), opt_g, opt_d)
    agree([g, d, q], [hand_g, hand_d, hand_q])


def test_infogan_needs_no_second_forward():
    d = Body(CODES.parameters)
    learn = InfoGANLearner(generator(CODES.width), d, BATCHES, codes=CODES, q=d.q, **KW)
    learn.fit(steps=2)
    talking = d.calls
    silent = Body(CODES.parameters, talks=False)
    InfoGANLearner(generator(CODES.width), silent, BATCHES, codes=CODES, q=silent.q, **KW).fit(steps=2)
    assert (talking, silent.calls) == (6, 8)


def test_adversarial_autoencoder_by_hand():
    nets = plain(2, 1), plain(1, 2), flat(1)
    enc, dec, dis = twins(*nets)
    AAELearner(*nets, BATCHES, latent=1, **KW).fit(epochs=1)
    opt_r, opt_d, opt_g = adam(enc, dec), adam(dis), adam(enc)
    torch.manual_seed(0)
    for x in BATCHES:
        descend(F.mse_loss(dec(enc(x)), x), opt_r)
        codes, prior = enc(x).detach(), torch.randn(8, 1)
        descend(F.softplus(-dis(prior)).mean() + F.softplus(dis(codes)).mean(), opt_d)
        torch.randn(8, 1)  # the draws of the generator's round
        descend(F.softplus(-dis(enc(x))).mean(), opt_g, opt_d)
    agree(nets, [enc, dec, dis])


def test_a_labelled_autoencoder_decodes_what_it_is_told():
    class Decoder(nn.Module):
        latent_dim, num_classes = 1, 3

        def __init__(self):
            super().__init__()
            self.net = plain(4)

        def forward(self, z, labels):
            return self.net(torch.cat([z, F.one_hot(labels, 3).float()], 1))

    learn = AAELearner(plain(2, 1), Decoder(), flat(1), loader(A, LABELS), labels="dataset", penalties=R1(0.1), **KW)
    learn.fit(steps=2)
    assert learn.sample(4, labels=1).shape == (4, 2)
    assert not torch.equal(learn.reconstruct(A[:3], labels=0), learn.reconstruct(A[:3], labels=2))
    with pytest.raises(ValueError, match="needs labelled batches"):
        AAELearner(plain(2, 1), Decoder(), flat(1), [A], labels="dataset", **KW).fit(1)
    with pytest.raises(ValueError, match="received 'sampled'"):
        AAELearner(plain(2, 1), Decoder(), flat(1), [A], labels="sampled", **KW)


def test_cyclegan_by_hand():
    "The paper's objectives, halved: Zhu et al. 2017, eq. 3 and §4 (λ = 10), §5.2 (identity 0.5 λ)."
    nets = plain(), plain(), flat(), flat()
    there, back, d_a, d_b = twins(*nets)
    CycleGANLearner(*nets, PAIRS, pool=0, **KW).fit(epochs=1)
    opt_g, opt_d = adam(there, back), adam(d_a, d_b)
    for a, b in PAIRS:
        fake_b, fake_a = there(a), back(b)
        gan = ((d_b(fake_b) - 1) ** 2).mean() + ((d_a(fake_a) - 1) ** 2).mean()
        cycle = (back(fake_b) - a).abs().mean() + (there(fake_a) - b).abs().mean()
        same = (there(b) - b).abs().mean() + (back(a) - a).abs().mean()
        descend((gan + 10 * cycle + 5 * same) / 2, opt_g, opt_d)
        loss = sum((d(x) - 1).square().mean() + d(fake.detach()).square().mean()
                   for d, x, fake in ((d_a, a, fake_a), (d_b, b, fake_b)))  # fmt: skip
        descend(loss / 2, opt_d)
    agree(nets, [there, back, d_a, d_b])


def test_pix2pix_by_hand():
    g, d = plain(), flat(4)
    hand_g, hand_d = twins(g, d)
    Pix2PixLearner(g, Joined(d), PAIRS, l1=10.0, **KW).fit(epochs=1)
    opt_g, opt_d = adam(hand_g), adam(hand_d)
    for a, b in PAIRS:
        real, fake = hand_d(torch.cat([a, b], 1)), hand_d(torch.cat([a, hand_g(a).detach()], 1))
        descend(F.softplus(-real).mean() + F.softplus(fake).mean(), opt_d)
        out = hand_g(a)
        descend(F.softplus(-hand_d(torch.cat([a, out], 1))).mean() + 10 * (out - b).abs().mean(), opt_g, opt_d)
    agree([g, d], [hand_g, hand_d])


@pytest.mark.parametrize("plus", [False, True])
def test_metricgan_by_hand(plus):
    g, d = plain(), flat(4)
    hand_g, hand_d = twins(g, d)
    learn = MetricGANLearner(g, Joined(d), PAIRS, distance, target=0.9, score_inputs=plus, **KW)
    learn.fit(epochs=1)
    opt_g, opt_d, means = adam(hand_g), adam(hand_d), []
    for x, y in PAIRS:
        out = hand_g(x).detach()
        score = torch.tensor(distance(out, y))
        means.append(score.mean().item())
        loss = (hand_d(torch.cat([y, y], 1)) - 1).square().mean() + (hand_d(torch.cat([y, out], 1)) - score).square().mean()
        if plus:
            loss = loss + (hand_d(torch.cat([y, x], 1)) - torch.tensor(distance(x, y))).square().mean()
        descend(loss, opt_d)
        descend((hand_d(torch.cat([y, hand_g(x)], 1)) - 0.9).square().mean(), opt_g, opt_d)
    agree([g, d], [hand_g, hand_d])
    np.testing.assert_allclose(learn.history.scalars["train/discriminator/metric"][1], means, rtol=1e-5)


@pytest.mark.parametrize("together", [False, True])
def test_d2gan_by_hand(together):
    "Nguyen et al. 2017, eq. 1; both discriminators see the same fakes."
    g, d1, d2 = plain(), flat(), flat()
    hand_g, hand_1, hand_2 = twins(g, d1, d2)
    D2GANLearner(g, d1, d2, BATCHES, latent=2, alpha=0.3, beta=0.6, together=together, **KW).fit(epochs=1)
    opt_g, opt_1, opt_2 = adam(hand_g), adam(hand_1), adam(hand_2)
    torch.manual_seed(0)

    def score(d, x):
        return F.softplus(d(x))

    for x in BATCHES:
        fake = hand_g(torch.randn(8, 2)).detach()
        descend(-(0.3 * score(hand_1, x).log().mean() - score(hand_1, fake).mean()), opt_1)
        descend(-(-score(hand_2, x).mean() + 0.6 * score(hand_2, fake).log().mean()), opt_2)
        fake = hand_g(torch.randn(8, 2))
        descend(-score(hand_1, fake).mean() + 0.6 * score(hand_2, fake).log().mean(), opt_g, opt_1, opt_2)
    agree([g, d1, d2], [hand_g, hand_1, hand_2])


def test_simultaneous_by_hand():
    g, d = plain(), flat()
    hand_g, hand_d = twins(g, d)
    GANLearner(g, d, BATCHES, latent=2, updates="simultaneous", **KW).fit(epochs=1)
    opt_g, opt_d = adam(hand_g), adam(hand_d)
    torch.manual_seed(0)
    for x in BATCHES:
        fake = hand_g(torch.randn(8, 2)).detach()
        loss_d = F.softplus(-hand_d(x)).mean() + F.softplus(hand_d(fake)).mean()
        loss_g = F.softplus(-hand_d(hand_g(torch.randn(8, 2)))).mean()
        grads_d = torch.autograd.grad(loss_d, [*hand_d.parameters()])
        grads_g = torch.autograd.grad(loss_g, [*hand_g.parameters()])
        for net, grads, opt in (hand_d, grads_d, opt_d), (hand_g, grads_g, opt_g):
            for p, grad in zip(net.parameters(), grads):
                p.grad = grad
            opt.step()
    agree([g, d], [hand_g, hand_d])


# --- one after the other, or all at once ------------------------------------------------------------------------------


class Number(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value), dtype=torch.float64))


def bilinear(updates, lr, x=1.0, y=0.0, n=50, **kw):
    x, y = Number(x), Number(y)
    sgd = OptimBuilder("sgd", lr=lr)
    players = [Player("x", x, step=lambda learn, batch: x.value * y.value, opt=sgd),
               Player("y", y, step=lambda learn, batch: -x.value * y.value, opt=sgd)]  # fmt: skip
    game = GameLearner(players, [torch.zeros(1)] * n, updates=updates, front="none", **kw)
    path = [(x.value.item(), y.value.item())]
    game.add(On("cleanup_batch", lambda learn: path.append((x.value.item(), y.value.item()))))
    return game, path


@settings(max_examples=5, deadline=None)
@given(st.floats(0.01, 0.8), st.floats(-2, 2), st.floats(0.1, 2))
def test_a_bilinear_game(lr, x, y):
    "At once: outwards by √(1 + lr²) a step. In turns: for ever on x² + y² - lr·xy (Gidel et al. 2019)."
    game, path = bilinear("simultaneous", lr, x, y, n=12)
    game.fit(1)
    for step, point in enumerate(path):
        assert math.isclose(math.hypot(*point), math.hypot(x, y) * math.sqrt(1 + lr * lr) ** step, rel_tol=1e-9)
    game, path = bilinear("alternating", lr, x, y, n=12)
    game.fit(1)
    form = [a * a + b * b - lr * a * b for a, b in path]
    assert all(math.isclose(value, form[0], rel_tol=1e-9) for value in form)
    assert path[1] == pytest.approx((x - lr * y, y + lr * (x - lr * y)))


def test_whoever_moves_less_often_moves_from_the_same_point():
    game, path = bilinear("simultaneous", 0.1, 1.0, 1.0, n=2)
    game.players[1].every = 2
    game.fit(1)
    assert path[1] == pytest.approx((0.9, 1.0)) and path[2] == pytest.approx((0.8, 1.09))


def test_simultaneous_with_gathered_gradients():
    "Two batches make a step of each; both gradients of both batches are taken where the players stood."
    game, path = bilinear("simultaneous", 0.1, 1.0, 1.0, n=4, accumulate=2)
    game.fit(1)
    assert path[1] == (1.0, 1.0) and path[2] == path[3] == pytest.approx((0.9, 1.1)) and path[4] == pytest.approx((0.79, 1.19))


@pytest.mark.parametrize("event", ["before_turn", "after_loss", "before_step"])
@pytest.mark.parametrize("error", [CancelTurn, CancelBatch])
def test_what_was_called_off_makes_no_step_later(event, error):
    game, path = bilinear("simultaneous", 0.1, 1.0, 1.0, n=3)
    calls = []

    def act(learn):
        calls.append(learn.player.name)
        if learn.step == 0 and learn.player.name == "y":
            raise error

    game.add(On(event, act))
    game.fit(1)
    x_moved = error is CancelTurn or event == "before_step"
    assert path[1] == pytest.approx((0.9 if x_moved else 1.0, 1.0))
    x, y = path[1]
    assert path[2] == pytest.approx((x - 0.1 * y, y + 0.1 * x)) and all(p.window == [] for p in game.players)


def test_simultaneous_reuses_the_forward():
    learn = GANLearner(generator(), judge(), loader(A), latent=2, updates="simultaneous", reuse_forward=True, **KW)
    fakes, calls = {}, []
    learn.generator.register_forward_hook(lambda *args: calls.append(1))
    learn.add(On("after_forward", lambda learn: fakes.update({learn.player.name: learn.pred.fake.detach().clone()})))
    learn.fit(steps=3)
    assert torch.equal(fakes["discriminator"], fakes["generator"]) and len(calls) == 3
    assert learn.generator[1].num_batches_tracked == 3  # a forward that is both players' counts for the generator


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_simultaneous_in_low_precision(precision):
    learn = GANLearner(plain(), flat(), loader(A), latent=2, updates="simultaneous", precision=precision, **KW)
    learn.fit(steps=6)
    assert all(torch.isfinite(p).all() for player in learn.players for p in player.parameters())


def test_players_who_share_cannot_move_at_once():
    with pytest.raises(ValueError, match="'reconstruction' and 'generator' share"):
        make("AAE", updates="simultaneous")
    with pytest.raises(ValueError, match="share"):
        make("InfoGAN", updates="simultaneous")
    make("InfoGAN, head apart", updates="simultaneous").fit(steps=2)


def test_statistics_may_move_as_in_other_loops():
    learn = GANLearner(generator(), judge(), loader(A), latent=2, freeze_statistics=False, **KW)
    learn.fit(steps=3)
    assert (learn.generator[1].num_batches_tracked, learn.discriminator[1].num_batches_tracked) == (6, 9)


def test_frozen_statistics_change_no_weight():
    frozen, free = (GANLearner(*twins(*NETS), loader(A), latent=2, freeze_statistics=f, **KW) for f in (True, False))
    frozen.fit(steps=5)
    free.fit(steps=5)
    agree([frozen.generator, frozen.discriminator], [free.generator, free.discriminator])


NETS = generator(), judge()


# --- parts ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 6), st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_the_pool_hands_out_what_came_in(size, batches):
    pool, seen, given_out = ImagePool(size), [], []
    for n in batches:
        images = torch.arange(len(seen), len(seen) + n).float()[:, None].requires_grad_()
        seen += images.flatten().tolist()
        out = pool(images)
        assert out.shape == images.shape and not out.requires_grad
        given_out += out.flatten().tolist()
        assert set(given_out) <= set(seen) and len(pool.images) == min(size, len(seen))
    assert given_out[:size] == seen[:size]
    held = [image.item() for image in pool.images]
    assert len(set(held)) == len(held) and set(held) <= set(seen)


def test_half_of_what_a_full_pool_hands_out_is_old():
    torch.manual_seed(0)
    pool = ImagePool(20)
    pool(torch.zeros(20, 1))
    images = torch.arange(4000.0)[:, None]
    out = torch.cat([pool(batch) for batch in images.split(20)])
    assert 0.47 < (out == images).float().mean() < 0.53


def test_the_pool_travels_with_a_checkpoint(tmp_path):
    learn = make("CycleGAN", tmp_path / "run")
    learn.fit(steps=4)
    again = make("CycleGAN", tmp_path / "run")
    again.restore("last")
    for key, pool in learn.pools.items():
        assert len(pool.images) == 12 and torch.equal(torch.stack(pool.images), torch.stack(again.pools[key].images))
    smaller = ImagePool(5)
    smaller.load_state_dict(learn.pools["a"].state_dict())
    assert len(smaller.images) == 5


def test_the_discriminators_see_the_pools_images():
    learn, seen = make("CycleGAN"), []
    learn.add(On("after_forward", lambda learn: seen.append((learn.player.name, learn.pred.fake_a.detach().clone()))))
    learn.fit(steps=4)
    made = torch.cat([x for name, x in seen if name == "generator"])
    judged = torch.cat([x for name, x in seen if name == "discriminator"])
    assert torch.equal(made[:12], judged[:12]) and not torch.equal(made, judged)
    assert torch.cdist(judged, made).min(1).values.max() < 1e-5


def test_unpaired_pairs_anew_and_the_same_way_again():
    torch.manual_seed(0)
    data = Unpaired(torch.arange(6), torch.arange(100, 104))
    first, second = ([(int(a), int(b)) for a, b in data] for _ in range(2))
    assert [a for a, _ in first] == [a for a, _ in second] == [*range(6)] and first != second
    assert [a for a, _ in Unpaired(torch.arange(2), torch.arange(5))] == [0, 1, 0, 1, 0]


def test_r2_gets_the_labels_of_the_fakes():
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x, labels):
            return (x @ self.w) * labels

    for penalty, name in (R2(2.0), "r2"), (Lazy(R2(2.0), every=2), "r2"):
        learn = GANLearner(Conditional(), Bilinear(), [(A[:8], torch.full((8,), 2))], labels="sampled", penalties=penalty, **KW)
        seen = []
        learn.add(On("after_forward", lambda learn, seen=seen: seen.append(learn.pred.fake_labels.clone())))
        learn.fit(steps=1)
        expected = 2 * seen[0].float().square().mean() * (1 if name == "r2" and not isinstance(penalty, Lazy) else 2)
        assert learn.history.last("train/discriminator/r2") == pytest.approx(expected.item())


def test_a_penalty_of_four_arguments_still_works():
    class Mine:
        name = "mine"

        def __call__(self, discriminator, real, fake, labels=None):
            return discriminator(real).square().mean()

    learn = GANLearner(plain(), flat(), BATCHES, latent=2, penalties=Mine(), **KW)
    learn.fit(steps=1)
    assert "train/discriminator/mine" in learn.history.names()


def test_penalties_look_at_the_logits_of_a_discriminator_that_says_more():
    torch.manual_seed(0)
    talking, g = Body(3), plain()
    talking.body = plain(2, 8)
    silent = copy.deepcopy(talking)
    silent.talks = False
    losses = []
    for d in talking, silent:
        learn = GANLearner(copy.deepcopy(g), d, BATCHES, latent=2, penalties=[GradientPenalty(), R1()], **KW)
        learn.fit(steps=2)
        losses.append([learn.history.last(f"train/discriminator/{name}") for name in ("gradient_penalty", "r1", "loss")])
    assert losses[0] == pytest.approx(losses[1])


def test_a_round_holds_the_noise():
    learn, seen = GANLearner(plain(), flat(), BATCHES, latent=2, reuse_forward=True, **KW), []

    def look(learn):
        seen.append((learn.pred.noise, learn.pred.fake.detach(), learn.generator(learn.pred.noise)))

    learn.add(On("after_forward", look))
    learn.fit(steps=2)
    for noise, fake, again in seen:
        assert noise.shape == (8, 2) and torch.equal(fake, again.detach())


def test_a_generator_that_draws_its_own_noise():
    class Uniform(nn.Linear):
        def sample_latent(self, n, device=None, generator=None):
            return torch.rand(n, 2, device=device) + 5

    learn, seen = GANLearner(Uniform(2, 2), flat(), BATCHES, **KW), []
    learn.add(On("after_forward", lambda learn: seen.append(learn.pred.noise.min().item())))
    learn.fit(steps=2)
    assert min(seen) >= 5


@pytest.mark.parametrize("loss", ["began", "BEGAN", "boundary-equilibrium", "trainkit.gan.energy.BoundaryEquilibrium"])
def test_losses_that_live_elsewhere(loss):
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain()

        def forward(self, x):
            return (self.net(x) - x).abs().mean(1)

    learn = GANLearner(plain(), Energy(), BATCHES, loss, latent=2, **KW)
    learn.fit(steps=2)
    assert {"train/discriminator/k", "train/discriminator/convergence"} <= {*learn.history.names()}


def test_hardness_lies_between_the_mean_and_the_hardest():
    values = torch.tensor([0.2, 1.0, -0.5], requires_grad=True)
    assert hardened(values, 0.0).item() == pytest.approx(values.mean().item())
    assert hardened(values, math.inf) == 1.0 and hardened(values, 50.0).item() == pytest.approx(1.0, abs=1e-4)
    (grad,) = torch.autograd.grad(hardened(values, 2.0), values)
    torch.testing.assert_close(grad, torch.softmax(2 * values.detach(), 0))


def test_one_loss_for_each_judge():
    judges, losses = {"a": flat(), "b": flat()}, ["hinge", "relativistic"]
    learn = GMANLearner(plain(), judges, BATCHES, losses, latent=2, penalties=R1(1.0), **KW)
    learn.fit(steps=2)
    assert [p.name for p in learn.players] == ["discriminator_a", "discriminator_b", "generator"]
    assert "train/discriminator_b/r1" in learn.history.names() and learn.needs_real


X = torch.rand(8, 1, 16, 16, generator=G) * 2 - 1


def with_the_architectures(name):
    "A scheme with the networks of its paper, small."
    from trainkit.gan.autoencoding import AAEDecoder, AAEEncoder, BEGANDiscriminator, BEGANGenerator, LatentDiscriminator
    from trainkit.gan.heads import InfoGANDiscriminator, InfoGANGenerator
    from trainkit.gan.translation import CycleGANGenerator, PatchGANDiscriminator

    small = {"in_channels": 1, "patch": 16, "channels": 4}
    if name == "InfoGAN":
        d = InfoGANDiscriminator(CODES, 16, 1, 4, hidden=8)
        return InfoGANLearner(InfoGANGenerator(CODES, 16, 1, 4), d, [X], codes=CODES, q=d.to_codes, **KW)
    if name == "pix2pix":
        return Pix2PixLearner(CycleGANGenerator(1, 1, 4, 1), PatchGANDiscriminator(**small, given_channels=1), [(X, -X)], **KW)
    if name == "CycleGAN":
        there, back = (CycleGANGenerator(1, 1, 4, 1) for _ in range(2))
        return CycleGANLearner(there, back, *(PatchGANDiscriminator(**small) for _ in range(2)), [(X, -X)], **KW)
    if name == "AAE":
        shape = (1, 16, 16)
        nets = AAEEncoder(shape, 4, (8,)), AAEDecoder(shape, 4, (8,), num_classes=3), LatentDiscriminator(4, (8,), num_classes=3)
        return AAELearner(*nets, [(X, LABELS[:8])], labels="dataset", discriminator_labels=True, **KW)
    d = BEGANDiscriminator(in_size=16, in_channels=1, channels=4)
    return GANLearner(BEGANGenerator(8, 16, 1, 4), d, [X], "began", **KW)


@pytest.mark.parametrize("name", ["InfoGAN", "pix2pix", "CycleGAN", "AAE", "BEGAN"])
def test_the_papers_architectures_fit_their_schemes(name):
    learn = with_the_architectures(name)
    before = [p.clone() for player in learn.players for p in player.parameters()]
    learn.fit(epochs=2)
    moved = [not torch.equal(a, b) for a, b in zip(before, (p for player in learn.players for p in player.parameters()))]
    assert np.mean(moved) > 0.9 and all(player.updates == 2 for player in learn.players)


def test_translations():
    learn = make("pix2pix", examples=A[:6])
    assert learn.sample_fixed().shape == (6, 2) and torch.equal(learn.sample(3), learn.translate(A[:3]))
    cycle = make("CycleGAN")
    assert torch.equal(cycle.translate(A), cycle.predict(A)) and cycle.there.training
    assert not torch.equal(cycle.translate(A), cycle.translate(A, to="a"))


IMAGES = TensorDataset(torch.rand(20, 1, 16, 16, generator=G) * 2 - 1, torch.rand(20, 3, 8, 8, generator=G) * 2 - 1)


class Resized(nn.Sequential):
    "Pictures of one size and colour from those of another."

    def __init__(self, n_in, n_out, size):
        super().__init__(nn.Conv2d(n_in, n_out, 3, padding=1), nn.Dropout(0.5), nn.Upsample(size=size), nn.Tanh())


class Noisy(Resized):
    "With noise of its own, in use, too."

    def forward(self, x):
        return super().forward(x + 0.5 * torch.randn_like(x))


def patches(n):
    return nn.Sequential(nn.Conv2d(n, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3, 1, 1))


class Apart(nn.Module):
    "Judges a picture by what it is about, of another size."

    def __init__(self):
        super().__init__()
        self.net = patches(4)

    def forward(self, x, about):
        return self.net(torch.cat([x, F.interpolate(about, x.shape[2:])[:, :1]], 1)).mean((1, 2, 3))


def translating(name, data=None, **kw):
    torch.manual_seed(0)
    data = DataLoader(IMAGES, batch_size=4, shuffle=True) if data is None else data
    if name == "CycleGAN":
        return CycleGANLearner(Noisy(1, 3, 8), Noisy(3, 1, 16), patches(1), patches(3), data, identity=0.0, pool=6, **KW,
                               **kw)  # fmt: skip
    if name == "MetricGAN":
        score = lambda a, b: 1 - (a - b).abs().flatten(1).mean(1) / 2  # noqa: E731
        return MetricGANLearner(Noisy(1, 3, 8), Score(), data, score, **KW, **kw)
    return Pix2PixLearner(Noisy(1, 3, 8), Apart(), data, **KW, **kw)


class Score(nn.Module):
    "Of a picture, by what it should be; MetricGAN asks for that of inputs, too."

    def __init__(self):
        super().__init__()
        self.net = patches(6)

    def forward(self, x, reference):
        return self.net(torch.cat([x, reference], 1)).mean((1, 2, 3))


TRANSLATING = ["pix2pix", "MetricGAN", "CycleGAN"]


@pytest.mark.parametrize("name", TRANSLATING)
def test_fixed_pictures_of_translations(name):
    learn = translating(name)
    a, b = IMAGES.tensors
    picture = learn.sample_fixed()
    assert picture.shape == (56, 3, 16, 16) and torch.equal(picture, learn.sample_fixed())
    rows = picture.reshape(7, 8, 3, 16, 16)
    assert torch.equal(rows[0], a[:8].expand(-1, 3, -1, -1)) and (rows[3] == 1).all()
    if name == "CycleGAN":
        assert torch.equal(rows[4], F.interpolate(b[:8], (16, 16)))
        other = learn.there, learn.back
    else:
        assert torch.equal(rows[2], F.interpolate(b[:8], (16, 16))) and torch.equal(rows[4], a[8:16].expand(-1, 3, -1, -1))
        other = (learn.generator,)
    for made in (1, 2, 5, 6) if name == "CycleGAN" else (1, 5):
        assert (rows[made] != 1).any() and (rows[made] != rows[0]).any()
    learn.fit(steps=3)
    again = learn.sample_fixed().reshape(7, 8, 3, 16, 16)
    assert torch.equal(again[0], rows[0]) and not torch.equal(again[1], rows[1])
    assert all(net.training for net in other)


@pytest.mark.parametrize("name", TRANSLATING)
def test_looking_at_translations_changes_nothing(name):
    looked, alone = translating(name), translating(name)
    looked.add(On("after_batch", lambda learn: learn.sample_fixed()))
    looked.fit(steps=4)
    alone.fit(steps=4)
    for p, q in zip(looked.players, alone.players):
        assert all(torch.equal(a, b) for a, b in zip(p.parameters(), q.parameters()))


@pytest.mark.parametrize("name", TRANSLATING)
def test_live_samples_and_thumbnails_of_translations(name, tmp_path):
    from trainkit.ui.samples import Samples
    from trainkit.ui.thumbnails import Thumbnails

    learn = translating(name, run=tmp_path / "run", cbs=[Samples(live=False), Thumbnails()])
    learn.fit(steps=5)
    learn.send("sample")
    step, picture = learn.history.media["samples"][-1]
    assert step == 5 and picture.shape == (7 * 18 + 2, 8 * 18 + 2, 3)
    learn.save()
    (entry, *_) = learn.checkpoints.list()
    assert entry.thumbnail and entry.thumbnail[:4] == b"\x89PNG"


def test_examples_are_the_ones_given_or_the_held_out_ones():
    a, b = IMAGES.tensors
    held_out = TensorDataset(a[10:], b[10:])
    learn = translating("pix2pix", {"train": DataLoader(IMAGES, 4, shuffle=True), "valid": DataLoader(held_out, 4)})
    assert torch.equal(learn.sample_fixed()[:8, :1], a[10:18])
    learn = translating("pix2pix", examples=a[5:8])  # inputs alone: no row of targets
    assert learn.sample_fixed().shape == (16, 3, 16, 16) and torch.equal(learn.sample_fixed()[:3, :1], a[5:8])
    assert learn.sample(2).shape == (2, 3, 8, 8)
    learn = translating("CycleGAN", examples=(a[:3], b[:3]))
    assert (learn.sample_fixed().reshape(7, 8, 3, 16, 16)[:, 3:] == 1).all()
    batches = [(a[:4], b[:4]), (a[4:8], b[4:8])]
    assert torch.equal(translating("CycleGAN", batches).sample_fixed()[:4, :1], a[:4])


def test_a_stream_has_no_fixed_examples_and_loses_no_batch():
    a, b = IMAGES.tensors
    stream = iter([(a[:4], b[:4])])
    learn = translating("pix2pix", stream)
    with pytest.raises(ValueError, match="its data have no fixed examples: give it examples="):
        learn.sample_fixed()
    assert next(stream)[0].shape == (4, 1, 16, 16)


def test_judges_need_labels_only_if_they_take_them():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = flat(4)

        def forward(self, z, labels):
            return self.net(torch.cat([z, F.one_hot(labels, 3).float()], 1))

    torch.manual_seed(0)
    decoder = nn.Linear(1, 2)
    decoder.forward = lambda z, labels: F.linear(z, decoder.weight) + labels[:, None]
    learn = AAELearner(plain(2, 1), decoder, Labelled(), loader(A, LABELS), latent=1, labels="dataset", num_classes=3,
                       discriminator_labels=True, penalties=R1(0.1), **KW)  # fmt: skip
    learn.fit(steps=2)
    assert "train/discriminator/r1" in learn.history.names()


@pytest.mark.parametrize("build,message", [
    (lambda: GANLearner(plain(), flat(), latent=2, updates="together", **KW), "received 'together'"),
    (lambda: GMANLearner(plain(), [], latent=2, **KW), "discriminators are modules"),
    (lambda: GMANLearner(plain(), [flat()], latent=2, hardness=-1, **KW), "received -1"),
    (lambda: GMANLearner(plain(), [flat()], loss=["hinge", "wgan"], latent=2, **KW), "2 losses for 1"),
    (lambda: D2GANLearner(plain(), flat(), flat(), latent=2, alpha=2.0, **KW), r"weight in \(0, 1\]"),
    (lambda: MetricGANLearner(plain(), flat(), PAIRS, **KW), "needs metric="),
    (lambda: MetricGANLearner(plain(), Joined(flat(4)), PAIRS, lambda a, b: 1.0, **KW).fit(1), "score for each of the 8"),
    (lambda: Pix2PixLearner(plain(), Joined(flat(4)), BATCHES, **KW).fit(1), "learns from pairs"),
    (lambda: Pix2PixLearner(plain(), Joined(flat(4)), **KW).sample(2), "makes nothing from noise"),
    (lambda: CycleGANLearner(plain(), plain(), flat(), flat(), **KW).sample_fixed(), "makes nothing from noise"),
    (lambda: CycleGANLearner(plain(), plain(), flat(), flat(), BATCHES, **KW).fit(1), r"takes batches \(a, b\)"),
    (lambda: CycleGANLearner(plain(), plain(), flat(), flat(), PAIRS, pool=-1, **KW), "received -1"),
    (lambda: Unpaired([], [1]), "received 0 and 1"),
    (lambda: find_loss("nowhere.Loss"), "can't be found"),
    (lambda: find_loss("begam"), "unknown GAN loss 'begam'; .*: began"),
    (lambda: GANLearner(plain(), nn.LSTM(2, 2), BATCHES, latent=2, **KW).fit(1), r"logits, or \(logits, \{name: tensor\}\)"),
])  # fmt: skip
def test_bad_arguments(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()
