"The same samples whatever the number of workers, and wherever a run was left."

import functools
import random
import signal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from trainkit.data import BatchStream
from trainkit.device import rng_state, set_rng_state
from trainkit.seeds import (
    SeededStream,
    Telling,
    generator_kinds,
    held,
    in_bulk,
    is_plain,
    keys_for,
    numbers_of,
    obstacle,
    repeats,
    sample_seeds,
    seed_sample,
    seeded,
    set_aside,
    tells,
    unseeded,
)

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores are meant here
N = 11


def seed(n):
    random.seed(n)
    np.random.seed(n)
    torch.manual_seed(n)


def noise():
    return torch.rand(()).item(), random.random(), np.random.rand(), np.random.normal()


class Noisy(Dataset):
    "Sample i is i and draws from all three global generators."

    def __len__(self):
        return N

    def __getitem__(self, i):
        return torch.tensor([float(i), *noise()], dtype=torch.float64)


class Bulk(Noisy):
    "Makes batches at once, and draws for a batch as a whole."

    def __getitems__(self, indices):
        shift = noise()
        return [torch.tensor([float(i), *shift], dtype=torch.float64) for i in indices]


class Own(Noisy):
    "Draws from four generators of its own, in various hiding places."

    def __init__(self):
        self.torch = torch.Generator().manual_seed(1)
        self.parts = {"numpy": [np.random.default_rng(2)]}
        legacy = np.random.RandomState(3)
        self.transform = functools.partial(lambda x, rng: x + legacy.rand() + rng.random(), rng=random.Random(4))

    def __getitem__(self, i):
        drawn = torch.rand((), generator=self.torch).item(), self.parts["numpy"][0].random(), self.transform(0.0)
        return torch.tensor([float(i), *drawn], dtype=torch.float64)


class Named(Noisy):
    "Samples have names instead of numbers."

    def __getitem__(self, name):
        return torch.tensor([float(name[1:]), *noise()], dtype=torch.float64)


class Whole(Noisy):
    "Gives a batch for a list of indices."

    def __getitem__(self, indices):
        return torch.stack([torch.tensor([float(i), *noise()], dtype=torch.float64) for i in indices])


class Custom:
    "A user's batch sampler, which shuffles as soon as it is iterated over."

    def __len__(self):
        return 6

    def __iter__(self):
        return iter(torch.randperm(N).tolist()[i : i + 2] for i in range(0, N, 2))


class Eager(Custom):
    def __iter__(self):
        order = torch.randperm(N).tolist()
        random.shuffle(order)
        return iter([order[i : i + 2] for i in range(0, N, 2)])


class Wandering:
    "A sampler that draws all along, from all three generators."

    def __len__(self):
        return N

    def __iter__(self):
        for _ in range(N):
            yield (torch.randint(N, ()).item() + random.randrange(N) + np.random.randint(N)) % N


def mixing(samples):
    "A user's collate_fn that draws."
    return torch.stack(samples) + torch.tensor([0.0, *noise()], dtype=torch.float64)


def generator(n):
    return torch.Generator().manual_seed(n)


