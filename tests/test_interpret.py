"Confusions and highest losses: against double loops, and with loaders that shuffle, drop, repeat and transform."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler
from torchmetrics.classification import MulticlassConfusionMatrix

from trainkit.callback import CancelValidate, On
from trainkit.interpret import (
    Predictions,
    confusion_matrix,
    most_confused,
    plot_confusion,
    plot_top_losses,
    predictions,
    sample_losses,
    top_losses,
)
from trainkit.learner import Learner

N, C = 23, 4
X = torch.randn(N, C, generator=torch.Generator().manual_seed(0))
Y = torch.randint(C, (N,), generator=torch.Generator().manual_seed(1))


class Scores(nn.Module):
    "The first few numbers of each input are its scores."

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x.flatten(1)[:, :C] * self.factor


def learner(dls=None, model=None, **options):
    return Learner(model or Scores(), dls, "cross_entropy", front="none", **options)


@st.composite
def judged(draw):
    "Scores and targets of up to 40 samples in up to 6 classes; few different scores, so that some tie."
    classes, n = draw(st.integers(2, 6)), draw(st.integers(1, 40))
    scores = draw(st.lists(st.lists(st.integers(-3, 3), min_size=classes, max_size=classes), min_size=n, max_size=n))
    targets = draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    return torch.tensor(scores).float() - 3.5, torch.tensor(targets)


# ---------------------------------------------------------------------------------------------------------- confusions


@settings(deadline=None, max_examples=60)
@given(judged())
def test_the_matrix_is_that_of_a_double_loop_and_of_torchmetrics(case):
    scores, targets = case
    n, classes = scores.shape
    expected = torch.zeros(classes, classes, dtype=torch.int64)
    for row, target in zip(scores.tolist(), targets.tolist()):
        expected[target, row.index(max(row))] += 1
    matrix = confusion_matrix(case)
    assert matrix.dtype == torch.int64 and torch.equal(matrix, expected)
    assert torch.equal(matrix, MulticlassConfusionMatrix(classes)(scores, targets))
    assert torch.equal(matrix.sum(1), targets.bincount(minlength=classes)) and matrix.sum() == n


@settings(deadline=None, max_examples=40)
@given(judged(), st.randoms(use_true_random=False))
def test_the_order_of_the_samples_changes_nothing(case, random):
    scores, targets = case
    order = [*range(len(targets))]
    random.shuffle(order)
    moved = Predictions(scores[order], targets[order], torch.tensor(order))
    assert torch.equal(confusion_matrix(case), confusion_matrix(moved))
    assert most_confused(case) == most_confused(moved)
    a, b = top_losses(case, 40), top_losses(moved, 40)
    assert [s.loss for s in a] == pytest.approx([s.loss for s in b])
    assert {s.index: s[2:4] for s in a} == {s.index: s[2:4] for s in b}


@settings(deadline=None, max_examples=40)
@given(judged())
def test_confusions_are_the_matrix_off_its_diagonal(case):
    matrix, pairs = confusion_matrix(case), most_confused(case, 1000)
    assert sum(pair.count for pair in pairs) == matrix.sum() - matrix.trace()
    assert all(pair.true != pair.predicted and matrix[pair.true, pair.predicted] == pair.count > 0 for pair in pairs)
    assert [pair.count for pair in pairs] == sorted((pair.count for pair in pairs), reverse=True)
    assert len(set(pairs)) == len(pairs) and most_confused(case, 1) == pairs[:1]


def test_names():
    names = ["ant", "bee", "cow", "dog"]
    for plain, named in zip(most_confused((X, Y)), most_confused((X, Y), names=names), strict=True):
        assert named == (names[plain.true], names[plain.predicted], plain.count)
    plain, named = top_losses((X, Y), 5), top_losses((X, Y), 5, names)
    assert [(names[s.true], names[s.predicted], s.index) for s in plain] == [(s.true, s.predicted, s.index) for s in named]
    pair = most_confused((X, Y), 1, names)[0]
    assert len(top_losses((X, Y), N, names, only=pair[:2])) == pair.count


