"Loaders from anything, and a stream of batches that goes on where it was left, bit for bit."

import os
import random
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

from trainkit.data import (
    ArrayDataset,
    BatchStream,
    Loaders,
    as_loader,
    as_loaders,
    as_tensor,
    batch_size_of,
    checked_split,
    describe,
    length_of,
    split_batch,
    worker_safe,
)
from trainkit.device import rng_state, set_rng_state

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)


def seed(n):
    random.seed(n)
    np.random.seed(n)
    torch.manual_seed(n)


# --- sources ---------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 40), batch_size=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_array_loader_agrees_with_tensordataset(n, batch_size):
    x, y = torch.randn(n, 3), torch.arange(n)
    ours = list(as_loader((x, y), batch_size=batch_size))
    theirs = list(DataLoader(TensorDataset(x, y), batch_size=batch_size))
    assert len(ours) == len(theirs)
    for (a, b), (c, d) in zip(ours, theirs):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_shuffled_array_loader_has_torchs_order():
    torch.manual_seed(3)
    ours = torch.cat([y for _, y in as_loaders((X, Y), batch_size=3).train])
    torch.manual_seed(3)
    theirs = torch.cat([y for _, y in DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True)])
    assert torch.equal(ours, theirs)


def test_seed_gives_an_order_of_its_own():
    def order(s):
        return torch.cat([y for _, y in as_loaders((X, Y), batch_size=3, seed=s).train]).tolist()

    torch.manual_seed(0)
    first = order(5)
    torch.manual_seed(1)
    assert order(5) == first != order(6)


def test_memory_mapped_and_read_only_arrays(tmp_path, recwarn):
    np.save(tmp_path / "x.npy", np.random.rand(9, 4))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    (batch,) = as_loader(mapped, batch_size=9)
    assert torch.equal(batch, torch.from_numpy(np.array(mapped)).float())
    assert as_tensor(mapped).dtype == torch.float32 and not recwarn.list


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int64", "float16", "float32", "complex64"])
def test_other_numpy_dtypes_are_kept(dtype):
    row = ArrayDataset(np.zeros((2, 2), dtype=dtype))[0]
    assert str(row.dtype) == f"torch.{dtype}"


def test_arrays_that_torch_cannot_share():
    swapped, reversed_ = np.arange(4, dtype=">f4"), np.arange(4)[::-1]
    assert as_tensor(swapped).tolist() == [0, 1, 2, 3] and as_tensor(reversed_).tolist() == [3, 2, 1, 0]
    assert next(iter(as_loader((swapped, reversed_), batch_size=2)))[1].tolist() == [3, 2]


def test_default_dtype_is_followed():
    torch.set_default_dtype(torch.float64)
    try:
        assert ArrayDataset(np.zeros(3))[0].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


class Rows(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return torch.tensor(float(i)), i


class Duck:
    "Rows and a length, but neither torch's Dataset nor iterable."

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return torch.tensor(i)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(7))


def test_sources_of_every_kind():
    loader, batches = DataLoader(Rows(), batch_size=4), [(X, Y), (X, Y), (X, Y)]
    assert as_loaders(loader) == Loaders(loader)
    assert as_loaders(batches).train is batches
    assert [len(b[0]) for b in as_loaders(Rows(), batch_size=4).train] == [4, 2]
    assert [len(b) for b in as_loaders(Duck(), batch_size=4).train] == [4, 1]
    assert [len(b) for b in as_loaders(Stream(), batch_size=4).train] == [4, 3]
    pair = as_loaders((loader, X))
    assert pair.train is loader and len(next(iter(pair.valid["valid"]))) == 10
    only_test = as_loaders({"test": {"a": X, "b": Rows()}})
    assert only_test.train is None and list(only_test.test) == ["a", "b"] and only_test.valid == {}
    assert as_loaders((None, X)).train is None and as_loaders({"train": X, "valid": None}).valid == {}


def test_training_is_shuffled_and_looking_is_not():
    dls = as_loaders({"train": Y, "valid": Y, "test": Y}, batch_size=10)
    assert next(iter(dls.valid["valid"])).tolist() == next(iter(dls.test["test"])).tolist() == Y.tolist()
    assert next(iter(dls.train)).tolist() != Y.tolist()


