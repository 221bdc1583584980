"""The masks say what the paper's figure says, and gradients confirm that nothing later leaks in."""

from typing import get_args

import pytest
import torch

from tessera.errors import UserError
from transformer.masks import AttentionMask, MaskKind, layer_kinds
from transformer.model import Prior, PriorConfig, SequenceLayout

KINDS: tuple[MaskKind, ...] = get_args(MaskKind)


def mask_of(
    kind: MaskKind, *, text_len: int = 3, grid: tuple[int, int] = (4, 4), kernel_size: int = 3
) -> AttentionMask:
    return AttentionMask(kind=kind, text_len=text_len, grid_height=grid[0], grid_width=grid[1], kernel_size=kernel_size)


def image_keys(kind: MaskKind, query: int, **options: int) -> list[int]:
    mask = mask_of(kind, **options)  # type: ignore[arg-type]
    row = mask.dense()[mask.text_len + query, mask.text_len :]
    return row.nonzero().flatten().tolist()


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (1, 9), (3, 2)])
def test_masks_are_causal_and_see_themselves(kind: MaskKind, grid: tuple[int, int]) -> None:
    dense = mask_of(kind, grid=grid, kernel_size=11).dense()
    assert dense.diagonal().all()
    assert not dense.triu(1).any()


def test_the_papers_key_counts_hold_in_the_interior() -> None:
    # 32 x 32, kernel 11: 33 keys for row, 61 for conv, one per row for column
    position = 20 * 32 + 16
    counts = {}
    for kind in KINDS[1:]:
        mask = AttentionMask(kind=kind, text_len=256, grid_height=32, grid_width=32)
        counts[kind] = int(mask.dense()[256 + position, 256:].sum())
    assert counts == {"row": 33, "column": 21, "conv": 61}


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(UserError, match="kernel_size must be odd"):
        mask_of("conv", kernel_size=4)


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
    output = prior._run_blocks(x, start=0, cache=None)
    allowed = prior.get_buffer(f"mask_{kind}")
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
    output = prior._run_blocks(x, start=0, cache=None)
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
