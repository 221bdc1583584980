"""The dVAE: shapes, pixel range, independence of batch and surroundings, errors, learning."""

from pathlib import Path

import pytest
import torch

from dvae.losses import PixelLoss, pixel_loss
from dvae.model import DiscreteVAE, DiscreteVAEConfig, load
from tessera.config import to_plain
from tessera.errors import UserError
from tessera.model_folder import ModelFolder, write_part
from tessera.training.optim import OptimizerConfig, build_optimizer

TINY = DiscreteVAEConfig(widths=(16, 24), blocks=(1, 1), levels=(5, 4))


@pytest.mark.parametrize("quantizer", ["fsq", "gumbel"])
@pytest.mark.parametrize(("widths", "f"), [((16,), 4), ((16, 16), 8), ((16, 16, 16), 16)])
@pytest.mark.parametrize("loss", ["mixed", "logit_laplace"])
def test_images_become_codes_and_codes_images(quantizer: str, widths: tuple[int, ...], f: int, loss: PixelLoss) -> None:
    config = DiscreteVAEConfig(
        quantizer=quantizer,  # type: ignore[arg-type]
        widths=widths,
        blocks=(1,) * len(widths),
        levels=(5, 4),
        codebook_size=20,
        embedding_dim=8,
        pixel_loss=loss,
    )
    vae = DiscreteVAE(config).eval()
    images = torch.rand(2, 3, 32, 48)
    codes = vae.encode(images)
    assert vae.downsampling == f
    assert codes.shape == (2, 32 // f, 48 // f)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < vae.codebook_size == 20
    decoded = vae.decode(codes)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1


def test_an_image_has_the_same_codes_alone_or_in_any_batch() -> None:
    torch.manual_seed(0)
    vae = DiscreteVAE(TINY).eval()
    images = torch.rand(5, 3, 32, 32)
    together = vae.encode(images)
    for index in range(5):
        assert torch.equal(vae.encode(images[index : index + 1])[0], together[index])


def test_codes_out_of_range_are_refused() -> None:
    vae = DiscreteVAE(TINY)
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 20\); got 0 to 20"):
        vae.decode(torch.tensor([[[0, 20]]]))


def test_sides_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="positive multiples of 8 pixels; got 32x30"):
        DiscreteVAE(TINY).encode(torch.rand(1, 3, 32, 30))
    with pytest.raises(ValueError, match=r"shape \[batch, 3, height, width\]; got \(3, 32, 32\)"):
        DiscreteVAE(TINY).encode(torch.rand(3, 32, 32))


def test_widths_and_blocks_must_pair_up() -> None:
    with pytest.raises(UserError, match="one entry per resolution"):
        DiscreteVAEConfig(widths=(16, 16), blocks=(1,))


def test_a_saved_dvae_loads_equal(tmp_path: Path) -> None:
    vae = DiscreteVAE(TINY).eval()
    write_part(tmp_path / "model", "dvae", config=to_plain(TINY), tensors=vae.state_dict())
    loaded = load(ModelFolder.open(tmp_path / "model"))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.encode(images), vae.encode(images))
    codes = vae.encode(images)
    assert torch.equal(loaded.decode(codes), vae.decode(codes))


@pytest.mark.parametrize("quantizer", ["fsq", "gumbel"])
def test_it_overfits_a_few_images(quantizer: str) -> None:
    torch.manual_seed(0)
    config = DiscreteVAEConfig(
        quantizer=quantizer,  # type: ignore[arg-type]
        widths=(16, 32),
        blocks=(1, 1),
        levels=(8, 5, 5),
        codebook_size=200,
        embedding_dim=16,
    )
    vae = DiscreteVAE(config)
    images = torch.nn.functional.interpolate(torch.rand(4, 3, 4, 4), size=(32, 32))
    optimizer = build_optimizer(vae, OptimizerConfig(learning_rate=5e-3))
    for step in range(120):
        result = vae(images, temperature=max(1 - step / 60, 1 / 16))
        loss = pixel_loss(result.output, images, "mixed")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vae.eval()
    error = (vae.decode(vae.encode(images)) - images).abs().mean()
    assert float(error) < 0.06


@pytest.mark.parametrize(("kernel_size", "first", "last"), [(1, 5, 6), (3, 3, 8)])
def test_codes_depend_on_their_neighborhood_only(kernel_size: int, first: int, last: int) -> None:
    """The codes of a flat background must not change with an object far away: the prior would have to predict that."""
    torch.manual_seed(0)
    config = DiscreteVAEConfig(
        widths=(16, 32),
        blocks=(1, 0),
        levels=(8, 5, 5, 5),
        encoder_kernel_size=kernel_size,  # type: ignore[arg-type]
    )
    vae = DiscreteVAE(config).eval()
    plain = torch.full((1, 3, 96, 96), 0.7)
    with_object = plain.clone()
    with_object[:, :, 40:56, 40:56] = torch.rand(1, 3, 16, 16)
    before, after = vae.encode(plain), vae.encode(with_object)
    assert len(before.unique()) == 1, "borders must not show either"
    changed = (before != after)[0].nonzero()
    assert len(changed) > 0
    assert changed.min() >= first
    assert changed.max() <= last
