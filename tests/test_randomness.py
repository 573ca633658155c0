"A random state of one's own."

import random

import numpy as np
import pytest
import torch

from trainkit.randomness import RandomState


def seed(n):
    random.seed(n)
    np.random.seed(n)
    torch.manual_seed(n)


def noise():
    return torch.rand(()).item(), random.random(), np.random.rand(), np.random.normal()


def draws(n=3):
    return [noise() for _ in range(n)]


def test_worn_in_turns_each_draws_what_it_would_draw_alone():
    alone = {}
    for s in (1, 2):
        state = RandomState(s)
        with state.wear():
            alone[s] = draws(6)
    seed(0)
    shared = draws(6)
    seed(0)
    one, two, got, between = RandomState(1), RandomState(2), {1: [], 2: []}, []
    for n in (1, 2, 3):
        with one.wear():
            got[1] += draws(n)
            with one.wear(), two.wear():
                got[2] += draws(n)
        between += draws(n)
    assert got == alone and between == shared


def test_without_a_seed_there_is_only_the_shared_state():
    seed(0)
    expected = draws(4)
    seed(0)
    state = RandomState()
    with state.wear():
        got = draws(2)
    saved = state.state_dict()
    got += draws(2)
    assert got == expected
    state.load_state_dict(saved)
    assert draws(2) == expected[2:]


@pytest.mark.parametrize("inside", [True, False])
def test_kept_and_given_back(inside):
    state = RandomState(5)
    with state.wear():
        draws()
        saved = state.state_dict() if inside else None
        mark = draws()
    if not inside:
        saved = state.state_dict()
        with state.wear():
            mark = draws()
    fresh = RandomState(99)
    seed(3)
    fresh.load_state_dict(saved)
    assert draws() == (seed(3), draws())[1]  # the shared state was not touched
    with fresh.wear():
        assert draws() == mark
    with pytest.raises(ValueError, match="missing"):
        fresh.load_state_dict({"torch": saved["torch"]})


def test_an_error_inside_takes_it_off():
    state = RandomState(5)
    seed(3)
    expected = draws()
    seed(3)
    with pytest.raises(KeyboardInterrupt), state.wear():
        first = draws()
        raise KeyboardInterrupt
    assert draws() == expected and not state.worn
    with state.wear():
        assert draws() != first


def test_its_state_can_be_saved_before_it_was_ever_worn():
    state = RandomState(5)
    saved = state.state_dict()
    with state.wear():
        expected = draws()
    fresh = RandomState(6)
    fresh.load_state_dict(saved)
    with fresh.wear():
        assert draws() == expected
