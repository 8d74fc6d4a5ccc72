"""Ctrl-C at any operation of a step: everything is as before, or as after it."""

import os
import sys
import warnings

import pytest
import torch
from modes import Interrupt, Snapshot, hooks_of, modes
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


class AtLine:
    """Raises an error in place of one line of a step, in the files that make it; counts them."""

    FILES = ("/projgrad/methods/", "/projgrad/tape/", "/projgrad/recording/")

    def __init__(self, at=-1, error=KeyboardInterrupt, after=lambda: True):
        self.at, self.error, self.after, self.count, self.where = at, error, after, 0, ""

    def __enter__(self):
        sys.settrace(lambda frame, *_: self._line if any(f in frame.f_code.co_filename for f in self.FILES) else None)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _line(self, frame, event, _):
        if event == "line" and self.after():
            self.count += 1
            if self.count - 1 == self.at:
                sys.settrace(None)
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise self.error
        return self._line


LINES = 10_000 if os.environ.get("PROJGRAD_EXAMPLES") else 35


@pytest.mark.parametrize("name", ["global", "metric", "two_passes"])
def test_an_interrupt_at_any_line(name):
    """Nothing that is registered refuses the next step, which is that of a twin that was not interrupted."""
    twin, lines = prepared(name), AtLine()
    with lines:
        twin.step()
    subject = prepared(name)
    before = Snapshot(subject.model, subject.optimizer)
    assert lines.count > 300
    stride = max(1, lines.count // LINES)
    for k in range(sum(map(ord, name)) % stride, lines.count, stride):
        interrupt = AtLine(k)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                with interrupt:
                    subject.step()
            except KeyboardInterrupt:
                pass
        assert hooks_of(subject.model, subject.optimizer)[1] == before.hooks[1], interrupt.where
        assert modes() == before.modes, interrupt.where
        assert torch._C._is_torch_function_enabled(), interrupt.where
        if before.same_parameters() and before.same_state():
            continue
        subject.step()  # works
        subject = prepared(name)
        before = Snapshot(subject.model, subject.optimizer)
    subject.step()
    assert all(map(torch.equal, subject.params, twin.params))


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.0)


def nesterov(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True)


def rmsprop(params):
    return torch.optim.RMSprop(params, lr=0.01, momentum=0.5)


@pytest.mark.parametrize(
    "make, error",
    [
        (adamw, torch.OutOfMemoryError),
        (adamw, KeyboardInterrupt),
        (nesterov, KeyboardInterrupt),
        (rmsprop, KeyboardInterrupt),
    ],
)
def test_an_error_in_the_correction_leaves_no_forgetting(make, error):
    """With α = 0 the forgetting part is all of the change: the parameters are where they were, but for rounding."""

    def made():
        subject = Subject("metric")
        subject.rebuild(make(subject.params))
        subject.unlearner.alpha = 0.0
        for _ in range(2):
            subject.step()
        return subject, [p.detach().clone() for p in subject.params], [p._version for p in subject.params]

    def stepped():
        return all(p._version != v for p, v in zip(subject.params, versions, strict=True))

    subject, held, versions = made()
    counted = AtLine(after=stepped)
    with counted:
        subject.step()
    assert counted.count > 200
    twin = subject.params
    taken_out = 0
    for k in range(0, counted.count, max(1, 4 * counted.count // LINES)):
        subject, held, versions = made()
        failing = AtLine(k, error, after=stepped)
        with pytest.raises(error) as raised, failing:
            subject.step()
        unchanged = all(torch.allclose(p, q, rtol=0, atol=1e-14) for p, q in zip(subject.params, held, strict=True))
        done = all(torch.allclose(p, q, rtol=0, atol=1e-14) for p, q in zip(subject.params, twin, strict=True))
        assert unchanged or done, failing.where
        taken_out += unchanged
        if unchanged:
            assert any("was taken out" in note for note in raised.value.__notes__)
        assert subject.step().residual < 1e-10, failing.where
    assert taken_out > 5
