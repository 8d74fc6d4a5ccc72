"""Drop-in torch functions that report to a tape: same arguments and results as the originals, plus `tape`.

`projgrad.per_sample(model)` replaces the functions of a forward pass with these. In a training loop of your own they
do the same without interception:

    >>> import projgrad.functional as pf
    >>> weight, x = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    >>> tape = projgrad.Tape({"weight": weight})
    >>> losses = pf.linear(x, weight, tape=tape).square().sum(1)
    >>> tape.gram(losses).shape
    torch.Size([5, 5])

Every function returns what torch returns. What it adds is a note of its inputs, from which the per-sample gradients
of those of its arguments that the tape follows are made when the backward pass brings the gradient of the output.
"""

from .convolutions import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from .elementwise import add, mul, sub
from .lookups import embedding, embedding_bag
from .norms import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from .products import addmm, bilinear, einsum, linear, matmul

__all__ = [
    "add",
    "addmm",
    "batch_norm",
    "bilinear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "einsum",
    "embedding",
    "embedding_bag",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "linear",
    "matmul",
    "mul",
    "rms_norm",
    "sub",
]