KINDS = {
    "in order": lambda **kw: DataLoader(Noisy(), 2, **kw),
    "shuffle": lambda **kw: DataLoader(Noisy(), 2, shuffle=True, **kw),
    "drop_last": lambda **kw: DataLoader(Noisy(), 2, shuffle=True, drop_last=True, **kw),
    "generator": lambda **kw: DataLoader(Noisy(), 2, shuffle=True, generator=generator(9), **kw),
    "sampler's generator": lambda **kw: DataLoader(Noisy(), 2, sampler=RandomSampler(Noisy(), generator=generator(4)), **kw),
    "replacement": lambda **kw: DataLoader(Noisy(), 2, sampler=RandomSampler(Noisy(), True, N), **kw),
    "weighted": lambda **kw: DataLoader(Noisy(), 2, sampler=WeightedRandomSampler(torch.arange(1.0, N + 1), N), **kw),
    "batch sampler": lambda **kw: DataLoader(Noisy(), batch_sampler=Custom(), **kw),
    "eager": lambda **kw: DataLoader(Noisy(), batch_sampler=Eager(), **kw),
    "wandering": lambda **kw: DataLoader(Noisy(), 2, sampler=Wandering(), **kw),
    "collate": lambda **kw: DataLoader(Noisy(), 2, shuffle=True, collate_fn=mixing, **kw),
    "bulk": lambda **kw: DataLoader(Bulk(), 2, shuffle=True, **kw),
    "subset": lambda **kw: DataLoader(Subset(Noisy(), range(1, N)), 2, shuffle=True, **kw),
    "subset of bulk": lambda **kw: DataLoader(Subset(Bulk(), range(1, N)), 2, shuffle=True, **kw),
    "concat": lambda **kw: DataLoader(ConcatDataset([Noisy(), Own()]), 2, collate_fn=list, **kw),
    "own generators": lambda **kw: DataLoader(Own(), 2, shuffle=True, **kw),
    "names": lambda **kw: DataLoader(Named(), 2, sampler=[f"n{i}" for i in range(N)], **kw),
    "sample by sample": lambda **kw: DataLoader(Noisy(), batch_size=None, shuffle=True, **kw),
    "whole batches": lambda **kw: DataLoader(Whole(), None, sampler=BatchSampler(RandomSampler(Noisy()), 2, False), **kw),
    "nothing random": lambda **kw: DataLoader(TensorDataset(torch.arange(float(N))[:, None]), 2, shuffle=True, **kw),
}


def stream_of(kind, workers=0, **kw):
    return SeededStream(KINDS[kind](num_workers=workers, **kw), seed=7)


def flat(batch):
    return torch.cat([flat(b) for b in batch]) if isinstance(batch, list) else batch.reshape(-1)


def train(stream, n):
    "n batches, with a model's random draws in between; None at the end of an epoch."
    out = []
    for _ in range(n):
        batch = stream.next_batch()
        out.append(None if batch is None else (flat(batch).clone(), torch.tensor(noise())))
    return out


def same(a, b):
    assert len(a) == len(b)
    for i, (x, y) in enumerate(zip(a, b)):
        assert (x is None) == (y is None), i
        assert x is None or (torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])), i


@functools.cache
def reference(kind, n=26):
    seed(0)
    return train(stream_of(kind), n)


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_seeds_are_splitmix64():
    "The first five numbers of the reference implementation (prng.di.unimi.it/splitmix64.c) for the seed 0."
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]
    assert sample_seeds(0, np.arange(5, dtype=np.uint64)).tolist() == known


@given(st.integers(0, 2**64 - 1), st.sets(st.integers(0, 2**64 - 1), min_size=2))
def test_no_two_indices_share_a_seed(key, indices):
    seeds = sample_seeds(key, np.array(sorted(indices), dtype=np.uint64))
    assert len(set(seeds.tolist())) == len(indices)


def test_keys_differ_by_seed_name_and_epoch():
    keys = {key for s in (0, 1) for name in ("train", "valid") for epoch in (0, 1) for key in keys_for(s, name, epoch)}
    assert len(keys) == 16


def test_the_generators_do_not_copy_each_other():
    "With one seed for both, torch and NumPy draw the same bits; halves of a longer one are different seeds."

    def uniform():
        return torch.rand(50, dtype=torch.float64).numpy(), np.random.rand(50), np.array([random.random() for _ in range(50)])

    equal = 0
    for s in sample_seeds(3, np.arange(20, dtype=np.uint64)).tolist():
        seed_sample(s)
        a, b, c = uniform()
        equal += np.isclose(a, b).sum() + np.isclose(a, c).sum() + np.isclose(b, c).sum()
    assert equal == 0


@given(st.lists(st.integers(0, 1000), min_size=1))
def test_numbers_of_indices_in_any_container(indices):
    for form in (indices, tuple(indices), np.array(indices), torch.tensor(indices), [np.int64(i) for i in indices]):
        assert numbers_of(form, 5).tolist() == indices


@pytest.mark.parametrize("strange", [["a", "b"], [(0, 1), (2,)], [(0, 1), (2, 3)], [None, None], [0.5, 1.5], [{}, {}]])
def test_other_indices_count_by_their_place(strange):
    assert numbers_of(strange, 5).tolist() == [5, 6]


