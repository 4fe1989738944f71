"""pictures.py: overlays, legends, letters, the picture of a confusion matrix."""

import numpy as np
import pytest
import torch
from PIL import Image

import pictures
from classes import ADE20K
from synthetic import CLASSES


@pytest.mark.parametrize("size", [10, 14, 24])
def test_titles_are_cut_to_their_picture(size):
    font = pictures.load_font(size)
    for text in ("", "short", "a very long name of a checkpoint in a folder, best.pt"):
        cut = pictures.shorten(text, font, 120)
        assert font.getlength(cut) <= 120
        assert cut == text or (cut.endswith("...") and text.startswith(cut[:-3]))
    row = [[Image.new("RGB", (50, 50))] * 2]
    long = pictures.sheet(row, ("x" * 300, "b"), ("c" * 300, "d"), ((1, 2, 3), (4, 5, 6)), 150)
    assert (
        long.size
        == pictures.sheet(row, ("x" * 200, "b"), ("c" * 200, "d"), ((1, 2, 3), (4, 5, 6)), 150).size
    )
    second = np.asarray(long)[:22, 6 + 150 :]  # the gap, and the second title
    assert (second[:, :6] == 255).all() and (second < 128).any()


def test_an_overlay_keeps_the_shape_of_a_tall_photograph():
    """Up to 2048 pixels are not squeezed: the lowest row of the picture is the photograph's."""
    image, ids = torch.zeros(1900, 300, 3, dtype=torch.uint8), np.zeros((1900, 300), np.uint8)
    image[-1] = 250
    picture = np.asarray(pictures.overlay(image.numpy(), "t", ids, ["a"], [[0, 0, 0]])).astype(int)
    (bright,) = (abs(picture[:, 100] - 162.5) < 1).all(1).nonzero()
    assert len(bright) == 1 and (picture[bright[0] - 1899 : bright[0], 100] == 0).all()


def test_letters_are_legible_when_a_sheet_is_1000_pixels_wide():
    for width in (500, 990, 2400, 9000):
        cell = Image.new("RGB", (9, 9))
        out = pictures.sheet([[cell]], ["H"], ["H"], [(255, 255, 255)], width, "H")
        title = np.asarray(out.convert("L"))[: pictures.line_height(pictures.text_size(width))]
        ink = (title < 128).any(1).sum()
        assert ink * 1000 / max(1000, out.width) > 9
    assert pictures.line_height(14) == 22


def test_the_legend_names_ignored_pixels_only_where_they_are_shown():
    classes, colors = ("a", "b"), ((1, 2, 3), (4, 5, 6))
    masks = [np.uint8([[0, 1]]), np.uint8([[1, 255]])]
    named = pictures.with_ignored(classes, colors, masks)
    assert named == (["a", "b", "(ignored)"], [*colors, (0, 0, 0)])
    assert pictures.with_ignored(classes, colors, masks[:1]) == (classes, colors)


def test_cells_of_a_confusion_matrix_have_the_colours_of_their_shares():
    """The scale names shares whose square roots are 0, 1/4, 1/2, 3/4 and 1."""
    matrix = np.array([[9, 4, 1, 2], [0, 0, 0, 0], [0, 0, 7, 0], [1, 0, 0, 10**9]])
    share = matrix / matrix.sum(1, keepdims=True).clip(1)
    share[1] = np.nan
    cells = pictures.matrix_cells(share, np.sqrt(share), 40, pictures.load_font(14))
    got = np.asarray(cells)[4::40, 4::40]
    assert got[0, :3].tolist() == [list(pictures.HEAT[i]) for i in (3, 2, 1)]
    assert (got[1] == 255).all()  # no pixel of that class
    assert got[2].tolist() == [list(pictures.HEAT[i]) for i in (0, 0, 4, 0)]
    assert (got[3, 0] == pictures.HEAT[0]).all() and (got[3, 3] == pictures.HEAT[4]).all()
    assert np.ptp(got, axis=2).any() and cells.size == (160, 160)
    small = pictures.matrix_cells(share, np.sqrt(share), 14, pictures.load_font(12))
    assert np.array_equal(np.asarray(small)[4::14, 4::14], got)


def test_a_class_without_pixels_has_a_white_row():
    matrix = np.array([[3, 1], [0, 0]])
    out = np.asarray(pictures.confusion_picture(matrix, ("a", "b")))
    bright = (out == pictures.HEAT[2]).all(2)  # 1 of 4
    top, left = bright.any(1).argmax(), bright.any(0).argmax()
    assert (out[top + 60 : top + 110, left : left + 50] == 255).all()


@pytest.mark.parametrize("classes", [("road",), CLASSES, ADE20K])
def test_a_confusion_matrix_names_each_row_and_column(classes):
    n = len(classes)
    side = 14 if n > 64 else 56
    out = pictures.confusion_picture(np.eye(n, dtype=np.int64), classes)
    ink = np.asarray(out.convert("L")) < 128
    bright = (np.asarray(out) == pictures.HEAT[4]).all(2)  # the diagonal, and the legend
    top, left = bright.any(1).argmax(), bright[: out.height - 60].any(0).argmax()
    bottom, right = top + n * side, left + n * side
    for i in range(n):  # close to the cells, on each side
        row = slice(top + i * side, top + (i + 1) * side)
        column = slice(left + i * side, left + (i + 1) * side)
        assert ink[row, left - 12 : left].any() and ink[row, right : right + 12].any()
        assert ink[top - 12 : top, column].any() and ink[bottom : bottom + 12, column].any()
        assert bright[row, column].mean() > 0.5
