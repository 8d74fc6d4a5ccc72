"""What identifies a model, its parameters and its samples."""

import ctypes
import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

Form = tuple[nn.Parameter, torch.dtype, torch.Size, torch.device]


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers: names, dtypes, shapes, numbers."""
    digest = hashlib.sha256()
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        host = t.detach().cpu().contiguous()
        digest.update(f"{name} {host.dtype} {tuple(host.shape)};".encode())
        digest.update(_bytes(host))
    return digest.hexdigest()


def forms_of(model: nn.Module) -> dict[str, Form]:
    """Return the parameters by name, each with what a cast or a move would change in place."""
    return {name: (p, p.dtype, p.shape, p.device) for name, p in model.named_parameters()}


def change_of(before: Form | None, now: Form | None) -> str | None:
    """Return what happened to a parameter since fit() or load(), or None; its numbers do not count."""
    if before is None:
        return "is new in the model"
    if now is None:
        return "is no longer in the model"
    for old, new in zip(before[1:], now[1:], strict=True):
        if old != new:
            old, new = (tuple(x) if isinstance(x, torch.Size) else x for x in (old, new))
            return f"was {old} when it was fitted and is {new} now"
    return None if before[0] is now[0] else "is another parameter than the one that was fitted"


def tensors_of(batch: object) -> list[Tensor]:
    """Return all tensors in tuples, lists and dictionaries, these by name: the order of filling them is chance."""
    if isinstance(batch, Mapping):
        batch = [batch[key] for key in sorted(batch, key=str)]
    if isinstance(batch, (tuple, list)):
        return [t for part in batch for t in tensors_of(part)]
    return [batch] if isinstance(batch, Tensor) else []


def sample_hashes(tensors: list[Tensor]) -> list[int]:
    """Return 64 bits for every sample, of all tensors along dimension 0."""
    hosts = [t.detach().cpu().contiguous() for t in tensors]
    views = [(f"{t.dtype} {tuple(t.shape[1:])};".encode(), _bytes(t), t[:1].numel() * t.element_size()) for t in hosts]
    hashes = []
    for j in range(len(hosts[0])):
        digest = hashlib.blake2b(digest_size=8)
        for kind, data, size in views:
            digest.update(kind)
            digest.update(data[j * size : (j + 1) * size])
        hashes.append(int.from_bytes(digest.digest(), "little", signed=True))
    return hashes


def _bytes(t: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU, which must outlive it."""
    size = t.numel() * t.element_size()
    return memoryview((ctypes.c_ubyte * size).from_address(t.data_ptr()) if size else b"")