# -------------------------------------------------------------------------------------------------------------- losses


@settings(deadline=None, max_examples=40)
@given(judged())
def test_losses_are_minus_the_log_of_the_true_class_s_share(case):
    scores, targets = case
    expected = [np.log(np.exp(row).sum()) - row[t] for row, t in zip(scores.double().numpy(), targets.tolist())]
    torch.testing.assert_close(sample_losses(case), torch.tensor(expected).float(), atol=1e-5, rtol=1e-5)
    found = top_losses(case, 1000)
    assert sorted(s.index for s in found) == [*range(len(targets))]
    assert [s.loss for s in found] == sorted((s.loss for s in found), reverse=True)
    for s in found:
        assert s.true == targets[s.index] and s.predicted == scores[s.index].argmax()
        assert s.probability == pytest.approx(scores[s.index].softmax(0).max().item(), abs=1e-5)


def test_equal_losses_keep_the_dataset_s_order():
    assert [s.index for s in top_losses((torch.ones(6, 3), torch.zeros(6).long()), 4)] == [0, 1, 2, 3]


def test_a_class_ruled_out_has_an_infinite_loss():
    scores = torch.tensor([[0.0, float("-inf")], [2.0, 1.0]])
    assert top_losses((scores, torch.tensor([1, 0])), 1)[0][:2] == (0, float("inf"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_other_types(dtype):
    assert torch.equal(confusion_matrix((X.to(dtype), Y.int())), confusion_matrix((X, Y)))
    torch.testing.assert_close(sample_losses((X.to(dtype), Y.int())), sample_losses((X, Y)), atol=0.05, rtol=0.05)


# --------------------------------------------------------------------------------------------------------------- order

LOADERS = {
    "arrays": lambda: (X, Y),
    "numpy": lambda: (X.numpy(), Y.numpy()),
    "dataset": lambda: TensorDataset(X, Y),
    "in order": lambda: DataLoader(TensorDataset(X, Y), 5),
    "shuffled": lambda: DataLoader(TensorDataset(X, Y), 5, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(TensorDataset(X, Y), 5, shuffle=True, generator=torch.Generator()),
    "without the last batch": lambda: DataLoader(TensorDataset(X, Y), 5, shuffle=True, drop_last=True),
    "with replacement": lambda: DataLoader(TensorDataset(X, Y), 5, sampler=WeightedRandomSampler(torch.ones(N), 50)),
    "a subset, shuffled": lambda: DataLoader(TensorDataset(X, Y), 5, sampler=SubsetRandomSampler(range(N))),
    "batches of a sampler's": lambda: DataLoader(TensorDataset(X, Y), batch_sampler=[*torch.randperm(N).split(4)]),
    "workers": lambda: DataLoader(TensorDataset(X, Y), 5, shuffle=True, num_workers=2),
    "list of batches": lambda: [(X[i : i + 5], Y[i : i + 5]) for i in range(0, N, 5)],
    "dicts": lambda: [{"x": X[:20], "label": Y[:20]}, {"x": X[20:], "label": Y[20:]}],
}


@pytest.mark.parametrize("kind", LOADERS)
def test_an_index_points_at_its_sample(kind):
    seen = predictions(learner({"train": (X, Y), "valid": LOADERS[kind]()}))
    assert torch.equal(seen.scores, X) and torch.equal(seen.targets, Y) and seen.indices.tolist() == [*range(N)]
    losses = F.cross_entropy(X, Y, reduction="none")
    found = top_losses(seen, 6)
    assert [s.index for s in found] == losses.argsort(descending=True)[:6].tolist()
    assert torch.equal(torch.as_tensor(seen.fetch([s.index for s in found])), X[[s.index for s in found]])


def test_a_sampler_s_choice_is_kept():
    chosen = [20, 3, 11, 4, 17]
    loader = DataLoader(TensorDataset(X, Y), 2, sampler=SubsetRandomSampler(chosen))
    seen = predictions(learner(), loader)
    assert seen.indices.tolist() == sorted(chosen) and torch.equal(seen.scores, X[sorted(chosen)])
    assert {s.index for s in top_losses(seen, 99)} == set(chosen)


def test_a_sample_that_is_drawn_twice_counts_once():
    seen = predictions(learner(), DataLoader(TensorDataset(X, Y), batch_sampler=[[5, 2, 5], [2, 9]]))
    assert seen.indices.tolist() == [2, 5, 9] and torch.equal(seen.targets, Y[[2, 5, 9]])


class Jittered(Dataset):
    "Samples with a random transform."

    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i] + torch.rand(C), Y[i]


def test_random_transforms_are_those_of_the_validation_and_of_the_pictures():
    learn = learner({"train": (X, Y), "valid": DataLoader(Jittered(), 5, shuffle=True)}, seed=3)
    seen = predictions(learn)
    assert not torch.equal(seen.scores, X) and torch.equal(seen.targets, Y)
    assert torch.equal(predictions(learn).scores, seen.scores)
    assert torch.equal(seen.fetch([7, 2]), seen.scores[[7, 2]])


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y)


def test_a_stream_counts_its_samples():
    seen = predictions(learner(), DataLoader(Stream(), 4))
    assert torch.equal(seen.scores, X) and seen.indices.tolist() == [*range(N)] and seen.fetch is None
    with pytest.raises(ValueError, match="nowhere to take the images from"):
        plot_top_losses(seen)


def test_looking_changes_nothing():
    def trained(look):
        torch.manual_seed(0)
        order = torch.Generator().manual_seed(5)
        loader = DataLoader(TensorDataset(X, Y), 5, sampler=SubsetRandomSampler(range(N), generator=order))
        learn = learner((loader, (X, Y)), nn.Sequential(nn.Linear(C, 8), nn.Dropout(0.5), nn.Linear(8, C)), seed=0)
        for _ in range(2):
            learn.fit(epochs=1)
            if look:
                predictions(learn, "train"), plot_confusion(learn), top_losses(learn)
        return learn

    a, b = trained(False), trained(True)
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))
    assert a.history.names() == b.history.names() and b.model.training == a.model.training


