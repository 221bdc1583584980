"""The masks say what the paper's figure says, and gradients confirm that nothing later leaks in."""

from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from tessera.errors import UserError
from transformer.masks import AttentionMask, ConvMode, MaskKind, layer_kinds
from transformer.model import Prior, PriorConfig, SequenceLayout

KINDS: tuple[MaskKind, ...] = get_args(MaskKind)
GRIDS = [(4, 4), (7, 5), (1, 9), (3, 2)]
KERNELS = (1, 3, 5, 11)  # the largest is wider than every grid


def mask_of(
    kind: MaskKind, *, text_len: int = 3, grid: tuple[int, int] = (4, 4), kernel_size: int = 3
) -> AttentionMask:
    return AttentionMask(kind=kind, text_len=text_len, grid_height=grid[0], grid_width=grid[1], kernel_size=kernel_size)


def masks_of_all_modes(*, text_len: int, grid: tuple[int, int]) -> Iterator[AttentionMask]:
    """Every kind and mode, every kernel, dense and dilated."""
    sizes = {"text_len": text_len, "grid_height": grid[0], "grid_width": grid[1]}
    yield AttentionMask(kind="full", **sizes)
    yield AttentionMask(kind="row", row_mode="window", **sizes)
    yield AttentionMask(kind="row", row_mode="own_row", **sizes)
    yield AttentionMask(kind="column", **sizes)
    for mode, kernel_size, dilation in product(get_args(ConvMode), (2, *KERNELS), (1, 2)):
        if mode == "quadrant" or kernel_size % 2:
            yield AttentionMask(kind="conv", conv_mode=mode, kernel_size=kernel_size, dilation=dilation, **sizes)


def image_keys(kind: MaskKind, query: int, **options: int) -> list[int]:
    mask = mask_of(kind, **options)  # type: ignore[arg-type]
    row = mask.dense()[mask.text_len + query, mask.text_len :]
    return row.nonzero().flatten().tolist()


def image_keys_by_definition(mask: AttentionMask, query: int) -> set[int]:
    """The image positions that one image position sees, offset by offset as the modes are defined."""
    height, width = mask.grid_height, mask.grid_width
    row, column = divmod(query, width)
    keys: set[int] = set()
    if mask.kind == "full":
        keys.update(range(query + 1))
    elif mask.kind == "row":
        first = query - width if mask.row_mode == "window" else row * width
        keys.update(range(max(0, first), query + 1))
    elif mask.kind == "column":
        keys.update(above * width + column for above in range(row + 1))
    elif mask.conv_mode == "quadrant":  # the window of a convolution whose input is padded above and to the left only
        for up, left in product(range(mask.kernel_size), repeat=2):
            key_row, key_column = row - up * mask.dilation, column - left * mask.dilation
            if key_row >= 0 and key_column >= 0:
                keys.add(key_row * width + key_column)
    else:
        half = mask.kernel_size // 2
        for up, right in product(range(-half, half + 1), repeat=2):
            if mask.conv_mode == "raster":
                keys.add(query - mask.dilation * (up * width - right))
                continue
            key_row, key_column = row - up * mask.dilation, column + right * mask.dilation
            if mask.conv_mode == "torus":
                key_row, key_column = key_row % height, key_column % width
            if 0 <= key_row < height and 0 <= key_column < width:
                keys.add(key_row * width + key_column)
    return {key for key in keys if 0 <= key <= query}


def test_row_reaches_back_to_the_position_above() -> None:
    assert image_keys("row", 10) == [6, 7, 8, 9, 10]


def test_column_sees_its_own_column_only() -> None:
    assert image_keys("column", 10) == [2, 6, 10]


def test_conv_sees_the_causal_half_of_its_window() -> None:
    assert image_keys("conv", 10) == [5, 6, 7, 9, 10]


def test_conv_wraps_in_raster_order_at_the_left_edge() -> None:
    # position 8 opens row 2: its left neighbor in raster order is position 7, the end of the row above
    assert image_keys("conv", 8) == [3, 4, 5, 7, 8]


def test_full_is_plain_causality() -> None:
    assert image_keys("full", 5) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_position_sees_all_text_and_text_sees_no_image(kind: MaskKind) -> None:
    dense = mask_of(kind).dense()
    assert dense[3:, :3].all()
    assert not dense[:3, 3:].any()
    assert torch.equal(dense[:3, :3], torch.ones(3, 3, dtype=torch.bool).tril())


