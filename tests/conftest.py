import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits on every stream

from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: Triton kernels then run on CPU tensors

# Whole files that need packages of the comparison; others skip what they miss.
NEEDS = dict.fromkeys(
    (
        *("experiments/test_compare.py", "experiments/test_cli.py"),
        *("evaluate/test_evaluate.py", "evaluate/test_report.py", "evaluate/test_evaluate_input.py"),
        *("test_atomic.py", "test_options.py"),
    ),
    ("sklearn", "rich", "matplotlib"),
)
MISSING = {file: [p for p in packages if find_spec(p) is None] for file, packages in NEEDS.items()}
collect_ignore = [file for file, packages in MISSING.items() if packages]

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_report_header():
    return [f"not collected: {file}, without {', '.join(MISSING[file])}" for file in collect_ignore]


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
