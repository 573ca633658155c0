"SRGAN's learner: its gradients by hand, whole images judged, weights taken up, stopped and gone on with."
import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from trainkit.gan.features import Perceptual
from trainkit.learner import Learner
from trainkit.sr.data import CropPairs, whole_pairs
from trainkit.sr.gan import SRGANLearner
from trainkit.sr.metrics import PSNR, psnr
from trainkit.sr.models import EDSR, WDSR, SRGANDiscriminator, SRResNet
from trainkit.sr.vgg import VGG

torch.set_num_threads(1)


def images(*sizes):
    torch.manual_seed(5)
    return [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]


def loaders(batch_size=2, length=8):
    train = DataLoader(CropPairs(images((60, 50), (40, 70)), 2, patch=8, length=length), batch_size)
    return train, DataLoader(whole_pairs(images((22, 31), (40, 26)), 2), 1)


def made(generator=None, content="mse", **options):
    torch.manual_seed(0)
    generator = SRResNet(2, 4, 1) if generator is None else generator
    return SRGANLearner(generator, SRGANDiscriminator(16, 2, 4), options.pop("dls", loaders()), content,
                        **{"front": "none", "seed": 0, "device": "cpu", "channels_last": "no", **options})  # fmt: skip


def test_one_step_by_hand():
    "Both players' gradients against the paper's equations written out."
    low, high = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 16, 16)
    see = Perceptual(VGG("relu2_1", (1, 1), (4, 4)))
    gan = made(EDSR(2, 4, 1), see, dls=[(low, high)], opt={"name": "sgd", "lr": 0.1}, adversarial=0.02)
    G, D = copy.deepcopy(gan.generator), copy.deepcopy(gan.discriminator)
    gan.fit(steps=1)
    fake = G(low)
    loss = F.softplus(-D(high)).mean() + F.softplus(D(fake.detach())).mean()
    loss.backward()
    with torch.no_grad():
        for p in D.parameters():
            p -= 0.1 * p.grad
    for ours, theirs in zip(gan.discriminator.parameters(), D.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    D = copy.deepcopy(D).requires_grad_(False)
    loss = see(fake, high) + 0.02 * F.softplus(-D(fake)).mean()
    loss.backward()
    with torch.no_grad():
        for ours, p in zip(gan.generator.parameters(), G.parameters()):
            torch.testing.assert_close(ours, p - 0.1 * p.grad, rtol=1e-4, atol=1e-6)
    assert gan.history.last("train/generator/loss") == pytest.approx(loss.item(), rel=1e-5)


def test_the_discriminator_sees_large_images_only():
    seen = []

    class Watching(SRGANDiscriminator):
        def forward(self, *args):
            seen.append([tuple(a.shape) for a in args])
            return super().forward(*args)

    gan = SRGANLearner(SRResNet(2, 4, 1), Watching(16, 2, 4), loaders(), front="none", seed=0)
    gan.fit(steps=1)
    assert seen == [[(2, 3, 16, 16)]] * 3  # real, fake; fake again in the generator's turn
    gan.validate()
    assert len(seen) == 3, "whole images have other sizes than it wants"


def test_whole_images_are_judged():
    gan = made(content={"pixels": ("l1", 2.0), "squares": "mse"}, metrics=[PSNR(2, y=True)])
    gan.fit(epochs=1)
    generator = copy.deepcopy(gan.generator).eval()
    with torch.no_grad():
        pairs = [(generator(low), high) for loader in gan.loaders.valid.values() for low, high in loader]

    def mean(f):
        return sum(float(f(a, b)) for a, b in pairs) / len(pairs)

    last = gan.history.last
    assert last("valid/pixels") == pytest.approx(mean(F.l1_loss), rel=1e-5)
    assert last("valid/squares") == pytest.approx(mean(F.mse_loss), rel=1e-5)
    assert last("valid/loss") == pytest.approx(2 * last("valid/pixels") + last("valid/squares"), rel=1e-6)
    assert last("valid/psnr_y") == pytest.approx(mean(lambda a, b: psnr(a, b, 2, True)), abs=1e-3)


@pytest.mark.parametrize("make", [lambda: SRResNet(2, 4, 1), lambda: EDSR(2, 4, 1), lambda: WDSR(2, 5, 1)])
def test_from_the_folder_of_a_run(make, tmp_path):
    "Weights from pixels are taken up from the run's folder, or from its best checkpoint."
    torch.manual_seed(1)
    pixels = Learner(make(), loaders(), "mae", "adam", run=tmp_path / "pixels", front="none", seed=0)
    pixels.fit(epochs=2)
    for source in tmp_path / "pixels", pixels.checkpoints.best:
        gan = made(make(), pretrained={"generator": source})
        found = gan.generator.state_dict()
        if source is not pixels.checkpoints.best or pixels.checkpoints.best.step == pixels.step:
            assert all(torch.equal(found[name], w) for name, w in pixels.model.state_dict().items())
    before = copy.deepcopy(found)
    gan.fit(steps=2)
    assert any(not torch.equal(w, before[name]) for name, w in gan.generator.state_dict().items())


def test_stopped_and_gone_on_with(tmp_path):
    "To the last bit, crops and both optimizers included."
    whole = made(run=tmp_path / "whole")
    whole.fit(steps=6, validate_every=2)
    first = made(run=tmp_path / "parts", save_every=2)
    first.fit(steps=3, validate_every=2)
    second = made(run=tmp_path / "parts", save_every=2)
    second.restore("last")
    second.fit(steps=3, validate_every=2)
    for a, b in zip(whole.players, second.players):
        for ours, theirs in zip(a.parameters(), b.parameters()):
            assert torch.equal(ours, theirs)
    assert whole.history.scalars["valid/loss"][1].tolist() == second.history.scalars["valid/loss"][1].tolist()


def test_samples_are_crops_whatever_is_validated_on():
    gan = made()
    sheet = gan.sample_fixed(8)
    low, high = gan.examples
    assert sheet.shape == (24, 3, 16, 16) and torch.equal(sheet[16:], high[:8])
    assert torch.equal(sheet[8:16], gan.translate(low[:8]))
    torch.manual_seed(7)
    assert torch.equal(made().examples[0], low), "the same crops, whatever the random state"
    shown = torch.rand(4, 3, 8, 8)
    assert torch.equal(made(examples=shown).sample(4), made().translate(shown))
    torch.manual_seed(3)
    nets, before = (SRResNet(2, 4, 1), SRGANDiscriminator(16, 2, 4)), torch.get_rng_state()
    SRGANLearner(*nets, loaders(), front="none", device="cpu")
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    loaders()
    assert torch.equal(torch.get_rng_state(), after), "choosing examples uses up no random numbers"


def test_what_is_refused():
    for wrong in (-1, float("inf"), float("nan"), "1", True, None):
        with pytest.raises(ValueError, match="a weight >= 0"):
            made(adversarial=wrong)
    with pytest.raises(ValueError, match="no loss 'msee'"):
        made(content="msee")
    with pytest.raises(TypeError, match="a loss is a name"):
        made(content=None)
    gan = made(EDSR(4, 4, 1), dls=[(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 8, 8))])
    with pytest.raises(ValueError, match=r"expected \(batch, 3, 16, 16\)"):
        gan.fit(steps=1)
    gan = made(EDSR(2, 4, 1), dls=[torch.rand(1, 3, 8, 8)])
    with pytest.raises(ValueError, match="learns from pairs"):
        gan.fit(steps=1)
