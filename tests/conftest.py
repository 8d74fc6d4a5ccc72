import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits on every stream

import pytest
import torch
from cases import DEVICES

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: Triton kernels then run on CPU tensors


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="two parametrizations of every test, slow ones left out")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """With --quick, keep the first and the last parametrization of every test that is not slow."""
    if not config.option.quick:
        return
    tests = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {id(same[k]) for same in tests.values() for k in (0, -1)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


@pytest.fixture
def float64():
    """Everything made without a dtype is float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except ValueError as error:
        if "cuda" in DEVICES and "cannot be accessed from Triton (cpu tensor?)" in str(error):
            pytest.skip("beside a GPU Triton kernels run on it, not in the interpreter")
        raise


@pytest.fixture(autouse=True)
def fixed_seed_and_poisoned_memory():
    """The same numbers for every test alone or in company; NaN in all uninitialised memory, that of C++ included."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
