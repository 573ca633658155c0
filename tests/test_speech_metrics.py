"SI-SDR against torchmetrics and STOI against pystoi's figures; tables of files."

import csv
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from trainkit.speech import metrics as sm

torch.set_num_threads(1)


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 400), st.floats(0.01, 10), st.integers(0, 2**20))
def test_si_sdr_is_torchmetrics(n, amount, seed):
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(2, 3, n, generator=g)
    pred = target + amount * torch.randn(2, 3, n, generator=g)
    expected = scale_invariant_signal_distortion_ratio(pred, target, zero_mean=True)
    torch.testing.assert_close(sm.si_sdr(pred, target), expected, atol=1e-3, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.floats(-20, 30), st.floats(0.01, 100), st.floats(-3, 3))
def test_si_sdr_by_its_definition(decibels, volume, offset):
    "Orthogonal noise of a known power; neither volume nor offset counts."
    t = torch.arange(1000, dtype=torch.float64) / 1000
    target, noise = torch.sin(2 * math.pi * 10 * t), torch.sin(2 * math.pi * 37 * t)
    pred = volume * (target + 10 ** (-decibels / 20) * noise) + offset
    assert sm.si_sdr(pred, target).item() == pytest.approx(decibels, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.floats(-25, 25), st.floats(-25, 25), st.sampled_from([-1, 1]), st.floats(-60, 60), st.integers(0, 2**20))
def test_si_sdr_of_whispers_and_shouts(a, b, sign, decibels, seed):
    "Fifty orders of magnitude of volume change nothing, in float32."
    x, y = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(seed))
    pred = x + 10 ** (-decibels / 20) * y
    expected = sm.si_sdr(pred.double(), x.double()).float()
    torch.testing.assert_close(sm.si_sdr(sign * 10**a * pred, 10**b * x), expected, atol=2e-2, rtol=1e-3)


def test_si_sdr_is_bounded_and_silence_is_the_worst():
    x = torch.randn(2, 500)
    assert (sm.si_sdr(x, 3 * x) > 99).all() and (sm.si_sdr(x, 3 * x) <= 100).all()
    for pred, target in ((0 * x, x), (x, 0 * x), (0 * x, 0 * x), (0 * x + 0.1, x), (x, 1e5 + 0 * x)):
        assert sm.si_sdr(pred, target).tolist() == [-100, -100]
    assert sm.si_sdr(x * torch.tensor([[1.0], [math.nan]]), x).isnan().tolist() == [False, True]


def test_si_sdr_has_the_gradient_of_its_definition():
    "The volume that is divided by is no constant, and yet may be taken for one."
    p, t = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sm.si_sdr(x, t), p)
    assert torch.autograd.gradcheck(lambda x: sm.si_sdr(1e-6 * x, t), p)


def test_si_sdr_can_be_trained_on():
    x = torch.randn(2, 500, requires_grad=True)
    sm.si_sdr(x, torch.randn(2, 500)).sum().backward()
    assert x.grad.isfinite().all()
    silence = torch.zeros(2, 500, requires_grad=True)
    sm.si_sdr(silence, torch.randn(2, 500)).sum().backward()
    assert silence.grad.isfinite().all()
    assert sm.si_sdr(torch.randn(500).half(), torch.randn(500).half()).dtype == torch.float32