def test_it_is_the_validation_s_accuracy_and_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(C, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, C))
    learn = learner(((X, Y), DataLoader(TensorDataset(X, Y), 7, shuffle=True)), model, metrics=["accuracy"])
    learn.fit(epochs=2)
    found = learn.validate()
    matrix = confusion_matrix(learn)
    assert matrix.trace().item() / N == pytest.approx(found["valid/accuracy"])
    assert sample_losses(learn).mean().item() == pytest.approx(found["valid/loss"], rel=1e-5)


# --------------------------------------------------------------------------------------------------------------- plots


def test_the_picture_of_a_matrix_holds_its_counts():
    figure = plot_confusion((X, Y), names=["ant", "bee", "cow", "a long name"])
    ax, = figure.axes
    shown = {(t.get_position()[1], t.get_position()[0]): int(t.get_text()) for t in ax.texts}
    matrix = confusion_matrix((X, Y))
    assert shown == {(i, j): int(matrix[i, j]) for i in range(C) for j in range(C) if matrix[i, j]}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["ant", "bee", "cow", "a long name"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "true")
    percent = plot_confusion((X, Y), normalize=True).axes[0].texts
    row = [int(t.get_text()) for t in percent if t.get_position()[1] == 0]
    assert sum(row) == pytest.approx(100, abs=2)


@pytest.mark.parametrize("shape", [(1, 5, 6), (3, 5, 6), (5, 6)])
def test_the_pictures_are_those_of_the_samples(shape):
    images = torch.randn(N, *shape)
    learn = learner({"valid": (images, Y), "train": (images, Y)})
    found = top_losses(learn, 4)
    figure = plot_top_losses(learn, 4, columns=3)
    expected = images[[s.index for s in found]]
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    for ax, sample, image in zip(figure.axes, found, expected, strict=True):
        drawn = torch.as_tensor(np.asarray(ax.images[0].get_array()))
        image = image[0] if shape[0] == 1 else image.permute(1, 2, 0) if len(shape) == 3 else image
        torch.testing.assert_close(drawn.float(), image, atol=1e-5, rtol=1e-5)
        assert ax.get_title() == f"{sample.true} → {sample.predicted}\nloss {sample.loss:.1f}"


