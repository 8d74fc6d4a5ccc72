"""PGU's bases as the published code makes them, networks of the shapes it was run on, and a small fitted one."""

import torch
import torch.nn.functional as F
from torch import nn

from projgrad.methods.pgu.pgu import PGU

F64 = torch.float64


def bases(model, x, gamma, *, strided):
    """M (i, k) of every convolution and linear layer, by name. strided=False: patches at every position, as published,
    whatever the stride and dilation of the layer."""
    moments = {}

    def hook(name):
        def add(layer, inputs, _):
            x = inputs[0]
            if isinstance(layer, nn.Conv2d):
                where = dict(stride=layer.stride, dilation=layer.dilation) if strided else {}
                x = F.unfold(x, layer.kernel_size, padding=layer.padding, **where).mT
            rows = x.reshape(-1, x.shape[-1]).double()
            moments[name] = moments.get(name, 0) + rows.T @ rows

        return add

    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(x)
    for h in hooks:
        h.remove()
    found = {}
    for name, C in moments.items():
        values, vectors = torch.linalg.eigh(C)
        s = values.flip(0).clamp(min=0).sqrt()
        k = int((s.cumsum(0) / s.sum() <= gamma).sum())
        found[name] = vectors.flip(1)[:, :k]
    return found


def conv(i, o, kernel=3, stride=1):
    return nn.Sequential(nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU())


def all_cnn(width=4, classes=5):
    a, b = width, 2 * width
    layers = [conv(3, a), conv(a, a), conv(a, a, stride=2), conv(a, b), conv(b, b), conv(b, b, stride=2), conv(b, b)]
    return nn.Sequential(*layers, conv(b, b, 1), conv(b, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def small_vgg(width=4, classes=5):
    layers, i = [], 3
    for o in (width, 2 * width, 2 * width):
        layers += [conv(i, o), conv(o, o), nn.MaxPool2d(2)]
        i = o
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * i, 12), nn.ReLU(), nn.Linear(12, classes))


class Block(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.a, self.b = conv(i, o, stride=stride), nn.Sequential(*conv(o, o)[:2])
        self.short = nn.Identity() if i == o and stride == 1 else nn.Sequential(*conv(i, o, 1, stride)[:2])

    def forward(self, x):
        return F.relu(self.b(self.a(x)) + self.short(x))


def resnet18(width=3, classes=5):
    layers, i = [conv(3, width)], width
    for o, stride in ((width, 1), (2 * width, 2), (2 * width, 2), (3 * width, 2)):
        layers += [Block(i, o, stride), Block(o, o, 1)]
        i = o
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, classes))


NETWORKS = {"AllCNN": all_cnn, "SmallVGG": small_vgg, "ResNet-18": resnet18}


def sgd(model, lr=0.1):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def perceptron(dtype=F64):
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def correlated(n, i, dtype=F64):
    """Rows whose spectrum falls, so that some directions are kept and some are not."""
    return (torch.randn(n, i, dtype=F64) * torch.logspace(0, -2, i, dtype=F64)).to(dtype)


def fitted(dtype=F64, n=40, **options):
    model, x = perceptron(dtype), correlated(n, 6, dtype)
    return PGU(model, sgd(model), **{"gamma": 0.8, **options}).fit(x.split(16)), x, torch.arange(n) % 3


def angle(a, b):
    """Sine of the largest principal angle between two subspaces of equal dimension."""
    return float(torch.linalg.matrix_norm(b - a @ (a.mT @ b), 2)) if a.shape[1] else 0.0


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]
