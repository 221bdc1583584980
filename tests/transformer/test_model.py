"""The prior: cached decoding equals the full pass, shapes and errors, learning."""

from dataclasses import asdict
from typing import Any

import pytest
import torch

from tessera.config import from_plain, to_plain
from tessera.errors import UserError
from tessera.training.optim import OptimizerConfig, build_optimizer
from transformer.attention import Backend
from transformer.cache import KVCache
from transformer.lit import prior_loss
from transformer.masks import MaskKind
from transformer.model import Prior, PriorConfig, SequenceLayout, rotary_angles

LAYOUT = SequenceLayout(text_len=5, grid_height=3, grid_width=4, text_vocab_size=20, codebook_size=17)


DIGITS = SequenceLayout(
    text_len=5, grid_height=3, grid_width=4, text_vocab_size=20, codebook_size=18, codebook_levels=(3, 3, 2)
)


def random_prior(
    attention: tuple[MaskKind, ...], *, layout: SequenceLayout = LAYOUT, backend: Backend = "auto", **options: Any
) -> Prior:
    sizes: dict[str, Any] = {"dim": 32, "depth": 3, "heads": 2, "kernel_size": 3, **options}
    prior = Prior(PriorConfig(layout=layout, attention=attention, **sizes), attention_backend=backend)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return prior.eval()


def random_inputs(batch: int, layout: SequenceLayout = LAYOUT) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(0, layout.num_text_ids, (batch, layout.text_len), generator=generator)
    return text, torch.randint(0, layout.codebook_size, (batch, layout.image_len), generator=generator)


