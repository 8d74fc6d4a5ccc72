"""What torch.compile made of a model, or of parts of it: it runs as it was written while a tape records, and counts."""

import copy
import threading

import pytest
import torch
from steps import mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import projgrad

pytestmark = pytest.mark.usefixtures("float64")

N = 6


class Compiler:
    """A backend that counts what it compiles."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, _):
        self.count += 1
        return graph.forward


def _whole(model, compiler):
    return torch.compile(model, backend=compiler)


def _part(model, compiler):
    model[0] = torch.compile(model[0], backend=compiler)
    return model


def _in_place(model, compiler):
    model[0].compile(backend=compiler)
    return model


def _function(model, compiler):
    first = torch.compile(lambda x: torch.tanh(F.linear(x, *model[0].parameters())), backend=compiler, fullgraph=True)
    return lambda x: model[2](first(x))


def _checkpointed(model, compiler):
    first = torch.compile(model[0], backend=compiler)
    return lambda x: model[2](torch.tanh(checkpoint(first, x, use_reentrant=False)))


COMPILED = {f.__name__[1:]: f for f in (_whole, _part, _in_place, _function, _checkpointed)}


def losses_of(run, x, y):
    return lambda: F.cross_entropy(run(x), y, reduction="none")


@pytest.mark.parametrize("name", COMPILED)
def test_steps_are_those_of_the_model_before_it_was_compiled(name):
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5))
    plain, compiler = copy.deepcopy(model), Compiler()
    run = COMPILED[name](model, compiler)
    x, y, xf = torch.randn(N, 8), torch.randint(5, (N,)), torch.randn(4, 8)
    held, weights = run if isinstance(run, nn.Module) else model, []
    for module, forward in ((plain, plain), (held, run)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        unlearner = projgrad.OrthoGrad(module, optimizer)
        records = [
            unlearner.step(lambda: F.cross_entropy(forward(xf), y[:4]), losses_of(forward, x, y))  # noqa: B023
            for _ in range(3)
        ]
        assert max(record.residual for record in records) < 1e-10
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-12)
    assert compiler.count or name == "in_place"  # outside of the tape it was compiled; torch may skip a single layer


@pytest.mark.filterwarnings("ignore:Using `torch.compile\\(module\\)` when there are global hooks")
@pytest.mark.parametrize("is_tracked", [True, False])
def test_batch_norms_of_a_compiled_model_are_looked_at(is_tracked):
    """In the forget closure too: it compiled the hook that looks, and without running statistics it saw nothing."""
    torch.compiler.reset()

    class Net(nn.Sequential):  # whose forward is not torch's own: torch.compile leaves that alone
        def forward(self, x):
            return self[2](self[1](self[0](x)))

    plain = Net(nn.Linear(8, 7), nn.BatchNorm1d(7, track_running_stats=is_tracked), nn.Linear(7, 5)).eval()
    model, x, y, weights = copy.deepcopy(plain), torch.randn(N, 8), torch.randint(5, (N,)), []
    compiled = torch.compile(model, backend=Compiler())
    compiled(x)
    for module in (plain, compiled):
        unlearner = projgrad.OrthoGrad(module, torch.optim.SGD(module.parameters(), lr=0.1))
        closures = losses_of(module, -x[:4], y[:4]), losses_of(module, x, y)
        if is_tracked:
            assert unlearner.step(lambda: closures[0]().mean(), closures[1]).residual < 1e-10  # noqa: B023
            weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
            continue
        with pytest.raises(ValueError, match="1 is a BatchNorm1d that uses batch statistics"):
            unlearner.step(lambda: closures[0]().mean(), closures[1])  # noqa: B023
    if is_tracked:
        torch.testing.assert_close(*weights, rtol=0, atol=1e-12)


def test_only_the_recorded_pass_is_not_compiled():
    torch.compiler.reset()
    compiler, model, x = Compiler(), mlp(), torch.randn(N, 8)
    run = torch.compile(model, backend=compiler)
    with projgrad.per_sample(model) as tape:
        losses = run(x).square().sum(1)
    assert not compiler.count
    assert tape.gram(losses).diagonal().min() > 0
    for _ in range(2):
        run(x)
    assert compiler.count == 1


def test_an_error_in_the_recorded_pass_leaves_compilation_on():
    torch.compiler.reset()
    compiler, model, x = Compiler(), mlp(), torch.randn(N, 8)
    run = torch.compile(model, backend=compiler)
    with pytest.raises(RuntimeError), projgrad.per_sample(model):
        run(x[:, :5])
    run(x)
    assert compiler.count == 1


def test_tapes_that_end_in_any_order_leave_compilation_on():
    """As two threads do, whose tapes overlap."""
    torch.compiler.reset()
    compiler, x = Compiler(), torch.randn(N, 8)
    runs = [torch.compile(mlp(), backend=compiler) for _ in range(2)]
    runs[0](x)
    first_entered, second_entered, first_left = (threading.Event() for _ in range(3))
    counts = []

    def first():
        with projgrad.per_sample(runs[0]):
            first_entered.set()
            second_entered.wait(10)
        first_left.set()

    def second():
        first_entered.wait(10)
        with projgrad.per_sample(runs[1]):
            second_entered.set()
            first_left.wait(10)
            torch.compiler.reset()
            runs[1](x)
            counts.append(compiler.count)

    torch.set_default_dtype(torch.float64)
    threads = [threading.Thread(target=f) for f in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [1]
    torch.compiler.reset()  # two models of the same layers share what was compiled
    runs[1](x)
    assert compiler.count == 2
