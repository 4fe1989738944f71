"""cache.py: the decoded copy: the same samples, made once, whole or not at all."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import halve, noise, save

import cache
import data
from runtime import InputError


def test_cache_holds_the_same_samples(folder, tmp_path):
    plain, cached = (
        data.open_dataset("folder", folder, "train", c) for c in (None, tmp_path / "cache")
    )
    assert cached.copy.path.stat().st_size == 3 * 30 * 40 * 4
    for i in range(len(plain)):
        assert all(np.array_equal(a, b) for a, b in zip(data.read(plain, i), data.read(cached, i)))
        assert all(
            torch.equal(a, b)
            for a, b in zip(data.sample(plain, 0, 1, i, 24), data.sample(cached, 0, 1, i, 24))
        )
    a, b = (list(data.eval_images(d, 0, 1, 0)) for d in (plain, cached))
    assert all(torch.equal(torch.as_tensor(x[1]), torch.as_tensor(y[1])) for x, y in zip(a, b))


def test_cache_is_made_once_and_again_after_a_change(folder, tmp_path, monkeypatch):
    made, build = [], cache._make
    monkeypatch.setattr(cache, "_make", lambda *a: made.append(a) or build(*a))
    first = data.open_dataset("folder", folder, "val", tmp_path / "cache")
    assert (
        len(made) == 1
        and data.open_dataset("folder", folder, "val", tmp_path / "cache") == first
        and len(made) == 1
    )
    save(folder / "images" / "val" / "a 0.png", noise(30, 40, 77))
    os.utime(folder / "images" / "val" / "a 0.png", (1, 1))
    again = data.open_dataset("folder", folder, "val", tmp_path / "cache")
    assert len(made) == 2 and np.array_equal(data.read(again, 0)[0], noise(30, 40, 77))


def test_half_a_cache_is_none(folder, tmp_path, monkeypatch):
    """A build that fails (wrong file, full disk) leaves nothing that passes for a whole copy."""
    good = (folder / "labels" / "val" / "a 1.png").read_bytes()
    save(folder / "labels" / "val" / "a 1.png", np.full((30, 40), 77, np.uint8))
    with pytest.raises(InputError, match=r"a 1\.png"):
        data.open_dataset("folder", folder, "val", tmp_path / "cache")
    (folder / "labels" / "val" / "a 1.png").write_bytes(good)
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(InputError, match=r"No space left.*make room"):
        data.open_dataset("folder", folder, "val", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.json")) and not list(
        (tmp_path / "cache").glob("*.part")
    )
    monkeypatch.setattr(os, "fsync", fsync)
    assert len(data.open_dataset("folder", folder, "val", tmp_path / "cache").copy.places) == 2


def test_cut_cache_is_made_again(folder, tmp_path):
    first = data.open_dataset("folder", folder, "val", tmp_path / "cache")
    for spoil in (
        lambda: halve(first.copy.path),
        lambda: first.copy.path.with_suffix(".json").write_text("[[0, 30"),
        lambda: first.copy.path.with_suffix(".json").write_text("[]"),
        lambda: first.copy.path.with_suffix(".json").write_text(
            json.dumps([first.copy.places[1], first.copy.places[0]])
        ),
        lambda: first.copy.path.with_suffix(".json").write_text(json.dumps([[0, 60, 40]])),
        lambda: first.copy.path.with_suffix(".json").write_text(
            json.dumps([[0, 30.0, 40], first.copy.places[1]])
        ),
        lambda: first.copy.path.with_suffix(".json").write_text(
            json.dumps([["0", 30, 40], [4800, 30]])
        ),
    ):
        spoil()
        again = data.open_dataset("folder", folder, "val", tmp_path / "cache")
        assert again == first and np.array_equal(data.read(again, 1)[0], noise(30, 40, 1))


def test_whole_cache_may_lie_where_nothing_can_be_written(folder, tmp_path, monkeypatch):
    """The superuser writes everywhere: so the system's calls refuse in its place."""
    first = data.open_dataset("folder", folder, "val", tmp_path / "cache")
    monkeypatch.setattr(
        "builtins.open", lambda *a, **k: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    assert data.open_dataset("folder", folder, "val", tmp_path / "cache") == first
    with pytest.raises(InputError, match=r"--cache .*Read-only file system"):
        data.open_dataset("folder", folder, "train", tmp_path / "cache")


def test_cache_of_synthetic_scenes_is_refused(tmp_path):
    with pytest.raises(InputError, match="synthetic scenes are made in memory: leave --cache out"):
        data.open_dataset("synthetic", None, "train", tmp_path)


def test_cache_of_several_ranks_at_once(folder, tmp_path):
    with ProcessPoolExecutor(4) as pool:
        sets = list(
            pool.map(data.open_dataset, *zip(*[("folder", folder, "val", tmp_path / "cache")] * 4))
        )
    assert all(s == sets[0] for s in sets) and len(list((tmp_path / "cache").glob("*.bin"))) == 1


@pytest.mark.parametrize("plant", ["nested", "pipe", "lock"])
def test_a_planted_index_is_made_again(folder, tmp_path, plant):
    cache = tmp_path / "cache"
    expected = data.open_dataset("folder", folder, "train", cache)
    base = str(expected.copy.path).removesuffix(".bin")
    index = Path(f"{base}.json")
    whole = index.read_text()
    index.unlink()
    if plant == "nested":
        index.write_text("[" * 100_000 + "]" * 100_000)
    elif plant == "pipe":
        os.mkfifo(index)
    else:
        os.unlink(f"{base}.lock")
        os.mkfifo(f"{base}.lock")
    assert data.open_dataset("folder", folder, "train", cache).copy == expected.copy
    assert index.read_text() == whole


def test_a_planted_label_is_a_line(folder, tmp_path):
    dataset = data.open_dataset("folder", folder, "train", tmp_path / "cache")
    raw = bytearray(dataset.copy.path.read_bytes())
    raw[-1] = 77  # the last byte of the last label
    dataset.copy.path.write_bytes(raw)
    data.read(dataset, 0)
    with pytest.raises(InputError, match=r"\.bin: holds labels out of range: remove it"):
        data.read(dataset, 2)