# --- the same samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers, persistent", [(2, False), (4, True)])
def test_the_number_of_workers_makes_no_difference(kind, workers, persistent):
    "Samples, their order and what the model draws beside them, over more than two epochs."
    seed(0)
    stream = stream_of(kind, workers, persistent_workers=persistent)
    got = train(stream, 26)
    stream.close()
    same(got, reference(kind))


def test_how_workers_are_started_makes_no_difference():
    "A spawned worker gets everything through a pipe."
    data = ConcatDataset([Noisy(), Noisy()])
    seed(0)
    expected = train(SeededStream(DataLoader(data, 2, shuffle=True, collate_fn=list), seed=7), 24)
    seed(0)
    kw = dict(num_workers=2, multiprocessing_context="spawn", persistent_workers=True, worker_init_fn=initialise)
    stream = SeededStream(DataLoader(data, 2, shuffle=True, collate_fn=list, **kw), seed=7)
    got = train(stream, 24)
    stream.close()
    same(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_left_at_any_batch_and_taken_up(kind):
    "At every batch of two epochs and between them; in a fresh stream and in the same one."
    seed(0)
    stream, places = stream_of(kind), []
    for _ in range(16):
        places.append((stream.state_dict(), rng_state()))
        train(stream, 1)
    for at, (state, rng) in enumerate(places):
        seed(777)
        again = stream_of(kind) if at % 2 else stream
        again.load_state_dict(state)
        set_rng_state(rng)
        same(train(again, 10), reference(kind)[at : at + 10])


@pytest.mark.parametrize("kind", ["generator", "weighted", "wandering", "own generators", "nothing random"])
@pytest.mark.parametrize("before, after, persistent, at", [(0, 2, False, 3), (2, 0, False, 9), (2, 4, True, 10), (4, 1, True, 2)])
def test_left_with_so_many_workers_and_taken_up_with_others(kind, before, after, persistent, at, recwarn):
    "Inside the first epoch, between epochs, inside the second; no warning, as nothing changes."
    seed(0)
    stream = stream_of(kind, before, persistent_workers=persistent and before > 0)
    train(stream, at)
    state, rng = stream.state_dict(), rng_state()
    stream.close()
    seed(777)
    again = stream_of(kind, after, persistent_workers=persistent and after > 0)
    again.load_state_dict(state)
    set_rng_state(rng)
    got = train(again, 10)
    again.close()
    same(got, reference(kind)[at : at + 10])
    assert not [w for w in recwarn if "place was saved" in str(w.message)]


@pytest.mark.parametrize("kind, workers", [*((kind, 0) for kind in KINDS), ("shuffle", 2), ("wandering", 2), ("weighted", 2)])
def test_closing_in_the_middle_changes_nothing(kind, workers):
    seed(0)
    stream, got = stream_of(kind, workers), []
    for n in (1, 3, 2, 7, 4):
        got += train(stream, n)
        stream.close()
    same(got, reference(kind)[:17])


@pytest.mark.parametrize("kind", ["shuffle", "generator", "sampler's generator", "replacement", "weighted", "names", "subset"])
def test_the_order_is_that_of_a_bare_loader(kind):
    "Three epochs. (Without workers, what a bare loader's samples draw moves the order of the epochs that follow.)"
    seed(5)
    loader = KINDS[kind](num_workers=1)
    bare = [i for _ in range(3) for batch in loader for i in batch[:, 0].tolist()]
    seed(5)
    stream = stream_of(kind)
    assert [i for _ in range(3) for batch in stream for i in batch[:, 0].tolist()] == bare


@pytest.mark.parametrize("workers", [0, 2])
def test_an_eager_samplers_order_is_that_of_a_bare_loader_without_workers(workers):
    seed(5)
    bare = [batch[0, 0].item() for batch in KINDS["eager"]()]
    seed(5)
    stream = stream_of("eager", workers)
    assert [batch[0, 0].item() for batch in stream] == bare
    stream.close()


def test_the_random_state_of_the_process_is_left_alone():
    "What is drawn beside the data is what would be drawn beside a dataset that draws nothing."
    def beside(data):
        seed(3)
        stream = SeededStream(DataLoader(data, 2, shuffle=True), seed=7)
        return [x[1] for x in train(stream, 15) if x is not None]

    for a, b in zip(beside(Own()), beside(torch.arange(N))):
        assert torch.equal(a, b)
    seed(3)
    before = rng_state()
    with set_aside():
        noise()
    after = rng_state()
    assert str(before) == str(after)


def test_an_error_in_a_dataset_leaves_the_random_state_alone():
    class Broken(Noisy):
        def __getitem__(self, i):
            noise()
            raise OSError("gone")

    stream = SeededStream(DataLoader(Broken(), 2), seed=7)
    seed(3)
    torch.empty((), dtype=torch.int64).random_()  # the iterator's
    expected = noise()
    seed(3)
    with pytest.raises(OSError, match="gone"):
        stream.next_batch()
    assert noise() == expected


def test_epochs_seeds_and_loaders_differ():
    first, second = (torch.cat([b for b in stream]) for stream in [stream_of("in order")] * 2)
    other = torch.cat(list(SeededStream(DataLoader(Noisy(), 2), seed=8)))
    named = torch.cat(list(SeededStream(DataLoader(Noisy(), 2), "second", seed=7)))
    for x in (second, other, named):
        assert torch.equal(first[:, 0], x[:, 0]) and not (first[:, 1:] == x[:, 1:]).any()


def test_a_sample_is_the_same_in_any_order_and_batch():
    a = torch.cat(list(SeededStream(DataLoader(Noisy(), 2), seed=7)))
    b = torch.cat(list(SeededStream(DataLoader(Noisy(), 3, shuffle=True), seed=7)))
    assert torch.equal(a, b[b[:, 0].argsort()])


def test_a_sample_that_is_shown_again_is_another_one():
    loader = DataLoader(Noisy(), 2, sampler=[3, 3, 5, 3, 5])
    rows = torch.cat(list(SeededStream(loader, seed=7)))
    assert len(set(rows[:, 1].tolist())) == 5
    alone = torch.cat(list(SeededStream(DataLoader(Noisy(), 2), seed=7)))
    assert torch.equal(rows[[0, 2]], alone[[3, 5]])


@pytest.mark.parametrize("sampler, expected", [
    (None, False), (RandomSampler(range(4)), False), (RandomSampler(range(4), num_samples=3), False),
    (RandomSampler(range(4), num_samples=9), True), (RandomSampler(range(4), True), True), ([0, 1], True)])  # fmt: skip
def test_which_samplers_repeat(sampler, expected):
    assert repeats(DataLoader(range(4), 2, sampler=sampler).batch_sampler) == expected


def test_no_sample_is_loaded_to_come_to_a_place():
    class Counting(Noisy):
        loaded = []

        def __getitem__(self, i):
            self.loaded.append(i)
            return i

    stream = SeededStream(DataLoader(Counting(), 2, shuffle=True), seed=7)
    train(stream, 4)
    state = stream.state_dict()
    Counting.loaded.clear()
    again = SeededStream(DataLoader(Counting(), 2, shuffle=True), seed=7)
    again.load_state_dict(state)
    again.fast_forward()
    assert Counting.loaded == []
    again.next_batch()
    assert len(Counting.loaded) == 2


def test_a_place_beyond_the_end_is_met_at_once():
    class Short(Custom):
        n = 6

        def __iter__(self):
            return iter([[i] for i in range(self.n)])

    sampler = Short()
    stream = SeededStream(DataLoader(Noisy(), batch_sampler=sampler), seed=7)
    train(stream, 5)
    state = stream.state_dict()
    sampler.n = 3
    stream.load_state_dict(state)
    with pytest.raises(RuntimeError, match="the train loader cannot go on where it stood: DataLoader of length 6 ends 2 batches"):
        stream.fast_forward()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_fetch_loses_no_sample_and_changes_none(error):
    class Interrupted(Noisy):
        strikes = 3

        def __getitem__(self, i):
            sample = super().__getitem__(i)
            if i in (3, 8) and self.strikes:
                self.strikes -= 1
                raise error("now")
            return sample

    def rows(data):
        seed(1)
        stream, seen = SeededStream(DataLoader(data, 2, shuffle=True), seed=7), []
        while len(seen) < 2 * N:
            try:
                seen += [] if (b := stream.next_batch()) is None else b.tolist()
            except error:
                noise()  # somebody looks around
        return seen[:N]

    assert rows(Interrupted()) == rows(Noisy())


# --- what the user's loader says -------------------------------------------------------------------------------------


class Informed(Noisy):
    "Its samples say what the worker's info holds and what its worker_init_fn did."

    mine = 0

    def __getitem__(self, i):
        info = get_worker_info()
        return torch.tensor([info.dataset is self, self.mine, info.id, info.num_workers])


def initialise(worker_id):
    get_worker_info().dataset.mine = 10 + worker_id


def test_the_users_loader_is_honoured():
    kw = dict(worker_init_fn=initialise, prefetch_factor=3, timeout=60, multiprocessing_context="fork")
    loader = DataLoader(Informed(), 2, num_workers=2, **kw)
    before = dict(vars(loader))
    stream = SeededStream(loader, seed=7)
    first, second = stream.next_batch(), stream.next_batch()
    stream.close()
    assert first.tolist() == [[1, 10, 0, 2]] * 2 and second.tolist() == [[1, 11, 1, 2]] * 2
    assert vars(loader) == before and stream.source.loader.prefetch_factor == 3 and stream.source.loader.timeout == 60
    assert len(stream.source.loader) == len(loader) == stream.length


def test_workers_still_ignore_the_interrupt():
    class Deaf(Noisy):
        def __getitem__(self, i):
            return signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    stream = SeededStream(DataLoader(Deaf(), 2, num_workers=1), seed=7)
    assert all(stream.next_batch())
    stream.close()


class Epochs(Noisy):
    "A sample is the epoch that the dataset was told."

    epoch = -1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, i):
        return self.epoch