@pytest.mark.parametrize(
    "bad, message",
    [
        ("train.csv", "from str"),
        (b"bytes", "from bytes"),
        (3, "from int"),
        (nn.Linear(2, 2), "from Linear"),
        (nn.Sequential(nn.ReLU()), "from Sequential"),
        ((), "from tuple of 0"),
        ([], "empty"),
        ([1, 2], "int is none"),
        ([Rows(), Rows(), Rows()], "Rows of length 6 is none"),
        ([X, Y], r"\(inputs, targets\)"),
        ((X, Y[:5]), "equal length"),
        ((X, [1, 2, 3]), "int is none"),
        ((X, (X, Y)), "may mean"),
        (torch.tensor(1.0), "first axis"),
        (np.array([object()]), "numbers"),
        (np.array(["a"]), "numbers"),
        (X[:0], "empty"),
        ({}, "'train', 'valid' and 'test'"),
        ({"trian": X, "valid": X}, "'train', 'valid' and 'test'"),
        ({"train": X, "valid": {1: X}}, "loaders have names"),
        ({"train": X, "valid": {"a": X}, "a": X}, "two validation loaders"),
    ],
)
def test_nonsense_is_named(bad, message):
    with pytest.raises((TypeError, ValueError), match=message):
        as_loaders(bad)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_an_unlabelled_tensordataset_has_no_target():
    (batch,) = DataLoader(TensorDataset(X), batch_size=10)
    inputs, kwargs, targets = split_batch(batch)
    assert torch.equal(inputs[0], X) and kwargs == {} and targets == ()


def test_split_batch_forms():
    assert split_batch(np.ones(2))[2] == ()
    assert split_batch((X, None)) == ((X,), {}, ())
    assert split_batch(((X, X), Y)) == (((X, X),), {}, (Y,))
    assert split_batch({"image": X}) == ((X,), {}, ())
    assert split_batch({"y": Y, "a": 1, "b": 2}) == ((), {"a": 1, "b": 2}, (Y,))


@pytest.mark.parametrize("bad", ["abc", 3, None, [], {}, {"label": 1}, {"x": 1, "y": 2, "label": 3}, {0: 1, 1: 2}, {"a"}])
def test_split_batch_refuses(bad):
    with pytest.raises(TypeError, match="split function"):
        split_batch(bad)


leaf = st.sampled_from([1, "text", 2.5, None])


@given(st.integers(1, 9), st.recursive(leaf, lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(), c, max_size=3)))
def test_batch_size_is_that_of_the_first_array(n, clutter):
    assert batch_size_of([clutter, {"x": (torch.tensor(0.0), torch.zeros(n, 2), np.zeros(n + 1))}]) == n


def test_batch_size_falls_back_to_sized_leaves():
    assert batch_size_of(["a", "b", "c"]) == 3
    assert batch_size_of([{}, Duck()]) == 5
    for nothing in (1, "text", [], {"a": torch.tensor(1)}):
        with pytest.raises(TypeError, match="how many samples"):
            batch_size_of(nothing)


def test_describe_is_short_whatever_comes():
    assert describe({i: list(range(1000)) for i in range(1000)}).startswith("dict of 1000 (0: list of 1000 (int,")
    assert len(describe([[[[list(range(50))] * 50] * 50] * 50] * 50)) < 400
    assert describe(DataLoader(Stream())) == "DataLoader"


@pytest.mark.parametrize("parts, received", [
    ((X, Y), "tuple of 2 (Tensor (10, 2) float32, Tensor (10,) int64)"),
    ((X, {}, Y), "tuple of 3 (Tensor (10, 2) float32, dict of 0, Tensor (10,) int64)"),
    (((X,), {}, Y), "tuple of 3 (tuple of 1 (Tensor (10, 2) float32), dict of 0, Tensor (10,) int64)"),
    (((X,), {}, None), "NoneType"), (((X,), None, (Y,)), "NoneType"), (((X,), (), (Y,)), "tuple of 0"),
    (((X,), {}, (Y,), 1), "tuple of 4"), (("text", {}, (Y,)), "str of length 4"), (((), {}, (Y,)), "tuple of 0"),
    (X, "Tensor (10, 2) float32"), (None, "NoneType"), ({"x": X}, "dict of 1"), (((X,), {1: X}, (Y,)), "dict of 1 (1: "),
    (X[:3], "Tensor (3, 2) float32"),
])  # fmt: skip
def test_a_split_that_returns_something_else_is_named_with_what_it_returned(parts, received):
    def mine(batch):
        return parts

    with pytest.raises(TypeError) as raised:
        checked_split(mine)("batch")
    for part in "mine should return (inputs, kwargs, targets)", "return (x,), {}, (y,)", "It returned ", received:
        assert part in str(raised.value)


