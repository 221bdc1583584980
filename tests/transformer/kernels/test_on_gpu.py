"""The sparse kernels as shipped, on a GPU: against the float64 reference, twice the same, inside a CUDA graph."""

import pytest
import torch

from transformer.cache_layout import CacheLayout
from transformer.kernels import ops, reference
from transformer.masks import AttentionMask, ConvMode, MaskKind, RowMode

pytestmark = pytest.mark.gpu

# relative to the largest value, at least 1
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
MODES: list[tuple[MaskKind, RowMode, ConvMode]] = [
    ("full", "window", "raster"),
    ("row", "window", "raster"),
    ("row", "own_row", "raster"),
    ("column", "window", "raster"),
    ("conv", "window", "raster"),
    ("conv", "window", "clip"),
    ("conv", "window", "quadrant"),
    ("conv", "window", "torus"),
]


@pytest.mark.parametrize("modes", MODES, ids="-".join)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_outputs_and_gradients(modes: tuple[MaskKind, RowMode, ConvMode], dtype: torch.dtype, head_dim: int) -> None:
    kind, row_mode, conv_mode = modes
    mask = AttentionMask(
        kind=kind, text_len=77, grid_height=20, grid_width=24, row_mode=row_mode, conv_mode=conv_mode, kernel_size=5
    )
    length = mask.seq_len - 7  # a last row that is cut
    shapes = [(2, heads, length, head_dim) for heads in (4, 2, 2, 4)]
    query, key, value, grad_output = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    results = []
    for _ in range(2):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        output = ops.sparse_attention(leaves[0], leaves[1], leaves[2], mask)
        results.append((output, *torch.autograd.grad(output, leaves, grad_output)))
    scale = head_dim**-0.5
    forward = reference.forward(query, key, value, mask, scale)
    wanted = (forward.output, *reference.backward(grad_output, query, key, value, *forward, mask, scale))
    for first, second, exact in zip(*results, wanted, strict=True):
        assert torch.equal(first, second)
        error = (first.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(1)
        assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("modes", MODES, ids="-".join)
@pytest.mark.parametrize("batch", [1, 80])
def test_one_graph_decodes_every_position(modes: tuple[MaskKind, RowMode, ConvMode], batch: int) -> None:
    kind, row_mode, conv_mode = modes
    mask = AttentionMask(
        kind=kind, text_len=19, grid_height=5, grid_width=6, row_mode=row_mode, conv_mode=conv_mode, kernel_size=3
    )
    query, key, value = torch.randn(3, batch, 2, mask.seq_len, 64, device="cuda")
    exact = reference.attention(query, key, value, mask)
    shape = (batch, 2, CacheLayout(mask).num_slots, 64)
    keys, values = (torch.zeros(shape, device="cuda") for _ in range(2))
    keys[:, :, :19], values[:, :, :19] = key[:, :, :19], value[:, :, :19]
    new = [tensor[:, :, 19:20].clone() for tensor in (query, key, value)]
    where = torch.tensor([19], dtype=torch.int32, device="cuda")
    ops.decode_attention(new[0], new[1], new[2], keys, values, where, mask)  # compiles; writes what is written again
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ops.decode_attention(new[0], new[1], new[2], keys, values, where, mask)
    for position in range(19, mask.seq_len):
        for tensor, whole in zip(new, (query, key, value), strict=True):
            tensor.copy_(whole[:, :, position : position + 1])
        where.fill_(position)
        graph.replay()
        torch.testing.assert_close(output, exact[:, :, position : position + 1], atol=1e-4, rtol=1e-4)