@pytest.mark.parametrize("kw", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_every_copy_of_a_dataset_is_told_the_epoch(kw):
    stream = SeededStream(DataLoader(Epochs(), 2, **kw), seed=7)
    seen = [{x for batch in stream for x in batch.tolist()} for _ in range(3)]
    assert seen == [{0}, {1}, {2}]
    stream.end_epoch()
    stream.close()


def test_samplers_are_told_the_epoch():
    told = []

    class Told(Custom):
        def set_epoch(self, epoch):
            told.append(epoch)

    stream = SeededStream(DataLoader(Noisy(), batch_sampler=Told()), seed=7)
    list(stream), list(stream)
    sampler = torch.utils.data.DistributedSampler(Noisy(), num_replicas=1, rank=0)
    stream = SeededStream(DataLoader(Noisy(), 2, sampler=sampler), seed=7)
    orders = [torch.cat(list(stream))[:, 0].tolist() for _ in range(2)]
    assert told == [0, 1] and sampler.epoch == 1 and orders[0] != orders[1]


def test_a_worker_that_fails_says_where():
    class Broken(Noisy):
        def __getitem__(self, i):
            raise OSError(f"no sample {i}")

    stream = SeededStream(DataLoader(Broken(), 2, num_workers=1), seed=7)
    with pytest.raises(OSError, match="no sample 0"):
        stream.next_batch()


class Iterating(DataLoader):
    def __iter__(self):
        yield from super().__iter__()


@pytest.mark.parametrize("loader, why", [
    ([torch.ones(1)], "it is no DataLoader but a list"), (unseeded(DataLoader(Noisy())), "it was kept out by unseeded()"),
    (Iterating(Noisy()), "Iterating iterates in a way of its own")])  # fmt: skip
def test_what_can_have_no_seeds_is_left_as_it_is(loader, why):
    assert obstacle(loader) == why and seeded(loader, 7) is loader
    assert type(SeededStream(loader, seed=7).source).__name__ == "Rewindable"


def test_kept_out_is_as_bare():
    loader = DataLoader(Noisy(), 2, shuffle=True)
    seed(4)
    bare = list(loader)
    seed(4)
    kept_out = list(SeededStream(unseeded(loader)))
    assert all(torch.equal(a, b) for a, b in zip(bare, kept_out)) and not obstacle(loader)


@pytest.mark.parametrize("data, plain", [
    (TensorDataset(torch.ones(3)), True), (range(3), True), ([1, 2], True), (Subset(range(4), [1]), True),
    (ConcatDataset([range(3), range(2)]), True), (Noisy(), False), (Subset(Noisy(), [1]), False),
    (ConcatDataset([range(3), Noisy()]), False), (type("Mine", (TensorDataset,), {})(torch.ones(3)), False)])  # fmt: skip
def test_what_is_known_to_draw_nothing(data, plain):
    assert is_plain(data) == plain
    loader = seeded(DataLoader(data), 7)
    assert (loader.dataset is data) == plain


def test_arrays_with_a_collate_that_draws_are_not_plain():
    torch.manual_seed(0)
    data = [torch.tensor([float(i), 0, 0, 0, 0], dtype=torch.float64) for i in range(6)]
    a, b = (list(SeededStream(DataLoader(data, 2, collate_fn=mixing, num_workers=n), seed=7)) for n in (0, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and len({x[0, 1].item() for x in a}) == 3


def test_bulk_is_asked_of_what_makes_the_samples():
    assert in_bulk(Bulk()) and in_bulk(Subset(Bulk(), [1])) and in_bulk(Subset(Subset(Bulk(), [1]), [0]))
    assert not in_bulk(Noisy()) and not in_bulk(Subset(Noisy(), [1]))


# --- what is saved ---------------------------------------------------------------------------------------------------


def test_the_seed_is_found_once_and_saved(tmp_path):
    seed(1)
    a = SeededStream(DataLoader(Noisy(), 2))
    assert noise() == (seed(1), noise())[1]  # finding it drew nothing
    seed(2)
    b = SeededStream(DataLoader(Noisy(), 2))
    assert a.seed != b.seed
    train(a, 2)
    torch.save(a.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    b.load_state_dict(state)
    assert b.seed == a.seed and torch.equal(b.next_batch(), a.next_batch())


def test_a_state_without_seeds_is_taken_with_a_warning():
    loader = DataLoader(Noisy(), 2, shuffle=True)
    old = BatchStream(loader)
    train(old, 2)
    stream = SeededStream(loader, seed=7)
    with pytest.warns(UserWarning, match="had no seeds of their own when its place was saved, and have some now"):
        stream.load_state_dict(old.state_dict())
    assert stream.seed == 7 and [b[:, 0].tolist() for b in stream] == [b[:, 0].tolist() for b in old]  # the order is kept
    new = SeededStream(unseeded(loader))
    train(stream, 2)
    with pytest.warns(UserWarning, match="had seeds of their own when its place was saved, and have none now"):
        new.load_state_dict(stream.state_dict())


def test_a_place_that_does_not_exist_changes_nothing():
    stream = SeededStream(DataLoader(Noisy(), 2), seed=7)
    train(stream, 5)
    small = SeededStream(DataLoader(Noisy(), 8), seed=8)
    with pytest.raises(ValueError, match="batch 5 of an epoch"):
        small.load_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match="lacks"):
        small.load_state_dict({"seed": 3})
    assert (small.seed, small.epoch, small.batch_idx) == (8, 0, 0)


@pytest.mark.parametrize("kw", [{}, {"num_workers": 2, "persistent_workers": True}])
def test_what_is_looked_at_beside_is_the_same_each_time(kw):
    stream = stream_of("shuffle")
    loader = stream.beside(DataLoader(Noisy(), 4, **kw), "valid")
    looks = [torch.cat(list(loader)) for _ in range(2)]
    seed(9)
    other = SeededStream(DataLoader(Noisy(), 2), seed=1)
    theirs = other.beside(DataLoader(Noisy(), 4), "valid")
    different = torch.cat(list(theirs))
    other.load_state_dict(stream.state_dict())
    assert torch.equal(looks[0], looks[1]) and torch.equal(torch.cat(list(theirs)), looks[0])
    assert not torch.equal(different, looks[0])


def test_beside_leaves_alone_what_needs_nothing():
    stream, plain, batches = stream_of("shuffle"), DataLoader(range(4)), [torch.ones(1)]
    assert stream.beside(plain, "valid") is plain and stream.beside(batches, "valid") is batches


# --- generators of a dataset's own -----------------------------------------------------------------------------------


def test_generators_are_found_wherever_they_hide():
    found = dict(held(Own(), generator_kinds()))
    assert {type(g) for g in found.values()} == set(generator_kinds())
    assert found[".parts['numpy'][0]"].bit_generator is not None and found[".torch"].initial_seed() == 1


def test_the_search_ends():
    class Knot:
        pass

    knot = Knot()
    knot.me, knot.files, knot.rng = knot, [str(i) for i in range(100_000)], random.Random()
    knot.deep = [[[[[[[[random.Random()]]]]]]]]
    assert held(knot, generator_kinds()) == [(".rng", knot.rng)] and held([1, knot], generator_kinds(), skip=[knot]) == []


def test_a_generator_shared_with_the_sampler_keeps_its_state():
    class Shares(Noisy):
        def __init__(self, rng):
            self.rng = rng

        def __getitem__(self, i):
            return torch.tensor([i, torch.rand((), generator=self.rng)])

    def order(make):
        rng = generator(5)
        stream = SeededStream(DataLoader(make(rng), 2, shuffle=True, generator=rng), seed=7)
        return [[b[:, 0].tolist() for b in stream] for _ in range(2)]

    assert order(Shares) == order(lambda rng: torch.arange(float(N))[:, None])


# --- datasets that tell their place ----------------------------------------------------------------------------------


class Buffered(IterableDataset):
    "Numbers through a buffer from which random ones are taken, noise on top; continues from where it stands."

    def __init__(self, n=10, size=4):
        self.n, self.size, self.at, self.buffer = n, size, 0, []

    def __iter__(self):
        while self.at < self.n or self.buffer:
            while self.at < self.n and len(self.buffer) < self.size:
                self.buffer.append(self.at)
                self.at += 1
            yield torch.tensor([float(self.buffer.pop(torch.randint(len(self.buffer), ()).item())), *noise()])
        self.at = 0

    def state_dict(self):
        return {"at": self.at, "buffer": list(self.buffer)}

    def load_state_dict(self, state):
        self.at, self.buffer = state["at"], list(state["buffer"])


@pytest.mark.parametrize("kw", [{"batch_size": 3}, {"batch_size": 3, "drop_last": True}, {"batch_size": None},
                                {"batch_size": 2, "generator": 1}])  # fmt: skip
def test_a_dataset_that_tells_its_place_is_taken_up_at_every_batch(kw):
    def make():
        more = {"generator": generator(5)} if "generator" in kw else {}
        return SeededStream(DataLoader(Buffered(), **{**kw, **more}), seed=7)

    seed(0)
    stream, places = make(), []
    assert tells(stream.loader) and isinstance(stream.source, Telling)
    expected = []
    for _ in range(16):
        places.append((stream.state_dict(), rng_state()))
        expected += train(stream, 1)
    expected += train(stream, 14)
    for at, (state, rng) in enumerate(places):
        seed(777)
        again = make()
        again.load_state_dict(state)
        set_rng_state(rng)
        same(train(again, 14), expected[at : at + 14])


def test_a_dataset_with_a_place_of_its_own_survives_an_error():
    class Fragile(Buffered):
        "In order, as the buffer holds one."

        broken = 0

        def __iter__(self):
            for x in super().__iter__():
                self.broken += 1
                if self.broken in (4, 9):
                    raise OSError("hiccup")
                yield x

    def rows(stream, n):
        seen = []
        while len(seen) < n:
            try:
                seen += stream.next_batch()[:, 0].tolist()
            except OSError:
                pass
        return seen

    stream = SeededStream(DataLoader(Fragile(size=1), 2), seed=7)
    assert rows(stream, 10) == list(range(10)) and stream.next_batch() is None
    assert rows(stream, 4) == [0, 1, 2, 3]
    again = SeededStream(DataLoader(Fragile(size=1), 2), seed=7)
    again.load_state_dict(stream.state_dict())
    assert rows(again, 6) == [4, 5, 6, 7, 8, 9] and again.source.loader.dataset.dataset.broken >= 6


def test_with_workers_it_is_drawn_anew():
    loader = DataLoader(Buffered(), 2, num_workers=1)
    assert not tells(loader) and not tells(DataLoader(range(3))) and not tells([1])
    seed(0)
    stream = SeededStream(loader, seed=7)
    train(stream, 3)
    state, rng = stream.state_dict(), rng_state()
    expected = train(stream, 8)
    stream.close()
    seed(777)
    again = SeededStream(DataLoader(Buffered(), 2, num_workers=1), seed=7)
    again.load_state_dict(state)
    set_rng_state(rng)
    same(train(again, 8), expected)
    again.close()
