"Networks: how many parameters, what they may see, and that they learn."

import pytest
import torch
from torch import nn

from trainkit.speech import models as sm
from trainkit.speech.features import complex_mask, squeeze
from trainkit.speech.metrics import si_sdr

torch.set_num_threads(1)
NETS = {
    "fullsubnet": lambda **k: sm.FullSubNet(12, 8, 1, neighbours=2, n_fft=64, hop=32, **k),
    "gru": lambda **k: sm.FullSubNet(12, 8, 1, neighbours=0, look_ahead=0, n_fft=64, hop=32, cell="gru", **k),
    "crn": lambda **k: sm.CRN((4, 6), 8, n_fft=64, hop=32, **k),
}


def test_the_papers_size():
    def lstm(inputs, hidden):
        return sum(4 * hidden * (n + hidden + 2) for n in (inputs, hidden))

    expected = lstm(257, 512) + 512 * 257 + 257 + lstm(2 * 15 + 2, 384) + 384 * 2 + 2
    assert sum(p.numel() for p in sm.FullSubNet().parameters()) == expected == 5_637_635


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("n", [64, 1000, 1001])
def test_any_length_and_no_nan(name, n):
    torch.manual_seed(0)
    net = NETS[name]()
    for x in torch.randn(2, n), torch.zeros(2, n), 1e4 * torch.randn(2, n):
        out = net(x)
        assert out.shape == x.shape and out.isfinite().all()


@pytest.mark.parametrize("name", NETS)
def test_what_is_untrained_lets_pass(name):
    torch.manual_seed(0)
    x = torch.randn(2, 992)
    assert si_sdr(NETS[name]().eval()(x), x).min() > 15


@pytest.mark.parametrize(("name", "ahead"), [("fullsubnet", 2), ("gru", 0), ("crn", 0)])
def test_nothing_is_heard_before_it_comes(name, ahead):
    torch.manual_seed(0)
    net = NETS[name]().eval()
    x = torch.randn(1, 1600)
    other = x.clone()
    other[:, 800:] += torch.randn(1, 800)
    changed = (net(x) - net(other)).abs()[0]
    allowed = 800 - ahead * 32 - 64
    assert changed[:allowed].max() < 1e-5 and changed[allowed : 800].max() > 1e-4, "as far as that it does look ahead"


@pytest.mark.parametrize("name", NETS)
def test_volume_makes_no_difference(name):
    torch.manual_seed(0)
    net, x = NETS[name]().eval(), torch.randn(2, 1600)
    torch.testing.assert_close(net(8 * x), 8 * net(x), atol=0.05, rtol=0.02)


def test_a_mask_is_what_is_learned():
    "Squeezed masks can be compared as the papers do, and the network that gives the ideal one gives the clean signal."
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 1, 2000)
    net = NETS["fullsubnet"]()
    spectrum = net.transform(clean + noise)
    ideal = squeeze(complex_mask(net.transform(clean), spectrum))
    assert net.parts(spectrum).shape == ideal.shape == (1, 2, 33, 64)
    net.parts = lambda _: ideal
    assert si_sdr(net(clean + noise), clean) > 25


@pytest.mark.parametrize("name", NETS)
def test_noise_in_one_band_is_learned_away(name):
    torch.manual_seed(0)
    net, t = NETS[name](), torch.arange(1600) / 8000
    opt = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(40):
        clean = torch.sin(2 * torch.pi * (600 + 300 * torch.rand(4, 1)) * t)
        noise = torch.sin(2 * torch.pi * (2500 + 700 * torch.rand(4, 1)) * t)
        loss = -si_sdr(net(clean + noise), clean).mean()
        opt.zero_grad(), loss.backward(), opt.step()
    assert loss < -5, "three seeds gave -9 to -35; nothing done is 0"


def test_the_critic_learns_an_order():
    torch.manual_seed(0)
    critic, truth, x = sm.MetricCritic(4, 64, 32), torch.rand(48), torch.randn(48, 800)
    y = truth[:, None] * x + (1 - truth[:, None]) * torch.randn_like(x)
    opt = torch.optim.Adam(critic.parameters(), lr=0.01)
    for _ in range(25):
        loss = nn.functional.mse_loss(critic(y, x), truth)
        opt.zero_grad(), loss.backward(), opt.step()
    assert torch.corrcoef(torch.stack([critic(y, x).detach(), truth]))[0, 1] > 0.9


def test_bad_input_is_named():
    for wrong, match in (
        (lambda: sm.FullSubNet(cell="rnn"), "there are lstm and gru"),
        (lambda: sm.FullSubNet(neighbours=300), "neighbours=300"),
        (lambda: sm.FullSubNet(look_ahead=-1), "look_ahead=-1"),
        (lambda: sm.CRN((4,) * 8), "can't be halved 8 times"),
        (lambda: sm.CRN(()), "can't be halved 0 times"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()
