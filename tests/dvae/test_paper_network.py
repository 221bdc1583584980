"""The paper's network: sizes, initialization, precision, gradients. That it computes what the published modules compute
is shown in test_import_openai.py, where both hold the same weights.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dvae.paper_network import BottleneckBlock, PaperDecoder, PaperEncoder
from dvae.pixels import squeeze_pixels
from tessera.errors import UserError
from tessera.training.optim import OptimizerConfig, build_optimizer

SMALL: dict[str, Any] = {"widths": (8, 16, 32), "blocks": (1, 2, 1)}


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small_encoder() -> PaperEncoder:
    return PaperEncoder(**SMALL, codebook_size=24)


def small_decoder() -> PaperDecoder:
    return PaperDecoder(**SMALL, embedding_dim=12, out_channels=6)


def test_the_paper_s_sizes_have_the_paper_s_number_of_parameters() -> None:
    sizes: dict[str, Any] = {"widths": (256, 512, 1024, 2048), "blocks": (2, 2, 2, 2)}
    with torch.device("meta"):
        encoder = PaperEncoder(**sizes, codebook_size=8192)
        decoder = PaperDecoder(**sizes, embedding_dim=128, out_channels=6)
    codebook = 8192 * 128
    assert num_parameters(encoder) == 53_786_240
    assert num_parameters(decoder) + codebook == 43_829_766


@pytest.mark.parametrize("n_hid", [64, 256])
def test_parameters_are_as_many_as_in_the_published_modules(n_hid: int) -> None:
    dall_e = pytest.importorskip("dall_e")
    widths = (n_hid, 2 * n_hid, 4 * n_hid, 8 * n_hid)
    with torch.device("meta"):
        encoder = PaperEncoder(widths=widths, blocks=(3, 3, 3, 3), codebook_size=512)
        decoder = PaperDecoder(widths=widths, blocks=(3, 3, 3, 3), embedding_dim=96, out_channels=6)
    sizes = {"n_hid": n_hid, "n_blk_per_group": 3, "vocab_size": 512, "device": torch.device("meta")}
    assert num_parameters(encoder) == num_parameters(dall_e.Encoder(**sizes))
    assert num_parameters(decoder) + 512 * 96 == num_parameters(dall_e.Decoder(**sizes, n_init=96))


def test_non_square_images_become_logits_and_embeddings_become_channels() -> None:
    assert small_encoder()(torch.rand(2, 3, 16, 24)).shape == (2, 24, 4, 6)
    assert small_decoder()(torch.randn(2, 12, 4, 6)).shape == (2, 6, 16, 24)


def test_a_residual_path_counts_by_its_gain() -> None:
    block = BottleneckBlock(8, 8, kernel_sizes=(3, 3, 3, 1), gain=1 / 64)
    nn.init.zeros_(block.conv4.weight)
    nn.init.constant_(block.conv4.bias, 2.0)  # type: ignore[arg-type]
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(block(x), x + 2 / 64)


def test_the_gain_is_one_over_the_square_of_the_number_of_blocks() -> None:
    for network in (small_encoder(), small_decoder()):
        gains = {block.gain for block in network.modules() if isinstance(block, BottleneckBlock)}
        assert gains == {1 / 16}


def test_images_are_squeezed_away_from_zero_and_one() -> None:
    encoder = small_encoder()
    seen: list[Tensor] = []
    encoder.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.rand(1, 3, 8, 8)
    encoder(images)
    assert torch.equal(seen[0], squeeze_pixels(images))


def test_weights_start_at_one_over_the_root_of_the_fan_in_and_biases_at_zero() -> None:
    sizes: dict[str, Any] = {"widths": (32, 64), "blocks": (1, 1)}
    for network in (PaperEncoder(**sizes, codebook_size=64), PaperDecoder(**sizes, embedding_dim=64, out_channels=6)):
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                assert not parameter.any(), name
            else:
                fan_in = parameter.shape[1] * parameter.shape[2] * parameter.shape[3]
                assert abs(float(parameter.detach().std()) * fan_in**0.5 - 1) < 4 / (2 * parameter.numel()) ** 0.5, name


def test_under_autocast_the_logits_alone_stay_in_full_precision() -> None:
    encoder, decoder = small_encoder(), small_decoder()
    dtypes: dict[str, torch.dtype] = {}
    for network in (encoder, decoder):
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Conv2d):
                key = f"{type(network).__name__}.{name}"
                layer.register_forward_hook(lambda _, __, output, key=key: dtypes.update({key: output.dtype}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoder(torch.rand(1, 3, 8, 8))
        decoder(torch.randn(1, 12, 2, 2))
    assert dtypes.pop("PaperEncoder.vocabulary_head") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_channels_last_memory_gives_the_same_numbers() -> None:
    for network, x in ((small_encoder(), torch.rand(2, 3, 16, 8)), (small_decoder(), torch.randn(2, 12, 4, 2))):
        expected = network(x)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        found = network(x.contiguous(memory_format=torch.channels_last))
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_every_parameter_learns() -> None:
    for network, x in ((small_encoder(), torch.rand(2, 3, 16, 8)), (small_decoder(), torch.randn(2, 12, 4, 2))):
        network(x).square().mean().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name


def test_the_optimizer_takes_stem_and_heads_for_the_ends_and_all_else_for_hidden() -> None:
    network = nn.ModuleDict({"encoder": small_encoder(), "decoder": small_decoder()})
    optimizer = build_optimizer(network, OptimizerConfig())
    hidden = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    kernels = {name: parameter for name, parameter in network.named_parameters() if parameter.dim() == 4}
    ends = {name for name, parameter in kernels.items() if id(parameter) not in hidden}
    assert ends == {"encoder.stem.weight", "encoder.vocabulary_head.weight", "decoder.pixel_head.weight"}
    assert len(hidden) == len(kernels) - len(ends)


@pytest.mark.parametrize(
    ("widths", "blocks", "message"),
    [
        ((8, 16), (1,), r"got widths=\(8, 16\), blocks=\(1,\)"),
        ((8, 18), (1, 1), r"a multiple of 4, .* got widths=\(8, 18\)"),
        ((8, 16), (1, 0), r"at least one block per resolution; got blocks=\(1, 0\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(widths: tuple[int, ...], blocks: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PaperEncoder(widths=widths, blocks=blocks, codebook_size=24)
    with pytest.raises(UserError, match=message):
        PaperDecoder(widths=widths, blocks=blocks, embedding_dim=12, out_channels=6)
