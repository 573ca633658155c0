"PSNR and SSIM against closed forms, the papers' sums written out, torchmetrics and scikit-image."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit.learner import Learner
from trainkit.metrics import MetricSet
from trainkit.sr import metrics as sr
from trainkit.sr.data import photograph

torch.set_num_threads(1)


def saved(x):
    "As 8-bit values, by numpy."
    return np.round(np.clip(x.double().numpy() * 255, 0, 255))


def y_of(x):
    "MATLAB's rgb2ycbcr, first channel: its matrix for values in [0, 1], times 255."
    r, g, b = np.moveaxis(x / 255, -3, 0)
    return (16 + 65.481 * r + 128.553 * g + 24.966 * b)[..., None, :, :]


def pairs(seed, shape=(2, 3, 26, 31)):
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(shape, generator=g)
    return (a + 0.15 * torch.randn(shape, generator=g)), a


def slow_ssim(a, b):
    "Wang et al. 2004, eq. 13, window by window, for one plane."
    i = np.arange(11) - 5
    window = np.exp(-(i[:, None] ** 2 + i**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(values)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**20), st.integers(0, 4), st.booleans())
def test_psnr_written_out(seed, border, y):
    pred, target = pairs(seed)
    a, b = saved(pred), saved(target)
    if y:
        a, b = y_of(a), y_of(b)
    inside = np.s_[..., border : a.shape[-2] - border, border : a.shape[-1] - border]
    expected = np.mean([10 * math.log10(255**2 / np.mean((p[inside] - q[inside]) ** 2)) for p, q in zip(a, b)])
    assert sr.psnr(pred, target, border, y).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("border, y", [(0, False), (3, False), (0, True), (4, True)])
def test_ssim_written_out(border, y):
    pred, target = pairs(1)
    a, b = saved(pred), saved(target)
    if y:
        a, b = y_of(a), y_of(b)
    inside = np.s_[:, border : a.shape[-2] - border, border : a.shape[-1] - border]
    expected = np.mean([[slow_ssim(p, q) for p, q in zip(m[inside], n[inside])] for m, n in zip(a, b)])
    assert sr.ssim(pred, target, border, y).item() == pytest.approx(expected, rel=1e-9)


def test_torchmetrics_agrees():
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    pred, target = pairs(2, (3, 3, 40, 33))
    a, b = torch.from_numpy(saved(pred)), torch.from_numpy(saved(target))
    theirs = peak_signal_noise_ratio(a, b, data_range=255.0, dim=(1, 2, 3), reduction="elementwise_mean")
    assert sr.psnr(pred, target).item() == pytest.approx(theirs.item(), rel=1e-6)
    _, places = structural_similarity_index_measure(a, b, sigma=1.5, kernel_size=11, data_range=255.0, return_full_image=True)
    assert places.shape == a.shape  # it mirrors the borders
    assert sr.ssim(pred, target).item() == pytest.approx(places[..., 5:-5, 5:-5].mean().item(), abs=1e-6)


def test_closed_forms():
    x = torch.full((1, 3, 20, 20), 100 / 255)
    assert sr.psnr(x + 2 / 255, x).item() == pytest.approx(42.1102, abs=5e-5)
    assert sr.psnr(torch.zeros_like(x), torch.ones_like(x)).item() == 0
    assert sr.psnr(torch.zeros_like(x), torch.ones_like(x), y=True).item() == pytest.approx(20 * math.log10(255 / 219))
    assert sr.psnr(x, x).item() == math.inf and sr.ssim(x, x).item() == pytest.approx(1, abs=1e-12)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    assert sr.ssim(x * 0.5, x).item() == pytest.approx((2 * 100 * 50 + c1) / (100**2 + 50**2 + c1), rel=1e-9)
    noise = pairs(4)[1]
    mean = sr.blurred(torch.from_numpy(saved(noise)), sr.gaussian_window())
    assert mean.shape == (2, 3, 16, 21) and c2 > c1


def test_what_is_saved_is_what_is_compared():
    "Values that are clamped or rounded away make no difference."
    x = torch.randint(0, 256, (1, 3, 24, 24), generator=torch.Generator().manual_seed(0)) / 255
    moved = x + 0.3 / 255 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    moved = torch.where(x == 1, torch.tensor(9.0), torch.where(x == 0, torch.tensor(-9.0), moved))
    assert sr.psnr(moved, x).item() == math.inf and sr.ssim(moved, x).item() == pytest.approx(1, abs=1e-12)


