"Photographs, MATLAB-like bicubic resizing and aligned crops, against independent references."
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from trainkit.seeds import SeededStream
from trainkit.sr import data as sr

torch.set_num_threads(1)


def keys_kernel(x):
    "Keys 1981, a = -1/2, written out."
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def imresize_1d(signal, out_length):
    "MATLAB's imresize along the last axis: `contributions` with a symmetric continuation, one output at a time."
    n = signal.shape[-1]
    ratio = out_length / n
    stretch = max(1.0, 1 / ratio)
    out = np.zeros((*signal.shape[:-1], out_length))
    for j in range(out_length):
        centre = (j + 0.5) / ratio - 0.5
        taps = np.arange(int(np.floor(centre - 2 * stretch)) - 1, int(np.ceil(centre + 2 * stretch)) + 2)
        weights = keys_kernel((taps - centre) / stretch)
        weights /= weights.sum()
        folded = np.mod(taps, 2 * n)
        folded = np.where(folded < n, folded, 2 * n - 1 - folded)
        out[..., j] = signal[..., folded] @ weights
    return out


def imresize(image, size):
    rows = imresize_1d(np.swapaxes(image, -1, -2), size[0])
    return imresize_1d(np.swapaxes(rows, -1, -2), size[1])


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sr.SCALES), st.integers(2, 7), st.integers(2, 7), st.integers(0, 2**20))
def test_downscale_is_imresize(scale, h, w, seed):
    x = np.random.default_rng(seed).uniform(0, 255, (2, h * scale, w * scale))
    np.testing.assert_allclose(sr.downscale(torch.from_numpy(x), scale).numpy(), imresize(x, (h, w)), atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sr.SCALES), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**20))
def test_upscale_is_imresize(scale, h, w, seed):
    x = np.random.default_rng(seed).uniform(0, 255, (2, h, w))
    np.testing.assert_allclose(sr.upscale(torch.from_numpy(x), scale).numpy(), imresize(x, (h * scale, w * scale)), atol=1e-9)


