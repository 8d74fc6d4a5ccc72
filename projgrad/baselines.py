"""Baselines with the same `step(forget, retain)`; see `projgrad.methods.baselines`."""

from .methods.baselines import SCRUB, BaselineRecord, NegGradPlus, PCGrad, SalUn

__all__ = ["SCRUB", "BaselineRecord", "NegGradPlus", "PCGrad", "SalUn"]
