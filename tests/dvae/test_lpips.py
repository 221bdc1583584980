"""LPIPS from files: equal to torchmetrics' with the same weights; files that hold something else are refused."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torchmetrics.functional.image.lpips import _LPIPS

from dvae.lpips import Lpips
from tessera.errors import UserError

CHANNELS = (64, 128, 256, 512, 512)


@pytest.fixture(scope="module")
def oracle() -> _LPIPS:
    """torchmetrics' own, with random weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        network = _LPIPS(pretrained=False, net="vgg", pnet_rand=True)
    weights = {}
    for name, weight in network.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator)
        if name.startswith("lin"):
            weights[name] = noise.abs()
        else:
            weights[name] = noise * (2 / weight[0].numel()) ** 0.5 if weight.dim() > 1 else 0.1 * noise
    for layer in range(5):  # the same five heads under their second names
        weights[f"lins.{layer}.model.1.weight"] = weights[f"lin{layer}.model.1.weight"]
    network.load_state_dict(weights, assign=True)
    return network


@pytest.fixture(scope="module")
def backbone_weights(oracle: _LPIPS) -> dict[str, Tensor]:
    weights = {
        f"features.{name.split('.', 2)[2]}": weight
        for name, weight in oracle.state_dict().items()
        if name.startswith("net.")
    }
    return {**weights, "classifier.0.weight": torch.zeros(2, 2)}


@pytest.fixture(scope="module")
def heads_weights(oracle: _LPIPS) -> dict[str, Tensor]:
    return {name: weight for name, weight in oracle.state_dict().items() if name.startswith("lin") and name[3] != "s"}


@pytest.fixture(scope="module")
def heads_file(heads_weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("heads") / "vgg.pth"
    torch.save(heads_weights, file)
    return file


@pytest.fixture(scope="module")
def backbone_file(backbone_weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("backbone") / "vgg16.safetensors"
    safetensors.torch.save_file(backbone_weights, file)
    return file


@pytest.fixture(scope="module")
def lpips(backbone_file: Path, heads_file: Path) -> Lpips:
    return Lpips(backbone=backbone_file, heads=heads_file)


def test_the_distance_and_its_gradient_are_those_of_torchmetrics(lpips: Lpips, oracle: _LPIPS) -> None:
    images, reconstruction = torch.rand(2, 3, 32, 48), torch.rand(2, 3, 32, 48)
    ours, theirs = (reconstruction.clone().requires_grad_() for _ in range(2))
    distance, expected = lpips(ours, images), oracle(theirs, images, normalize=True).flatten()
    torch.testing.assert_close(distance, expected, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(distance.sum(), ours)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), theirs)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-3)
    assert gradient.any()


def test_equal_pictures_have_no_distance_and_a_finite_gradient(lpips: Lpips) -> None:
    images = torch.rand(1, 3, 16, 16)
    reconstruction = images.clone().requires_grad_()
    distance = lpips(reconstruction, images)
    assert float(distance.detach()) == 0
    (gradient,) = torch.autograd.grad(distance.sum(), reconstruction)
    assert gradient.isfinite().all()


def test_the_weights_are_frozen_and_only_the_reconstruction_gets_a_gradient(lpips: Lpips) -> None:
    images, reconstruction = (torch.rand(1, 3, 16, 16, requires_grad=True) for _ in range(2))
    lpips(reconstruction, images).sum().backward()
    assert images.grad is None
    assert reconstruction.grad is not None
    assert len(list(lpips.parameters())) == 2 * 13 + 5
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    assert not lpips.training


def test_autocast_changes_nothing(lpips: Lpips) -> None:
    images, reconstruction = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        distance = lpips(reconstruction, images)
    assert distance.dtype == torch.float32
    assert torch.equal(distance, lpips(reconstruction, images))


def test_pth_and_safetensors_files_are_the_same(
    lpips: Lpips,
    backbone_weights: dict[str, Tensor],
    heads_weights: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    torch.save(backbone_weights, tmp_path / "vgg16.pth", _use_new_zipfile_serialization=False)  # torchvision's is old
    safetensors.torch.save_file(heads_weights, tmp_path / "vgg.safetensors")
    other = Lpips(backbone=tmp_path / "vgg16.pth", heads=tmp_path / "vgg.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), lpips.parameters(), strict=True))


def test_pictures_of_the_wrong_shape_are_refused(lpips: Lpips) -> None:
    for first, second in [((1, 3, 32, 32), (2, 3, 32, 32)), ((1, 1, 32, 32),) * 2, ((1, 3, 32, 15),) * 2]:
        with pytest.raises(ValueError, match="at least 16; got"):
            lpips(torch.rand(first), torch.rand(second))


def test_a_missing_file_is_named(heads_file: Path, backbone_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vgg16\.pth: no such file; it must hold torchvision's VGG16 weights"):
        Lpips(backbone=tmp_path / "vgg16.pth", heads=heads_file)
    with pytest.raises(UserError, match=r"vgg\.pth: no such file; it must hold LPIPS heads"):
        Lpips(backbone=backbone_file, heads=tmp_path / "vgg.pth")


@pytest.mark.parametrize("name", ["heads.pth", "heads.safetensors"])
def test_a_file_that_is_none_of_tensors_is_refused(backbone_file: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text("not a file of tensors")
    with pytest.raises(UserError, match=f"{name}: cannot be read as a file of tensors"):
        Lpips(backbone=backbone_file, heads=file)


def test_a_file_with_code_in_it_is_refused(backbone_file: Path, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(UserError, match=r"module\.pth: cannot be read as a file of tensors") as error:
        Lpips(backbone=backbone_file, heads=tmp_path / "module.pth")
    assert "\n" not in str(error.value)


def test_other_weights_are_refused(
    backbone_file: Path, heads_file: Path, heads_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "other.pth"
    with pytest.raises(UserError, match=r"features\.0\.weight must have shape \(64, 3, 3, 3\), it is not there"):
        Lpips(backbone=heads_file, heads=backbone_file)
    torch.save({**heads_weights, "lin2.model.1.weight": torch.ones(1, 192, 1, 1)}, file)
    with pytest.raises(UserError, match=r"shape \(1, 256, 1, 1\), it has \(1, 192, 1, 1\)"):
        Lpips(backbone=backbone_file, heads=file)
    torch.save({**heads_weights, "lin2.model.1.weight": -heads_weights["lin2.model.1.weight"]}, file)
    with pytest.raises(UserError, match="must not be negative"):
        Lpips(backbone=backbone_file, heads=file)
    torch.save([torch.ones(1)], file)
    with pytest.raises(UserError, match="it is not there"):
        Lpips(backbone=backbone_file, heads=file)
