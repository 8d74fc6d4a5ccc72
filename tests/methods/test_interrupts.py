"""Ctrl-C at any operation of a step: everything is as before, or as after it."""

import os

import pytest
import torch
from modes import Interrupt, Snapshot
from subjects import SETUPS, Subject

pytestmark = [
    pytest.mark.same_without_extension,
    pytest.mark.filterwarnings("ignore:PGU protects nothing"),
    pytest.mark.filterwarnings("ignore:the union of"),
]
PLACES = 10_000 if os.environ.get("PROJGRAD_EXAMPLES") else 24  # of a step, at which it is interrupted


def prepared(name):
    """A subject that took two steps, with the state of its optimizer, and the hooks that come with a first step."""
    subject = Subject(name)
    for _ in range(2):
        subject.step()
    subject.optimizer.zero_grad()
    return subject


def watched(subject, mode):
    """Notes at which operation the optimizer begins and ends its own step."""
    optimizer, step = subject.optimizer, type(subject.optimizer).step
    seen = []

    def noted(self, *args, **kwargs):
        seen.append(mode.count)
        out = step(self, *args, **kwargs)
        seen.append(mode.count)
        return out

    optimizer.step = noted.__get__(optimizer)
    return seen


def act(subject, what):
    if what == "step":
        subject.step()
    elif what == "request":
        subject.unlearner.forget([subject.x[:2]])
    else:
        subject.unlearner.backward(*subject.closures())


CASES = [(name, "step") for name in SETUPS] + [("global", "backward"), ("metric", "backward"), ("pgu", "request")]


@pytest.mark.parametrize("name, what", CASES)
def test_an_interrupt_at_any_operation(name, what):
    """In the optimizer's own step, which is torch's, nothing is promised, but where what was is put back."""
    whole, mode = prepared(name), Interrupt()
    seen = watched(whole, mode)
    with mode:
        act(whole, what)
    begins = seen[0] if seen else mode.count
    puts_back = name in ("feasible", "aggregate", "masked", "metric_parts") or what == "request"
    last = mode.count if puts_back else begins
    stride = max(1, last // PLACES)
    first = sum(map(ord, name)) % stride
    assert last > 20
    subject = prepared(name)
    before = Snapshot(subject.model, subject.optimizer)
    more = {begins - 1, min(begins + 5, last - 1), last - 2, last - 1}  # begins + 5: in the optimizer's own step
    for k in sorted({*range(first, last, stride), *more}):
        with pytest.raises(KeyboardInterrupt), Interrupt(k):
            act(subject, what)
        before.assert_surroundings()
        if before.same_parameters() and before.same_state():
            continue
        assert k >= begins
        if not before.same_parameters():  # all is done
            assert all(map(torch.equal, subject.params, whole.params)), k
        else:
            assert name in ("feasible", "aggregate", "masked"), k  # the optimizer has stepped
        subject = prepared(name)
        before = Snapshot(subject.model, subject.optimizer)
    act(subject, what)  # the next step is what it would have been
    assert all(map(torch.equal, subject.params, whole.params))