def decoded_logits(prior: Prior, text: torch.Tensor, codes: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """The logits [B, I, K] of all codes, one position at a time."""
    logits = [prior.prefill(text, cache)]
    for position in range(prior.layout.image_len - 1):
        logits.append(prior.decode(codes[:, position], position, cache))
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize(
    "attention",
    [("full",), ("row",), ("column",), ("conv",), ("row", "column", "row", "row", "conv")],
    ids=lambda pattern: "-".join(pattern),
)
@pytest.mark.parametrize("layout", [LAYOUT, DIGITS], ids=["plain", "digits"])
def test_cached_decoding_equals_the_full_pass(attention: tuple[MaskKind, ...], layout: SequenceLayout) -> None:
    prior = random_prior(attention, layout=layout)
    text, codes = random_inputs(2)
    with torch.no_grad():
        expected = prior(text, codes).image_logits
    torch.testing.assert_close(decoded_logits(prior, text, codes, prior.new_cache(2)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key_value_heads", [0, 1, 2])
@pytest.mark.parametrize("grid", [(3, 4), (7, 5)], ids=lambda grid: "x".join(map(str, grid)))
@pytest.mark.parametrize(
    "options",
    [
        {"attention": ("full",)},
        {"attention": ("row",)},
        {"attention": ("row",), "row_mode": "own_row"},
        {"attention": ("column",)},
        *(
            {"attention": ("conv",), "conv_mode": mode, "kernel_size": size, "dilation": dilation}
            for mode in ("raster", "clip", "quadrant", "torus")
            for size, dilation in ((3, 1), (5, 1), (3, 2))
        ),
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_cached_decoding_equals_the_full_pass_for_every_variant(
    options: dict[str, Any], grid: tuple[int, int], key_value_heads: int
) -> None:
    layout = SequenceLayout(text_len=5, grid_height=grid[0], grid_width=grid[1], text_vocab_size=20, codebook_size=17)
    prior = random_prior(layout=layout, depth=2, heads=4, key_value_heads=key_value_heads, **options)
    text, codes = random_inputs(2, layout)
    with torch.no_grad():
        expected = prior(text, codes).image_logits
    torch.testing.assert_close(decoded_logits(prior, text, codes, prior.new_cache(2)), expected, atol=1e-5, rtol=1e-5)


def test_variants_of_the_masks_are_other_models() -> None:
    text, codes = random_inputs(2)
    variants: list[dict[str, Any]] = [
        {},
        {"row_mode": "own_row"},
        {"conv_mode": "clip"},
        {"dilation": 2},
        {"kernel_size": 5},
    ]
    with torch.no_grad():
        logits = [random_prior(("row", "conv"), **variant)(text, codes).image_logits for variant in variants]
    for place, one in enumerate(logits):
        assert not any(torch.allclose(one, other) for other in logits[:place]), variants[place]


def test_shared_keys_and_values_equal_repeated_ones() -> None:
    """Grouped-query attention is the plain one with each head's keys and values written down several times."""
    shared = random_prior(("row", "full"), heads=4, key_value_heads=2)
    plain = random_prior(("row", "full"), heads=4)
    weights = shared.state_dict()
    for name in [name for name in weights if name.endswith("query_key_value.weight")]:
        queries, keys, values = weights[name].unflatten(0, (-1, 8)).split([4, 2, 2])  # [heads, D, C]
        every = [queries, keys.repeat_interleave(2, dim=0), values.repeat_interleave(2, dim=0)]
        weights[name] = torch.cat(every).flatten(0, 1)
    plain.load_state_dict(weights)
    text, codes = random_inputs(2)
    with torch.no_grad():
        torch.testing.assert_close(shared(text, codes).image_logits, plain(text, codes).image_logits)
    assert shared.cache_bytes_per_row(torch.float32) * 2 == plain.cache_bytes_per_row(torch.float32)


def test_a_cache_is_as_large_as_its_masks_ask() -> None:
    prior = random_prior(("row", "column", "full", "conv"), depth=4, heads=4, key_value_heads=2)
    image_slots = 5 + 12 + 12 + 6  # of row, column, full and conv in a grid of 3 x 4
    numbers = 2 * 2 * 8 * (4 * 5 + image_slots)  # keys and values x heads x channels x slots
    assert prior.cache_bytes_per_row(torch.bfloat16) == 2 * numbers
    cache = prior.new_cache(3)
    assert cache.num_bytes == 3 * 4 * numbers
    assert [layer.keys.shape[2] for layer in cache.layers] == [10, 17, 17, 11]


def test_a_cache_in_bf16_stays_close() -> None:
    prior = random_prior(("row", "column", "conv"))
    text, codes = random_inputs(2)
    exact = decoded_logits(prior, text, codes, prior.new_cache(2))
    rounded = decoded_logits(prior, text, codes, prior.new_cache(2, dtype=torch.bfloat16))
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact).abs().max()) < 0.05 * float(exact.std())


@pytest.mark.parametrize("key_value_heads", [0, 1])
def test_autocast_stays_close(key_value_heads: int) -> None:
    """Autocast normalizes in fp32, so that queries and keys arrive in another dtype than values."""
    prior = random_prior(("row", "column", "conv"), key_value_heads=key_value_heads)
    text, codes = random_inputs(2)
    with torch.no_grad():
        exact = prior(text, codes).image_logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = prior(text, codes).image_logits
            decoded = decoded_logits(prior, text, codes, prior.new_cache(2))
    for logits in (rounded, decoded):
        assert 0 < float((logits - exact).abs().max()) < 0.2 * float(exact.std())


def test_the_backend_changes_nothing_but_how_attention_is_computed() -> None:
    text, codes = random_inputs(2)
    backends: list[Backend] = ["auto", "matmul", "sdpa", "reference"]
    priors = [random_prior(("row", "conv"), key_value_heads=1, backend=backend) for backend in backends]
    expected = priors[0](text, codes).image_logits
    for prior in priors[1:]:
        torch.testing.assert_close(prior(text, codes).image_logits, expected, atol=1e-5, rtol=1e-5)
        decoded = decoded_logits(prior, text, codes, prior.new_cache(2))
        torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)


def test_the_backend_that_was_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    prior = random_prior(("row", "full"), backend="triton", heads=1)
    text, codes = random_inputs(2)
    for work in (
        lambda: prior(text, codes),
        lambda: prior.prefill(text, prior.new_cache(2)),
        lambda: prior.decode(codes[:, 0], 0, prior.new_cache(2)),
    ):
        with pytest.raises(ValueError, match="backend triton needs"):
            work()


def test_the_forward_pass_compiles_as_one_graph() -> None:
    prior = random_prior(("row", "conv"), depth=2)
    text, codes = random_inputs(2)
    expected = prior(text, codes).image_logits
    prior.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(prior(text, codes).image_logits, expected)


def test_masks_are_no_part_of_the_weights() -> None:
    prior = random_prior(("row", "column", "full", "conv"), depth=4)
    assert {name for name, _ in prior.named_buffers()} == {"cos", "sin"}
    assert {name for name in prior.state_dict() if "mask" in name} == set()
    assert [mask.kind for mask in prior.masks] == ["row", "column", "full", "conv"]


def test_a_model_from_before_the_variants_of_masks_and_heads_is_the_same_today() -> None:
    """Configs of model folders name no keys that came later, and weights are named as they were."""
    old = {
        "layout": asdict(LAYOUT) | {"codebook_levels": []},
        "dim": 32,
        "depth": 3,
        "heads": 2,
        "attention": ["row", "column", "conv"],
        "kernel_size": 3,
        "mlp_ratio": 2.75,
        "rope_theta": 100.0,
    }
    config = from_plain(PriorConfig, old, source="config.yaml")
    prior = random_prior(("row", "column", "conv"))
    assert config == prior.config
    assert from_plain(PriorConfig, to_plain(config), source="config.yaml") == config
    shapes = {name: tuple(tensor.shape) for name, tensor in prior.state_dict().items()}
    of_a_block = {name: shape for name, shape in shapes.items() if name.startswith("blocks.2.")}
    assert of_a_block == {
        "blocks.2.norm_attention.weight": (32,),
        "blocks.2.attention.query_gain": (16,),
        "blocks.2.attention.key_gain": (16,),
        "blocks.2.attention.query_key_value.weight": (3 * 32, 32),
        "blocks.2.attention.project.weight": (32, 32),
        "blocks.2.norm_mlp.weight": (32,),
        "blocks.2.mlp.gate_up.weight": (2 * 96, 32),
        "blocks.2.mlp.down.weight": (32, 96),
    }


def test_candidates_share_one_prefilled_prompt() -> None:
    prior = random_prior(("row", "full"))
    text, codes = random_inputs(2)
    shared = prior.new_cache(2)
    prior.prefill(text, shared)
    index = torch.tensor([1, 0, 1])
    expanded = shared.expand(index)
    alone = prior.new_cache(3)
    prior.prefill(text[index], alone)
    first = torch.tensor([3, 4, 5])
    torch.testing.assert_close(prior.decode(first, 0, expanded), prior.decode(first, 0, alone))
    for layer in shared.layers:
        assert not layer.keys[:, :, LAYOUT.text_len :].any(), "decoding candidates must leave the prompt's cache alone"


def test_null_text_is_what_an_empty_caption_becomes() -> None:
    from tessera.text_tokenizer import TextTokenizer

    tokenizer = TextTokenizer.train(["a red star", "two blue rings"], vocab_size=300)
    layout = SequenceLayout(text_len=6, text_vocab_size=tokenizer.vocab_size)
    prior = Prior(PriorConfig(layout=layout, dim=16, depth=1, heads=2))
    assert torch.equal(prior.null_text_ids()[None], tokenizer.encode_batch([""], text_len=6))


def test_a_new_prior_predicts_uniformly() -> None:
    prior = Prior(PriorConfig(layout=LAYOUT, dim=32, depth=2, heads=2))
    text, codes = random_inputs(2)
    with torch.no_grad():
        output = prior(text, codes)
    assert output.text_logits.shape == (2, LAYOUT.text_len - 1, LAYOUT.num_text_ids)
    assert output.image_logits.shape == (2, LAYOUT.image_len, LAYOUT.codebook_size)
    loss = prior_loss(output, text, codes, text_vocab_size=LAYOUT.text_vocab_size)
    assert float(loss.image) == pytest.approx(torch.tensor(float(LAYOUT.codebook_size)).log().item(), abs=1e-5)


def test_certain_pads_are_left_out_of_the_text_loss() -> None:
    prior = random_prior(("full",))
    pads = prior.null_text_ids()
    text, codes = random_inputs(1)
    text[0] = pads
    text[0, :2] = torch.tensor([3, 4])
    with torch.no_grad():
        output = prior(text, codes)
    loss = prior_loss(output, text, codes, text_vocab_size=LAYOUT.text_vocab_size)
    log_probability = output.text_logits[0].log_softmax(dim=-1)
    expected = -(log_probability[0, 4] + log_probability[1, pads[2]]) / 2  # the second token, and the end
    assert float(loss.text) == pytest.approx(float(expected), rel=1e-5)
    assert float(loss.total) == pytest.approx(float(loss.text) / 8 + 7 * float(loss.image) / 8, rel=1e-6)


def test_rotary_angles_are_relative_within_text_and_within_the_image() -> None:
    angles = rotary_angles(LAYOUT, 16, 100.0)
    text_step = angles[1] - angles[0]
    torch.testing.assert_close(angles[4] - angles[3], text_step)
    start, width = LAYOUT.text_len, LAYOUT.grid_width
    down = angles[start + width] - angles[start]
    right = angles[start + 1] - angles[start]
    torch.testing.assert_close(angles[start + 2 * width + 3] - angles[start], 2 * down + 3 * right)
    torch.testing.assert_close(down + right, text_step)


def test_wrong_shapes_name_expected_and_got() -> None:
    prior = random_prior(("full",))
    text, codes = random_inputs(2)
    with pytest.raises(ValueError, match=r"image_codes must have shape \[batch, 12\]; got \(2, 11\)"):
        prior(text, codes[:, :-1])
    with pytest.raises(ValueError, match=r"position must lie in \[0, 11\); got 11"):
        prior.decode(codes[:, 0], 11, prior.new_cache(2))


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="dim=30, heads=4"):
        PriorConfig(dim=30, heads=4)
    with pytest.raises(UserError, match=r"key_value_heads must divide heads.* got key_value_heads=3, heads=4"):
        PriorConfig(heads=4, key_value_heads=3)
    with pytest.raises(UserError, match="got key_value_heads=8, heads=4"):
        PriorConfig(heads=4, key_value_heads=8)
    with pytest.raises(UserError, match="got key_value_heads=-1, heads=4"):
        PriorConfig(heads=4, key_value_heads=-1)
    with pytest.raises(UserError, match="kernel_size must be odd and positive; got 4"):
        PriorConfig(attention=("conv",), kernel_size=4)
    with pytest.raises(UserError, match="dilation must be at least 1; got 0"):
        PriorConfig(attention=("conv",), dilation=0)
    with pytest.raises(UserError, match=r"product of layout.codebook_levels must be .* got \(8, 5\) and 1024"):
        SequenceLayout(codebook_size=1024, codebook_levels=(8, 5))


def test_the_prior_overfits_a_few_images() -> None:
    torch.manual_seed(0)
    prior = Prior(PriorConfig(layout=LAYOUT, dim=32, depth=2, heads=2, attention=("row", "column")))
    text, codes = random_inputs(4)
    optimizer = build_optimizer(prior, OptimizerConfig(learning_rate=1e-2))
    for _ in range(80):
        loss = prior_loss(prior(text, codes), text, codes, text_vocab_size=LAYOUT.text_vocab_size)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert float(loss.image.detach()) < 0.1
    cache = prior.new_cache(4)
    logits = prior.eval().prefill(text, cache)
    sampled = [logits.argmax(dim=1)]
    for position in range(LAYOUT.image_len - 1):
        sampled.append(prior.decode(sampled[-1], position, cache).argmax(dim=1))
    assert torch.equal(torch.stack(sampled, dim=1), codes)
