"""Every way to K and to the projection gives the truth on a small model, and says what it needs."""

import importlib.util

import pytest
import torch

from bench.features import FEATURES
from bench.support import truth
from projgrad.experiments.benchmark.peers import PEERS
from projgrad.methods import projectors

pytestmark = pytest.mark.same_without_extension


def per_tensor(job):
    """The forget gradient without the span of the retain gradients, tensor by tensor."""
    params, losses = list(job.model.parameters()), job.retain()
    rows = zip(*(torch.autograd.grad(loss, params, retain_graph=True) for loss in losses), strict=True)
    u = torch.autograd.grad(job.forget(), params)
    pairs = zip(u, (torch.stack(G).flatten(1) for G in rows), strict=True)
    return torch.cat([projectors.lstsq(part.flatten(), G) for part, G in pairs])


@pytest.mark.parametrize("name", [name for name in PEERS if name != "plain"])
@pytest.mark.parametrize("feature", ["linear", "conv2d"])
def test_K_and_the_projection_of_every_peer_are_the_truth(name, feature):
    peer = PEERS[name]
    if peer.module:
        pytest.importorskip(peer.module)
    K, projected = truth(FEATURES[feature].job())
    call = peer.start(FEATURES[feature].job())
    for _ in range(2):  # nothing is left over from the first call
        torch.testing.assert_close(call(), K)
    if peer.scope == "per_tensor":
        projected = per_tensor(FEATURES[feature].job())
    call = peer.project(FEATURES[feature].job())
    for _ in range(2):
        torch.testing.assert_close(call(), projected)


def test_the_floor_computes_both_batches_and_projects_nothing():
    job = FEATURES["linear"].job()
    peer = PEERS["plain"]
    assert peer.scope == ""
    torch.testing.assert_close(peer.start(job)(), job.retain().detach())
    params = list(job.model.parameters())
    both = torch.autograd.grad(job.forget() + job.retain().mean(), params)
    torch.testing.assert_close(peer.project(job)(), torch.cat([g.flatten() for g in both]))


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.module])
def test_a_missing_package_is_named_with_what_installs_it(name, monkeypatch):
    peer = PEERS[name]
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    assert peer.missing() == f"{peer.module} is not installed: pip install '{peer.package}'"
    for begin in (peer.start, peer.project):
        with pytest.raises(ModuleNotFoundError, match=peer.package.partition(">")[0]):
            begin(FEATURES["linear"].job())


def test_what_torch_has_is_not_missing():
    assert all(peer.missing() is None for peer in PEERS.values() if not peer.module)


def test_closures_are_enough_where_a_peer_says_so():
    class Closures:
        def __init__(self):
            whole = FEATURES["linear"].job()
            self.model, self.optimizer, self.forget, self.retain = (
                whole.model,
                whole.optimizer,
                whole.forget,
                whole.retain,
            )

    for peer in PEERS.values():
        if peer.module:
            continue
        if peer.needs_samples:
            with pytest.raises(TypeError, match="needs the samples"):
                peer.start(Closures())
        else:
            assert peer.project(Closures())().isfinite().all()


def test_torchjd_takes_K_of_the_model_with_two_weights_where_two_modules_share_one():
    """As docs/support.md says; where this fails, TorchJD has learnt it, and the matrix is out of date."""
    pytest.importorskip("torchjd")
    K = PEERS["torchjd"].start(FEATURES["tied embedding"].job())()
    job = FEATURES["tied embedding"].job()
    head = job.model[-1]
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    torch.testing.assert_close(K, truth(job)[0])
