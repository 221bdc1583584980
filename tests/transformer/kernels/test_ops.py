"""The operators hold what PyTorch asks of one: compilers, checkpointing and data parallelism may take them apart."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributed, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from transformer.cache_layout import CacheLayout
from transformer.kernels import ops, reference
from transformer.kernels.flops import register_flop_formulas
from transformer.masks import AttentionMask

# B batch, H query heads, Hkv key-value heads, N positions, S slots of a cache, D head width.

KINDS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "row": {"kind": "row"},
    "own-row": {"kind": "row", "row_mode": "own_row"},
    "column": {"kind": "column"},
    "conv-raster": {"kind": "conv", "kernel_size": 3},
    "conv-dilated": {"kind": "conv", "kernel_size": 3, "dilation": 2},
    "conv-clip": {"kind": "conv", "conv_mode": "clip", "kernel_size": 5},
    "conv-quadrant": {"kind": "conv", "conv_mode": "quadrant", "kernel_size": 2},
    "conv-torus": {"kind": "conv", "conv_mode": "torus", "kernel_size": 3},
}
LAYOUTS = ["heads first", "positions first", "packed"]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def _without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def mask_of(kind: str, *, text_len: int = 3, height: int = 4, width: int = 5) -> AttentionMask:
    return AttentionMask(text_len=text_len, grid_height=height, grid_width=width, **KINDS[kind])


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


def random_inputs(
    length: int = 23,
    *,
    heads: int = 4,
    key_heads: int = 2,
    layout: str = "heads first",
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Leaves that want gradients, [2, H, N, 8]; packed ones are views of one projection of all three."""
    counts = (heads, key_heads, key_heads)
    if layout == "packed":
        parts = torch.randn(2, length, sum(counts), 8, dtype=dtype).split(counts, dim=2)
    else:
        parts = [torch.randn(2, length, count, 8, dtype=dtype) for count in counts]
    views = [part.transpose(1, 2) for part in parts]
    if layout == "heads first":
        views = [view.contiguous() for view in views]
    return Inputs(*(view.requires_grad_() for view in views))


def detached(inputs: Inputs) -> Inputs:
    return Inputs(*(tensor.detach() for tensor in inputs))


class Cache(NamedTuple):
    keys: Tensor
    values: Tensor


def filled_cache(mask: AttentionMask, key: Tensor, value: Tensor, positions: list[int]) -> Cache:
    """What came before positions[b], row by row; slots not yet written hold NaN."""
    layout = CacheLayout(mask)
    shape = (*key.shape[:2], layout.num_slots, key.shape[3])
    cache = Cache(torch.full(shape, torch.nan), torch.full(shape, torch.nan))
    for row, position in enumerate(positions):
        for before in range(position):
            cache.keys[row, :, layout.slot(before)] = key[row, :, before]
            cache.values[row, :, layout.slot(before)] = value[row, :, before]
    return cache


@every_kind
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [2, 16, 23])
def test_values_and_gradients_equal_those_of_the_differentiated_reference(
    kind: str, key_heads: int, length: int
) -> None:
    mask, inputs = mask_of(kind), random_inputs(length, key_heads=key_heads)
    ours = ops.sparse_attention(*inputs, mask, scale=0.7)
    theirs = reference.attention(*inputs, mask, scale=0.7)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        atol=2e-6,
        rtol=1e-5,
    )


@every_kind
def test_the_second_output_is_the_logsumexp_in_base_2(kind: str) -> None:
    mask, (query, key, value) = mask_of(kind), random_inputs(key_heads=4)
    _, logsumexp = torch.ops.tessera.sparse_attention(query, key, value, mask.code, 0.7)
    powers = torch.exp2(query.double() @ key.double().mT * 0.7 / math.log(2)) * mask.dense()
    assert logsumexp.dtype == torch.float32 and not logsumexp.requires_grad
    torch.testing.assert_close(logsumexp, powers.sum(dim=3).log2().float())


def test_gradients_are_the_slopes_of_the_values() -> None:
    mask = mask_of("conv-raster", text_len=2, height=2, width=3)
    inputs = [torch.randn(1, heads, 8, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1)]
    # the logsumexp between the passes is in float32
    assert torch.autograd.gradcheck(
        lambda query, key, value: ops.sparse_attention(query, key, value, mask), inputs, atol=1e-5, rtol=1e-5
    )


def test_second_derivatives_are_refused_and_not_wrong() -> None:
    query, key, value = random_inputs()
    output = ops.sparse_attention(query, key, value, mask_of("row"))
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


# its trick of asking a view for its gradient makes PyTorch warn of itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@every_layout
def test_opcheck_passes_for_attention_and_its_backward_pass(layout: str) -> None:
    mask, inputs = mask_of("conv-raster").code, random_inputs(layout=layout)
    torch.library.opcheck(torch.ops.tessera.sparse_attention.default, (*inputs, mask, 0.7))
    query, key, value = detached(inputs)
    output, logsumexp = torch.ops.tessera.sparse_attention(query, key, value, mask, 0.7)
    torch.library.opcheck(
        torch.ops.tessera.sparse_attention_backward.default,
        (torch.randn_like(output), query, key, value, output, logsumexp, mask, 0.7),
    )


@pytest.mark.parametrize("positions", [[14], [14, 9]], ids=["one position", "a position per row"])
@pytest.mark.parametrize("layout", ["heads first", "positions first"])
def test_opcheck_passes_for_decoding(positions: list[int], layout: str) -> None:
    mask, new = mask_of("conv-raster"), detached(random_inputs(1, layout=layout))
    keys, values = torch.randn(2, 2, 2, CacheLayout(mask).num_slots, 8)
    where = torch.tensor(positions, dtype=torch.int32)
    torch.library.opcheck(torch.ops.tessera.decode_attention.default, (*new, keys, values, where, mask.code, 0.7))


