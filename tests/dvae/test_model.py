"""The dVAE: shapes, pixel range, independence of batch and surroundings, errors, learning."""

from pathlib import Path

import pytest
import torch

from dvae.adversarial import AdversarialConfig
from dvae.losses import LossConfig
from dvae.model import DiscreteVAE, DiscreteVAEConfig, load
from dvae.objective import Objective
from dvae.pixels import Pixels
from dvae.schedule import ScheduleConfig
from tessera.config import to_plain
from tessera.errors import UserError
from tessera.model_folder import ModelFolder, write_part
from tessera.training.optim import OptimizerConfig, build_optimizer

TINY = DiscreteVAEConfig(widths=(16, 24), blocks=(1, 1), levels=(5, 4))
QUANTIZERS = ["fsq", "gumbel", "vq"]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize(("widths", "f"), [((16,), 4), ((16, 16), 8), ((16, 16, 16), 16)])
@pytest.mark.parametrize("pixels", ["rgb", "logit_laplace"])
def test_images_become_codes_and_codes_images(quantizer: str, widths: tuple[int, ...], f: int, pixels: Pixels) -> None:
    config = DiscreteVAEConfig(
        quantizer=quantizer,  # type: ignore[arg-type]
        widths=widths,
        blocks=(1,) * len(widths),
        levels=(5, 4),
        codebook_size=20,
        embedding_dim=8,
        pixels=pixels,
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


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_encoding_teaches_the_model_nothing(quantizer: str) -> None:
    config = DiscreteVAEConfig(widths=(16,), blocks=(1,), quantizer=quantizer, codebook_size=20)  # type: ignore[arg-type]
    vae = DiscreteVAE(config).train()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    images = torch.rand(2, 3, 16, 16)
    codes = vae.encode(images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    assert torch.equal(vae.eval().encode(images), codes)
    assert torch.equal(vae(images).codes, codes)


def test_codes_out_of_range_are_refused() -> None:
    vae = DiscreteVAE(TINY)
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 20\), the size of this codebook; got 0 to 20"):
        vae.decode(torch.tensor([[[0, 20]]]))


def test_sides_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="positive multiples of 8 pixels; got 32x30"):
        DiscreteVAE(TINY).encode(torch.rand(1, 3, 32, 30))
    with pytest.raises(ValueError, match=r"shape \[batch, 3, height, width\]; got \(3, 32, 32\)"):
        DiscreteVAE(TINY).encode(torch.rand(3, 32, 32))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
            r"floating-point numbers in \[0, 1\]; got torch.uint8: .*to_float",
        ),
        (torch.zeros(1, 1, 32, 32), r"shape \[batch, 3, height, width\]; got \(1, 1, 32, 32\)"),
        (torch.full((1, 3, 32, 32), torch.nan), r"finite numbers in \[0, 1\]; got nan to nan"),
        (torch.rand(1, 3, 32, 32).masked_fill(torch.rand(1, 3, 32, 32) > 0.99, torch.inf), "got .* to inf"),
        (torch.rand(1, 3, 32, 32) * 255, r"finite numbers in \[0, 1\]; got .* to 2\d\d"),
    ],
)
def test_pixels_that_are_none_are_refused(images: torch.Tensor, message: str) -> None:
    vae = DiscreteVAE(TINY)
    with pytest.raises(ValueError, match=message):
        vae.encode(images)
    with pytest.raises(ValueError, match=message):
        vae(images)


def test_codes_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"integers of shape \[batch, rows, columns\]; got torch.float32 \(1, 2, 2\)"):
        DiscreteVAE(TINY).decode(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"got torch.int64 \(2, 2\)"):
        DiscreteVAE(TINY).decode(torch.zeros(2, 2, dtype=torch.int64))


def test_the_papers_network_is_one_setting_away() -> None:
    config = DiscreteVAEConfig(
        network="paper",
        quantizer="gumbel",
        pixels="logit_laplace",
        patch_size=1,
        widths=(8, 16, 16, 32),
        blocks=(1, 1, 1, 1),
        codebook_size=32,
        embedding_dim=16,
        tied=False,
    )
    vae = DiscreteVAE(config).eval()
    images = torch.rand(2, 3, 32, 48)
    assert vae.decode(vae.encode(images)).shape == images.shape
    assert vae.encode(images).shape == (2, 4, 6)
    assert float(vae.quantizer.codebook.detach().std()) == pytest.approx(32**-0.5, rel=0.2)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="patch_size must be 1; got 4"):
        DiscreteVAEConfig(network="paper", quantizer="gumbel")


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


@pytest.mark.parametrize("quantizer", QUANTIZERS)
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
    objective = Objective(
        loss=LossConfig(kl=0.0), schedule=ScheduleConfig(temperature_share=0.5), adversarial=AdversarialConfig()
    )
    optimizer = build_optimizer(vae, OptimizerConfig(learning_rate=5e-3))
    for step in range(120):
        losses = objective(vae, images, progress=step / 120)
        optimizer.zero_grad()
        losses.total.backward()
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
