"""What a step must leave as it found it: parameters, optimizer, hooks, and the modes that torch and Python are in."""

import copy
import gc

import torch
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from projgrad.methods import closures


def modes():
    """The modes of this thread and process."""
    hooks = [name for name in vars(modules) if name.startswith("_global") and name.endswith("hooks")]
    return {
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "functions": len(_get_current_function_mode_stack()),
        "dispatch": len(_get_current_dispatch_mode_stack()),
        "saved": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "collector": gc.isenabled(),
        "hooks": {name: len(getattr(modules, name)) for name in hooks},
        "running": len(closures._running),
    }


def hooks_of(model, optimizer):
    """How many hooks there are on modules, parameters and an optimizer."""
    kinds = [name for name in vars(model) if name.endswith("hooks")]
    counts = [[len(getattr(module, kind)) for kind in kinds] for module in model.modules()]
    tensors = [(len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ())) for p in model.parameters()]
    steps = [len(getattr(optimizer, f"_optimizer_{kind}_hooks")) for kind in ("step_pre", "step_post")]
    return counts, tensors, steps


def state_of(optimizer):
    """Copies of the state by the place of the parameter, and of the settings."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        (k, key): copy.deepcopy(value)
        for k, p in enumerate(params)
        for key, value in optimizer.state.get(p, {}).items()
    }
    return state, [{k: v for k, v in group.items() if k != "params"} for group in copy.deepcopy(optimizer.param_groups)]


class Snapshot:
    """Everything that belongs to a step, as it is now."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.tensors = {
            name: (t, t.detach().clone()) for name, t in (*model.named_parameters(), *model.named_buffers())
        }
        self.flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
        self.state, self.settings = state_of(optimizer)
        self.hooks, self.modes = hooks_of(model, optimizer), modes()

    def same_parameters(self):
        now = dict((*self.model.named_parameters(), *self.model.named_buffers()))
        return all(now[name] is t and torch.equal(t, value) for name, (t, value) in self.tensors.items())

    def same_state(self):
        state, settings = state_of(self.optimizer)
        return (
            state.keys() == self.state.keys()
            and settings == self.settings
            and all(
                torch.equal(value, state[key]) if isinstance(value, torch.Tensor) else value == state[key]
                for key, value in self.state.items()
            )
        )

    def assert_surroundings(self):
        """Hooks, flags and modes are the same, and no `.grad` is left."""
        assert (
            [p.requires_grad for p in self.model.parameters()],
            [m.training for m in self.model.modules()],
        ) == self.flags
        assert hooks_of(self.model, self.optimizer) == self.hooks
        assert modes() == self.modes
        assert all(p.grad is None for group in self.optimizer.param_groups for p in group["params"])

    def assert_same(self):
        assert self.same_parameters() and self.same_state()
        self.assert_surroundings()


class Interrupt(TorchDispatchMode):
    """Raises KeyboardInterrupt in place of one operation of torch; counts them."""

    def __init__(self, at=-1):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count - 1 == self.at:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))
