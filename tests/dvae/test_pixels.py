"""Pixels in all their forms: each conversion and its inverse, and what is refused."""

import pytest
import torch

from dvae.pixels import out_channels, squeeze_pixels, stretch_pixels, to_float, to_pixels, to_uint8


def test_bytes_survive_the_way_to_floats_and_back() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    floats = to_float(images)
    assert (floats.shape, floats.dtype) == ((1, 3, 16, 16), torch.float32)
    assert (float(floats.min()), float(floats.max())) == (0, 1)
    assert torch.equal(to_uint8(floats), images)
    assert to_uint8(torch.full((1, 3, 1, 1), 7.0)).flatten().tolist() == [255] * 3


def test_pixels_survive_the_squeeze_and_the_likelihoods_best_location() -> None:
    images = torch.rand(1, 3, 4, 4)
    squeezed = squeeze_pixels(images)
    assert float(squeezed.min()) >= 0.1 and float(squeezed.max()) <= 0.9
    torch.testing.assert_close(stretch_pixels(squeezed), images)
    output = torch.cat([torch.logit(squeezed), torch.zeros(1, 3, 4, 4)], dim=1)
    assert output.shape[1] == out_channels("logit_laplace")
    torch.testing.assert_close(to_pixels(output, "logit_laplace"), images, atol=1e-5, rtol=0)


def test_floats_for_bytes_and_bytes_for_floats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 images \[batch, height, width, 3\]; got torch.float32 \[1, 4, 4, 3\]"):
        to_float(torch.rand(1, 4, 4, 3))
    with pytest.raises(ValueError, match=r"got torch.uint8 \[1, 3, 4, 4\]"):
        to_float(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"floating-point images \[batch, 3, height, width\]; got torch.uint8"):
        to_uint8(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
