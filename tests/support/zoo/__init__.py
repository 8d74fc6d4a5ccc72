"""Small models of every kind: `ZOO[name]()` builds a case with n losses, and the same losses by batches of one."""

from zoo import adapters, free, functional, language, layers, vision
from zoo.case import ZOO, Case

__all__ = ["ZOO", "Case", "adapters", "free", "functional", "language", "layers", "vision"]
