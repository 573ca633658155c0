"VGG: torchvision's numbers and sizes by arithmetic, files there and back with random weights, and what is refused."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from trainkit.checkpoint import CheckpointError
from trainkit.gan.features import Perceptual
from trainkit.sr.vgg import DEPTHS, VGG, WIDTHS, layer_names, load_vgg, vgg_form

torch.set_num_threads(1)
FORMS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # table 1 of the paper
CONVOLUTIONS_19 = [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34]  # in torchvision's `vgg19().features`


@pytest.mark.parametrize("layers, parameters", [(11, 9_220_480), (13, 9_404_992), (16, 14_714_688), (19, 20_024_384)])
def test_published_sizes(layers, parameters):
    with torch.device("meta"):
        model = VGG("pool5", FORMS[layers])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == layers - 3
    assert vgg_form(model.state_dict()) == (FORMS[layers], WIDTHS)


def test_torchvisions_numbers():
    with torch.device("meta"):
        model = VGG()
    assert [i for i, m in enumerate(model.features) if isinstance(m, nn.Conv2d)] == CONVOLUTIONS_19
    assert [*model.state_dict()] == [f"features.{i}.{kind}" for i in CONVOLUTIONS_19 for kind in ("weight", "bias")]
    assert len(model.features) == 36 and len(layer_names()) == 37 and DEPTHS == FORMS[19]
    assert not any(getattr(m, "inplace", False) for m in model.modules())


def test_forward_by_hand():
    "As written by the numbers of the layers, colours brought to ImageNet's mean and deviation first."
    torch.manual_seed(0)
    model = VGG("relu2_2", (1, 2), (3, 5))
    w = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    x = torch.rand(2, 3, 9, 8)
    colours = zip(x.unbind(1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    h = torch.stack([(c - mean) / std for c, mean, std in colours], 1)
    h = F.max_pool2d(F.conv2d(h, w[0].weight, w[0].bias, padding=1).relu(), 2)
    h = F.conv2d(F.conv2d(h, w[1].weight, w[1].bias, padding=1).relu(), w[2].weight, w[2].bias, padding=1)
    torch.testing.assert_close(model(x), h.relu())
    before = load_vgg(model, "conv2_2")
    torch.testing.assert_close(before(x), h)
    assert (before(x) < 0).any(), "what the convolution gave, not what a ReLU left of it"


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_there_and_back(tmp_path_factory, data):
    "Any form of a VGG is found again in its weights, and gives the same up to every layer."
    stages = data.draw(st.integers(1, 4))
    depths = tuple(data.draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages)))
    widths = tuple(data.draw(st.lists(st.integers(1, 5), min_size=stages, max_size=stages)))
    names = layer_names(depths)
    model = VGG(names[-1], depths, widths)
    last = data.draw(st.sampled_from(names))
    path = tmp_path_factory.mktemp("vgg") / "weights.pth"
    torch.save({**model.state_dict(), "classifier.0.weight": torch.zeros(3, 3)}, path)
    assert vgg_form(model.state_dict()) == (depths, widths)
    x, loaded = torch.rand(1, 3, 17, 16), load_vgg(path, last)
    with torch.no_grad():
        shown = (x - model.mean) / model.std
        for layer in model.features[: names.index(last) + 1]:
            shown = layer(shown)
    assert torch.equal(loaded(x), shown)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_safetensors_and_perceptual(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    model = VGG("relu3_1", (1, 1, 1), (4, 4, 4))
    safetensors.save_file(model.state_dict(), tmp_path / "vgg.safetensors")
    loss = Perceptual(load_vgg(tmp_path / "vgg.safetensors", "relu3_1"))
    a, b = torch.rand(2, 3, 16, 16, requires_grad=True), torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(loss(a, b), F.mse_loss(model(a), model(b)))
    loss(a, b).backward()
    assert a.grad.abs().sum() > 0 and loss(b, b) == 0


def test_what_is_refused(tmp_path):
    small = VGG("relu2_1", (1, 1), (4, 4))
    for last in ("relu5_4", "conv2_2", "features.0", ""):
        with pytest.raises(ValueError, match="name of a layer"):
            load_vgg(small, last)
    with pytest.raises(ValueError, match="a depth for each width"):
        VGG("relu1_1", (1, 1), (4,))
    with pytest.raises(ValueError, match=r"VGG expects \(batch, 3, height, width\)"):
        small(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="sides from 2"):
        small(torch.rand(1, 3, 1, 8))
    weights = small.state_dict()
    lacking = {name: w for name, w in weights.items() if name != "features.3.bias"}
    with pytest.raises(ValueError, match=r"up to relu2_1: .*missing: features\.3\.bias"):
        load_vgg(lacking, "relu2_1")
    with pytest.raises(ValueError, match="of another shape"):
        load_vgg({**weights, "features.3.weight": torch.zeros(4, 9, 3, 3)}, "relu2_1")
    normed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match="no VGG's weights"):
        load_vgg({f"features.{name}": w for name, w in normed.state_dict().items()}, "relu1_1")
    (tmp_path / "vgg.pth").write_bytes(b"not a file of torch's")
    with pytest.raises(CheckpointError, match=r"vgg\.pth"):
        load_vgg(tmp_path / "vgg.pth")