@pytest.mark.parametrize("parts", [
    ((X,), {}, (Y,)), ((X, X), {"mask": X}, ()), ((), {"ids": X}, (Y,)), ((X,), {}, ((Y, Y),)), ([X], {}, [Y]), [[X], {}, []],
])  # fmt: skip
def test_a_split_that_is_right_is_passed_on_untouched(parts):
    split = checked_split(lambda batch: parts)
    assert split("batch") is parts and checked_split(split) is split


def test_every_result_of_a_split_is_checked():
    """A later loader may bring other batches."""
    split = checked_split(lambda batch: ((batch,), {}, (Y,)) if len(batch) == 10 else batch)
    assert split(X)[2] is not None
    with pytest.raises(TypeError, match="It returned Tensor"):
        split(X[:3])


def test_what_can_be_a_split_function():
    assert checked_split(split_batch) is split_batch

    class Split:
        def __call__(self, batch):
            return batch

    with pytest.raises(TypeError, match="the split function .*Split should return"):
        checked_split(Split())(X)
    for bad in None, "labels", (0, 1):
        with pytest.raises(TypeError, match="split takes a function"):
            checked_split(bad)


# --- the stream ------------------------------------------------------------------------------------------------------


class Noisy(Dataset):
    "Random transforms that draw from all three global generators."

    def __len__(self):
        return 11

    def __getitem__(self, i):
        return torch.tensor([i, torch.rand(()).item(), random.random(), np.random.rand()], dtype=torch.float64)


def make(num_workers=0, **kwargs):
    return DataLoader(Noisy(), batch_size=2, num_workers=num_workers, **kwargs)


LOADERS = {
    "shuffle": lambda w: make(w, shuffle=True),
    "generator": lambda w: make(w, shuffle=True, generator=torch.Generator().manual_seed(9)),
    "sampler": lambda w: make(w, sampler=RandomSampler(Noisy(), generator=torch.Generator().manual_seed(4))),
    "weighted": lambda w: make(w, sampler=WeightedRandomSampler(torch.arange(1.0, 12), 11)),
}


def train(stream, n):
    "n batches, with the random draws of a model in between; the end of an epoch is a None."
    out = []
    for _ in range(n):
        batch = stream.next_batch()
        out.append(batch if batch is None else (batch.clone(), torch.rand(3)))
    return out


def same(a, b):
    return len(a) == len(b) and all(
        (x is None and y is None) or (torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])) for x, y in zip(a, b)
    )


def check_resume(make_loader, at, total, save_load=lambda s: s):
    seed(0)
    stream = BatchStream(make_loader())
    train(stream, at)
    saved, rng = save_load(stream.state_dict()), rng_state()
    place = stream.epoch, stream.batch_idx
    expected = train(stream, total - at)
    stream.close()
    seed(777)
    again = BatchStream(make_loader())
    again.load_state_dict(saved)
    set_rng_state(rng)
    assert (again.epoch, again.batch_idx) == place
    got = train(again, total - at)
    again.close()
    assert same(got, expected)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("at", range(15))
def test_resume_is_exact_at_every_batch(kind, at):
    check_resume(lambda: LOADERS[kind](0), at, 22)


@pytest.mark.parametrize("kind, at", [("shuffle", 2), ("shuffle", 9), ("generator", 3)])
def test_resume_is_exact_with_workers(kind, at):
    check_resume(lambda: LOADERS[kind](2), at, 16)


@pytest.mark.parametrize("at", [2, 9])
def test_resume_keeps_the_order_with_persistent_workers(at):
    def build():
        return DataLoader(torch.arange(11), batch_size=2, shuffle=True, num_workers=2, persistent_workers=True)

    check_resume(build, at, 16)


def test_resume_survives_a_checkpoint_file(tmp_path):
    def through_disk(state):
        torch.save(state, tmp_path / "state.pt")
        return torch.load(tmp_path / "state.pt", weights_only=True)

    check_resume(lambda: LOADERS["generator"](0), 4, 14, through_disk)


