"""Unlearners in any order of what a loop may do to them, against twins to which nothing bad ever happened."""

import copy

import pytest
import torch

pytest.importorskip("hypothesis")
from any_input import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from modes import Snapshot, state_of
from subjects import SETUPS, Hooked, Subject

pytestmark = [
    pytest.mark.same_without_extension,
    pytest.mark.filterwarnings("ignore:PGU protects nothing"),
    pytest.mark.filterwarnings("ignore:the union of"),
]
SIDES = (
    "before the forward pass",
    "after the forward pass",
    "NaN",
    "NaN in a gradient",
    "in the backward pass",
    "wrong shape",
)
STAGES = [f"{side}: {what}" for side in ("forget", "retain") for what in SIDES]
STAGES += ["a hook of a module", "a hook before the optimizer's step"]
ERRORS = (ValueError("no"), KeyboardInterrupt(), Hooked(), MemoryError(), RuntimeError("no"))


class Twins(RuleBasedStateMachine):
    """Both do the same, but only the first one fails on the way, is saved and loaded, or is made anew."""

    @initialize(name=st.sampled_from(list(SETUPS)), seed=st.integers(0, 99))
    def begin(self, name, seed):
        self.one, self.twin = Subject(name, seed), Subject(name, seed)
        self.fitted = name == "pgu"  # and nothing else has changed since

    def both(self, act):
        for subject in (self.one, self.twin):
            act(subject)
        self.compare()

    def compare(self):
        limits = {"rtol": 1e-8, "atol": 1e-10}
        for name, p in self.one.model.named_parameters():
            torch.testing.assert_close(p, self.twin.model.get_parameter(name), **limits, msg=name)
        (state, settings), (expected, others) = state_of(self.one.optimizer), state_of(self.twin.optimizer)
        assert state.keys() == expected.keys() and settings == others
        for key, value in state.items():
            torch.testing.assert_close(value, expected[key], **limits, msg=str(key))

    @rule()
    def step(self):
        getattr(self.one.unlearner, "_stop", lambda: None)()  # waiting for a step on what backward wrote
        before = Snapshot(self.one.model, self.one.optimizer)
        records = [subject.step() for subject in (self.one, self.twin)]
        if hasattr(records[0], "residual"):
            assert records[0].residual < 1e-4
        self.compare()
        for p in self.one.params:
            p.grad = None
        before.assert_surroundings()

    @rule(stage=st.sampled_from(STAGES), error=st.sampled_from(ERRORS))
    def fail(self, stage, error):
        if self.one.name == "pgu" and (stage.startswith("retain") or "wrong shape" in stage):
            return
        self.one.failing("forget: before the forward pass", error)  # makes what a first step leaves: one hook
        before = Snapshot(self.one.model, self.one.optimizer)
        raised = self.one.failing(stage, error)
        if stage == "forget: wrong shape" and self.one.parts > 1 and raised is None:
            self.twin.step()
            return self.compare()
        assert raised is not None
        if "NaN" not in stage and "shape" not in stage:
            assert raised is error or raised.__cause__ is error, raised
        before.assert_same()

    @precondition(
        lambda self: not self.one.name.startswith("metric") and self.one.name not in ("feasible", "aggregate", "masked")
    )
    @rule()
    def fail_after_the_step(self):
        """All is updated then."""
        assert isinstance(self.one.failing("a hook after the optimizer's step", Hooked()), Hooked)
        self.twin.step()
        self.compare()

    @precondition(lambda self: hasattr(self.one.unlearner, "backward") and self.one.unlearner.max_norm is None)
    @rule()
    def backward_and_step(self):
        self.both(lambda subject: subject.backward())

    @precondition(lambda self: hasattr(self.one.unlearner, "backward") and self.one.unlearner.max_norm is None)
    @rule()
    def backward_without_a_step(self):
        self.one.unlearner.backward(*self.one.closures())
        self.one.optimizer.zero_grad()

    @rule()
    def plain_step(self):
        self.both(lambda subject: subject.by_hand())
        self.fitted = False

    @rule()
    def stale_gradients(self):
        for p in self.one.params:
            p.grad = torch.ones_like(p)

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        self.one.optimizer.zero_grad(set_to_none)

    @rule(rate=st.sampled_from((0.0, 0.003, 0.05)))
    def change_the_learning_rate(self, rate):
        self.both(lambda subject: subject.optimizer.param_groups[0].update(lr=rate))

    @rule(k=st.sampled_from((1, 2, 3, 5)), flag=st.booleans())
    def freeze(self, k, flag):
        self.both(lambda subject: subject.params[k].requires_grad_(flag))

    @rule(size=st.sampled_from((6, 7, 12)))
    def change_the_batch(self, size):
        self.both(lambda subject: setattr(subject, "size", size))

    @rule(flag=st.booleans())
    def train(self, flag):
        self.one.model.train(flag)

    @rule()
    def load(self):
        one = self.one
        one.model.load_state_dict(copy.deepcopy(one.model.state_dict()))
        one.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))

    @precondition(lambda self: self.one.name != "pgu")
    @rule()
    def resume(self):
        self.one.resume()

    @rule()
    def rebuild(self):
        self.one.rebuild()

    @precondition(lambda self: self.fitted and self.one.unlearner.cache.n > 20)
    @rule(fails=st.booleans())
    def request(self, fails):
        """A deletion of two samples, perhaps after one that fails."""
        k = 24 - self.one.unlearner.cache.n
        if fails:
            before, cache = Snapshot(self.one.model, self.one.optimizer), self.one.unlearner.cache
            for p in self.one.params:
                p.grad = None

            def broken():
                yield self.one.x[k : k + 1]
                raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                self.one.unlearner.forget(broken())
            assert self.one.unlearner.cache is cache
            before.assert_same()
        self.both(lambda subject: subject.unlearner.forget([subject.x[k : k + 2]]))


TestTwins = Twins.TestCase
TestTwins.settings = settings(examples(60), stateful_step_count=12)
