"""A cache of the size of its mask holds what the mask still allows, wherever it lies."""

from typing import Any

import pytest
import torch

from transformer.cache import KVCache, LayerCache
from transformer.cache_layout import CacheLayout
from transformer.masks import AttentionMask

CPU = torch.device("cpu")

VARIANTS: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "row"},
    {"kind": "row", "row_mode": "own_row"},
    {"kind": "column"},
    {"kind": "conv", "conv_mode": "quadrant", "kernel_size": 2},
    *(
        {"kind": "conv", "conv_mode": mode, "kernel_size": size, "dilation": dilation}
        for mode in ("raster", "clip", "quadrant", "torus")
        for size, dilation in ((3, 1), (3, 2), (5, 1))
    ),
]
GRIDS = [(3, 4), (7, 5), (1, 6), (4, 1)]

every_mask = pytest.mark.parametrize(
    "mask",
    [
        AttentionMask(text_len=text_len, grid_height=height, grid_width=width, **variant)
        for variant in VARIANTS
        for height, width in GRIDS
        for text_len in (0, 3)
    ],
    ids=lambda mask: mask.code.replace(" ", "-"),
)


def mask_of(kind: str, **options: Any) -> AttentionMask:
    sizes: dict[str, Any] = {"text_len": 3, "grid_height": 7, "grid_width": 5, "kernel_size": 3, **options}
    return AttentionMask(kind=kind, **sizes)  # type: ignore[arg-type]


def empty_layer(mask: AttentionMask, *, dtype: torch.dtype = torch.float32) -> LayerCache:
    cache = KVCache.empty(masks=[mask], batch_size=2, heads=3, head_dim=4, device=CPU, dtype=dtype)
    return cache.layers[0]


def random_keys(count: int) -> torch.Tensor:
    return torch.randn(2, 3, count, 4)


@every_mask
def test_visible_slots_hold_exactly_the_positions_that_the_mask_allows(mask: AttentionMask) -> None:
    layout, dense = CacheLayout(mask), mask.dense()
    held = torch.full((layout.num_slots,), -1)
    for position in range(mask.seq_len):
        held[layout.slot(position)] = position
        expected = dense[position].nonzero().flatten().tolist()
        assert held[layout.visible_slots(position, CPU)].tolist() == expected, f"position {position}"
        assert sorted(held[layout.visible(position, CPU)].tolist()) == expected, f"position {position}"


@every_mask
def test_many_positions_at_once_are_stored_as_one_by_one(mask: AttentionMask) -> None:
    text_len, length = mask.text_len, mask.seq_len
    keys, values = random_keys(length), random_keys(length)
    for start, end in ((0, text_len), (0, length), (1, text_len + 2), (text_len + 2, length), (text_len, text_len)):
        at_once, one_by_one = empty_layer(mask), empty_layer(mask)
        for position in range(end):
            here = slice(position, position + 1)
            one_by_one.write(position, keys[:, :, here], values[:, :, here])
            if position < start:
                at_once.write(position, keys[:, :, here], values[:, :, here])
        at_once.write(start, keys[:, :, start:end], values[:, :, start:end])
        assert torch.equal(at_once.keys, one_by_one.keys), f"{start} to {end}"
        assert torch.equal(at_once.values, one_by_one.values), f"{start} to {end}"


@pytest.mark.parametrize(
    ("mask", "image_slots"),
    [
        (mask_of("row"), 5 + 1),
        (mask_of("row", row_mode="own_row"), 5),
        (mask_of("conv"), 6 + 1),
        (mask_of("conv", conv_mode="clip", dilation=2), 12 + 1),
        (mask_of("conv", conv_mode="quadrant"), 12 + 1),
        (mask_of("conv", conv_mode="torus"), 35),
        (mask_of("conv", kernel_size=13), 35),
        (mask_of("column"), 35),
        (mask_of("full"), 35),
    ],
)
def test_a_ring_holds_what_the_mask_reaches_back_to_and_never_more(mask: AttentionMask, image_slots: int) -> None:
    layer = empty_layer(mask)
    assert layer.keys.shape == layer.values.shape == (2, 3, 3 + image_slots, 4)
    for position in range(mask.seq_len):
        marked = torch.full((2, 3, 1, 4), position + 1.0)
        layer.write(position, marked, marked)
    latest = set(range(3 + 35 - image_slots, 3 + 35))
    assert {int(mark) - 1 for mark in layer.keys.unique()} == {0, 1, 2} | latest


@pytest.mark.parametrize("mask", [mask_of("full"), mask_of("row"), mask_of("row", row_mode="own_row")])
def test_full_and_row_are_read_as_slices(mask: AttentionMask) -> None:
    layout = CacheLayout(mask)
    assert all(isinstance(layout.visible(position, CPU), slice) for position in range(mask.seq_len))
    assert CacheLayout(mask_of("full")).visible(20, CPU) == slice(0, 21)


def test_a_column_lies_together_behind_the_text() -> None:
    layout = CacheLayout(mask_of("column"))
    assert [layout.slot(3 + 5 * row + 2) for row in range(7)] == list(range(3 + 14, 3 + 21))
    assert layout.visible(3 + 5 * 4, CPU) == slice(0, 3 + 5)


def test_slots_found_while_sampling_serve_training_too() -> None:
    layout = CacheLayout(mask_of("conv", grid_width=6))
    with torch.inference_mode():
        visible = layout.visible(30, CPU)
    assert isinstance(visible, torch.Tensor)
    keys = torch.randn(1, 1, layout.num_slots, 4, requires_grad=True)
    keys[:, :, visible].square().sum().backward()
    assert keys.grad is not None and int((keys.grad != 0).any(dim=3).sum()) == len(visible)


def test_expanding_copies_rows_and_leaves_the_original_alone() -> None:
    masks = [mask_of("row"), mask_of("full")]
    cache = KVCache.empty(masks=masks, batch_size=2, heads=3, head_dim=4, device=CPU, dtype=torch.float32)
    for layer in cache.layers:
        layer.write(0, random_keys(3), random_keys(3))
    expanded = cache.expand(torch.tensor([1, 0, 1]))
    for layer, copy in zip(cache.layers, expanded.layers, strict=True):
        assert copy.layout == layer.layout
        assert torch.equal(copy.keys, layer.keys[[1, 0, 1]])
        assert torch.equal(copy.values, layer.values[[1, 0, 1]])
        copy.write(3, torch.ones(3, 3, 1, 4), torch.ones(3, 3, 1, 4))
        assert not layer.keys[:, :, 3:].any() and not layer.values[:, :, 3:].any()
    assert expanded.num_bytes == cache.num_bytes // 2 * 3 == 3 * 2 * 3 * 4 * 4 * ((3 + 6) + (3 + 35))


@pytest.mark.parametrize("count", [1, 8])
def test_what_is_stored_takes_the_dtype_of_the_cache(count: int) -> None:
    layer = empty_layer(mask_of("conv"), dtype=torch.bfloat16)
    keys = random_keys(count)
    layer.write(3, keys, -keys)
    stored = [layer.layout.slot(position) for position in range(3, 3 + count)][-7:]
    assert torch.equal(layer.keys[:, :, stored], keys[:, :, -7:].bfloat16())
    assert torch.equal(layer.values[:, :, stored], -keys[:, :, -7:].bfloat16())


def test_positions_that_the_mask_does_not_have_are_refused() -> None:
    layer = empty_layer(mask_of("row"))
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 38\); got 37 to 38"):
        layer.write(37, random_keys(2), random_keys(2))
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 38\); got 38 to 38"):
        layer.write(38, random_keys(1), random_keys(1))
