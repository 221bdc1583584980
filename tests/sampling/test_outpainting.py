"""Windows cover a canvas once, never leave it, always hold something known, and what is known is never overwritten."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sampling.editing import VARIATION_STREAM
from sampling.outpainting import (
    MAX_SIDE_CELLS,
    OUTPAINTING_STREAM,
    Canvas,
    Margins,
    Window,
    fill,
    new_canvas,
    parse_margins,
    plan_windows,
    window_known,
)
from tessera.errors import UserError

SIDES = st.integers(2, 7)
ADDED = st.integers(0, 9)


def images(count: int = 2, height: int = 4, width: int = 6) -> torch.Tensor:
    return torch.arange(1, 1 + count * height * width).reshape(count, height, width)


def known_around(canvas: Canvas, window: Window) -> int:
    return int(window_known(canvas, window)[0].mask.sum())


@settings(max_examples=30)
@given(SIDES, SIDES, st.tuples(ADDED, ADDED, ADDED, ADDED), st.one_of(st.none(), st.integers(1, 6)))
def test_every_new_cell_is_drawn_once_in_a_window_that_knows_all_else(
    height: int, width: int, sides: tuple[int, int, int, int], step: int | None
) -> None:
    margins = Margins(*sides)
    step = None if step is None else min(step, min(height, width) - 1)
    canvas = new_canvas(torch.ones(1, height, width, dtype=torch.int64), margins)
    canvas_height, canvas_width = canvas.known.shape
    assert (canvas_height, canvas_width) == (height + sides[1] + sides[3], width + sides[0] + sides[2])
    for window in plan_windows((height, width), margins, step=step):
        assert 0 <= window.top <= canvas_height - height
        assert 0 <= window.left <= canvas_width - width
        (known,) = window_known(canvas, window)
        assert known.mask.shape == (height, width)
        assert known.mask.any() and not known.mask.all()
        before = canvas.known
        canvas = fill(canvas, window, torch.full((1, height, width), 7))
        (after,) = window_known(canvas, window)
        assert after.mask.all()  # what it draws is just what was not known
        drawn = canvas.known & ~before
        assert int(drawn.sum()) == len(window.rows) * len(window.columns)  # and was drawn by none before
    assert canvas.known.all()


@given(SIDES, SIDES, st.tuples(ADDED, ADDED, ADDED, ADDED))
def test_no_window_draws_more_rows_and_columns_than_a_step_beyond_the_known(
    height: int, width: int, sides: tuple[int, int, int, int]
) -> None:
    step = min(height, width) - 1
    for window in plan_windows((height, width), Margins(*sides), step=step):
        assert min(len(window.rows), len(window.columns)) <= step
        assert len(window.rows) in (height, *range(1, step + 1))
        assert len(window.columns) in (width, *range(1, step + 1))


def test_one_side_is_extended_by_half_a_grid_at_a_time() -> None:
    rows, columns = range(4), range(6)
    assert plan_windows((4, 6), Margins(right=7)) == [
        Window(0, 3, rows, range(6, 9)),
        Window(0, 6, rows, range(9, 12)),
        Window(0, 7, rows, range(12, 13)),  # with five known columns instead of three
    ]
    assert plan_windows((4, 6), Margins(bottom=3)) == [
        Window(2, 0, range(4, 6), columns),
        Window(3, 0, range(6, 7), columns),
    ]
    assert plan_windows((4, 6), Margins(left=4)) == [
        Window(0, 1, rows, range(1, 4)),
        Window(0, 0, rows, range(1)),
    ]
    assert plan_windows((4, 6), Margins(top=3)) == [
        Window(1, 0, range(1, 3), columns),
        Window(0, 0, range(1), columns),
    ]


def test_what_can_see_the_image_is_drawn_first() -> None:
    margins = Margins(left=2, top=1, right=2, bottom=1)
    order = []
    for window in plan_windows((4, 6), margins):
        if window.rows.stop <= 1:
            order.append("top")
        elif window.columns.stop <= 2:
            order.append("left")
        else:
            order.append("bottom" if window.rows.start >= 5 else "right")
    assert list(dict.fromkeys(order)) == ["right", "bottom", "left", "top"]


def test_a_strip_is_drawn_to_the_right_or_downward() -> None:
    right_and_bottom = plan_windows((4, 6), Margins(right=5, bottom=1))
    assert right_and_bottom[2:] == [
        Window(1, 0, range(4, 5), range(6)),
        Window(1, 3, range(4, 5), range(6, 9)),
        Window(1, 5, range(4, 5), range(9, 11)),
    ]
    left_and_bottom = plan_windows((4, 6), Margins(left=1, bottom=3))
    assert left_and_bottom[2:] == [
        Window(0, 0, range(4), range(1)),
        Window(2, 0, range(4, 6), range(1)),
        Window(3, 0, range(6, 7), range(1)),
    ]


def test_a_smaller_step_lets_every_window_know_more() -> None:
    known = {}
    for step in (1, 3):
        canvas = new_canvas(images(), Margins(right=6, bottom=4))
        counts = []
        for window in plan_windows((4, 6), Margins(right=6, bottom=4), step=step):
            counts.append(known_around(canvas, window))
            canvas = fill(canvas, window, images())
        known[step] = min(counts)
    assert known == {1: 3 * 6, 3: 6}


def test_no_margins_need_no_windows() -> None:
    assert plan_windows((4, 6), Margins()) == []


@pytest.mark.parametrize(
    ("grid", "margins", "step", "message"),
    [
        ((1, 6), Margins(right=1), None, "grid of 1x6 cells cannot slide"),
        ((4, 6), Margins(top=-1), None, "margin top is -1 cells"),
        ((4, 6), Margins(right=MAX_SIDE_CELLS), None, f"canvas of 4x{MAX_SIDE_CELLS + 6} cells, expected at most"),
        ((4, 6), Margins(right=10**30), None, "expected at most"),
        ((4, 6), Margins(right=1), 0, "step is 0 cells, expected 1 to 3"),
        ((4, 6), Margins(right=1), 4, "step is 4 cells, expected 1 to 3"),
    ],
)
def test_plans_that_cannot_be_are_refused(
    grid: tuple[int, int], margins: Margins, step: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_windows(grid, margins, step=step)


def test_the_images_lie_at_their_place_on_the_canvas() -> None:
    canvas = new_canvas(images(), Margins(left=2, top=1, right=3))
    assert canvas.codes.shape == (2, 5, 11)
    assert torch.equal(canvas.codes[:, 1:, 2:8], images())
    assert int(canvas.known.sum()) == 24 and bool(canvas.known[1:, 2:8].all())


def test_a_window_shows_the_codes_of_every_image_under_it() -> None:
    canvas = new_canvas(images(), Margins(right=3))
    (window,) = plan_windows((4, 6), Margins(right=3))
    for known, codes in zip(window_known(canvas, window), images(), strict=True):
        assert torch.equal(known.codes[:, :3], codes[:, 3:])
        assert known.mask.tolist() == [[True] * 3 + [False] * 3] * 4


def test_filling_takes_the_drawn_cells_only_and_changes_no_other_canvas() -> None:
    canvas = new_canvas(images(), Margins(right=3))
    (window,) = plan_windows((4, 6), Margins(right=3))
    filled = fill(canvas, window, torch.full((2, 4, 6), 99))
    assert torch.equal(filled.codes[:, :, :6], images())
    assert bool((filled.codes[:, :, 6:] == 99).all()) and bool(filled.known.all())
    assert not canvas.codes[:, :, 6:].any() and not canvas.known[:, 6:].any()


def test_codes_of_another_shape_are_refused() -> None:
    canvas = new_canvas(images(), Margins(right=3))
    (window,) = plan_windows((4, 6), Margins(right=3))
    with pytest.raises(UserError, match=r"\(1, 4, 6\), expected \(2, 4, 6\)"):
        fill(canvas, window, images(1))
    for codes in (images()[0], images().float()):
        with pytest.raises(UserError, match=r"expected integers \[n, h, w\]"):
            new_canvas(codes, Margins(right=1))


def test_streams_of_windows_are_those_of_no_other_purpose() -> None:
    assert OUTPAINTING_STREAM > VARIATION_STREAM > 0


@pytest.mark.parametrize(
    ("text", "margins"),
    [
        ("right=4,bottom=2", Margins(right=4, bottom=2)),
        (" left = 1 , top=0", Margins(left=1)),
        ("left=1,top=2,right=3,bottom=4", Margins(1, 2, 3, 4)),
    ],
)
def test_margins_are_read_from_text(text: str, margins: Margins) -> None:
    assert parse_margins(text) == margins


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read margin ''"),
        ("right", "cannot read margin 'right'"),
        ("right=4,", "cannot read margin ''"),
        ("up=4", "cannot read margin 'up=4': expected left, top, right or bottom"),
        ("right=-1", "cannot read margin 'right=-1'"),
        ("right=1.5", "cannot read margin"),
        ("right=\u0663", "cannot read margin"),
        ("right=" + "9" * 5000, "cannot read margin"),
        ("right=1,right=2", "margin right is given twice"),
        ("left=0,right=0", "add nothing"),
    ],
)
def test_margins_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_margins(text)
