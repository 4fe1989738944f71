"""How well P_class knows whether two pixels are of one class: means and the area under ROC.

GR multiplies a map by P_class, so this is its gate: it should be open between pixels of one class
and closed between classes (Section III-D). Here, for a query pixel of class c and its row of
P_class, over the other pixels of a known label:

    same    mean over the pixels of class c                     1: all pass
    other   mean over the pixels of other classes               0: all are stopped
    AUC     share of (pixel of c, pixel of another class) in which the first has the larger value,
            a tie counting half                                 0.5: the gate knows nothing

A mean over no pixel is NaN, and so is the AUC if either group is empty. P_class is in fp32, as in
the network. It is 1 for all logits above 17: such values are equal here, because they are equal to
GR.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from classes import IGNORE

GATE = ("same", "other", "AUC")


def gate_values(p_class: Tensor, label: Tensor, queries: Tensor) -> Tensor:
    """The mean over the same class, over others, and the AUC of each query, (3, R) float64.

    p_class (R, N) 0..1, its rows; label (N,); queries (R,) indices of the rows' pixels.
    """
    rows = p_class.double()
    same, other = pairs(label, queries)
    n_same = same.sum(1).double()
    n_other = other.sum(1).double()
    same_mean = (rows * same).sum(1) / n_same
    other_mean = (rows * other).sum(1) / n_other
    # The Mann-Whitney statistic. Equal values share the mean of their ranks.
    known = same | other
    ranked = rows.masked_fill(~known, torch.inf).sort(1).values  # the unknown come last
    below = torch.searchsorted(ranked, rows)
    at_most = torch.searchsorted(ranked, rows, right=True)
    ranks = (below + at_most + 1).double() / 2
    wins = (ranks * same).sum(1) - n_same * (n_same + 1) / 2
    auc = wins / (n_same * n_other)
    return torch.stack([same_mean, other_mean, auc])


def pairs(label: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a query and a pixel are of one class, and of two, each (R, N) bool.

    False in both for a pixel with itself, and for label 255.
    """
    same = label == label[queries, None]
    other = ~same & (label != IGNORE)
    same[torch.arange(len(queries)), queries] = False
    return same, other


def pair_sums(p_class: Tensor, label: Tensor, queries: Tensor, n: int) -> Tensor:
    """For each pair of classes: the sum of P_class and the number of pairs of pixels.

    (2, n, n) float64, rows of the query's class. Arguments as in `gate_values`; n: all classes.
    """
    same, other = pairs(label, queries)
    known = (same | other).double()
    known_label = label.masked_fill(label == IGNORE, 0)
    onehot = F.one_hot(known_label, n).double()  # (N, n)
    sums = torch.zeros(2, n, n, dtype=torch.float64)
    for part, values in zip(sums, (p_class.double() * known, known)):
        part.index_add_(0, label[queries], values @ onehot)
    return sums