def test_the_test_of_exactness_can_fail():
    "Without the loader's state the order does come out differently."
    seed(0)
    stream = BatchStream(make(shuffle=True))
    train(stream, 2)
    rng = rng_state()
    expected = train(stream, 6)
    seed(777)
    naive = BatchStream(make(shuffle=True))
    train(naive, 2)
    set_rng_state(rng)
    assert not same(train(naive, 6), expected)


def test_saving_leaves_random_state_and_place_alone():
    seed(2)
    plain = train(BatchStream(make(shuffle=True)), 14)
    seed(2)
    watched, out = BatchStream(make(shuffle=True)), []
    for _ in range(14):
        watched.state_dict()
        out += train(watched, 1)
    assert same(out, plain)


def test_a_stream_equals_a_bare_loop():
    seed(5)
    loader = make(shuffle=True)
    bare = [b for _ in range(2) for b in loader]
    seed(5)
    stream = BatchStream(make(shuffle=True))
    ours = [b for _ in range(2) for b in stream]
    assert all(torch.equal(a, b) for a, b in zip(bare, ours)) and len(bare) == len(ours)


@pytest.mark.parametrize("at", range(1, 6))
def test_closing_in_the_middle_loses_nothing(at):
    seed(6)
    plain = train(BatchStream(make(shuffle=True)), 13)
    seed(6)
    stream = BatchStream(make(shuffle=True))
    out = train(stream, at)
    stream.close()
    out += train(stream, 13 - at)
    assert same(out, plain)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_fetch_loses_no_batch(error):
    class Interrupted(Noisy):
        strikes = 2

        def __getitem__(self, i):
            if i in (3, 8) and self.strikes:
                self.strikes -= 1
                raise error("now")
            return super().__getitem__(i)

    seed(1)
    stream, seen, errors = BatchStream(DataLoader(Interrupted(), batch_size=2, shuffle=True)), [], 0
    while len(seen) < 11:
        try:
            seen += stream.next_batch()[:, 0].tolist()
        except error:
            errors += 1
    assert errors == 2 and sorted(seen) == list(range(11)) and stream.next_batch() is None


def test_fast_forward_meets_a_shorter_loader_at_once():
    class Lying(IterableDataset):
        n = 10

        def __iter__(self):
            return iter(range(self.n))

    data = Lying()
    stream = BatchStream(DataLoader(data, batch_size=2))
    train(stream, 4)
    saved = stream.state_dict()
    data.n = 4
    stream.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="cannot go on where it stood.*ends 2 batches before"):
        stream.fast_forward()


def test_a_changed_loader_is_warned_of_or_refused():
    stream = BatchStream(make(shuffle=True))
    train(stream, 4)
    saved = stream.state_dict()
    with pytest.warns(UserWarning, match="had 6 batches and 0 workers"):
        BatchStream(DataLoader(Noisy(), batch_size=1)).load_state_dict(saved)
    small = BatchStream(DataLoader(Noisy(), batch_size=4))
    with pytest.raises(ValueError, match="batch 4 of an epoch, and the train loader, DataLoader of length 3, has only 3"):
        small.load_state_dict(saved)
    with pytest.raises(ValueError, match="lacks batch_idx"):
        small.load_state_dict({k: v for k, v in saved.items() if k != "batch_idx"})
    assert (small.epoch, small.batch_idx) == (0, 0)


def test_generators_go_forward_but_not_back():
    def numbers():
        yield from torch.arange(10).split(1)

    stream = BatchStream(numbers(), "noise")
    train(stream, 3)
    saved = stream.state_dict()
    assert train(stream, 1)[0][0].item() == 3
    with pytest.raises(ValueError, match="cannot go back to batch 3 of the noise loader"):
        stream.load_state_dict(saved)
    assert train(stream, 1)[0][0].item() == 4  # refused, and nothing lost
    again = BatchStream(numbers(), "noise")
    again.load_state_dict(saved)
    assert again.next_batch().item() == 3
    stream.load_state_dict(stream.state_dict())  # where it stands is no way back
    assert stream.next_batch().item() == 5