@pytest.mark.parametrize("grid", GRIDS)
def test_image_positions_see_what_the_definitions_enumerate(grid: tuple[int, int]) -> None:
    for mask in masks_of_all_modes(text_len=3, grid=grid):
        expected = torch.zeros(mask.image_len, mask.image_len, dtype=torch.bool)
        for query in range(mask.image_len):
            expected[query, sorted(image_keys_by_definition(mask, query))] = True
        assert torch.equal(mask.dense()[3:, 3:], expected), mask


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("text_len", [0, 1, 5])
def test_masks_are_causal_and_see_themselves(text_len: int, grid: tuple[int, int]) -> None:
    for mask in masks_of_all_modes(text_len=text_len, grid=grid):
        dense = mask.dense()
        assert dense.shape == (mask.seq_len, mask.seq_len)
        assert dense.diagonal().all(), mask
        assert not dense.triu(1).any(), mask


def test_convolutions_differ_at_the_edges_alone() -> None:
    modes: tuple[ConvMode, ...] = ("raster", "clip", "torus")
    masks = [
        AttentionMask(kind="conv", text_len=0, grid_height=9, grid_width=9, kernel_size=3, conv_mode=mode)
        for mode in modes
    ]
    inside = 4 * 9 + 4
    raster, clip, torus = (mask.dense() for mask in masks)
    assert torch.equal(raster[inside], clip[inside])
    assert torch.equal(torus[inside], clip[inside])
    assert not torch.equal(raster, clip)
    assert not torch.equal(torus, clip)
    assert not torch.equal(torus, raster)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_reach_is_the_largest_distance_to_a_visible_position(grid: tuple[int, int]) -> None:
    for mask in masks_of_all_modes(text_len=3, grid=grid):
        largest = max(query - key for query in range(mask.image_len) for key in image_keys_by_definition(mask, query))
        assert mask.reach == largest, mask


# Shares of the causal pairs as published with the analysis of these masks, in percent to one decimal.
@pytest.mark.parametrize(
    ("text_len", "side", "options", "percent"),
    [
        (256, 32, {"kind": "row"}, 40.0),
        (256, 32, {"kind": "column"}, 38.0),
        (256, 32, {"kind": "conv"}, 43.0),
        (64, 32, {"kind": "row"}, 17.0),
        (64, 32, {"kind": "row", "row_mode": "own_row"}, 14.3),
        (64, 32, {"kind": "column"}, 14.3),
        (64, 32, {"kind": "conv"}, 21.1),
        (64, 32, {"kind": "conv", "conv_mode": "clip"}, 20.3),
        (64, 32, {"kind": "conv", "conv_mode": "quadrant"}, 26.3),
        (64, 64, {"kind": "row"}, 6.1),
        (64, 64, {"kind": "column"}, 4.6),
        (64, 64, {"kind": "conv"}, 5.8),
        (64, 64, {"kind": "conv", "conv_mode": "quadrant"}, 7.9),
    ],
)
def test_known_shares_of_the_causal_pairs(text_len: int, side: int, options: dict[str, str], percent: float) -> None:
    mask = AttentionMask(text_len=text_len, grid_height=side, grid_width=side, **options)  # type: ignore[arg-type]
    causal = mask.seq_len * (mask.seq_len + 1) // 2
    assert round(100 * mask.pairs() / causal, 1) == percent


@pytest.mark.parametrize("length", [0, 1, 3, 4, 17, 38])
def test_a_shorter_sequence_has_the_corner_of_the_mask(length: int) -> None:
    for mask in masks_of_all_modes(text_len=3, grid=(7, 5)):
        corner = mask.dense()[:length, :length]
        assert torch.equal(mask.dense(length), corner)
        assert mask.pairs(length) == corner.sum()


@pytest.mark.parametrize("grid", [(7, 5), (1, 9)])
def test_a_mask_passes_through_its_code(grid: tuple[int, int]) -> None:
    masks = list(masks_of_all_modes(text_len=257, grid=grid))
    codes = [mask.code for mask in masks]
    assert len(set(codes)) == len(masks)
    assert [AttentionMask.from_code(code) for code in codes] == masks


