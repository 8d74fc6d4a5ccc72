"""Drop-in torch functions that report to a tape; see `projgrad.recording.functional`."""

from .recording.functional import *  # noqa: F403
from .recording.functional import __all__ as __all__
