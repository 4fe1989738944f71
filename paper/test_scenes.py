"""The scenes of objects in two parts: what they hold, and that a training can read them."""

import numpy as np
import pytest

import data
from paper import scenes
from runtime import InputError


def test_a_scene_depends_on_split_and_index_alone():
    first, again, other, val = (
        scenes.scene(*key) for key in (("train", 3), ("train", 3), ("train", 4), ("val", 3))
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[0], val[0])


def test_three_objects_each_with_a_sign(monkeypatch):
    """Every class of a scene has drawn its sign, and no plate covers it."""
    drawn = []
    texture = scenes.synthetic.texture

    def spy(kind, h, w, rng):
        drawn.append(kind)
        return texture(kind, h, w, rng)

    monkeypatch.setattr(scenes.synthetic, "texture", spy)
    for index in range(30):
        drawn.clear()
        image, label = scenes.scene("val", index)
        assert image.shape == (112, 112, 3) and label.shape == (112, 112)
        assert image.dtype == label.dtype == np.uint8
        kinds = [scenes.SIGNS[c - 1] for c in np.unique(label) if c]
        assert sorted(kinds) == sorted(drawn[1:]) and len(kinds) == 3  # the ground comes first
        for c in np.unique(label):
            assert c == 0 or (label == c).sum() >= scenes.SIGN**2


def test_a_training_reads_what_is_written(tmp_path, capsys):
    root = tmp_path / "scenes"
    assert scenes.main([str(root), "--train", "3", "--val", "2"]) == 0
    dataset = data.open_dataset("folder", str(root), "val")
    assert tuple(dataset.classes) == scenes.CLASSES and len(dataset) == 2
    for got, want in zip(data.read(dataset, 1), scenes.scene("val", 1)):
        assert np.array_equal(got, want)
    with pytest.raises(InputError, match="exists: name a new folder"):
        scenes.main([str(root)])
    with pytest.raises(InputError, match="--train 0, --val 2: expected 1 or more"):
        scenes.main([str(tmp_path / "none"), "--train", "0", "--val", "2"])