def signals(seed, snr, n=16000):
    "Noise with an envelope, and a pause; the same in noise."
    rng = np.random.default_rng(seed)
    envelope = np.abs(np.repeat(rng.standard_normal(n // 400 + 1), 400)[:n])
    clean = rng.standard_normal(n) * envelope
    clean[n // 3 : n // 2] *= 1e-4
    return clean, clean + 10 ** (-snr / 20) * rng.standard_normal(n)


PYSTOI = {  # pystoi 0.4.1, (rate, SNR): stoi(clean, noisy, rate)
    (8000, -10): 0.2781101681894701, (8000, 0): 0.8232194714180208, (8000, 10): 0.9569508285774814,
    (10000, -10): 0.22499123449865907, (10000, 0): 0.8510953642855312, (10000, 10): 0.9656687987559786,
    (16000, -10): 0.22794365122863744, (16000, 0): 0.7553695347126218, (16000, 10): 0.9704135352976946,
}  # fmt: skip


@pytest.mark.parametrize(("rate", "snr"), PYSTOI)
def test_stoi_is_pystois(rate, snr):
    clean, noisy = map(torch.from_numpy, signals(rate + snr, snr))
    assert sm.stoi(noisy, clean, rate).item() == pytest.approx(PYSTOI[rate, snr], abs=1e-6)


def test_stoi_of_batches_and_of_too_little():
    clean, noisy = (torch.from_numpy(np.stack(x)).float() for x in zip(signals(1, 0), signals(2, 5)))
    found = sm.stoi(noisy[None], clean[None])
    assert found.shape == (1, 2)
    torch.testing.assert_close(found[0, 1], sm.stoi(noisy[1], clean[1]))
    torch.testing.assert_close(sm.stoi(3 * noisy, clean), found[0], atol=1e-5, rtol=0)
    quiet = clean[0].clone()
    quiet[2000:] = 0
    with pytest.raises(ValueError, match=r"STOI needs 30 frames \(0.40 seconds\) .* 16000 samples at 8000 Hz"):
        sm.stoi(noisy[0], quiet)
    assert sm.stoi(torch.stack([noisy[0], noisy[0]]), torch.stack([quiet, clean[0]]), short=-1.0)[0] == -1


def test_bands_are_third_octaves():
    bands = sm.third_octaves()
    bins = np.arange(257) * 10000 / 512
    assert bands.shape == (15, 257) and bands.sum(0).max() == 1
    for k, band in enumerate(bands.numpy()):
        inside = bins[band > 0]
        centre = 150 * 2 ** (k / 3)
        assert abs(inside.min() - centre * 2 ** (-1 / 6)) < 10 and inside.max() < centre * 2 ** (1 / 6) + 10


def test_resampling_keeps_tones_and_drops_what_does_not_fit():
    for old, new in ((16000, 10000), (8000, 10000), (10000, 8000)):
        t, u = torch.arange(old, dtype=torch.float64) / old, torch.arange(new, dtype=torch.float64) / new
        found = sm.resampled(torch.sin(2 * math.pi * 1000 * t), old, new)
        assert len(found) == new and (found - torch.sin(2 * math.pi * 1000 * u))[500:-500].abs().max() < 2e-3
    high = sm.resampled(torch.sin(2 * math.pi * 6000 * torch.arange(16000, dtype=torch.float64) / 16000), 16000, 10000)
    assert high[500:-500].abs().max() < 2e-3, "60 dB"


def test_tables(tmp_path):
    names, snrs = [f"file {i}, \"x\"" for i in range(5)], [0.0, 5.0, 0.0, 5.0, 0.0]
    outputs = [{"a": torch.arange(3.0), "b": torch.ones(3)}, {"a": torch.tensor([7.0, 8.0]), "b": torch.zeros(2)}]
    table = sm.per_file(outputs, names, snr=snrs)
    assert table == {"file": names, "snr": snrs, "a": [0, 1, 2, 7, 8], "b": [1, 1, 1, 0, 0]}
    assert sm.column_means(table) == {"snr": 2.0, "a": 3.6, "b": 0.6}
    path = sm.write_csv(tmp_path / "deep/er/table.csv", table)
    with path.open(newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    assert [row["file"] for row in rows] == names and [float(row["a"]) for row in rows] == table["a"]
    assert sm.mean_table({"x": table}, 1).splitlines() == [
        "|  | files | snr | a | b |", "| --- | ---: | ---: | ---: | ---: |", "| x | 5 | 2.0 | 3.6 | 0.6 |"]  # fmt: skip
    for wrong in (lambda: sm.per_file(outputs[:1], names), lambda: sm.per_file(outputs, names, snr=snrs[:2])):
        with pytest.raises(ValueError, match="there are 5 files; columns of another length"):
            wrong()


def test_bad_signals_are_named():
    for metric in sm.si_sdr, sm.stoi:
        with pytest.raises(ValueError, match=r"Tensor \(2, 9\) float32 and Tensor \(9,\) float32"):
            metric(torch.zeros(2, 9), torch.zeros(9))
        with pytest.raises(ValueError, match="int64"):
            metric(torch.zeros(9), torch.arange(9))
