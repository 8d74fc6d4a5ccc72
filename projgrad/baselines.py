"""Baselines with the same `step(forget, retain)` (`projgrad.methods.baselines`); forget losses of language models."""

from .methods.baselines import SCRUB, BaselineRecord, NegGradPlus, PCGrad, SalUn
from .methods.language_losses import npo_loss, simnpo_loss

__all__ = ["SCRUB", "BaselineRecord", "NegGradPlus", "PCGrad", "SalUn", "npo_loss", "simnpo_loss"]