def test_the_border_is_left_out():
    x = torch.rand(1, 3, 30, 30)
    framed = x.clone()
    framed[..., :4], framed[..., -4:], framed[..., :4, :], framed[..., -4:, :] = 1, 0, 0, 1
    assert sr.psnr(framed, x, border=4).item() == math.inf > sr.psnr(framed, x, border=3).item()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**20), st.booleans())
def test_laws(seed, y):
    a, b = pairs(seed, (1, 3, 14, 15))
    for f in (sr.psnr, sr.ssim):
        assert f(a, b, 0, y).item() == pytest.approx(f(b, a, 0, y).item(), rel=1e-12)  # symmetric
        assert f(a.flip(-1), b.flip(-1), 0, y).item() == pytest.approx(f(a, b, 0, y).item(), rel=1e-9)
        assert f(a[0], b[0], 0, y).item() == f(a, b, 0, y).item()  # one image without its batch
    assert sr.ssim(a, b, 0, y).item() <= 1


def test_whole_images_of_several_sizes_count_alike():
    images = [pairs(i, (1, 3, 20 + 7 * i, 40 - 5 * i)) for i in range(4)]
    found = MetricSet([sr.PSNR(), sr.PSNR(2, True), sr.SSIM(), sr.SSIM(2, y=True)])
    for pred, target in images:
        found.update(pred, (target,), 1)
    for name, f, args in (("psnr", sr.psnr, (0, False)), ("psnr_y", sr.psnr, (2, True)), ("ssim", sr.ssim, (0, False)),
                          ("ssim_y", sr.ssim, (2, True))):  # fmt: skip
        expected = sum(f(p, t, *args).item() for p, t in images) / 4
        assert found.compute()[name] == pytest.approx(expected, rel=1e-12)
    metric = sr.PSNR()
    assert math.isnan(metric.compute())
    metric.update(*pairs(0, (3, 3, 16, 16)))
    metric.update(*(x[0] for x in pairs(1, (1, 3, 16, 16))))
    three, one = sr.psnr(*pairs(0, (3, 3, 16, 16))).item(), sr.psnr(*pairs(1, (1, 3, 16, 16))).item()
    assert metric.compute() == pytest.approx((3 * three + one) / 4)  # a batch counts as its images
    metric.reset()
    assert math.isnan(metric.compute())


def test_in_a_learner():
    images = [pairs(i, (1, 3, 16 + 4 * i, 24)) for i in range(3)]
    learn = Learner(nn.Conv2d(3, 3, 1), {"train": images, "valid": images}, nn.functional.l1_loss, "sgd", front="none",
                    metrics=[sr.PSNR(border=2, y=True), sr.SSIM()])  # fmt: skip
    found = learn.validate()
    with torch.no_grad():
        expected = sum(sr.psnr(learn.model(x), y, 2, True).item() for x, y in images) / 3
    assert found["valid/psnr_y"] == pytest.approx(expected, rel=1e-9) and "valid/ssim" in found


def test_half_precision_is_no_excuse():
    x = (photograph("chelsea")[:, :64, :64] / 255)[None]
    worse = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).half()
    for f in (sr.psnr, sr.ssim):
        assert f(worse, x.half()).item() == pytest.approx(f(worse.float(), x).item(), abs=0.02)


def test_bad_input_is_named():
    x = torch.rand(1, 3, 16, 12)
    for call, text in (
        (lambda: sr.psnr(x, x[..., 1:]), r"\(1, 3, 16, 12\) and \(1, 3, 16, 11\)"),
        (lambda: sr.psnr(x[0, 0], x[0, 0]), r"received \(16, 12\)"),
        (lambda: sr.psnr(x, x, border=6), "border=6 leaves nothing of images of 16×12"),
        (lambda: sr.psnr(x, x, border=-1), "border=-1"),
        (lambda: sr.psnr(x[:, :1], x[:, :1], y=True), "colour images"),
        (lambda: sr.ssim(x, x, border=1), "the images have 14×10"),
        (lambda: sr.SSIM(border=1.5), "border=1.5"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
