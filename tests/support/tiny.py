"""A scenario that trains in a moment, and the plan of a comparison on it."""

import torch
from torch import nn

from projgrad.evaluate.problem import Part, Problem, Training
from projgrad.experiments.comparison.comparison import ComparisonPlan
from projgrad.experiments.comparison.methods import Setting
from projgrad.experiments.scenarios import Scenario

SETTING = Setting(0.1, 3, 8, 0.8)


class Tiny(Problem):
    """Three noisy clusters, learnt in two epochs."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        y = torch.arange(3).repeat(40)
        x = 2 * nn.functional.one_hot(y, 6).float() + torch.randn(120, 6, generator=generator)
        whole = Part((x,), y)
        self.retain, self.forget, self.validation, self.test = whole[:60], whole[60:72], whole[72:90], whole[90:]
        self.seed, self.classes, self.training, self.others = seed, 3, Training(1e-2, 16, 2), {}

    def build(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def scenario(load=Tiny, **changes):
    fields = {"n": 8, "steps": 3, "forget_batch": 4, "study": (4, 8), "seconds": (1.0, 0.1)} | changes
    return Scenario("clusters", "made here", "forgotten points recognised", load, **fields)


def small_plan(methods=("neggrad", "orthograd"), seeds=(0,), memory=False):
    study = {"orthograd": tuple(Setting(0.1, 3, n, 0.5) for n in (4, 8))}
    return ComparisonPlan("test", seeds, {"tiny": dict.fromkeys(methods, SETTING)}, {"tiny": study}, memory)
