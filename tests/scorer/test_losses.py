"""The contrastive loss equals what can be worked out by hand; pairs that fit by chance neither help nor hurt."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scorer.losses import contrastive_loss


def unit_vectors(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)), dim=1)


def none(count: int) -> Tensor:
    return torch.zeros(count, count, dtype=torch.bool)


def test_two_pairs_have_a_closed_form() -> None:
    angle, scale = 0.3, 7.0
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[math.cos(angle), math.sin(angle)], [0.0, 1.0]])
    a, b, c, d = (scale * value for value in (math.cos(angle), 0.0, math.sin(angle), 1.0))
    rows = math.log(math.exp(a) + math.exp(b)) - a + math.log(math.exp(c) + math.exp(d)) - d
    columns = math.log(math.exp(a) + math.exp(c)) - a + math.log(math.exp(b) + math.exp(d)) - d
    loss = contrastive_loss(images, texts, scale=torch.tensor(scale), not_negative=none(2))
    assert loss.item() == pytest.approx((rows + columns) / 4, abs=1e-6)


def test_vectors_that_say_nothing_cost_the_logarithm_of_the_batch() -> None:
    same = torch.ones(5, 1)
    loss = contrastive_loss(same, same, scale=torch.tensor(30.0), not_negative=none(5))
    assert loss.item() == pytest.approx(math.log(5), abs=1e-6)


def test_loss_is_symmetric_and_independent_of_the_order() -> None:
    images, texts, scale = unit_vectors(6, 0), unit_vectors(6, 1), torch.tensor(5.0)
    loss = contrastive_loss(images, texts, scale=scale, not_negative=none(6))
    assert torch.allclose(loss, contrastive_loss(texts, images, scale=scale, not_negative=none(6)))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.allclose(loss, contrastive_loss(images[order], texts[order], scale=scale, not_negative=none(6)))


def test_pairs_that_fit_by_chance_take_no_part() -> None:
    texts, scale = torch.eye(3), torch.tensor(4.0)
    images = unit_vectors(3, 0)[:, :3].requires_grad_()
    fits = none(3)
    fits[0, 2] = fits[2, 0] = fits[1, 1] = True  # on the diagonal it says nothing new
    (gradient,) = torch.autograd.grad(contrastive_loss(images, texts, scale=scale, not_negative=fits), images)
    assert gradient[0, 2] == 0
    assert gradient[2, 0] == 0
    assert (gradient.diagonal() < 0).all()
    assert contrastive_loss(images, texts, scale=scale, not_negative=torch.ones(3, 3, dtype=torch.bool)).item() == 0.0
