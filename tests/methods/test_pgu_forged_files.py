"""PGU's file from somebody who means harm: refused in one line, with nothing unpickled, run, reached or overwritten."""

import json
import os
import pickle
import socket
import struct

import pytest
import torch
from published_pgu import fitted, sgd
from safetensors.torch import load_file, save_file

from projgrad.methods.pgu import file as pgu_file
from projgrad.methods.pgu.pgu import PGU

pytestmark = [pytest.mark.same_without_extension, pytest.mark.filterwarnings("ignore:PGU protects nothing")]


@pytest.fixture(autouse=True)
def nothing_is_unpickled_and_no_network_touched(monkeypatch):
    def never(*_, **__):
        raise AssertionError("unpickled, or reached for the network")

    for owner, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
        (socket, "socket"),
        (socket, "create_connection"),
        (socket, "getaddrinfo"),
    ):
        monkeypatch.setattr(owner, name, never)


@pytest.fixture
def saved(tmp_path):
    """A model, the path of its file, the description and the tensors in it."""
    pgu, x, _ = fitted()
    path = tmp_path / "cache"
    pgu.forget([x[:5]]).save(path)
    about, tensors = pgu_file.read(path)
    del about["format"]
    return pgu.model, path, about, tensors


def refused(path, model):
    with pytest.raises(ValueError) as caught:
        PGU.load(path, model, sgd(model))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 500, message
    return message


class Loaded:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_the_fixture_itself(saved):
    """A file that was only written anew is taken."""
    model, path, about, tensors = saved
    pgu_file.write(path, about, tensors)
    PGU.load(path, model, sgd(model))


WRONG = (None, True, -1, 1.5, float("nan"), float("inf"), "x", [], {}, [[]], {"x": 1}, {"../../x": "y"}, 10**30)


@pytest.mark.parametrize("key", ["models", "n", "eps", "views", "arithmetic", "refused", "noise"])
def test_descriptions_of_another_form(saved, key):
    """Nothing else than ValueError comes of it; a number for a number, or nothing refused, may be taken."""
    model, path, about, tensors = saved
    fine = {"eps": (1.5,), "refused": ({},), "noise": ({},)}.get(key, ())
    for wrong in (*WRONG, *([["a", "b"], about["models"][:1], [1, 2]] if key == "models" else ())):
        pgu_file.write(path, about | {key: wrong}, tensors)
        if not any(type(wrong) is type(f) and wrong == f for f in fine) and not (key == "eps" and wrong == 10**30):
            refused(path, model)
    without = {k: v for k, v in about.items() if k != key}
    pgu_file.write(path, without, tensors)
    refused(path, model)
    if key in ("views", "arithmetic", "refused", "noise"):
        for wrong in (*WRONG, [1, "yes"], [0, False], [-1, True], [3, False], [10**30, False], [1, False, 2]):
            name = next(iter(about["views"]))
            pgu_file.write(path, about | {key: about[key] | {name: wrong}}, tensors)
            if key == "noise" and type(wrong) in (int, float) and 0 <= wrong < float("inf"):
                continue
            if (key, wrong) in (("arithmetic", []), ("refused", "x")):
                continue
            refused(path, model)


def changed(t):
    """Tensors that cannot be in the place of one."""
    yield from (
        t.float(),
        t.half(),
        t.to(torch.int64),
        t.bool(),
        t.to(torch.complex64),
        t[None],
        t[..., :-1],
        t[..., :0],
    )
    yield from (
        torch.zeros(()),
        torch.zeros(0),
        t.new_tensor(torch.nan if t.is_floating_point() else 0).expand_as(t),
        -10 - t,
    )