def test_an_image_of_one_brightness_is_drawn():
    assert len(plot_top_losses(learner({"valid": (torch.zeros(N, 1, 4, 4), Y), "train": (X, Y)}), 3).axes) == 3


# ----------------------------------------------------------------------------------------------------------- bad input

BAD = [
    (torch.rand(N), Y, ValueError, r"scores \(N, C\)"),
    (torch.rand(N, 1), Y, ValueError, "C >= 2"),
    (torch.rand(N, C, 5, 5), Y, ValueError, r"\(23, 4, 5, 5\)"),
    (torch.ones(N, C).long(), Y, ValueError, "int64"),
    (X, Y.float(), ValueError, "whole class numbers"),
    (X, Y > 1, ValueError, "whole class numbers"),
    (X, Y[:, None], ValueError, r"\(23, 1\)"),
    (X, F.one_hot(Y, C), ValueError, r"targets.argmax\(1\)"),
    (X, Y[:5], ValueError, r"targets of 23 samples.*\(5,\)"),
    (X, Y - 1, ValueError, "from 0 to 3; received some from -1"),
    (X[:, :2], Y, ValueError, "from 0 to 1"),
    (X.where(X > 0, torch.nan), Y, ValueError, "hold NaN"),
    ([1, 2], Y, TypeError, "tensor of scores"),
    ({"logits": X}, Y, TypeError, "'logits'"),
]


@pytest.mark.parametrize("scores, targets, error, said", BAD)
@pytest.mark.parametrize("use", [confusion_matrix, most_confused, sample_losses, top_losses, plot_confusion])
def test_what_is_no_classification_is_refused(scores, targets, error, said, use):
    with pytest.raises(error, match=said):
        use((scores, targets))


def test_learners_that_don_t_classify_are_refused():
    with pytest.raises(ValueError, match="whole class numbers"):
        predictions(learner(), (X, X))
    with pytest.raises(ValueError, match="batches with one target"):
        predictions(learner(), X)
    with pytest.raises(ValueError, match="this learner has no one validation loader"):
        predictions(learner())
    with pytest.raises(ValueError, match=r"no loader 'vaild'.*valid, train"):
        predictions(learner(((X, Y), (X, Y))), "vaild")
    with pytest.raises(RuntimeError, match="cancelled"):
        def cancel(learn):
            raise CancelValidate

        predictions(learner(cbs=On("before_predict", cancel)), (X, Y))


def test_probabilities_are_no_logits():
    with pytest.raises(ValueError, match="leave the softmax away"):
        top_losses((X.softmax(1), Y))
    torch.testing.assert_close(sample_losses((X.softmax(1).log(), Y)), sample_losses((X, Y)))
    assert torch.equal(confusion_matrix((X.softmax(1), Y)), confusion_matrix((X, Y)))


@pytest.mark.parametrize("n", [0, -1, 2.0, True, None, "3"])
def test_how_many(n):
    for use in most_confused, top_losses:
        with pytest.raises(ValueError, match=rf"{use.__name__}\(…, n=…\) takes a whole number >= 1"):
            use((X, Y), n)


def test_other_bad_arguments():
    with pytest.raises(TypeError, match="a Learner, its predictions"):
        confusion_matrix(X)
    for names in ["a", "b"], "abcd", [*"abcde"]:
        with pytest.raises(ValueError, match="there are 4 classes"):
            plot_confusion((X, Y), names)
    with pytest.raises(ValueError, match="there is no class 'dog'"):
        top_losses((X, Y), only=("dog", 1))
    with pytest.raises(ValueError, match="no sample of this kind"):
        plot_top_losses((X.abs() * F.one_hot(Y, C), Y), only=(0, 1))
    with pytest.raises(ValueError, match="pictures can be drawn of inputs"):
        plot_top_losses(learner(((X, Y), (X, Y))))
