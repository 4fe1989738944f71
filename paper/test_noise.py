"""The noise of made-up maps with known answers, of loops, and of a whole tiny checkpoint."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import classes
import data
import dnl
import synthetic
from checkpoint import VERSION
from paper import noise
from paper.test_gate import loops as gate_loops
from runtime import InputError


def checkpoint(path, **changes):
    """Write a checkpoint as train.py does, of a small network with random weights.

    The weights of its context are so large that the maps are uneven.
    """
    torch.manual_seed(3)
    config = replace(dnl.PAPER, num_classes=8, backbone="resnet18", channels=16, **changes)
    net = dnl.build(config)
    for name, weight in net.named_parameters():
        if name.startswith("context."):
            torch.nn.init.normal_(weight)
    torch.save(
        {
            "version": VERSION,
            "model": net.state_dict(),
            "config": asdict(config),
            "data": "synthetic",
            "root": None,
            "classes": list(synthetic.CLASSES),
            "colors": [list(c) for c in classes.palette(8)],
            "amp": "off",
        },
        path,
    )
    return net.eval()


def loops(row, label, c):
    """DESIGN section 6 by loops over the pixels: (inter, intra), None where undefined."""
    known = [(float(a), int(i)) for a, i in zip(row, label) if i != 255]
    total, own = sum(a for a, _ in known), [a for a, i in known if i == c]
    inter = sum(a for a, i in known if i != c) / total if total else None
    if len(own) < 2 or not sum(own):
        return inter, None
    entropy = -sum(a / sum(own) * math.log(a / sum(own)) for a in own if a)
    return inter, 1 - entropy / math.log(len(own))


LABEL = torch.tensor([0, 0, 0, 1, 1, 2, 255, 0])


@pytest.mark.parametrize(
    "row, inter, intra",
    [
        ([1, 1, 1, 1, 1, 1, 9, 1], 3 / 7, 0),  # uniform: the share outside; 255 counts for nothing
        ([0.25, 0.25, 0.25, 0, 0, 0, 0, 0.25], 0, 0),  # even within the class
        ([0, 0, 5, 0, 0, 0, 0, 0], 0, 1),  # one pixel
        ([0, 0, 0, 0.5, 0.2, 0.3, 0, 0], 1, None),  # all mass outside
        ([2, 2, 0, 1, 0, 0, 0, 0], 1 / 5, 1 / 2),  # two of four pixels: log 2 / log 4
        ([0, 0, 0, 0, 0, 0, 1, 0], None, None),  # nothing on a known pixel
    ],
)
def test_made_up_maps(row, inter, intra):
    rows, classes = torch.tensor([row], dtype=torch.float64), torch.tensor([0])
    for value, expected in (
        (noise.inter_class(rows, LABEL, classes), inter),
        (noise.intra_class(rows, LABEL, classes), intra),
    ):
        assert (
            value.isnan().all()
            if expected is None
            else value.item() == pytest.approx(expected, abs=1e-14)
        )


def test_class_of_one_pixel_has_no_intra_noise():
    assert noise.intra_class(torch.ones(1, 8), LABEL, torch.tensor([2])).isnan().all()


def test_random_rows_against_loops():
    rng = np.random.default_rng(0)
    rows, label = (
        torch.from_numpy(rng.random((30, 50)) ** 4),
        torch.from_numpy(rng.choice([0, 1, 2, 255], 50)),
    )
    classes = torch.from_numpy(rng.integers(0, 3, 30))
    expected = torch.tensor(
        [loops(r, label, c) for r, c in zip(rows, classes)], dtype=torch.float64
    )
    torch.testing.assert_close(
        noise.inter_class(rows, label, classes), expected[:, 0], rtol=0, atol=1e-13
    )
    torch.testing.assert_close(
        noise.intra_class(7 * rows, label, classes), expected[:, 1], rtol=0, atol=1e-13
    )


def test_labels_lie_where_the_corners_align():
    label = torch.arange(35).view(5, 7)
    assert noise.labels_at(label, (3, 4)).tolist() == [0, 2, 4, 6, 14, 16, 18, 20, 28, 30, 32, 34]
    assert noise.labels_at(label, (1, 1)).tolist() == [0]
    assert noise.labels_at(label, (5, 7)).tolist() == list(range(35))


def test_queries_are_even_over_classes():
    label = np.repeat([0, 1, 2, 255], [500, 300, 3, 40])
    drawn = noise.sample_queries(label, 43, np.random.default_rng(1))
    assert len(set(drawn.tolist())) == 43
    assert np.bincount(label[drawn], minlength=3).tolist() == [
        20,
        20,
        3,
    ]  # the small class is used up
    assert set(noise.sample_queries(label, 9999, np.random.default_rng(1))) == set(range(803))
    assert not np.array_equal(drawn, noise.sample_queries(label, 43, np.random.default_rng(2)))
    assert len(noise.sample_queries(np.full(5, 255), 4, np.random.default_rng(0))) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"p_from": "res3", "deep_stem": True, "aux_conv": True},
        {"context": "nl"},
        {"lr": False},
    ],
)
def test_whole_checkpoint_against_loops(tmp_path, monkeypatch, capsys, changes):
    monkeypatch.setitem(synthetic.SIZES, "val", 2)
    net = checkpoint(tmp_path / "c.pt", **changes)
    sums = {}
    for index in range(2):
        image, label = synthetic.scene("val", index)
        x = data.normalize(torch.from_numpy(image).permute(2, 0, 1)[None])
        with torch.no_grad():
            f, p = net.features(x)[3:]
            q, k, _, p = net.context.inputs(f, p)
            # of all 80 pixels, which are fewer than the 100 queries asked for
            maps = dnl.denoised_maps(q, k, p, (8, 10), net.context.kernel)
            p_class = None if p is None else dnl.class_affinity(p)[0]
        small = [label[round(i * 127 / 7), round(j * 159 / 9)] for i in range(8) for j in range(10)]
        for m, a in enumerate(maps):
            for j, c in enumerate(small):
                for kind, value in enumerate(loops(a[0, j].double(), small, c)):
                    if value is not None:
                        sums.setdefault((kind * 3 + m, int(c)), []).append(value)
        for j, c in enumerate(small):
            values = [] if p_class is None else gate_loops(p_class[j], small, j)
            for m, value in enumerate(values, 6):
                if value is not None:
                    sums.setdefault((m, int(c)), []).append(value)
    assert noise.main([str(tmp_path / "c.pt"), "--queries", "100", "--workers", "0", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    got = json.loads(lines[-1])
    measures = got["measures"]
    assert list(measures) == list(noise.MEASURES)
    for m, (name, part) in enumerate(measures.items()):
        means = {c: sum(v) / len(v) for (a, c), v in sums.items() if a == m}
        mean = sum(means.values()) / len(means) if means else None
        assert part["mean"] == pytest.approx(mean, abs=1e-5), name
        for c, title in enumerate(synthetic.CLASSES):
            assert part["classes"][title] == pytest.approx(means.get(c), abs=1e-5)
            assert part["queries"][title] == len(sums.get((m, c), []))
    shown = [None if v == "-" else float(v) for v in lines[-2].split()[2:]]
    assert lines[-2].split()[0] == "mean"
    assert shown == pytest.approx([part["mean"] for part in measures.values()], abs=5.1e-5)
    same = [
        measures[f"inter {a}"] == measures[f"inter {b}"] for a, b in (("A", "A'"), ("A'", "A''"))
    ]
    assert tuple(same) == (changes.get("context") == "nl", bool({"context", "lr"} & changes.keys()))


def test_sampled_queries_are_a_function_of_the_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(synthetic.SIZES, "val", 2)
    checkpoint(tmp_path / "c.pt")
    outputs = []
    for seed in ("0", "0", "1"):
        noise.main([str(tmp_path / "c.pt"), "--queries", "9", "--workers", "0", "--seed", seed])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_wrong_input_is_one_clear_line(tmp_path):
    checkpoint(tmp_path / "none.pt", context="none")
    with pytest.raises(
        InputError,
        match=r"none\.pt: context 'none' has no attention maps .* --context dnl or nl",
    ):
        noise.main([str(tmp_path / "none.pt")])
    with pytest.raises(InputError, match="--queries must be 1 or more"):
        noise.main(["x.pt", "--queries", "0"])


def test_a_label_off_the_grid_of_f_is_no_query(tmp_path, monkeypatch):
    net, dataset = checkpoint(tmp_path / "c.pt"), data.open_dataset("synthetic", None, "val")
    label = torch.full((128, 160), 255, dtype=torch.uint8)
    label[5:9, 5:9] = 1
    images = [(0, torch.zeros(3, 128, 160, dtype=torch.uint8), label)]
    monkeypatch.setattr(noise, "eval_images", lambda *a: images)
    found = noise.measure(net, dataset, queries=4, seed=0, device=torch.device("cpu"))
    assert found.means.isnan().all() and not found.counts.any()


def test_features_that_are_not_finite_are_a_line(tmp_path, monkeypatch):
    net, dataset = checkpoint(tmp_path / "c.pt"), data.open_dataset("synthetic", None, "val")
    net.down.bn2.weight.data.fill_(torch.inf)
    with pytest.raises(InputError, match="not finite"):
        noise.measure(net, dataset, queries=4, seed=0, device=torch.device("cpu"))


def test_an_image_without_a_label_has_no_query(tmp_path, monkeypatch):
    net, dataset = checkpoint(tmp_path / "c.pt"), data.open_dataset("synthetic", None, "val")
    images = [
        (i, torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(label))
        for i, (image, label) in enumerate(map(synthetic.scene, ("val", "val"), (0, 1)))
    ]
    options = {"queries": 4, "seed": 0, "device": torch.device("cpu")}
    monkeypatch.setattr(noise, "eval_images", lambda *a: [images[0]])
    alone = noise.measure(net, dataset, **options)
    monkeypatch.setattr(
        noise,
        "eval_images",
        lambda *a: [images[0], (1, images[1][1], torch.full_like(images[1][2], 255))],
    )
    both = noise.measure(net, dataset, **options)
    for a, b in zip(vars(alone).values(), vars(both).values()):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
