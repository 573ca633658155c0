"Spectra and masks against NumPy and the papers' formulas."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.speech import features as sf

torch.set_num_threads(1)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(64, 32), (64, 16), (256, 128), (62, 20)]), st.integers(100, 900), st.integers(0, 2**20))
def test_there_and_back(shape, n, seed):
    transform, x = sf.Spectrum(*shape), torch.randn(2, n, generator=torch.Generator().manual_seed(seed))
    spectrum = transform(x)
    assert spectrum.shape == (2, shape[0] // 2 + 1, -(-n // shape[1]) + 1)
    torch.testing.assert_close(transform.inverse(spectrum, n), x, atol=1e-4, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([(64, 32), (64, 16), (256, 128), (62, 20)]), st.integers(3, 9), st.sampled_from([-1, 0, 1]),
       st.integers(0, 2**20))  # fmt: skip
def test_a_mask_leaves_the_end_as_it_does_the_rest(shape, hops, over, seed):
    "Divided by the tail of a window, where the last hop isn't whole, samples grow a hundredfold."
    n, g = hops * shape[1] + over, torch.Generator().manual_seed(seed)
    transform, x = sf.Spectrum(*shape), 0.1 * torch.randn(3, n, generator=g)
    mask = torch.rand(3, transform.bins, 1, generator=g)
    assert transform.inverse(mask * transform(x), n)[:, -shape[0] :].abs().max() < x.abs().max()


def test_a_frame_is_numpys():
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    found = sf.Spectrum(128, 64)(torch.from_numpy(x)[None])[0]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(128) / 128)
    padded = np.pad(x, 64)
    for t in (0, 1, 7, 15):
        np.testing.assert_allclose(found[:, t].numpy(), np.fft.rfft(window * padded[64 * t : 64 * t + 128]), atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.floats(-90, 90), st.floats(-90, 90))
def test_squeezing_is_the_papers(re, im):
    mask = torch.tensor([[[complex(re, im)]]], dtype=torch.complex128)
    parts = sf.squeeze(mask).flatten().numpy()
    K, C = 10, 0.1
    expected = [K * (1 - np.exp(-C * m)) / (1 + np.exp(-C * m)) for m in (re, im)]
    np.testing.assert_allclose(parts, expected, atol=1e-9)
    back = sf.unsqueezed(sf.squeeze(mask)).item()
    limit = -np.log((K - sf.CUT) / (K + sf.CUT)) / C  # eq. 10 at the cut
    np.testing.assert_allclose([back.real, back.imag], np.clip([re, im], -limit, limit), atol=1e-6)


def test_masks_do_what_they_are_for():
    g = torch.Generator().manual_seed(0)
    s, n = torch.complex(*torch.randn(2, 4, 33, 9, generator=g)), torch.complex(*torch.randn(2, 4, 33, 9, generator=g))
    torch.testing.assert_close(sf.complex_mask(s, s + n) * (s + n), s, atol=1e-4, rtol=1e-4)
    ratio = sf.ratio_mask(s, n)
    torch.testing.assert_close(ratio.square() + sf.ratio_mask(n, s).square(), torch.ones_like(ratio))
    zero = torch.zeros(1, 2, 2, dtype=torch.complex64)
    assert sf.complex_mask(s[:1, :2, :2], zero).abs().max() == 0 and sf.ratio_mask(zero, zero).abs().max() == 0


def test_the_spectral_loss_is_its_formula():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 3, 2000, generator=g)
    A, B = (sf.Spectrum()(x).numpy().astype(np.complex128) for x in (a, b))
    p, q = (np.abs(z) ** 0.3 * np.exp(1j * np.angle(z)) for z in (A, B))
    parts = np.stack([(p - q).real, (p - q).imag])
    expected = 0.2 * np.abs(parts).mean() + 0.7 * np.abs(np.abs(p) - np.abs(q)).mean()
    assert sf.SpectralLoss(complex=0.2, magnitude=0.7)(a, b).item() == pytest.approx(expected, rel=1e-3)


def test_gradients_are_finite_in_silence():
    x = torch.zeros(1, 600, requires_grad=True)
    (sf.SpectralLoss()(x, torch.zeros(1, 600)) + sf.power_law(sf.Spectrum()(x)).abs().sum()).backward()
    assert x.grad.isfinite().all()


def test_bad_input_is_named():
    for wrong, match in (
        (lambda: sf.Spectrum(255, 100), "n_fft=255"),
        (lambda: sf.Spectrum(64, 33), "hop=33"),
        (lambda: sf.Spectrum()(torch.zeros(2, 5, dtype=torch.int16)), "int16"),
        (lambda: sf.Spectrum()(torch.zeros(2, 3, 5)), r"\(2, 3, 5\)"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()


def test_pictures_and_players():
    waves = {"one & two": torch.sin(torch.arange(4000.0)), "half": 0.5 * torch.sin(torch.arange(4000.0))}
    figure = sf.plot_spectrograms(waves)
    assert [axes.get_title() for axes in figure.axes] == [*waves]
    assert figure.axes[0].images[0].get_clim() == figure.axes[1].images[0].get_clim(), "one scale"
    loud, soft = (axes.images[0].get_array().max() for axes in figure.axes)
    assert loud - soft == pytest.approx(20 * np.log10(2), abs=0.01)
    assert sf.players(waves).data.count("data:audio/wav;base64,") == 2 and "one &amp; two" in sf.players(waves).data
