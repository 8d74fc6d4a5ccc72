"""A tape for a model."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..recording.fixed import fixed_tensors
from .tape import Tape


def per_sample(model: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> Tape:
    """Return a tape that follows the parameters of a model through one forward pass, whatever the model is made of.

    What `torch.compile` made runs as it was written while the tape records.

    Args:
        model: any module.
        parameters: those to follow, by name. Default: all that require gradients.

    Raises:
        ValueError: no parameter requires a gradient.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> with projgrad.per_sample(model) as tape:
        ...     losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        >>> tape.gram(losses).shape
        torch.Size([5, 5])
    """
    if parameters is None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to follow")
    return Tape(parameters, fixed_tensors(model, parameters.values()), model)