@pytest.mark.parametrize("scale", sr.SCALES)
def test_eight_bit_images_are_the_rounded_ones(scale):
    image = sr.modcrop(sr.photograph("chelsea"), scale)[:, : 6 * scale * 4, : 5 * scale * 4]
    image = sr.modcrop(image, scale)
    exact = imresize(image.double().numpy(), [n // scale for n in image.shape[1:]])
    ours = sr.downscale(image, scale)
    assert ours.dtype == torch.uint8
    assert np.abs(ours.numpy() - exact.clip(0, 255)).max() <= 0.5 + 1e-6


def test_overshoot_is_clamped_not_wrapped():
    step = torch.zeros(1, 16, 16, dtype=torch.uint8)
    step[..., 8:] = 255
    exact = sr.upscale(step.double(), 4)
    assert exact.min() < 0 and exact.max() > 255
    assert torch.equal(sr.upscale(step, 4).double(), exact.clamp(0, 255).round())


@pytest.mark.parametrize("scale", sr.SCALES)
def test_pil_on_numbers_agrees_inside(scale):
    plane = sr.modcrop(sr.photograph("coffee"), scale)[0].float()
    h, w = (n // scale for n in plane.shape)
    theirs = np.array(Image.fromarray(plane.numpy()).resize((w, h), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(sr.downscale(plane, scale).numpy()[2:-2, 2:-2], theirs[2:-2, 2:-2], atol=1e-3)
    back = np.array(Image.fromarray(theirs).resize((w * scale, h * scale), Image.Resampling.BICUBIC))
    inside = np.s_[2 * scale : -2 * scale, 2 * scale : -2 * scale]
    np.testing.assert_allclose(sr.upscale(torch.from_numpy(theirs), scale).numpy()[inside], back[inside], atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sr.SCALES), st.integers(0, 7), st.integers(0, 2**20))
def test_turning_and_resizing_commute(scale, k, seed):
    x = torch.from_numpy(np.random.default_rng(seed).uniform(0, 1, (1, 3 * scale, 5 * scale)))
    torch.testing.assert_close(sr.downscale(sr.turned(x, k), scale), sr.turned(sr.downscale(x, scale), k), rtol=0, atol=1e-12)


def test_mirrored_is_numpys_symmetric():
    x = np.random.default_rng(0).uniform(size=(2, 3, 4))
    for margin in (0, 1, 3, 9):
        expected = np.pad(x, ((0, 0), (margin,) * 2, (margin,) * 2), mode="symmetric")
        np.testing.assert_array_equal(sr.mirrored(torch.from_numpy(x), margin).numpy(), expected)


# --- photographs ------------------------------------------------------------------------------------------------------

def test_photographs_are_those_of_the_files():
    folder = Path(find_spec("skimage").submodule_search_locations[0])
    for name, path in sr.PHOTOGRAPHS.items():
        image = sr.photograph(name)
        with Image.open(folder / path) as file:
            theirs = np.array(file)
        theirs = theirs if theirs.ndim == 3 else np.stack([theirs] * 3, -1)
        assert image.dtype == torch.uint8 and image.is_contiguous()
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), theirs[..., :3])


def test_nothing_large_is_imported():
    code = """import sys
from trainkit.sr.data import photograph
assert 'PIL' not in sys.modules
photograph('chelsea')
assert not {'skimage', 'scipy', 'matplotlib'} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sr, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps scikit-image"):
        sr.photograph("chelsea")


def test_a_split_is_by_photograph():
    images = {name: torch.full((3, 8, 8), i, dtype=torch.uint8) for i, name in enumerate(sr.PHOTOGRAPHS)}
    train, valid = sr.split_photographs(images, ["coins", "camera"])
    assert [*valid] == ["coins", "camera"] and not train.keys() & valid.keys() and {**train, **valid}.keys() == images.keys()
    with pytest.raises(ValueError, match="did you mean 'camera'"):
        sr.split_photographs(images, ["camerra"])
    for held_out in ([], images):
        with pytest.raises(ValueError, match="each side needs one"):
            sr.split_photographs(images, held_out)


# --- pairs ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def images():
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=g) for size in ((53, 61), (48, 48))]


@pytest.mark.parametrize("scale", sr.SCALES)
def test_whole_pairs(images, scale):
    for (lr, hr), image in zip(sr.whole_pairs(images, scale), images):
        h, w = (n // scale for n in image.shape[1:])
        assert lr.shape == (3, h, w) and lr.dtype == hr.dtype == torch.float32
        assert torch.equal((hr * 255).round().to(torch.uint8), image[:, : h * scale, : w * scale])
        assert torch.equal((lr * 255).round().to(torch.uint8), sr.downscale(image[:, : h * scale, : w * scale], scale))


def places(crop, image):
    "Where, and turned how, a crop lies in an image."
    windows = image.unfold(1, crop.shape[1], 1).unfold(2, crop.shape[2], 1)
    found = set()
    for k in range(8):
        hits = (windows == sr.turned(crop, k)[:, None, None]).all(-1).all(-1).all(0).nonzero().tolist()
        found |= {(k, *hit) for hit in hits}
    return found


@pytest.mark.parametrize("scale", [2, 3])
def test_crops_are_aligned_and_of_every_kind(images, scale):
    data, turns, corners = sr.CropPairs(images, scale, patch=9, length=60), set(), set()
    torch.manual_seed(0)
    for i in range(60):
        lr, hr = ((x * 255).round().to(torch.uint8) for x in data[i])
        low, high = data.pairs[i % 2]
        (k, y, x), = places(lr, low)
        assert places(hr, high) == {(k, y * scale, x * scale)}
        turns.add(k)
        corners.add((y, x))
    assert turns == set(range(8)) and len(corners) > 30


def test_crops_reach_every_place(images):
    data = sr.CropPairs(images[1:], 4, patch=11, length=1, augment=False)
    torch.manual_seed(0)
    seen = {tuple(place) for _ in range(40) for place in places((data[0][0] * 255).round().to(torch.uint8), data.pairs[0][0])}
    assert seen == {(0, y, x) for y in (0, 1) for x in (0, 1)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_taken_up_again_has_the_same_crops(images, workers):
    def stream(n):
        return SeededStream(DataLoader(sr.CropPairs(images, 2, patch=8, length=12), batch_size=3, shuffle=True, num_workers=n,
                                       generator=torch.Generator().manual_seed(3)), seed=7)  # fmt: skip

    one = stream(0)
    expected = [one.next_batch() for _ in range(4)]
    two = stream(workers)
    for _ in range(2):
        two.next_batch()
    state = two.state_dict()
    torch.manual_seed(99)
    three = stream(workers)
    three.load_state_dict(state)
    for wanted in expected[2:]:
        for a, b in zip(three.next_batch(), wanted):
            assert torch.equal(a, b)


def test_bad_input_is_named(images):
    for scale in (1, 5, 0, -2, 2.0, True, "2"):
        with pytest.raises(ValueError, match="accepted are 2, 3, 4, 8"):
            sr.downscale(images[0], scale)
    for call, text in (
        (lambda: sr.downscale(images[0], 2), r"sides 53×61 are no multiples of scale 2"),
        (lambda: sr.modcrop(images[0][:, :3], 4), "smaller than one pixel"),
        (lambda: sr.CropPairs(images, 4, patch=13), r"needs sides from 52"),
        (lambda: sr.CropPairs([], 4), "0 images"),
        (lambda: sr.CropPairs(images, 4, patch=8, length=0), "length=0"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    data = sr.CropPairs(images, 2, patch=8, length=3)
    for i in (3, -1):
        with pytest.raises(IndexError):
            data[i]
    assert len([*data]) == 3
