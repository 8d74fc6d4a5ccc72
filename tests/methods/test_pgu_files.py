"""PGU's file: what it keeps, that damage is noticed, and that it is complete whatever happens to its writer."""

import copy
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from published_pgu import fitted, perceptron, sgd
from torch import nn

from projgrad.methods.pgu import spectra
from projgrad.methods.pgu.pgu import PGU

pytestmark = [pytest.mark.same_without_extension, pytest.mark.filterwarnings("ignore:PGU protects nothing")]


def test_a_saved_cache_is_loaded_with_the_same_bits(tmp_path):
    pgu, x, y = fitted()
    original = copy.deepcopy(pgu.model)
    pgu.forget([x[:5]])
    pgu.step(lambda: (pgu.model(x[:5]), y[:5]))
    pgu.save(tmp_path / "cache")
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "cache").stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it as well
    for model in (original, pgu.model):  # as fitted, and as saved
        again = PGU.load(tmp_path / "cache", model, sgd(model), 0.5, "energy", data=[x[5:9], x[9:]])
        assert again.rule == "energy" and again.cache.n == 35 and again.frozen.keys() == pgu.frozen.keys()
        for name, (U, values) in pgu.cache.spectra.items():
            assert torch.equal(U, again.cache.spectra[name].vectors)
            assert again.bases[name].rank == int(spectra.rank(values[0], 0.5, "energy"))
        again.forget([x[5:7]])
    with pytest.raises(ValueError, match="sample 0 is not among the 33"):
        again.forget([x[:1]])
    pgu.step(lambda: (pgu.model(x[:5]), y[:5]))
    for model in (pgu.model, perceptron(), perceptron(torch.float32)):
        with pytest.raises(ValueError, match="belongs to another model"):
            PGU.load(tmp_path / "cache", model, sgd(model))
    with pytest.raises(ValueError, match="other data: 1 of its 35 samples are not in `data`, 2 of `data`"):
        PGU.load(tmp_path / "cache", original, sgd(original), data=[x[:2], x[6:]])


def refused(path, model):
    """The message with which a file is refused, which must name it."""
    with pytest.raises(ValueError) as caught:
        PGU.load(path, model, sgd(model))
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path):
    """A model and the bytes of its file."""
    pgu, x, _ = fitted()
    pgu.forget([x[:5]]).save(tmp_path / "cache")
    return pgu.model, (tmp_path / "cache").read_bytes()


def test_every_flipped_bit_is_noticed(saved, tmp_path):
    """In every byte of the header, and in bytes all over the file."""
    model, whole = saved
    header = 8 + int.from_bytes(whole[:8], "little")
    others = torch.randint(header, len(whole), (300,)).tolist()
    for place in (*range(header), *others, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(torch.randint(8, ()))
        (tmp_path / "damaged").write_bytes(damaged)
        refused(tmp_path / "damaged", model)


def test_other_damage_is_noticed(saved, tmp_path):
    model, whole = saved
    cuts = [whole[:n] for n in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1)]
    swapped, last = bytearray(whole), whole[-8:]
    k = next(k for k in range(16, len(whole), 8) if whole[-k : 8 - k] != last)
    swapped[-k : 8 - k], swapped[-8:] = last, whole[-k : 8 - k]  # two numbers of the last matrix
    zeroed = whole[:-64] + bytes(64)
    for damaged in (*cuts, whole + b"x", whole + whole, b"x" + whole, swapped, zeroed, whole[::-1]):
        (tmp_path / "damaged").write_bytes(damaged)
        refused(tmp_path / "damaged", model)
    (tmp_path / "damaged").write_bytes(whole)
    PGU.load(tmp_path / "damaged", model, sgd(model))


def test_a_file_that_is_no_cache(saved, tmp_path):
    from safetensors.torch import save_file

    model, _ = saved
    zeros = {"blake2b": "0" * 64}
    for tensors, about in (
        ({"x": torch.ones(2)}, None),
        ({"x": torch.ones(2)}, zeros),
        ({"x": torch.ones(2)}, {"pgu": "[]"}),
        ({"x": torch.ones(2)}, {"pgu": "{"}),
        ({}, {"pgu": '{"format": 3}'} | zeros),
    ):
        save_file(tensors, tmp_path / "other", about)
        refused(tmp_path / "other", model)
    save_file({"x": torch.ones(2)}, tmp_path / "other", {"pgu": '{"format": 1}'})
    assert "saved by an earlier version, without a checksum" in refused(tmp_path / "other", model)
    torch.save(model.state_dict(), tmp_path / "other")
    refused(tmp_path / "other", model)
    with pytest.raises(FileNotFoundError, match="nothing"):
        PGU.load(tmp_path / "nothing", model, sgd(model))
    with pytest.raises(IsADirectoryError):
        PGU.load(tmp_path, model, sgd(model))


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk" / "cache")
    pgu, _, _ = fitted()
    pgu.save(tmp_path / "cache")
    assert (tmp_path / "cache").is_symlink() and not (tmp_path / "disk" / "cache").is_symlink()
    assert sorted(os.listdir(tmp_path / "disk")) == ["cache"]


def test_a_failed_save_leaves_the_last_file(tmp_path, monkeypatch):
    pgu, x, _ = fitted()
    pgu.save(tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()
    pgu.forget([x[:3]])

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        pgu.save(tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_process_killed_while_saving_leaves_a_complete_file(tmp_path):
    """Wherever the process dies, the file is one that was complete."""
    script = textwrap.dedent("""
        import os, sys
        os.environ["OMP_WAIT_POLICY"] = "passive"
        import torch
        from projgrad.methods.pgu.pgu import PGU
        torch.manual_seed(0)
        model, x = torch.nn.Linear(300, 2), torch.randn(64, 300)
        pgu = PGU(model, torch.optim.SGD(model.parameters(), lr=0.1)).fit([x])
        caches = [pgu.cache, pgu.forget([x[:20]]).cache]
        torch.save((model.state_dict(), x), sys.argv[1] + ".model")
        parent = os.getpid()
        while sys.stdin.readline():  # one process for every line
            child = os.fork()
            while child == 0 and os.getppid() == parent:
                caches.reverse()
                pgu.cache = caches[0]
                pgu.save(sys.argv[1])
            if child == 0:
                os._exit(0)
            print(child, flush=True)
            os.waitpid(child, 0)
            print("dead", flush=True)
    """)
    path, model, halfway = tmp_path / "cache", nn.Linear(300, 2), 0
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    parent = subprocess.Popen([sys.executable, "-c", script, path], **pipes)
    try:
        for _ in range(6):
            parent.stdin.write("next\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            while not path.exists() or not list(tmp_path.glob(".cache.*.tmp")):
                assert parent.poll() is None
            os.kill(child, signal.SIGKILL)
            assert parent.stdout.readline() == "dead\n"
            state, x = torch.load(f"{path}.model")
            model.load_state_dict(state)
            n = PGU.load(path, model, sgd(model)).cache.n
            again = PGU.load(path, model, sgd(model), data=[x[64 - n :]])
            assert again.forget([x[30:40]]).cache.n == n - 10 and n in (64, 44)
            left = list(tmp_path.glob(".cache.*.tmp"))
            halfway += len(left)
            for file in left:
                file.unlink()
    finally:
        parent.kill()
        parent.communicate()
    assert halfway
