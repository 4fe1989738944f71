"""The gate's measures on made-up maps with known answers, and by loops over all pairs of pixels."""

import numpy as np
import pytest
import torch

import dnl
from paper import gate

LABEL = torch.tensor([0, 0, 0, 1, 1, 2, 255, 0])


def loops(p_class, label, query):
    """same, other and AUC of a query by loops over the pixels; None where undefined."""
    same, other = [], []
    for i, value in enumerate(p_class):
        if i != query and label[i] != 255:
            (same if label[i] == label[query] else other).append(float(value))
    wins = [(a > b) + (a == b) / 2 for a in same for b in other]
    return [sum(x) / len(x) if x else None for x in (same, other, wins)]


def values(p_class, label, queries):
    found = gate.gate_values(p_class, label, queries)
    return [[None if np.isnan(v) else v for v in row] for row in found.T.tolist()]


def test_perfect_predictions_have_the_area_one():
    hot = 10 * torch.eye(3)[[0, 0, 0, 1, 1, 2, 0, 0]].T  # (3, 8); the pixel of 255 does not count
    queries = torch.tensor([0, 3])
    rows = dnl.class_affinity(hot[None], queries)[0]
    assert values(rows, LABEL, queries) == [[1, 0.5, 1], [1, 0.5, 1]]


def test_a_constant_knows_nothing():
    queries = torch.tensor([0, 4, 7])
    rows = torch.full((3, 8), 0.25)
    assert values(rows, LABEL, queries) == [[0.25, 0.25, 0.5]] * 3


def test_one_class_alone_has_no_area():
    label = torch.tensor([4, 4, 255, 4])
    rows = torch.tensor([[0.9, 0.25, 0.1, 0.75]])
    assert values(rows, label, torch.tensor([0])) == [[0.5, None, None]]


def test_a_pixel_alone_in_its_class_has_no_area():
    rows = torch.tensor([[0.5] * 8])
    assert values(rows, LABEL, torch.tensor([5])) == [[None, 0.5, None]]


def test_a_large_class_has_no_area_above_one():
    label = torch.zeros(30002, dtype=torch.long)
    label[-1] = 1
    rows = (1 - label)[None].float()
    assert values(rows, label, torch.tensor([0])) == [[1, 0, 1]]


@pytest.mark.parametrize("steps", [3, 10**6])
def test_random_rows_against_loops(steps):
    """Few steps: many values are equal."""
    rng = np.random.default_rng(steps)
    label = torch.from_numpy(rng.choice([0, 1, 2, 255], 60))
    queries = torch.from_numpy(np.flatnonzero(label != 255)[:25])
    rows = torch.from_numpy(rng.integers(0, steps, (25, 60)) / steps)
    expected = [loops(row, label, int(q)) for row, q in zip(rows, queries)]
    for got, wanted in zip(values(rows, label, queries), expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-14)


def test_pairs_of_classes_against_loops():
    rng = np.random.default_rng(2)
    label = torch.from_numpy(rng.choice([0, 1, 3, 255], 40)).long()
    queries = torch.from_numpy(np.flatnonzero(label != 255)[::3])
    rows = torch.from_numpy(rng.random((len(queries), 40)))
    expected = torch.zeros(2, 4, 4, dtype=torch.float64)
    for row, query in zip(rows, queries.tolist()):
        for i, value in enumerate(row):
            if i != query and label[i] != 255:
                expected[0, label[query], label[i]] += value
                expected[1, label[query], label[i]] += 1
    found = gate.pair_sums(rows, label, queries, 4)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