@pytest.mark.parametrize("conv_mode", get_args(ConvMode))
@pytest.mark.parametrize("kind", KINDS)
def test_allowed_serves_flex_attention(kind: MaskKind, conv_mode: ConvMode) -> None:
    mask = AttentionMask(kind=kind, text_len=3, grid_height=4, grid_width=5, kernel_size=3, conv_mode=conv_mode)
    flex = create_mask(lambda batch, head, query, key: mask.allowed(query, key), None, None, 23, 23, device="cpu")
    assert torch.equal(flex[0, 0], mask.dense())


def test_the_papers_key_counts_hold_in_the_interior() -> None:
    # 32 x 32, kernel 11: 33 keys for row, 61 for conv, one per row for column
    position = 20 * 32 + 16
    counts = {}
    for kind in KINDS[1:]:
        mask = AttentionMask(kind=kind, text_len=256, grid_height=32, grid_width=32)
        counts[kind] = int(mask.dense()[256 + position, 256:].sum())
    assert counts == {"row": 33, "column": 21, "conv": 61}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "diagonal"}, "kind is one of full, row, column, conv; got 'diagonal'"),
        ({"row_mode": "wide"}, "row_mode is one of window, own_row; got 'wide'"),
        ({"conv_mode": "mirror"}, "conv_mode is one of raster, clip, quadrant, torus; got 'mirror'"),
        ({"text_len": -1}, "text_len >= 0 .* got -1 and 4x4"),
        ({"grid_height": 0}, "grid of at least 1x1; got 3 and 0x4"),
        ({"grid_width": 0}, "grid of at least 1x1; got 3 and 4x0"),
        ({"kernel_size": 4}, "kernel_size must be odd and positive; got 4"),
        ({"kernel_size": 0, "conv_mode": "quadrant"}, "kernel_size must be odd and positive; got 0"),
        ({"dilation": 0}, "dilation must be at least 1; got 0"),
    ],
)
def test_what_makes_no_mask_is_refused(wrong: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"kind": "conv", "text_len": 3, "grid_height": 4, "grid_width": 4} | wrong
    with pytest.raises(UserError, match=message):
        AttentionMask(**settings)


def test_conv_is_kept_for_the_last_layer() -> None:
    assert layer_kinds(("row", "column", "row", "row", "conv"), 6) == ("row", "column", "row", "row", "row", "conv")
    assert layer_kinds(("row", "full"), 3) == ("row", "full", "row")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_exactly_where_the_mask_allows(kind: MaskKind) -> None:
    """One layer, so that the gradient of output i with respect to input j is nonzero just where i attends to j."""
    layout = SequenceLayout(text_len=3, grid_height=4, grid_width=5, text_vocab_size=7, codebook_size=11)
    prior = Prior(PriorConfig(layout=layout, dim=16, depth=1, heads=2, attention=(kind,), kernel_size=3))
    randomize(prior)
    x = torch.randn(1, layout.seq_len, 16, dtype=torch.float64, requires_grad=True)
    prior.double()
    output = prior._run_blocks(x)
    allowed = prior.masks[0].dense()
    for i in range(layout.seq_len):
        (gradient,) = torch.autograd.grad(output[0, i].square().sum(), x, retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(dim=1) > 0, allowed[i]), f"position {i}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_prior_never_sees_the_future(kind: MaskKind) -> None:
    layout = SequenceLayout(text_len=3, grid_height=4, grid_width=5, text_vocab_size=7, codebook_size=11)
    prior = Prior(PriorConfig(layout=layout, dim=16, depth=3, heads=2, attention=(kind, "full"), kernel_size=3))
    randomize(prior)
    prior.double()
    x = torch.randn(1, layout.seq_len, 16, dtype=torch.float64, requires_grad=True)
    output = prior._run_blocks(x)
    for i in range(layout.seq_len):
        (gradient,) = torch.autograd.grad(output[0, i].square().sum(), x, retain_graph=True)
        assert (gradient[0, i + 1 :] == 0).all()
        assert (gradient[0, i] != 0).any()


def randomize(prior: Prior) -> None:
    """Random weights: as initialized, residual branches put out zero and would hide any leak."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_lengths_and_blocks_that_cannot_be_are_refused() -> None:
    mask = mask_of("row")
    with pytest.raises(ValueError, match=r"a length must lie in \[0, 19\], the mask's positions; got 20"):
        mask.dense(20)
    with pytest.raises(ValueError, match="blocks need at least one position; got 8 and 0"):
        mask.block_lists(8, 0)