@every_layout
def test_outputs_lie_in_memory_as_a_compiler_is_told(layout: str) -> None:
    mask, inputs = mask_of("column").code, detached(random_inputs(layout=layout))
    forward, backward = torch.ops.tessera.sparse_attention, torch.ops.tessera.sparse_attention_backward
    results = forward(*inputs, mask, 0.7)
    saved = (torch.randn_like(results[0]), *inputs, *results)
    real = (*results, *backward(*saved, mask, 0.7))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in saved]
        fake = (*forward(*fakes[1:4], mask, 0.7), *backward(*fakes, mask, 0.7))
    assert [tensor.stride() for tensor in fake] == [tensor.stride() for tensor in real]
    assert layout == "heads first" or not real[0].is_contiguous()


@every_layout
def test_compiled_attention_equals_eager(layout: str) -> None:
    mask, inputs = mask_of("conv-clip"), random_inputs(layout=layout)

    def doubled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.sparse_attention(query * 2, key, value, mask)

    torch._dynamo.reset()
    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    outputs = [function(*inputs) for function in (compiled, doubled)]
    torch.testing.assert_close(outputs[0], outputs[1])
    gradients = [torch.autograd.grad(output.square().sum(), inputs) for output in outputs]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_checkpointed_gradients_equal_plain_ones() -> None:
    mask, inputs = mask_of("column"), random_inputs()

    def squared(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.sparse_attention(query.square(), key, value, mask).square().sum()

    plain = torch.autograd.grad(squared(*inputs), inputs)
    again = torch.autograd.grad(checkpoint(squared, *inputs, use_reentrant=False), inputs)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@every_kind
@pytest.mark.parametrize("positions", [[3, 3], [14, 22]])
def test_decoding_stores_the_position_and_equals_its_row_of_attention(kind: str, positions: list[int]) -> None:
    mask, (query, key, value) = mask_of(kind), detached(random_inputs())
    rows = torch.arange(2)
    cache = filled_cache(mask, key, value, positions)
    new = Inputs(*(tensor[rows, :, positions].unsqueeze(2) for tensor in (query, key, value)))  # [B, heads, 1, D]
    where = torch.tensor(positions if positions[0] != positions[1] else positions[:1], dtype=torch.int32)
    output = ops.decode_attention(*new, *cache, where, mask)
    expected = reference.attention(query, key, value, mask)[rows, :, positions].unsqueeze(2)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
    for row, position in enumerate(positions):
        slot = CacheLayout(mask).slot(position)
        assert torch.equal(cache.keys[row, :, slot], key[row, :, position])
        assert torch.equal(cache.values[row, :, slot], value[row, :, position])


@every_kind
def test_the_flops_of_the_allowed_pairs_are_counted(kind: str) -> None:
    mask, inputs = mask_of(kind), random_inputs(16)
    register_flop_formulas()
    pairs = 2 * 4 * int(mask.dense(16).sum())  # [B, H]
    with FlopCounterMode(display=False) as counter:
        output = ops.sparse_attention(*inputs, mask)
    assert counter.get_total_flops() == 4 * 8 * pairs
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 10 * 8 * pairs


@every_kind
def test_the_flops_of_decoding_are_those_of_the_position_that_sees_most(kind: str) -> None:
    mask, (query, key, value) = mask_of(kind), detached(random_inputs())
    cache = filled_cache(mask, key, value, [22, 22])
    new = Inputs(query[:, :, 22:], key[:, :, 22:], value[:, :, 22:])
    register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        ops.decode_attention(*new, *cache, torch.tensor([22], dtype=torch.int32), mask)
    assert counter.get_total_flops() == 4 * 8 * 2 * 4 * int(mask.dense().sum(dim=1).max())


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_a_scale_that_is_not_positive_is_refused(scale: float) -> None:
    mask, inputs = mask_of("row"), random_inputs()
    with pytest.raises(ValueError, match=f"must be positive; got {scale}"):
        ops.sparse_attention(*inputs, mask, scale=scale)
    cache = filled_cache(mask, inputs.key, inputs.value, [3, 3])
    new = Inputs(*(tensor[:, :, 3:4] for tensor in inputs))
    with pytest.raises(ValueError, match=f"must be positive; got {scale}"):
        ops.decode_attention(*new, *cache, torch.tensor([3], dtype=torch.int32), mask, scale=scale)


class TinyLayer(nn.Module):
    """One attention layer with projections, of 16 channels."""

    def __init__(self, mask: AttentionMask) -> None:
        super().__init__()
        self.mask = mask
        self.query_key_value = nn.Linear(16, (2 + 1 + 1) * 8)
        self.project = nn.Linear(2 * 8, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query_key_value(x).unflatten(2, (-1, 8)).transpose(1, 2).split([2, 1, 1], dim=1)
        return self.project(ops.sparse_attention(query, key, value, self.mask).transpose(1, 2).flatten(2))


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Data parallelism of this one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_data_parallel_gradients_equal_plain_ones(strategy: str, mesh: DeviceMesh) -> None:
    layer, x = TinyLayer(mask_of("conv-raster")), torch.randn(2, 23, 16)
    layer(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    if strategy == "ddp":
        DistributedDataParallel(layer)(x).square().sum().backward()
    else:
        fully_shard(layer, mesh=mesh)  # in place
        layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        gradient = parameter.grad
        assert isinstance(gradient, DTensor) == (strategy == "fsdp")
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        torch.testing.assert_close(gradient, expected[name])
