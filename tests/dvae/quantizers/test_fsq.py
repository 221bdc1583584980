"""Finite scalar quantization: codes and bin centers are each other's inverse, the gradient passes straight through."""

import pytest
import torch

from dvae.quantizers.fsq import IFSQ_SLOPE, FiniteScalarQuantizer, FSQActivation


def test_every_code_is_looked_up_to_latents_that_quantize_to_it() -> None:
    quantizer = FiniteScalarQuantizer((4, 3, 5))
    codes = torch.arange(60).reshape(1, 6, 10)
    centers = quantizer.lookup(codes)
    latents = -torch.log(2 / (centers + 1) - 1) / IFSQ_SLOPE  # the inverse of the bound
    result = quantizer(latents)
    assert torch.equal(result.codes, codes)
    torch.testing.assert_close(result.embedding, centers)


def test_bins_are_filled_evenly_by_normal_latents() -> None:
    quantizer = FiniteScalarQuantizer((8,))
    latents = torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(quantizer(latents).codes.flatten(), minlength=8) / latents.numel()
    assert share.min() > 0.6 / 8
    assert share.max() < 1.4 / 8


@pytest.mark.parametrize("activation", ["ifsq", "tanh"])
def test_the_gradient_is_that_of_the_bound(activation: FSQActivation) -> None:
    quantizer = FiniteScalarQuantizer((5, 5), activation=activation)
    latents = torch.randn(2, 2, 3, 3, dtype=torch.float32, requires_grad=True)
    weights = torch.randn(2, 2, 3, 3)
    (quantizer(latents).embedding * weights).sum().backward()
    other = latents.detach().clone().requires_grad_()
    bound = torch.tanh(other) if activation == "tanh" else 2 * torch.sigmoid(IFSQ_SLOPE * other) - 1
    (bound * weights).sum().backward()
    torch.testing.assert_close(latents.grad, other.grad)


def test_extreme_latents_stay_in_range() -> None:
    quantizer = FiniteScalarQuantizer((4, 3))
    latents = torch.tensor([1e4, -1e4]).view(1, 2, 1, 1)
    assert quantizer(latents).codes.tolist() == [[[3]]]


def test_a_single_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(8, 1\)"):
        FiniteScalarQuantizer((8, 1))


@pytest.mark.parametrize("activation", ["ifsq", "tanh"])
def test_the_bound_decides_the_bin(activation: FSQActivation) -> None:
    quantizer = FiniteScalarQuantizer((4,), activation=activation)
    latents = torch.linspace(-3, 3, 61).view(1, 1, 1, -1)
    bound = torch.tanh(latents) if activation == "tanh" else 2 * torch.sigmoid(1.6 * latents) - 1
    assert torch.equal(quantizer.codes(latents), ((bound + 1) * 2).floor().long()[:, 0])
    assert torch.equal(quantizer(latents).codes, quantizer.codes(latents))
