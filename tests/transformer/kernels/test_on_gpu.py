"""The kernels as shipped, on a GPU: against the float64 reference, twice the same, inside a CUDA graph.

And the decode loop that is made of them: captured it draws what it draws step by step, and with a fixed number of rows
an image does not depend on its batch.
"""

import pytest
import torch
from torch import Tensor

from sampling import decode, graph
from sampling.decode import Sampled
from sampling.settings import SamplingSettings
from sampling.step import Forced
from transformer.cache_layout import CacheLayout
from transformer.decoder import Decoder
from transformer.frozen_linear import KERNEL_ROWS, Storage
from transformer.kernels import int8_reference, ops, reference
from transformer.masks import AttentionMask, ConvMode, MaskKind, RowMode
from transformer.model import Prior, PriorConfig, SequenceLayout

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


def random_int8(rows: int, inputs: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weight and scales of products of the size of their inputs."""
    weight = torch.randint(-127, 128, (channels, inputs), dtype=torch.int8, device="cuda")
    scale = (torch.rand(channels, device="cuda") + 0.5) / 73 * inputs**-0.5
    return torch.randn(rows, inputs, device="cuda").to(dtype), weight, scale


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("inputs", "channels"), [(1024, 3072), (2816, 1024), (100, 33), (2752, 17), (8, 1)])
def test_products_with_int8_weights_do_not_depend_on_the_number_of_rows(
    inputs: int, channels: int, dtype: torch.dtype
) -> None:
    x, weight, scale = random_int8(40, inputs, channels, dtype)
    exact = int8_reference.int8_linear(x.double(), weight, scale)
    together = ops.int8_linear(x, weight, scale)
    assert together.dtype == dtype
    assert (together.double() - exact).abs().max() / exact.abs().max().clamp_min(1) <= TOLERANCE[dtype]
    for rows in (1, 2, 7, 8, 9, 16, 17, 40):
        assert torch.equal(ops.int8_linear(x[:rows], weight, scale), together[:rows]), f"{rows} rows"
    assert torch.equal(ops.int8_linear(x.roll(3, dims=0), weight, scale), together.roll(3, dims=0))


def test_a_graph_holds_the_product_with_an_int8_weight() -> None:
    x, weight, scale = random_int8(2, 1024, 512, torch.bfloat16)
    ops.int8_linear(x, weight, scale)  # compiles
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        product = ops.int8_linear(x, weight, scale)
    for _ in range(2):
        x.normal_()
        captured.replay()
        assert torch.equal(product, ops.int8_linear(x, weight, scale))


LAYOUT = SequenceLayout(text_len=9, grid_height=4, grid_width=5, text_vocab_size=30, codebook_size=50)
MIXED = [
    SamplingSettings(),
    SamplingSettings(guidance=3.0, guidance_schedule="linear", temperature=0.8),
    SamplingSettings(temperature=0.0),
    SamplingSettings(guidance=2.0, top_k=9, top_p=0.9, min_p=0.01),
    SamplingSettings(guidance=4.0, top_k=20),
    SamplingSettings(top_p=0.8),
]


def random_prior() -> Prior:
    config = PriorConfig(
        layout=LAYOUT,
        dim=256,
        depth=4,
        heads=4,
        key_value_heads=2,
        attention=("row", "column", "full", "conv"),
        kernel_size=3,
    )
    prior = Prior(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return prior.eval().requires_grad_(False)


def sample(decoder: Decoder, images: list[int], *, seed: int = 0, forced: bool = False, max_rows: int = 64) -> Sampled:
    """The images of those numbers, each with its own text, settings and seed."""
    generator = torch.Generator().manual_seed(2)
    texts = torch.randint(0, LAYOUT.num_text_ids, (len(MIXED), LAYOUT.text_len), generator=generator)
    mask = torch.rand(len(MIXED), LAYOUT.image_len, generator=generator) < 0.3
    mask[:, 0] = False  # all begin at the first position
    given = Forced(torch.full_like(mask, 7, dtype=torch.int64)[images], mask[images])
    return decode.sample_codes(
        decoder,
        texts[images],
        settings=[MIXED[image] for image in images],
        seeds=torch.tensor(images) + seed,
        image_index=torch.zeros(len(images), dtype=torch.int64),
        forced=given if forced else None,
        max_rows=max_rows,
    )


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [2, KERNEL_ROWS + 1])
def test_a_decoder_on_a_gpu_predicts_what_it_predicts_on_a_cpu(weights: Storage, rows: int) -> None:
    prior = random_prior()
    text = torch.randint(0, LAYOUT.num_text_ids, (rows, LAYOUT.text_len))
    codes = torch.randint(0, LAYOUT.codebook_size, (rows, LAYOUT.image_len))
    exact = prior(text, codes).image_logits
    decoder = Decoder(prior.cuda(), weights=weights)
    cache = decoder.new_cache(rows)
    logits = [decoder.prefill(text.cuda(), cache, codes[:, :3].cuda())]
    for position in range(3, LAYOUT.image_len - 1):
        logits.append(decoder.decode(codes[:, position].cuda(), position, cache)[:, None])
    error = (torch.cat(logits, dim=1).cpu() - exact).square().mean().sqrt() / exact.std()
    assert error <= {"fp32": 1e-4, "bf16": 0.05, "int8": 0.1}[weights]


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("forced", [False, True])
def test_captured_steps_draw_what_the_loop_draws(
    weights: Storage, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, images = Decoder(random_prior().cuda(), weights=weights), list(range(len(MIXED)))
    captured = [sample(decoder, images, seed=seed, forced=forced) for seed in (0, 100, 0)]
    (step,) = graph._graphs[decoder].values()  # one graph has served three batches
    assert step._graph is not None
    monkeypatch.setattr(decode, "_captured", lambda decoder, state, position: None)
    eager = [sample(decoder, images, seed=seed, forced=forced) for seed in (0, 100, 0)]
    for one, other in zip(captured, eager, strict=True):
        assert torch.equal(one.codes, other.codes)
        torch.testing.assert_close(one.log_likelihood, other.log_likelihood, atol=1e-3, rtol=1e-4)
    assert not torch.equal(captured[0].codes, captured[1].codes)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_with_a_fixed_number_of_rows_an_image_is_the_same_alone_and_in_any_batch(weights: Storage) -> None:
    decoder = Decoder(random_prior().cuda(), weights=weights, row_independent=True)
    images = list(range(len(MIXED)))
    together = sample(decoder, images, max_rows=12)
    for batch in ([0], [4], [3, 1], [5, 2, 0]):
        apart = sample(decoder, batch, max_rows=12)
        for figures, whole in zip(apart, together, strict=True):
            torch.testing.assert_close(figures, whole[batch], atol=0, rtol=0, equal_nan=True)
