"""A whole prior on the sparse kernels, under Triton's interpreter: it equals the prior on plain matrix products."""

import pytest
import torch

from transformer.masks import ConvMode
from transformer.model import Prior, PriorConfig, SequenceLayout

pytest.importorskip("triton")

pytestmark = pytest.mark.interpreter

LAYOUT = SequenceLayout(text_len=5, grid_height=3, grid_width=4, text_vocab_size=20, codebook_size=17)


def priors(*, conv_mode: ConvMode = "raster", key_value_heads: int = 0) -> tuple[Prior, Prior]:
    """Equal weights, on the sparse kernels and on matrix products."""
    config = PriorConfig(
        layout=LAYOUT,
        dim=64,
        depth=3,
        heads=2,
        key_value_heads=key_value_heads,
        attention=("row", "column", "conv"),
        conv_mode=conv_mode,
        kernel_size=3,
    )
    sparse, plain = Prior(config, attention_backend="triton"), Prior(config, attention_backend="matmul")
    with torch.no_grad():
        for one, other in zip(sparse.parameters(), plain.parameters(), strict=True):
            one.copy_(torch.randn(one.shape) * 0.2)
            other.copy_(one)
    return sparse, plain


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(0, LAYOUT.num_text_ids, (2, LAYOUT.text_len))
    return text, torch.randint(0, LAYOUT.codebook_size, (2, LAYOUT.image_len))


@pytest.mark.parametrize(("conv_mode", "key_value_heads"), [("raster", 0), ("torus", 1)])
def test_logits_and_gradients_are_equal(conv_mode: ConvMode, key_value_heads: int) -> None:
    sparse, plain = priors(conv_mode=conv_mode, key_value_heads=key_value_heads)
    text, codes = inputs()
    outputs = []
    for prior in (sparse, plain):
        output = prior(text, codes)
        output.image_logits.square().mean().backward()
        outputs.append(output.image_logits)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    for one, other in zip(sparse.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
def test_decoding_is_equal_with_the_position_as_a_number_or_a_tensor(on_device: bool) -> None:
    sparse, plain = priors(key_value_heads=1)
    text, codes = inputs()
    caches = sparse.new_cache(2), plain.new_cache(2)
    sparse.prefill(text, caches[0])
    plain.prefill(text, caches[1])
    for position in range(LAYOUT.image_len - 1):
        where = torch.tensor([position], dtype=torch.int32) if on_device else position
        got = sparse.decode(codes[:, position], where, caches[0])
        wanted = plain.decode(codes[:, position], position, caches[1])
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_decoding_says_what_does_not_fit_the_cache() -> None:
    from transformer.attention import decode_attention

    sparse, _ = priors()
    layer = sparse.new_cache(2).layers[0]
    query, key, value = torch.randn(3, 2, 2, 1, 32)
    with pytest.raises(ValueError, match=r"query \[2, a multiple of 2, 1, 32\] and key and value \[2, 2, 1, 32\]"):
        decode_attention(query, key[:, :1], value[:, :1], layer, 5, backend="triton")
    with pytest.raises(ValueError, match="last dimension of key must be contiguous"):
        strided = torch.randn(2, 2, 32, 1).transpose(2, 3)
        decode_attention(query, torch.randn(2, 2, 1, 64)[..., ::2], strided, layer, 5, backend="triton")
    with pytest.raises(ValueError, match=r"must be int32 \[1\] or \[2\] on cpu; got torch.int64 \[1\]"):
        decode_attention(query, key, value, layer, torch.tensor([5]), backend="triton")
    with pytest.raises(ValueError, match=r"position must lie in \[0, 17\); got 17"):
        decode_attention(query, key, value, layer, 17, backend="triton")