def test_a_generator_that_failed_is_not_a_finished_epoch():
    def failing():
        yield torch.ones(1)
        raise OSError("gone")

    stream = BatchStream(failing())
    stream.next_batch()
    with pytest.raises(OSError, match="gone"):
        stream.next_batch()
    with pytest.raises(RuntimeError, match="stopped by an exception"):
        stream.next_batch()


def test_iterators_that_restart_are_no_generators():
    class Restarting:
        "Its own iterator, as some GPU loaders are."

        def __iter__(self):
            self.i = 0
            return self

        def __next__(self):
            self.i += 1
            if self.i > 3:
                raise StopIteration
            return torch.tensor([self.i])

    stream = BatchStream(Restarting())
    assert [[b.item() for b in stream] for _ in range(3)] == [[1, 2, 3]] * 3


class Stateful:
    "The protocol of torchdata's StatefulDataLoader; making an iterator goes on from a loaded state."

    def __init__(self):
        self.order, self.i, self.resumed = None, 0, False

    def __iter__(self):
        if not self.resumed or self.order is None:
            self.order, self.i = torch.randperm(8).tolist(), 0
        self.resumed = False
        while self.i < 8:
            self.i += 1
            yield torch.tensor([self.order[self.i - 1]])
        self.order = None  # finished

    def state_dict(self):
        torch.rand(1)  # a loader that disturbs the random state when asked
        return {"order": self.order, "i": self.i}

    def load_state_dict(self, state):
        self.order, self.i, self.resumed = state["order"], state["i"], True


@pytest.mark.parametrize("at", [0, 1, 5, 8, 9, 12])
def test_a_loaders_own_state_is_used(at):
    check_resume(Stateful, at, 20)


def test_own_state_needs_a_loader_that_takes_it():
    stream = BatchStream(Stateful())
    train(stream, 2)
    with pytest.raises(ValueError, match="kept its own state"):
        BatchStream(make()).load_state_dict(stream.state_dict())


def test_set_epoch_reaches_sampler_and_dataset():
    class Told(Dataset):
        epochs: list = []

        def __len__(self):
            return 4

        def __getitem__(self, i):
            return i

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    sampler = torch.utils.data.DistributedSampler(range(4), num_replicas=1, rank=0)
    stream = BatchStream(DataLoader(Told(), sampler=sampler, batch_size=2))
    orders = [torch.cat(list(stream)).tolist() for _ in range(3)]
    assert Told.epochs == [0, 1, 2] and sampler.epoch == 2 and orders[0] != orders[1]


def test_ending_an_epoch_early():
    stream = BatchStream(make())
    stream.end_epoch()
    assert stream.epoch == 0  # nothing had begun
    train(stream, 2)
    stream.end_epoch()
    assert (stream.epoch, stream.batch_idx) == (1, 0)
    assert stream.next_batch()[0, 0] == 0


def test_a_batch_that_is_none_is_an_error():
    with pytest.raises(TypeError, match="gave None for batch 0"):
        BatchStream([None]).next_batch()


def test_length_of_oddities():
    class Odd:
        def __len__(self):
            raise NotImplementedError

    assert length_of(Odd()) is None and length_of(DataLoader(Stream())) is None and length_of([]) == 0


# --- workers ---------------------------------------------------------------------------------------------------------


class Pids(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return os.getpid()


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_outlive_an_interrupt_and_are_released(persistent):
    loader = DataLoader(Pids(), batch_size=1, num_workers=2, persistent_workers=persistent)
    stream = BatchStream(loader)
    pids = {stream.next_batch().item() for _ in range(2)}
    assert len(pids) == 2 and os.getpid() not in pids
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    assert len(list(stream)) == 6 and len(list(stream)) == 8  # this epoch and the next
    stream.next_batch()
    stream.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert len(list(stream)) == 7
    stream.close()


def test_the_users_persistent_loader_is_another_one():
    "Looking at a batch of the same loader in between doesn't restart the stream's epoch."
    loader = DataLoader(torch.arange(6), batch_size=1, num_workers=1, persistent_workers=True)
    stream = BatchStream(loader)
    stream.next_batch()
    assert next(iter(loader)).item() == 0
    assert [b.item() for b in stream] == [1, 2, 3, 4, 5]
    assert worker_safe(loader).worker_init_fn.init is None and loader.worker_init_fn is None
    stream.close()
