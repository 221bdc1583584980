"""The sparse kernels under Triton's interpreter: outputs and every gradient against the float64 reference."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer.kernels import reference
from transformer.kernels.launch_config import LaunchConfig
from transformer.kernels.ops import sparse_attention
from transformer.masks import AttentionMask

pytest.importorskip("triton")

from transformer.kernels import backward, forward, launch

pytestmark = pytest.mark.interpreter

# B batch, H query heads, Hkv key-value heads, N positions, D head width.

KINDS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "row": {"kind": "row"},
    "own-row": {"kind": "row", "row_mode": "own_row"},
    "column": {"kind": "column"},
    "conv-raster": {"kind": "conv", "kernel_size": 3},
    "conv-dilated": {"kind": "conv", "kernel_size": 3, "dilation": 2},
    "conv-clip": {"kind": "conv", "conv_mode": "clip", "kernel_size": 5},
    "conv-quadrant": {"kind": "conv", "conv_mode": "quadrant", "kernel_size": 3, "dilation": 2},
    "conv-torus": {"kind": "conv", "conv_mode": "torus", "kernel_size": 3},
}
# relative to the largest value, at least 1; the interpreter cuts bf16 off where a GPU rounds
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SMALL = LaunchConfig(block_q=16, block_k=32, num_warps=4, num_stages=2)


def mask_of(kind: str, *, text_len: int = 5, height: int = 7, width: int = 5) -> AttentionMask:
    return AttentionMask(text_len=text_len, grid_height=height, grid_width=width, **KINDS[kind])


def random_inputs(
    length: int,
    *,
    batch: int = 1,
    heads: int = 1,
    key_heads: int = 1,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    layout: str = "heads first",
) -> list[Tensor]:
    """Query, key, value and gradient of the output, as views whose surroundings are NaN."""
    tensors = []
    for count in (heads, key_heads, key_heads, heads):
        shape = (batch, length, count, head_dim)
        # three positions beyond the last one: whoever reads them spoils everything
        storage = torch.full((batch, length + 3, count, head_dim), torch.nan, dtype=dtype)
        storage[:, :length] = torch.randn(shape).to(dtype)
        tensor = storage[:, :length].transpose(1, 2)
        tensors.append(tensor.contiguous() if layout == "heads first" else tensor)
    return tensors


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, so that what a kernel forgets to write is seen."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, make=original, **kwargs: make(*args, **kwargs).fill_(torch.nan))
    yield


def check(
    mask: AttentionMask,
    inputs: list[Tensor],
    *,
    config: LaunchConfig = SMALL,
    key_config: LaunchConfig | None = None,
    tolerance: float | None = None,
) -> None:
    """Compares output, log-sum-exp and the three gradients with the reference."""
    query, key, value, grad_output = inputs
    scale = 0.3
    wanted = reference.forward(query, key, value, mask, scale)
    got = forward.forward(query, key, value, mask, scale, config=config)
    grads = backward.backward(
        grad_output,
        query,
        key,
        value,
        got.output,
        got.logsumexp,
        mask,
        scale,
        query_config=config,
        key_config=key_config or config,
    )
    wanted_grads = reference.backward(grad_output, query, key, value, wanted.output, wanted.logsumexp, mask, scale)
    tolerance = tolerance or TOLERANCE[query.dtype]
    for name, one, other in zip(
        ("output", "logsumexp", "query", "key", "value"), (*got, *grads), (*wanted, *wanted_grads), strict=True
    ):
        assert one.dtype == other.dtype and one.shape == other.shape
        error = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1)
        assert error <= tolerance, f"{name} is off by {error:.1e}"  # a NaN is not <= anything


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text_len", "height", "width", "length"),
    [(5, 7, 5, None), (257, 7, 5, None), (19, 9, 12, 100), (0, 4, 6, None), (20, 5, 4, 13), (3, 1, 9, None)],
    ids=["odd", "257-text", "cut-row", "no-text", "text-only", "one-row"],
)
@pytest.mark.usefixtures("_poisoned")
def test_every_mask_and_length(kind: str, text_len: int, height: int, width: int, length: int | None) -> None:
    mask = mask_of(kind, text_len=text_len, height=height, width=width)
    block = 64 if text_len > 100 else 16
    config = LaunchConfig(block_q=block, block_k=2 * block, num_warps=4, num_stages=2)
    check(mask, random_inputs(length or mask.seq_len), config=config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("_poisoned")
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    mask = mask_of(kind, text_len=17)
    check(mask, random_inputs(mask.seq_len, dtype=dtype))


@pytest.mark.parametrize("head_dim", [32, 40, 64, 96, 128])
@pytest.mark.usefixtures("_poisoned")
def test_head_widths(head_dim: int) -> None:
    mask = mask_of("row")
    check(mask, random_inputs(mask.seq_len, head_dim=head_dim))


@pytest.mark.parametrize("layout", ["heads first", "positions first"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.usefixtures("_poisoned")
def test_grouped_queries_in_both_layouts(key_heads: int, layout: str) -> None:
    mask = mask_of("conv-raster", height=4)
    check(mask, random_inputs(mask.seq_len, batch=2, heads=4, key_heads=key_heads, layout=layout))


@pytest.mark.parametrize("kind", ["row", "conv-torus"])
@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.usefixtures("_poisoned")
def test_text_tiles_split_among_programs(kind: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = mask_of(kind, text_len=37)
    monkeypatch.setattr(launch, "text_parts", lambda *args, **kwargs: parts)
    check(mask, random_inputs(mask.seq_len, batch=2, heads=2, key_heads=1))


@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (32, 16), (16, 64), (64, 64)])
@pytest.mark.parametrize("kind", ["column", "conv-clip"])
@pytest.mark.usefixtures("_poisoned")
def test_block_sizes(kind: str, block_q: int, block_k: int) -> None:
    """On a grid wide enough for rectangular tiles, which these two kinds then take."""
    mask = mask_of(kind, text_len=9, height=6, width=40)
    config = LaunchConfig(block_q=block_q, block_k=block_k, num_warps=4, num_stages=2)
    check(mask, random_inputs(mask.seq_len), config=config)


def test_rectangular_tiles_are_taken_and_give_the_same() -> None:
    """What the test above claims to cover is reached."""
    from transformer.kernels.schedule import key_schedule, query_schedule

    for kind in ("column", "conv-clip"):
        mask = mask_of(kind, text_len=9, height=6, width=40)
        widths = {
            build(mask, mask.seq_len, block_q=block_q, block_k=block_k).tile_width
            for build in (query_schedule, key_schedule)
            for block_q, block_k in ((16, 16), (32, 16), (16, 64), (64, 64))
        }
        assert widths - {0}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_inputs_give_equal_bits(kind: str) -> None:
    mask = mask_of(kind, text_len=17)
    query, key, value, grad_output = random_inputs(mask.seq_len)
    results = []
    for _ in range(2):
        output, logsumexp = forward.forward(query, key, value, mask, 0.2)
        gradients = backward.backward(grad_output, query, key, value, output, logsumexp, mask, 0.2)
        results.append((output, logsumexp, *gradients))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_zero_exactly_where_the_mask_forbids(kind: str) -> None:
    """The gradient of output i with respect to the key and value of position j."""
    mask = mask_of(kind, text_len=3, height=4, width=5)
    query, key, value, _ = random_inputs(mask.seq_len)
    allowed = mask.dense()
    first = allowed.sum(dim=1) > 1  # a query that sees only itself does not move with the key
    for i in range(mask.seq_len):
        leaves = [tensor.clone().requires_grad_() for tensor in (key, value)]
        output = sparse_attention(query, leaves[0], leaves[1], mask)
        key_grad, value_grad = torch.autograd.grad(output[0, 0, i].square().sum(), leaves)
        assert torch.equal(value_grad[0, 0].abs().sum(dim=1) > 0, allowed[i]), f"values of position {i}"
        if first[i]:
            assert torch.equal(key_grad[0, 0].abs().sum(dim=1) > 0, allowed[i]), f"keys of position {i}"


def test_the_operator_runs_the_kernels_and_differentiates() -> None:
    mask = mask_of("column")
    query, key, value, grad_output = random_inputs(mask.seq_len, heads=2, key_heads=1, layout="positions first")
    ours = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    theirs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    sparse_attention(ours[0], ours[1], ours[2], mask).backward(grad_output)
    reference.attention(theirs[0], theirs[1], theirs[2], mask).backward(grad_output)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5)


def test_the_gradient_of_a_sum_is_an_expanded_tensor() -> None:
    """All its strides are 0, which no kernel reads."""
    mask = mask_of("row")
    query, key, value, _ = random_inputs(mask.seq_len)
    ours = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    theirs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    sparse_attention(ours[0], ours[1], ours[2], mask).sum().backward()
    reference.attention(theirs[0], theirs[1], theirs[2], mask).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5)
