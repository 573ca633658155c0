"docs/events.md's table of events, held against a run: what is there, what a change does, and what an exception leaves."

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from ways import same

import trainkit.callback as callback
from trainkit.callback import EVENTS, On
from trainkit.learner import Learner

PAGE = (Path(__file__).resolve().parent.parent / "docs/events.md").read_text(encoding="utf-8")
ROWS = {cells[0].strip("` "): [cell.strip() for cell in cells[1:]]
        for cells in re.findall(r"^\|" + 5 * r"([^|\n]*)\|" + "$", PAGE, re.M) if cells[0].strip("` ") in EVENTS}  # fmt: skip
ABSENT = ("player", "batch", "pred", "targets", "loss")  # where the table doesn't name them
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def words(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"\([^)]*\)", "", text))


def made(*cbs) -> Learner:
    "Two epochs of two batches, a validation after each, a pause behind the first batch."
    torch.manual_seed(1)
    data = (X, X.sum(1, keepdim=True))
    return Learner(nn.Linear(3, 1), {"train": data, "valid": data}, "mse", {"name": "sgd", "lr": 0.1}, front="none", batch_size=4,
                   seed=1, cbs=[On("after_batch", lambda learn: learn.step == 1 and learn.pause(), order=-9),
                                On("before_pause", lambda learn: learn.resume(), order=-9), *cbs])  # fmt: skip


def run(learn: Learner) -> tuple:
    "Train, look, and what came of it."
    learn.fit(2)
    found = learn.validate()
    tested = learn.test((X, X.sum(1, keepdim=True)))
    return {name: p.detach().clone() for name, p in learn.model.named_parameters()}, found, tested, learn.predict(X)


def test_the_table_has_every_event_once_in_order():
    assert list(ROWS) == [*EVENTS]


@pytest.mark.parametrize("event", EVENTS)
def test_what_is_there(event):
    said, seen = ROWS[event][1], []

    def look(learn):
        there = {name: getattr(learn, name) for name in {*ABSENT, *words(said)} - {"gradients"}}
        there["gradients"] = next((p.grad for p in learn.players[0].parameters()), None)
        seen.append({name for name, value in there.items() if isinstance(value, torch.Tensor) or value not in (None, (), {}, "")})
    run(made(On(event, look)))
    assert seen and all({*words(said)} <= there for there in seen), f"not there: {[{*words(said)} - there for there in seen]}"
    unsure = {*re.findall(r"\(`(\w+)`\)", said)}
    assert not any({*ABSENT} - {*words(said)} - unsure & there for there in seen)


def change(learn: Learner, name: str) -> None:
    if name == "weights":
        with torch.no_grad(): learn.model.weight.mul_(1.5)
    elif name == "gradients":
        for p in learn.model.parameters(): p.grad.mul_(1.5)
    elif name == "results": learn.record({"valid/own": 3.0})
    else:
        value = getattr(learn, name)
        setattr(learn, name, tuple(1.5 * part for part in value) if isinstance(value, tuple) else 1.5 * value)


@pytest.mark.parametrize("event, name", [(event, name) for event in EVENTS for name in words(ROWS[event][2])])
def test_a_change_has_an_effect(event, name):
    plain, changed = run(made()), run(made(On(event, lambda learn: change(learn, name))))
    with pytest.raises(AssertionError): same(plain, changed)


def counted(*cbs) -> dict[str, int]:
    "How often each event came to its last callback."
    found = dict.fromkeys(EVENTS, 0)

    def count(event):
        return On(event, lambda learn: found.update({event: found[event] + 1}), order=9)
    run(made(*cbs, *map(count, EVENTS)))
    return found


@pytest.mark.parametrize("event", [event for event in EVENTS if ROWS[event][3]])
def test_what_is_left(event):
    "The scope's end is skipped once, and its cleanup isn't; what is around it goes on."
    kind, raised = getattr(callback, ROWS[event][3]), []

    def leave(learn):
        if not raised:
            raised.append(learn.step)
            raise kind
    plain, found = counted(), counted(On(event, leave))
    name = kind.__name__.removeprefix("Cancel").lower()
    name = event.split("_")[1] if name == "validate" else name
    assert raised and found[f"after_{name}"] == plain[f"after_{name}"] - 1
    assert found.get(f"cleanup_{name}") == plain.get(f"cleanup_{name}")
    assert found["after_predict"] + (name == "predict") == plain["after_predict"] == 1, "what came behind it came"


@pytest.mark.parametrize("event", [event for event in EVENTS if not ROWS[event][3]])
def test_the_others_are_ends(event):
    assert event.startswith("cleanup_")
