"""Models that are spread over processes, wrapped optimizers, and optimizers that have lost their model."""

import copy
import os
import warnings

import pytest
import together
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import projgrad
from projgrad.methods.baselines import SCRUB, NegGradPlus, PCGrad, SalUn

pytestmark = pytest.mark.same_without_extension


class Pgu:
    """PGU in steps of two closures, fitted at the first one."""

    def __init__(self, model, optimizer):
        self.pgu = projgrad.PGU(model, optimizer, 0.6)

    def step(self, forget, retain):
        if self.pgu.cache is None:
            torch.manual_seed(1)
            self.pgu.fit([torch.randn(6, 5)])
        return self.pgu.step(forget)


METHODS = {
    "OrthoGrad": lambda model, optimizer, forget: projgrad.OrthoGrad(model, optimizer),
    "FeasibleUpdates": lambda model, optimizer, forget: projgrad.FeasibleUpdates(model, optimizer, delta=0.5),
    "NegGradPlus": lambda model, optimizer, forget: NegGradPlus(model, optimizer, 0.5),
    "PCGrad": lambda model, optimizer, forget: PCGrad(model, optimizer, 0.5),
    "SCRUB": lambda model, optimizer, forget: SCRUB(model, optimizer, 1),
    "PGU": lambda model, optimizer, forget: Pgu(model, optimizer),
}
IN_ONE_PROCESS = tuple(METHODS.keys() - {"OrthoGrad"})
SALUN = {"SalUn": lambda model, optimizer, forget: SalUn(model, optimizer, forget)}


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def closures(model):
    torch.manual_seed(1)
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    return lambda: F.cross_entropy(model(-x), y), lambda: F.cross_entropy(model(x), y, reduction="none")


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def refused(model, message, optimizer=None, names=tuple(METHODS)):
    """Every method refuses its step, and leaves the model alone."""
    before = [p.detach().clone() for p in model.parameters()]
    for name, make in [(name, METHODS[name]) for name in names]:
        forget, retain = closures(model)
        with pytest.raises(ValueError, match=message):
            make(model, sgd(model) if optimizer is None else optimizer, forget).step(forget, retain)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)), name
        assert all(p.grad is None for p in model.parameters())


def _two_processes(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = DistributedDataParallel(build())
    words = r"the model is a DistributedDataParallel over 2 processes.*`model\.module`.*broadcast"
    refused(model, words, names=IN_ONE_PROCESS)
    refused(nn.Sequential(model), "0 is a DistributedDataParallel over 2 processes", names=IN_ONE_PROCESS)
    forget, _ = closures(model)
    with pytest.raises(ValueError, match="DistributedDataParallel over 2 processes"):
        SalUn(model, sgd(model), forget)
    through = closures(model)  # the method is given what is inside, the closures the wrapper
    for pair in (through, (closures(model.module)[0], through[1])):
        with pytest.raises(ValueError, match=r"what (forget|retain)\(\) runs is a DistributedDataParallel over 2"):
            projgrad.OrthoGrad(model.module, sgd(model.module)).step(*pair)
    forget, retain = closures(model.module)
    projgrad.OrthoGrad(model.module, sgd(model.module)).step(forget, retain)  # one process does the work
    for p in model.parameters():
        dist.broadcast(p.detach(), 0)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group, and abort when they meet an interpreter on its way out


@pytest.mark.slow
def test_data_parallel_over_two_processes(tmp_path):
    together.start(_two_processes, (str(tmp_path / "store"),), 2)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "name", sorted({*METHODS, *SALUN} - {"PGU"})
)  # it leaves out biases, which DDP takes for unused
def test_data_parallel_of_one_process(one_process, name):
    found = []
    for wrap in (lambda model: model, DistributedDataParallel):
        model = wrap(build())
        forget, retain = closures(model)
        method = (METHODS | SALUN)[name](model, sgd(model), forget)
        for _ in range(2):
            method.step(forget, retain)
        found.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*found)


def test_sharded_parameters_of_one_process(one_process):
    from torch.distributed.fsdp import fully_shard

    model = build()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    words = r"0\.weight is a DTensor: sharded parameters \(FSDP2, tensor parallelism\) are not supported here"
    refused(model, words, names=IN_ONE_PROCESS)
    twin = build()
    for one in (model, twin):
        projgrad.OrthoGrad(one, sgd(one)).step(*closures(one))
    torch.testing.assert_close([p.full_tensor() for p in model.parameters()], [p.detach() for p in twin.parameters()])


