"Tiles against the whole image."
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit.sr.models import EDSR, WDSR, SRResNet
from trainkit.sr.tiles import reach, tile_spans, upscale_tiled

torch.set_num_threads(1)


def network(name, scale=2):
    torch.manual_seed(0)
    make = {"edsr": lambda: EDSR(scale, 4, 1), "wdsr": lambda: WDSR(scale, 5, 1), "srresnet": lambda: SRResNet(scale, 4, 1)}
    return make[name]()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 80), st.integers(0, 79))
def test_spans_cover_the_side_once(length, tile, overlap):
    assume(overlap < tile)
    spans = tile_spans(length, tile, overlap)
    assert [i for _, _, a, b in spans for i in range(a, b)] == list(range(length))
    for (s, e, a, b), (s2, _, a2, _) in zip(spans, spans[1:]):
        assert e - s2 >= overlap and e - b >= overlap // 2 and a2 - s2 >= overlap // 2
    for s, e, a, b in spans:
        assert 0 <= s <= a < b <= e <= length and e - s == min(tile, length)


@pytest.mark.parametrize("name", ["edsr", "wdsr", "srresnet"])
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 75), st.integers(1, 75), st.integers(1, 9), st.integers(1, 5), st.sampled_from([2, 3, 4]))
def test_with_the_overlap_it_finds_nothing_differs(name, h, w, more, batch_size, scale):
    net = network(name, scale).eval()
    image = torch.rand(3, h, w, generator=torch.Generator().manual_seed(h * 100 + w))
    tiled = upscale_tiled(net, image, tile=2 * reach(net) + more * 4, batch_size=batch_size)
    with torch.no_grad():
        torch.testing.assert_close(tiled, net(image[None])[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["edsr", "wdsr", "srresnet"])
def test_reach_bounds_what_a_network_looks_at(name):
    net = network(name, 2).eval().double()
    n = reach(net)
    x = torch.rand(1, 3, 2 * n + 9, 2 * n + 9, dtype=torch.float64)
    middle, change = n + 4, x.clone()
    change[..., : middle - n], change[..., middle + n + 1 :] = 5, -5
    change[..., : middle - n, :], change[..., middle + n + 1 :, :] = 5, -5
    with torch.no_grad():
        here = slice(2 * middle, 2 * middle + 2)
        torch.testing.assert_close(net(change)[..., here, here], net(x)[..., here, here], rtol=0, atol=1e-12)


def test_too_little_overlap_is_seen():
    net = network("edsr").eval()
    image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = net(image[None])[0]
    assert (upscale_tiled(net, image, tile=20, overlap=0) - whole).abs().max() > 1e-3


def test_batches_modes_and_no_gradient():
    net = network("srresnet")  # batch norm: in train mode, tiles would change it
    net.body.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    image = torch.rand(2, 3, 50, 30, generator=torch.Generator().manual_seed(0))
    random = torch.get_rng_state()
    tiled = upscale_tiled(net, image, tile=40)
    assert net.training and not net.body.training and not tiled.requires_grad
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(tiled, net.eval()(image), rtol=0, atol=2e-5)
    one, batch = (upscale_tiled(net, x, tile=40, batch_size=1) for x in (image[0], image[:1]))
    assert torch.equal(one, batch[0])


def test_all_tiles_have_one_size_and_batches_are_full():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(tuple(x.shape))
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    image = torch.rand(3, 30, 23)
    out = upscale_tiled(Spy(), image, scale=2, tile=10, overlap=2, batch_size=5)
    assert torch.equal(out, image.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert {shape[2:] for shape in seen} == {(10, 10)} and [shape[0] for shape in seen] == [5, 5, 2]


def test_an_error_leaves_the_mode():
    net = network("edsr")
    with pytest.raises(ValueError, match="not 4 times the size"):
        upscale_tiled(net, torch.rand(3, 8, 8), scale=4)
    assert net.training


def test_bad_input_is_named():
    net, x = network("edsr"), torch.rand(3, 60, 60)
    for call, text in (
        (lambda: upscale_tiled(net, x, tile=12), "tile=12, overlap=12"),
        (lambda: upscale_tiled(net, x, tile=8, overlap=-1), "overlap=-1"),
        (lambda: upscale_tiled(net, x, batch_size=0), "batch_size=0"),
        (lambda: upscale_tiled(net, x[0]), r"received \(60, 60\)"),
        (lambda: upscale_tiled(net, x[None][:0]), "no image"),
        (lambda: upscale_tiled(nn.Identity(), x), "scale=0: accepted are 2, 3, 4, 8"),
        (lambda: upscale_tiled(net, x, scale=5), "scale=5"),
        (lambda: tile_spans(0, 8, 2), "length=0"),
        (lambda: reach(nn.Sequential(nn.ConvTranspose2d(3, 3, 2))), "strided"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_even_and_dilated_kernels_are_not_underestimated():
    assert reach(nn.Conv2d(1, 1, 4, padding="same")) == 2
    assert reach(nn.Conv2d(1, 1, (3, 5), dilation=(4, 1))) == 4
