"The networks: the papers' numbers of parameters by arithmetic, shapes at any size, and what they must not do."
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from trainkit.sr import models as sr
from trainkit.sr.data import SCALES

torch.set_num_threads(1)


def n_params(model):
    return sum(p.numel() for p in model.parameters())


def conv(i, o, k=3, bias=True, norm=False):
    return i * o * k * k + o * bias + o * norm


def ups(c, scale):
    return {2: conv(c, 4 * c), 3: conv(c, 9 * c), 4: 2 * conv(c, 4 * c), 8: 3 * conv(c, 4 * c)}[scale]


def edsr(scale, c, blocks):
    return conv(3, c) + blocks * 2 * conv(c, c) + conv(c, c) + ups(c, scale) + conv(c, 3)


def wdsr(scale, n, blocks, expansion=6):
    def wn(*a):
        return conv(*a, norm=True)
    block = wn(n, n * expansion, 1) + wn(n * expansion, int(0.8 * n), 1) + wn(int(0.8 * n), n)
    return wn(3, n) + blocks * block + wn(n, 3 * scale**2) + wn(3, 3 * scale**2, 5)


@pytest.mark.parametrize("scale", SCALES)
def test_numbers_of_parameters(scale):
    with torch.device("meta"):
        assert n_params(sr.EDSR.baseline(scale)) == edsr(scale, 64, 16)
        assert n_params(sr.EDSR.full(scale)) == edsr(scale, 256, 32)
    assert n_params(sr.WDSR(scale)) == wdsr(scale, 32, 32)


def test_published_numbers():
    with torch.device("meta"):
        assert n_params(sr.EDSR.baseline(2)) == 1_369_859
        assert n_params(sr.EDSR.baseline(4)) == 1_517_571  # 1.52 million
        assert round(n_params(sr.EDSR.full(4)) / 1e6) == 43
        assert n_params(sr.SRResNet()) == 1_547_350  # 1.55 million
    assert n_params(sr.WDSR(4)) == 615_088  # 0.62 million
    assert {b.scale for b in sr.EDSR.full(2).body.body if isinstance(b, sr.Residual)} == {0.1}


def test_srgan_discriminator_by_arithmetic():
    widths = [64, 64, 128, 128, 256, 256, 512, 512]
    convs = conv(3, 64) + sum(conv(i, o, bias=False) + 2 * o for i, o in zip(widths, widths[1:]))
    with torch.device("meta"):
        assert n_params(sr.SRGANDiscriminator()) == convs + 512 * 36 * 1024 + 1024 + 1024 + 1


MAKERS = {"edsr": lambda s: sr.EDSR(s, 4, 1), "wdsr": lambda s: sr.WDSR(s, 5, 1), "srresnet": lambda s: sr.SRResNet(s, 4, 1)}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@settings(max_examples=12, deadline=None)
@given(st.sampled_from(SCALES), st.integers(1, 9), st.integers(1, 9))
def test_any_size(make, scale, h, w):
    model = make(scale).eval()
    assert model.scale == scale
    assert model(torch.rand(2, 3, h, w)).shape == (2, 3, h * scale, w * scale)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_other_scales_and_images_are_refused(make):
    for scale in (1, 5, 6, 16, 0, 2.0, True, "4"):
        with pytest.raises(ValueError, match="accepted are 2, 3, 4, 8"):
            make(scale)
    for shape in ((3, 8, 8), (1, 1, 8, 8)):
        with pytest.raises(ValueError, match=r"expects \(batch, 3, height, width\)"):
            make(2)(torch.rand(shape))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_every_parameter_learns_and_state_travels(make):
    torch.manual_seed(0)
    model, other = make(3), make(3)
    x, y = torch.rand(2, 3, 6, 7), torch.rand(2, 3, 18, 21)
    F.mse_loss(model(x), y).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    other.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    model.eval(), other.eval(), twin.eval()
    assert torch.equal(other(x), model(x)) and torch.equal(twin(x), model(x))


def test_edsr_is_what_the_paper_draws():
    "Against the same layers, put together by hand."
    torch.manual_seed(0)
    model = sr.EDSR(4, 6, 2, residual_scale=0.3)
    w = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(w) == 1 + 4 + 1 + 2 + 1 and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    mean = torch.tensor([0.4488, 0.4371, 0.4040])[:, None, None]
    x = torch.rand(1, 3, 5, 6)
    head = w[0]((x - mean) / 0.5)
    h = head + 0.3 * w[2](w[1](head).relu())
    h = h + 0.3 * w[4](w[3](h).relu())
    h = head + w[5](h)
    h = w[8](F.pixel_shuffle(w[7](F.pixel_shuffle(w[6](h), 2)), 2))
    torch.testing.assert_close(model(x), h * 0.5 + mean)


def test_wdsr_is_what_the_paper_draws():
    torch.manual_seed(0)
    model = sr.WDSR(2, 5, 1)
    w = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    mean = torch.tensor([0.4488, 0.4371, 0.4040])[:, None, None]
    x = torch.rand(1, 3, 5, 6)
    n = (x - mean) / 0.5
    h = w[0](n)
    h = h + w[3](w[2](w[1](h).relu()))
    out = F.pixel_shuffle(w[4](h), 2) + F.pixel_shuffle(w[5](n), 2)
    torch.testing.assert_close(model(x), out * 0.5 + mean)
    assert [m.kernel_size[0] for m in w] == [3, 1, 1, 3, 3, 5]


def test_weight_norm_is_exact():
    layer = sr.norm_conv(3, 4)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original1.mul_(7)  # the direction's length makes no difference
    torch.testing.assert_close(layer.weight, before)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(layer.weight, 2 * before)


@pytest.mark.parametrize("scale", [2, 3])
def test_icnr_begins_as_repetition(scale):
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 2 * scale**2, 3, padding=1)
    sr.icnr_(layer, scale)
    out = F.pixel_shuffle(layer(torch.randn(1, 5, 4, 6)), scale)
    torch.testing.assert_close(out, F.interpolate(out[..., ::scale, ::scale], scale_factor=scale))
    assert out.std() > 0.1
    with pytest.raises(ValueError, match="can't be shuffled by 5"):
        sr.icnr_(layer, 5)
    assert (sr.EDSR(2, 4, 1, icnr=True).tail[0].bias == 0).all()


def test_discriminator():
    D = sr.SRGANDiscriminator(32, 4, 8)
    assert [m.stride[0] for m in D.modules() if isinstance(m, nn.Conv2d)] == [1, 2] * 4
    assert D(torch.rand(5, 3, 32, 32)).shape == (5,)
    for size in (0, 8, 40, 96.0, "96"):
        with pytest.raises(ValueError, match="multiple of 16"):
            sr.SRGANDiscriminator(size)
    with pytest.raises(ValueError, match=r"expected \(batch, 3, 32, 32\)"):
        D(torch.rand(1, 3, 64, 64))