@pytest.mark.parametrize("metric", ["gradient", "optimizer"])
def test_shards_in_float64_that_are_gathered_in_float32(one_process, metric):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = build().double()
    policy = MixedPrecisionPolicy(param_dtype=torch.float32)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)), mp_policy=policy)
    unlearner = projgrad.OrthoGrad(model, sgd(model), metric=metric)
    forget, retain = closures(model)
    for retains in (retain, [retain, retain]):
        assert unlearner.step(forget, retains).residual < 1e-4


def test_fully_sharded_data_parallel(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        model = FullyShardedDataParallel(build(), device_id=torch.device("cpu"))
        refused(model, "the model is a FullyShardedDataParallel, which is not supported: use fully_shard")


class DeepSpeedEngine(nn.Sequential):
    """By its name."""


def test_a_deepspeed_engine_is_refused():
    refused(DeepSpeedEngine(nn.Linear(5, 3)), "DeepSpeed steps inside its own")


class State:
    sync_gradients = True


class AcceleratedOptimizer(torch.optim.SGD):
    """What of accelerate's wrapper matters: it steps only if gradients are synchronised, perhaps with a scaler."""

    gradient_state, scaler = State(), None

    def step(self, closure=None):
        if self.gradient_state.sync_gradients:
            super().step(closure)


def test_an_accelerated_optimizer_is_used_or_refused_with_the_way_out():
    model = build()
    optimizer, twin = AcceleratedOptimizer(model.parameters(), lr=0.1), copy.deepcopy(model)
    projgrad.OrthoGrad(model, optimizer).step(*closures(model))
    projgrad.OrthoGrad(twin, sgd(twin)).step(*closures(twin))
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    model.zero_grad()
    optimizer.gradient_state.sync_gradients = False
    refused(model, r"would skip this step.*accelerator\.accumulate", optimizer)
    optimizer.gradient_state.sync_gradients = True
    optimizer.scaler = torch.amp.GradScaler("cpu")
    refused(model, r"scale the gradient by itself.*`optimizer\.optimizer`.*scaler=accelerator\.scaler", optimizer)


@pytest.mark.parametrize("name", [*METHODS, *SALUN])
def test_an_optimizer_without_any_parameter_of_the_model(name):
    make, model = (METHODS | SALUN)[name], build()
    optimizer = sgd(model)
    copied = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"none of those that it holds belongs to the model: build it after"):
        make(copied, optimizer, closures(copied)[0])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="the 4 of the model that it holds have requires_grad=False"):
        make(model, optimizer, closures(model)[0])


@pytest.mark.parametrize("name", [*METHODS, *SALUN])
def test_a_layer_replaced_after_the_optimizer_was_built(name):
    """The new layer would stay as it is without a word."""
    model = build()
    optimizer = sgd(model)
    old, model[2] = model[2], nn.Linear(7, 3)
    forget, retain = closures(model)
    with pytest.warns(UserWarning, match=r"not hold 2\.weight, 2\.bias of the model.* 2 parameters.*build it anew"):
        (METHODS | SALUN)[name](model, optimizer, forget).step(forget, retain)
    model[2] = old
    method = (METHODS | SALUN)[name](model, optimizer, forget)
    model[2] = nn.Linear(7, 3)
    with pytest.warns(UserWarning, match=r"not hold 2\.weight, 2\.bias"):
        if name != "SalUn":
            method.step(forget, retain)
        else:  # whose masks are those of the old layer
            with pytest.raises(ValueError, match="other parameters than when the saliency was found: make a new SalUn"):
                method.step(forget, retain)


@pytest.mark.parametrize("name", [*METHODS, *SALUN])
def test_optimizers_of_some_or_more_parameters_give_no_warning(name):
    """Some of the model's parameters, or those of several models: nothing to warn of."""
    model, other = build(), build()
    forget, retain = closures(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for some in (model[0].parameters(), [*model.parameters(), *other.parameters()]):
            (METHODS | SALUN)[name](model, torch.optim.SGD(some, lr=0.1), forget).step(forget, retain)


@pytest.mark.parametrize("call", ["step", "run", "fit"])
def test_pgu_is_refused_after_the_model_was_spread_as_well(call):
    model = build()
    x, y = torch.randn(6, 5), torch.zeros(6, dtype=torch.long)
    pgu = projgrad.PGU(model, AcceleratedOptimizer(model.parameters(), lr=0.1), 0.6).fit([x])
    pgu.optimizer.gradient_state = State()
    pgu.optimizer.gradient_state.sync_gradients = False
    calls = {
        "step": lambda: pgu.step(lambda: (model(x), y)),
        "run": lambda: pgu.run([(x, y)], lambda: pytest.fail("the model is looked at before the check")),
        "fit": lambda: pgu.fit([x]),
    }
    with pytest.raises(ValueError, match="would skip this step"):
        calls[call]()
