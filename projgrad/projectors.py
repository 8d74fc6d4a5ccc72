"""Reference projectors; see `projgrad.methods.projectors`."""

from .methods.projectors import lstsq, qr, qr_per_tensor

__all__ = ["lstsq", "qr", "qr_per_tensor"]
