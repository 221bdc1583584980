"""Every backend computes the same attention, one function chooses among them, and what cannot run is named."""

import logging
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import flex_attention as flex_module

from transformer.attention import (
    CPU_MATMUL_KEYS,
    Backend,
    attend_to_cache,
    attention,
    choose_backend,
    choose_decode_backend,
    decode_attention,
    matmul_attention,
    why_not_triton,
)
from transformer.cache import KVCache, LayerCache
from transformer.kernels import reference
from transformer.masks import AttentionMask, MaskKind

# B batch, H query heads, Hkv key-value heads, N positions, D head width.

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
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
LENGTHS = [1, 3, 4, 16, 23]  # one position, the text, its first image position, a row cut short, all

every_kind = pytest.mark.parametrize("kind", KINDS)


def mask_of(kind: str, *, text_len: int = 3, height: int = 4, width: int = 5) -> AttentionMask:
    return AttentionMask(text_len=text_len, grid_height=height, grid_width=width, **KINDS[kind])


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


def random_inputs(length: int, *, key_heads: int = 2, dtype: torch.dtype = torch.float32) -> Inputs:
    return Inputs(*(torch.randn(2, heads, length, 8, dtype=dtype) for heads in (4, key_heads, key_heads)))


def leaves_of(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    return Inputs(*(tensor.detach().clone().to(dtype).requires_grad_() for tensor in inputs))


def attention_by_definition(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """Query by query, among the keys that the mask names."""
    group = query.shape[1] // key.shape[1]
    rows = []
    for position, allowed in enumerate(mask.dense(query.shape[2])):
        keys, values = (tensor[:, :, allowed].repeat_interleave(group, dim=1) for tensor in (key, value))
        scores = (query[:, :, position, None] * keys).sum(dim=3) * scale  # [B, H, keys]
        rows.append((scores.softmax(dim=2)[..., None] * values).sum(dim=2))
    return torch.stack(rows, dim=2)


@pytest.fixture
def _eager_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention step by step in PyTorch, without the warning that this is slow."""
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the choice looks at, as on a machine with a Hopper GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("transformer.attention._has_triton", lambda: True)


@every_kind
def test_the_reference_is_the_definition(kind: str) -> None:
    mask, inputs = mask_of(kind), random_inputs(23, dtype=torch.float64)
    ours, theirs = leaves_of(inputs), leaves_of(inputs)
    first = reference.attention(*ours, mask, scale=0.7)
    second = attention_by_definition(*theirs, mask, 0.7)
    torch.testing.assert_close(first, second)
    weights = torch.randn_like(first)
    torch.testing.assert_close(
        torch.autograd.grad((first * weights).sum(), ours), torch.autograd.grad((second * weights).sum(), theirs)
    )


@every_kind
@pytest.mark.parametrize("backend", ["auto", "sdpa", "matmul", "reference"])
def test_backends_equal_the_reference(kind: str, backend: Backend) -> None:
    mask = mask_of(kind)
    for length, scale in product(LENGTHS, (None, 0.7)):
        inputs = random_inputs(length)
        ours, exact = leaves_of(inputs), leaves_of(inputs, torch.float64)
        first = attention(*ours, mask, backend=backend, scale=scale)
        second = reference.attention(*exact, mask, scale=scale)
        torch.testing.assert_close(first, second.float(), atol=1e-6, rtol=1e-5)
        weights = torch.randn_like(first)
        gradients = torch.autograd.grad((first * weights).sum(), ours)
        expected = torch.autograd.grad((second * weights).sum(), exact)
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other.float(), atol=2e-6, rtol=1e-5)


@every_kind
@pytest.mark.usefixtures("_eager_flex")
def test_flex_attention_equals_the_reference(kind: str) -> None:
    mask = mask_of(kind)
    for length, scale in zip(LENGTHS, (None, 0.7, None, 0.7, None), strict=True):
        query, key, value = random_inputs(length)
        torch.testing.assert_close(
            attention(query, key, value, mask, backend="flex", scale=scale),
            reference.attention(query, key, value, mask, scale=scale),
            atol=1e-6,
            rtol=1e-5,
        )


@every_kind
@pytest.mark.usefixtures("_eager_flex")
def test_gradients_of_the_reference_are_the_slopes_of_flex_attention(kind: str) -> None:
    # FlexAttention has no backward pass on CPUs: its values a little to both sides stand in for one
    mask, inputs = mask_of(kind), random_inputs(23, dtype=torch.float64)
    leaves = leaves_of(inputs)
    output = reference.attention(*leaves, mask)
    weights = torch.randn_like(output)
    gradients = torch.autograd.grad((output * weights).sum(), leaves)
    step = 1e-5
    for name, gradient in zip(Inputs._fields, gradients, strict=True):
        direction = torch.randn_like(gradient)
        ends = []
        for sign in (-1, 1):
            moved = inputs._replace(**{name: getattr(inputs, name) + sign * step * direction})
            ends.append((attention(*moved, mask, backend="flex") * weights).sum())
        slope = (ends[1] - ends[0]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), slope, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("backend", ["sdpa", "matmul", "reference", "flex"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.usefixtures("_eager_flex")
def test_shared_keys_and_values_serve_neighboring_heads(backend: Backend, key_heads: int) -> None:
    mask, (query, key, value) = mask_of("column"), random_inputs(23, key_heads=key_heads)
    copied = Inputs(query, *(tensor.repeat_interleave(4 // key_heads, dim=1) for tensor in (key, value)))
    torch.testing.assert_close(
        attention(query, key, value, mask, backend=backend), attention(*copied, mask, backend=backend)
    )


@pytest.mark.parametrize("backend", ["sdpa", "matmul", "reference", "flex"])
@pytest.mark.parametrize("kind", ["full", "conv-raster"])
@pytest.mark.usefixtures("_eager_flex")
def test_layouts_with_heads_behind_positions_give_the_same(backend: Backend, kind: str) -> None:
    mask = mask_of(kind)
    packed = torch.randn(2, 23, 4 + 2 + 2, 8)  # as one projection makes all three
    views = Inputs(*(part.transpose(1, 2) for part in packed.split([4, 2, 2], dim=2)))
    assert not any(view.is_contiguous() for view in views)
    torch.testing.assert_close(
        attention(*views, mask, backend=backend),
        attention(*Inputs(*(view.contiguous() for view in views)), mask, backend=backend),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", ["sdpa", "matmul", "reference", "flex"])
@pytest.mark.usefixtures("_eager_flex")
def test_half_precision_stays_close_and_keeps_its_dtype(backend: Backend, dtype: torch.dtype, tolerance: float) -> None:
    mask, (query, key, value) = mask_of("row"), random_inputs(23, dtype=dtype)
    output = attention(query, key, value, mask, backend=backend)
    assert output.dtype == dtype
    exact = reference.attention(query.double(), key.double(), value.double(), mask)
    torch.testing.assert_close(output.double(), exact, atol=tolerance, rtol=0)


def test_long_sequences_take_another_path_and_agree() -> None:
    mask = mask_of("column", height=CPU_MATMUL_KEYS // 16, width=16)
    assert mask.seq_len > CPU_MATMUL_KEYS
    query, key, value = (torch.randn(1, 1, mask.seq_len, 4) for _ in range(3))
    expected = matmul_attention(query, key, value, mask.dense())
    torch.testing.assert_close(attention(query, key, value, mask), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "matmul", "reference"])
def test_a_mask_first_met_while_sampling_serves_training_too(backend: Backend) -> None:
    mask = mask_of("conv-clip", text_len=7)  # of no other test: what is derived from it must be made here
    inputs = random_inputs(mask.seq_len)
    with torch.inference_mode():
        expected = attention(*inputs, mask, backend=backend)
    leaves = leaves_of(inputs)
    output = attention(*leaves, mask, backend=backend)
    output.square().sum().backward()
    torch.testing.assert_close(output.detach(), expected)
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference", "flex"])
@pytest.mark.usefixtures("_eager_flex")
def test_autocast_takes_mixed_dtypes(backend: Backend) -> None:
    mask, (query, key, value) = mask_of("column"), random_inputs(23)
    exact = reference.attention(query, key, value, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attention(query, key, value.bfloat16(), mask, backend=backend)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, atol=3e-2, rtol=0)


def test_compiled_attention_equals_eager_at_every_mask_and_length() -> None:
    def double(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, backend: Backend) -> Tensor:
        return attention(query * 2, key, value, mask, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
    calls: list[tuple[str, int, Backend]] = [
        ("row", 23, "auto"),
        ("conv-raster", 23, "auto"),
        ("conv-raster", 16, "auto"),
        ("conv-raster", 3, "sdpa"),
    ]
    for kind, length, backend in calls:
        mask, inputs = mask_of(kind), random_inputs(length)
        ours, theirs = leaves_of(inputs), leaves_of(inputs)
        first, second = compiled(*ours, mask, backend), double(*theirs, mask, backend)
        torch.testing.assert_close(first, second)
        torch.testing.assert_close(
            torch.autograd.grad(first.square().sum(), ours), torch.autograd.grad(second.square().sum(), theirs)
        )


@pytest.mark.parametrize("key_heads", [2, 4])
@every_kind
def test_decoding_one_position_equals_the_last_row_of_attention(kind: str, key_heads: int) -> None:
    mask, (query, key, value) = mask_of(kind), random_inputs(23, key_heads=key_heads)
    for position in (1, 3, 14, 22):
        sizes = {"batch_size": 2, "heads": key_heads, "head_dim": 8}
        (layer,) = KVCache.empty(masks=[mask], device=CPU, dtype=torch.float32, **sizes).layers
        layer.write(0, key[:, :, :position], value[:, :, :position])
        now, until = slice(position, position + 1), slice(0, position + 1)
        torch.testing.assert_close(
            decode_attention(query[:, :, now], key[:, :, now], value[:, :, now], layer, position),
            reference.attention(query[:, :, until], key[:, :, until], value[:, :, until], mask)[:, :, now],
            atol=1e-6,
            rtol=1e-5,
        )


def layer_of(mask: AttentionMask, key: Tensor, value: Tensor, *, dtype: torch.dtype = torch.float32) -> LayerCache:
    """A cache that holds the first positions, key and value [B, Hkv, n, D]."""
    sizes = {"batch_size": key.shape[0], "heads": key.shape[1], "head_dim": key.shape[3]}
    (layer,) = KVCache.empty(masks=[mask], device=CPU, dtype=dtype, **sizes).layers
    layer.write(0, key, value)
    return layer


@pytest.mark.parametrize("scale", [1.0, 0.2])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "matmul", "reference"])
@every_kind
def test_the_scale_of_decoding_is_that_of_attention(kind: str, backend: Backend, scale: float) -> None:
    mask, (query, key, value) = mask_of(kind), random_inputs(15)
    layer = layer_of(mask, key[:, :, :14], value[:, :, :14])
    now = slice(14, 15)
    inputs = query[:, :, now], key[:, :, now], value[:, :, now]
    torch.testing.assert_close(
        decode_attention(*inputs, layer, 14, backend=backend, scale=scale),
        reference.attention(query, key, value, mask, scale=scale)[:, :, now],
        atol=1e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_the_unchecked_form_decodes_the_same(kind: str, dtype: torch.dtype) -> None:
    mask, (query, key, value) = mask_of(kind), random_inputs(23)
    layers = [layer_of(mask, key[:, :, :3], value[:, :, :3], dtype=dtype) for _ in range(2)]
    for position in range(3, 23):
        now = slice(position, position + 1)
        inputs = query[:, :, now], key[:, :, now], value[:, :, now]
        checked = decode_attention(*inputs, layers[0], position, scale=0.7)
        assert torch.equal(attend_to_cache(*inputs, layers[1], position, scale=0.7), checked)
    assert torch.equal(layers[0].keys, layers[1].keys) and torch.equal(layers[0].values, layers[1].values)


@pytest.mark.parametrize("head_dim", [8, 64])
@every_kind
def test_what_a_row_decodes_on_a_cpu_does_not_depend_on_the_rows_beside_it(kind: str, head_dim: int) -> None:
    mask, rows = mask_of(kind, text_len=40), 9
    query, key, value = torch.randn(3, rows, 4, 51, head_dim)
    now, before = slice(50, 51), slice(0, 50)

    def decoded(some: slice) -> Tensor:
        layer = layer_of(mask, key[some, :2, before], value[some, :2, before])
        return decode_attention(query[some, :, now], key[some, :2, now], value[some, :2, now], layer, 50)

    together = decoded(slice(None))
    for first, last in ((0, 1), (1, 3), (3, 6), (6, 9)):
        assert torch.equal(decoded(slice(first, last)), together[first:last])


def test_a_position_on_the_device_is_for_the_kernel_only() -> None:
    mask, (query, key, value) = mask_of("row"), random_inputs(1)
    layer = layer_of(mask, torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8))
    with pytest.raises(ValueError, match="is read by backend triton only; give it as a number"):
        attend_to_cache(query, key, value, layer, torch.tensor([3], dtype=torch.int32))


@pytest.mark.usefixtures("gpu")
def test_the_kernel_decodes_wherever_it_can_unless_another_is_asked_for() -> None:
    def chosen(device: torch.device, backend: Backend, head_dim: int) -> str:
        choose = choose_decode_backend.__wrapped__  # without what it remembers of other machines
        return choose(device=device, head_dim=head_dim, dtype=torch.bfloat16, backend=backend)

    assert [chosen(GPU, backend, 64) for backend in ("auto", "triton", "sdpa", "matmul")] == [
        "triton",
        "triton",
        "sdpa",
        "sdpa",
    ]
    assert chosen(GPU, "auto", 24) == "sdpa"
    assert {chosen(CPU, backend, 64) for backend in ("auto", "sdpa", "matmul", "reference")} == {"matmul"}


@every_kind
def test_a_cpu_multiplies_short_sequences_itself(kind: str) -> None:
    mask = mask_of(kind, height=40, width=20)
    for length, expected in ((CPU_MATMUL_KEYS, "matmul"), (CPU_MATMUL_KEYS + 1, "sdpa")):
        assert choose_backend(mask, length, device=CPU, head_dim=64, dtype=torch.float32) == expected


@pytest.mark.parametrize(
    ("kind", "text_len", "side", "length", "expected"),
    [
        *((kind, 256, 32, None, "triton") for kind in ("row", "own-row", "column", "conv-raster")),
        *((kind, 64, 32, None, "triton") for kind in KINDS if kind != "full"),
        ("full", 64, 32, None, "sdpa"),
        *((kind, 64, 16, None, "sdpa") for kind in KINDS),  # 320 positions
        ("row", 256, 32, 256 + 100, "sdpa"),  # a long sequence of which little is in use
        ("row", 1000, 4, None, "sdpa"),  # nearly all of it text, which is causal
        ("row", 1000, 32, 1000, "sdpa"),  # the text alone
    ],
)
@pytest.mark.usefixtures("gpu")
def test_a_gpu_takes_the_sparse_kernels_where_the_mask_spares_enough(
    kind: str, text_len: int, side: int, length: int | None, expected: Backend
) -> None:
    mask = replace(mask_of(kind, text_len=text_len, height=side, width=side), kernel_size=11)
    for dtype in (torch.float16, torch.bfloat16):
        chosen = choose_backend(mask, length or mask.seq_len, device=GPU, head_dim=64, dtype=dtype)
        assert chosen == expected
    # float32 has no matrix units to gain from, unless PyTorch may take TF32
    for precision, of_float32 in (("highest", "sdpa"), ("high", expected)):
        torch.set_float32_matmul_precision(precision)
        chosen = choose_backend(mask, length or mask.seq_len, device=GPU, head_dim=64, dtype=torch.float32)
        torch.set_float32_matmul_precision("highest")
        assert chosen == of_float32


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ("capability", {}),
        ("triton", {}),
        ("", {"head_dim": 24}),
        ("", {"head_dim": 136}),
        ("", {"dtype": torch.float64}),
        ("", {"device": torch.device("mps")}),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_where_the_sparse_kernels_cannot_run_sdpa_does(
    change: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if change == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    if change == "triton":
        monkeypatch.setattr("transformer.attention._has_triton", lambda: False)
    mask = mask_of("row", text_len=256, height=32, width=32)
    usual: dict[str, Any] = {"device": GPU, "head_dim": 64, "dtype": torch.bfloat16}
    assert choose_backend(mask, mask.seq_len, **usual) == ("sdpa" if change else "triton")
    assert choose_backend(mask, mask.seq_len, **usual | options) == "sdpa"


@pytest.mark.parametrize("kind", get_args(MaskKind))
def test_the_choice_is_logged_once_for_each_combination(kind: MaskKind, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="transformer.attention")
    mask = AttentionMask(kind=kind, text_len=11, grid_height=3, grid_width=2)  # of no other test
    query, key, value = random_inputs(17)
    for length in (17, 17, 12, 17):
        attention(query[:, :, :length], key[:, :, :length], value[:, :, :length], mask)
    attention(query, key, value, mask, backend="sdpa")
    assert caplog.messages == [
        f"{kind} attention over 17 positions on cpu: matmul",
        f"{kind} attention over 12 positions on cpu: matmul",
        f"{kind} attention over 17 positions on cpu: sdpa",
    ]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 8), (2, 2, 8), (2, 2, 8)), r"query \[B, H, N, D\] .*got \(2, 4, 8\), \(2, 2, 8\) and \(2, 2, 8\)"),
        (((2, 4, 23, 8), (2, 3, 23, 8), (2, 3, 23, 8)), r"H a multiple of Hkv; got \(2, 4, 23, 8\), \(2, 3, 23, 8\)"),
        (((2, 4, 23, 8), (2, 2, 23, 8), (2, 2, 22, 8)), r"key and value \[B, Hkv, N, D\].*and \(2, 2, 22, 8\)"),
        (((2, 4, 23, 8), (1, 2, 23, 8), (1, 2, 23, 8)), r"must agree in batch, positions and head width; got \(2, 4"),
        (((2, 4, 22, 8), (2, 2, 23, 8), (2, 2, 23, 8)), r"must agree in batch, positions and head width"),
        (((2, 4, 23, 8), (2, 2, 23, 16), (2, 2, 23, 16)), r"must agree in batch, positions and head width"),
        (
            ((2, 4, 24, 8), (2, 2, 24, 8), (2, 2, 24, 8)),
            r"takes 1 to 23 positions, as the mask has them \(3 text and 4x5 image\); got 24",
        ),
        (
            ((2, 4, 0, 8), (2, 2, 0, 8), (2, 2, 0, 8)),
            r"takes 1 to 23 positions, as the mask has them \(3 text and 4x5 image\); got 0",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[Any, ...], message: str) -> None:
    query, key, value = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        attention(query, key, value, mask_of("row"))


@pytest.mark.parametrize("backend", get_args(Backend))
def test_mixed_dtypes_are_refused(backend: Backend) -> None:
    query, key, value = random_inputs(23)
    with pytest.raises(ValueError, match=r"one floating dtype; got torch.float32, torch.float32 and torch.bfloat16"):
        attention(query, key, value.bfloat16(), mask_of("row"), backend=backend)


@pytest.mark.parametrize("name", Inputs._fields)
@pytest.mark.parametrize("backend", ["auto", "matmul", "sdpa", "reference", "flex"])
def test_a_last_dimension_that_is_not_contiguous_is_refused(backend: Backend, name: str) -> None:
    inputs = random_inputs(23)
    strided = getattr(inputs, name).transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match=rf"last dimension of {name} must be contiguous .*got strides \(.*, 1, 23\)"):
        attention(*inputs._replace(**{name: strided}), mask_of("row"), backend=backend)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    query, key, value = random_inputs(23)
    with pytest.raises(ValueError, match=r"one of auto, triton, flex, sdpa, matmul, reference; got 'cudnn'"):
        attention(query, key, value, mask_of("row"), backend="cudnn")  # type: ignore[arg-type]


@pytest.mark.usefixtures("gpu")
def test_triton_refuses_tensors_on_a_cpu_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query, key, value = (torch.zeros(2, 4, 23, 64) for _ in range(3))
    message = "needs a CUDA GPU; got device cpu"
    with pytest.raises(ValueError, match=message):
        attention(query, key, value, mask_of("row"), backend="triton")
    (layer,) = KVCache.empty(
        masks=[mask_of("row")], batch_size=2, heads=4, head_dim=64, device=CPU, dtype=torch.float32
    ).layers
    with pytest.raises(ValueError, match=message):
        now = slice(3, 4)
        decode_attention(query[:, :, now], key[:, :, now], value[:, :, now], layer, 3, backend="triton")


@pytest.mark.parametrize(
    ("head_dim", "dtype", "capability", "message"),
    [
        (24, torch.bfloat16, (9, 0), r"supports head widths of 32 to 128 in steps of 8; got 24"),
        (60, torch.bfloat16, (9, 0), r"supports head widths of 32 to 128 in steps of 8; got 60"),
        (136, torch.bfloat16, (9, 0), r"supports head widths of 32 to 128 in steps of 8; got 136"),
        (64, torch.float64, (9, 0), r"supports float32, float16 and bfloat16; got torch.float64"),
        (64, torch.bfloat16, (7, 5), r"needs a GPU of compute capability 8.0 or newer; got 7.5"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_triton_says_what_it_supports(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with FakeTensorMode():  # tensors on a GPU that need none
        query = torch.empty(2, 4, 23, head_dim, device=GPU, dtype=dtype)
        with pytest.raises(ValueError, match=message):
            attention(query, query, query, mask_of("row"), backend="triton")


@pytest.mark.usefixtures("gpu")
def test_on_the_meta_device_shapes_are_known_and_triton_is_refused() -> None:
    query = torch.empty(2, 4, 23, 64, device="meta")
    assert attention(query, query, query, mask_of("row")).shape == (2, 4, 23, 64)
    with pytest.raises(ValueError, match=r"needs a CUDA GPU; got device meta"):
        attention(query, query, query, mask_of("row"), backend="triton")


@pytest.mark.usefixtures("gpu")
def test_every_head_width_between_the_bounds_is_supported() -> None:
    supported = [
        head_dim
        for head_dim in range(1, 300)
        if why_not_triton(device=GPU, head_dim=head_dim, dtype=torch.bfloat16) is None
    ]
    assert supported == list(range(32, 129, 8))


def test_without_triton_the_package_imports_and_computes() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from transformer.attention import attention
from transformer.masks import AttentionMask
mask = AttentionMask(kind="row", text_len=3, grid_height=4, grid_width=5)
inputs = torch.randn(3, 1, 2, 23, 32).unbind()
print(tuple(attention(*inputs, mask).shape))
try:
    attention(*inputs, mask, backend="triton")
except ValueError as error:
    print(error)
"""
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        "(1, 2, 23, 32)",
        "backend triton needs the package triton, which is not installed (it exists for Linux)",
    ]


def test_a_matrix_in_place_of_a_mask_is_refused() -> None:
    mask = mask_of("row")
    query, key, value = torch.randn(3, 1, 1, mask.seq_len, 32)
    with pytest.raises(ValueError, match="takes an AttentionMask, not a matrix; got Tensor"):
        attention(query, key, value, mask.dense())  # type: ignore[arg-type]


def test_integers_and_two_devices_are_refused() -> None:
    mask = mask_of("row")
    query, key, value = torch.randn(3, 1, 1, mask.seq_len, 32)
    with pytest.raises(ValueError, match="one floating dtype; got torch.int64"):
        attention(query.long(), key.long(), value.long(), mask)
    with pytest.raises(ValueError, match="on one device; got cpu, cpu and meta"):
        attention(query, key, value.to("meta"), mask)


def test_flex_attention_with_gradients_on_a_cpu_is_refused() -> None:
    mask = mask_of("row")
    query, key, value = torch.randn(3, 1, 1, mask.seq_len, 32).requires_grad_()
    with pytest.raises(ValueError, match="no backward pass on a CPU; use backend auto or sdpa"):
        attention(query, key, value, mask, backend="flex")
