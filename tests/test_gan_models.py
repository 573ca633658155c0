"""DCGAN's shapes, sizes and initial weights, and what is refused."""
import pytest
import torch
from torch import nn

from trainkit.gan.models import DCGANDiscriminator, DCGANGenerator, dcgan_init, doublings, down_block, up_block


def n_params(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("num_classes", [0, 4])
@pytest.mark.parametrize("batchnorm", [True, False])
def test_shapes_and_ranges(size, num_classes, batchnorm):
    torch.manual_seed(0)
    G = DCGANGenerator(7, size, 2, 2, num_classes, batchnorm)
    D = DCGANDiscriminator(size, 2, 2, num_classes, batchnorm)
    labels = torch.randint(num_classes, (3,)) if num_classes else None
    images = G(10 * G.sample_latent(3), labels)
    assert images.shape == (3, 2, size, size) and images.abs().max() <= 1
    assert D(images, labels).shape == (3,)
    assert D.features(images, labels).shape == (3, 2 * size // 8, 4, 4)
    (D(images, labels)).sum().backward()
    assert all(p.grad is not None for m in (G, D) for p in m.parameters())


def test_images_fill_the_range_of_tanh():
    torch.manual_seed(0)
    G = DCGANGenerator(7, 16, 1, 2)
    with torch.no_grad():
        G.to_image[0].weight.mul_(1000)
        images = G(G.sample_latent(8))
    assert images.min() == pytest.approx(-1, abs=1e-3) and images.max() == pytest.approx(1, abs=1e-3)


def test_parameter_counts_at_the_usual_defaults():
    assert n_params(DCGANGenerator()) == 1_068_931
    assert n_params(DCGANDiscriminator()) == 663_360
    # by hand: embedding 10·10; ten more noise values into 256 4×4 kernels; ten more planes into 64
    assert n_params(DCGANGenerator(num_classes=10)) == 1_068_931 + 100 + 10 * 256 * 16
    assert n_params(DCGANDiscriminator(num_classes=10)) == 663_360 + 100 + 10 * 64 * 16


def test_initial_weights_are_the_papers():
    torch.manual_seed(0)
    for model in (DCGANGenerator(), DCGANDiscriminator()):
        for m in model.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                assert m.weight.mean().abs() < 1.5e-3 and 0.018 < m.weight.std() < 0.022
                assert m.bias is None or m.bias.eq(0).all()
            elif isinstance(m, nn.BatchNorm2d):
                assert 0.99 < m.weight.mean() < 1.01 and 0.012 < m.weight.std() < 0.028 and m.bias.eq(0).all()


def test_init_leaves_other_layers_alone():
    layer = nn.Linear(3, 3)
    before = layer.weight.clone()
    layer.apply(dcgan_init)
    assert torch.equal(layer.weight, before)


def test_logits_are_linear_and_unbounded():
    torch.manual_seed(0)
    D = DCGANDiscriminator(16, 1, 4).eval()
    x = torch.randn(64, 1, 16, 16)
    before = D(x)
    with torch.no_grad():
        D.to_logit.weight.mul_(-100)
    torch.testing.assert_close(D(x), -100 * before)
    assert before.min() < 0 < before.max()


def test_blocks_double_and_halve():
    assert up_block(5, 3)(torch.randn(2, 5, 6, 6)).shape == (2, 3, 12, 12)
    assert up_block(5, 3, first=True)(torch.randn(2, 5, 1, 1)).shape == (2, 3, 4, 4)
    assert down_block(5, 3)(torch.randn(2, 5, 12, 12)).shape == (2, 3, 6, 6)
    for block in (up_block, down_block):
        assert block(5, 3)[0].bias is None and block(5, 3, norm=None)[0].bias is not None


@pytest.mark.parametrize("size", [0, 1, 4, 8, 15, 17, 24, 48, 100, 32.0, -16])
def test_other_sizes_are_refused_by_name(size):
    for build in (lambda: DCGANGenerator(out_size=size), lambda: DCGANDiscriminator(in_size=size)):
        with pytest.raises(ValueError, match=f"image size {size!r} is not a power of two from 16"):
            build()


def test_near_sizes_are_offered():
    with pytest.raises(ValueError, match="near it: 64 and 128"):
        doublings(100)


def test_sampling_noise():
    G = DCGANGenerator(5, 16, 1, 2)
    own = [G.sample_latent(3, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*own) and own[0].shape == (3, 5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert not torch.equal(G.sample_latent(3), G.sample_latent(3))
    torch.set_rng_state(state)
    G.sample_latent(2, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert G.sample_latent(2, device="meta").device.type == "meta"
    assert DCGANGenerator(5, 16, 1, 2).to("meta").sample_latent(2).device.type == "meta"  # follows the weights


def test_labels_change_the_answer():
    torch.manual_seed(0)
    G, D = DCGANGenerator(5, 16, 1, 4, 3).eval(), DCGANDiscriminator(16, 1, 4, 3).eval()
    z, x = G.sample_latent(1).expand(3, -1), torch.randn(1, 1, 16, 16).expand(3, -1, -1, -1)
    assert len(G(z, torch.arange(3)).flatten(1).unique(dim=0)) == 3
    assert len(D(x, torch.arange(3)).unique()) == 3


def test_misuse_is_named():
    plain, conditional, y = DCGANGenerator(5, 16, 1, 2), DCGANGenerator(5, 16, 1, 2, 3), torch.tensor([0, 1])
    z = torch.randn(2, 5)
    for call, says in [
        (lambda: plain(z, y), "built without classes"),
        (lambda: conditional(z), "num_classes=3 and needs labels"),
        (lambda: conditional(z, y[:1]), r"labels of shape \(2,\), got \(1,\)"),
        (lambda: conditional(z, y.float()), "integer labels"),
        (lambda: plain(z[:, :4]), r"noise has shape \(2, 4\); expected \(batch, 5\)"),
        (lambda: plain(z[:, :, None, None]), "noise has shape"),
        (lambda: DCGANDiscriminator(16, 1, 2)(torch.randn(2, 3, 16, 16)), r"expected \(batch, 1, 16, 16\)"),
        (lambda: DCGANDiscriminator(16, 1, 2, 3)(torch.randn(2, 1, 16, 16)), "needs labels"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


def test_channels_last_gives_the_same():
    torch.manual_seed(0)
    G, D = DCGANGenerator(5, 16, 1, 4, 3).eval(), DCGANDiscriminator(16, 1, 4, 3).eval()
    z, y = torch.randn(2, 5), torch.tensor([0, 2])
    before = D(G(z, y), y)
    G, D = G.to(memory_format=torch.channels_last), D.to(memory_format=torch.channels_last)
    torch.testing.assert_close(D(G(z, y), y), before)