def test_tensors_of_another_form(saved):
    model, path, about, tensors = saved
    for key, t in tensors.items():
        for k, wrong in enumerate(changed(t)):
            if wrong.dtype == t.dtype and wrong.shape == t.shape and key.partition("/")[0] in ("fitted", "vectors"):
                continue  # other numbers: of a model's own weights, and of directions, which are looked at below
            if wrong.dtype == t.dtype and wrong.shape == t.shape and key == "samples":
                continue
            pgu_file.write(path, about, tensors | {key: wrong})
            assert refused(path, model), (key, k)
        if key != "samples":
            pgu_file.write(path, about, {k: v for k, v in tensors.items() if k != key})
            refused(path, model)
        if key.startswith("values"):
            pgu_file.write(path, about, tensors | {key: t.flip(1)})
            refused(path, model)
        if key.startswith("vectors"):
            pgu_file.write(path, about, tensors | {key: torch.full_like(t, torch.inf)})
            refused(path, model)
            pgu_file.write(path, about, tensors | {key: t + 0.1})
            with pytest.raises(ArithmeticError, match="orthonormal only to"):
                PGU.load(path, model, sgd(model))
    name = next(iter(about["views"]))
    for other in (
        "x",
        "fitted",
        "fitted/",
        f"evil/{name}",
        f"fitted/{name}/../../x",
        "fitted/../../../etc/passwd",
        "/x",
    ):
        pgu_file.write(path, about, tensors | {other: torch.ones(2)})
        refused(path, model)


def with_checksum(path, header, body=b""):
    """Write a file of any header with the checksum that belongs to it."""
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    found = pgu_file._checksum(path)
    if found is not None:
        digest = pgu_file._digest(path, found[0])
        with path.open("r+b") as file:
            file.seek(found[0])
            file.write(digest)


def header(pgu, **tensors):
    return json.dumps({"__metadata__": {"pgu": pgu, "blake2b": "0" * 64}, **tensors}, separators=(",", ":")).encode()


def test_headers_of_no_end(saved, tmp_path):
    """Brackets, numbers and sizes that would take the stack or the memory of whoever reads them."""
    model, path, *_ = saved
    huge = {"dtype": "F64", "shape": [1 << 62, 8], "data_offsets": [0, 1 << 62]}
    wide = {"dtype": "F64", "shape": [1 << 40, 0], "data_offsets": [0, 0]}
    for text in (
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 10_000,
        '{"format":2,"n":' + "9" * 10_000 + "}",
        "",
        "null",
        "2",
        '"x"',
    ):
        with_checksum(path, header(text))
        refused(path, model)
    for tensors in ({"x": huge}, {"x": wide}, {"x": huge | {"shape": [-1]}}, {"x": huge | {"dtype": "O"}}, {"x": []}):
        with_checksum(path, header('{"format":2}', **tensors))
        refused(path, model)
    for text in (b"[" * 1000, b"{" * 100_000, b'{"blake2b":"' + b"0" * 64 + b'"}', b"\xff" * 100, b"{}" + b" " * 1000):
        with_checksum(path, text)
        refused(path, model)
    for size in (0, 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        path.write_bytes(struct.pack("<Q", size) + b"{}")
        refused(path, model)
    with path.open("wb") as file:  # a terabyte, of which a block is on the disk
        file.write(struct.pack("<Q", (1 << 40) - 8))
        file.truncate(1 << 40)
    refused(path, model)


def test_pickles(saved, tmp_path):
    model, path, *_ = saved
    trace = tmp_path / "unpickled"
    pickled = pickle.dumps(Loaded(trace))
    for payload in (pickled, b"\x80\x04" + bytes(100), b"PK\x03\x04" + pickled):
        path.write_bytes(payload)
        refused(path, model)
        with_checksum(
            path,
            header('{"format":2}', x={"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]}),
            payload,
        )
        refused(path, model)
        with_checksum(path, header(payload.decode("latin1")))
        refused(path, model)
    assert not trace.exists()


def test_paths_that_are_no_files(saved, tmp_path):
    model, path, *_ = saved
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for name in ("loop", "gone", "pipe", "."):
        with pytest.raises((FileNotFoundError, IsADirectoryError, OSError), match="no cache of PGU"):
            PGU.load(tmp_path / name, model, sgd(model))
    for device in ("/dev/zero", "/dev/null"):  # without end
        with pytest.raises(OSError, match="no cache of PGU"):
            PGU.load(device, model, sgd(model))
    PGU.load(tmp_path / "link", model, sgd(model))


def test_a_checkpoint_of_a_model_and_other_safetensors(saved, tmp_path):
    model, path, about, tensors = saved
    save_file(model.state_dict(), path)
    refused(path, model)
    save_file(tensors, path, {"pgu": json.dumps({"format": 2, **about})})  # without a checksum
    refused(path, model)
    assert load_file(path).keys() == tensors.keys()
