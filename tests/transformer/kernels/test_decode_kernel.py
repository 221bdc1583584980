"""The decode kernel under Triton's interpreter: position by position it equals attention over the whole sequence."""

import pytest
import torch

from transformer.cache_layout import CacheLayout
from transformer.kernels import ops, reference
from transformer.kernels.launch_config import LaunchConfig
from transformer.masks import AttentionMask

pytest.importorskip("triton")

from transformer.kernels import decode

pytestmark = pytest.mark.interpreter

KINDS = {
    "full": {"kind": "full"},
    "row": {"kind": "row"},
    "own-row": {"kind": "row", "row_mode": "own_row"},
    "column": {"kind": "column"},
    "conv-raster": {"kind": "conv", "kernel_size": 3},
    "conv-wider-than-grid": {"kind": "conv", "kernel_size": 11},
    "conv-dilated": {"kind": "conv", "kernel_size": 3, "dilation": 2},
    "conv-clip": {"kind": "conv", "conv_mode": "clip", "kernel_size": 3, "dilation": 2},
    "conv-quadrant": {"kind": "conv", "conv_mode": "quadrant", "kernel_size": 3},
    "conv-torus": {"kind": "conv", "conv_mode": "torus", "kernel_size": 3},
}
SMALL = LaunchConfig(block_q=16, block_k=16, num_warps=4, num_stages=2)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}


def check_decoding(
    mask: AttentionMask,
    *,
    splits: int = 1,
    dtype: torch.dtype = torch.float32,
    heads: int = 2,
    key_heads: int = 2,
    head_dim: int = 32,
) -> None:
    """Decodes every image position with a cache whose untouched slots are NaN."""
    batch, text_len = 1, mask.text_len
    query = torch.randn(batch, heads, mask.seq_len, head_dim).to(dtype)
    key, value = torch.randn(2, batch, key_heads, mask.seq_len, head_dim).to(dtype)
    wanted = reference.attention(query, key, value, mask)
    shape = (batch, key_heads, CacheLayout(mask).num_slots, head_dim)
    keys, values = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
    keys[:, :, :text_len], values[:, :, :text_len] = key[:, :, :text_len], value[:, :, :text_len]
    scale = head_dim**-0.5
    for position in range(text_len, mask.seq_len):
        now = slice(position, position + 1)
        where = torch.tensor([position], dtype=torch.int32)
        new = (query[:, :, now], key[:, :, now], value[:, :, now])
        got = decode.decode(*new, keys, values, where, mask, scale, config=SMALL, splits=splits)
        error = (got.double() - wanted[:, :, now].double()).abs().max()
        assert error <= TOLERANCE[dtype], f"position {position} is off by {error:.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text_len", "height", "width", "splits"), [(5, 5, 4, 1), (19, 3, 5, 3)])
def test_every_position_of_every_mask(kind: str, text_len: int, height: int, width: int, splits: int) -> None:
    mask = AttentionMask(
        **{"text_len": text_len, "grid_height": height, "grid_width": width, **KINDS[kind]}  # type: ignore[arg-type]
    )
    check_decoding(mask, splits=splits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(4, 1, 32), (3, 3, 96)])
def test_formats_and_groups(dtype: torch.dtype, heads: int, key_heads: int, head_dim: int) -> None:
    mask = AttentionMask(kind="row", text_len=17, grid_height=3, grid_width=4)
    check_decoding(mask, splits=2, dtype=dtype, heads=heads, key_heads=key_heads, head_dim=head_dim)


def test_no_text_and_a_single_column() -> None:
    check_decoding(AttentionMask(kind="row", text_len=0, grid_height=4, grid_width=3))
    check_decoding(AttentionMask(kind="column", text_len=4, grid_height=5, grid_width=1), splits=2)


def test_rows_of_a_batch_may_stand_at_different_positions() -> None:
    mask = AttentionMask(kind="column", text_len=3, grid_height=3, grid_width=4)
    layout = CacheLayout(mask)
    shape = (2, 1, layout.num_slots, 32)
    keys, values = torch.randn(shape), torch.randn(shape)
    query, key, value = torch.randn(3, 2, 1, 1, 32)
    positions = torch.tensor([4, 11], dtype=torch.int32)
    caches = (keys.clone(), values.clone()), (keys.clone(), values.clone())
    got = ops.decode_attention(query, key, value, *caches[0], positions, mask)
    wanted = reference.decode(query, key, value, *caches[1], positions, mask, 32**-0.5)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    for one, other in zip(*caches, strict=True):
        assert torch.equal(one, other)
