"""The whole objective: each term once, weighted and named; the schedules; the adversary apart."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from dvae.adversarial import AdversarialConfig
from dvae.losses import LossConfig, elbo_scale
from dvae.model import DiscreteVAE, DiscreteVAEConfig
from dvae.objective import Objective
from dvae.schedule import ScheduleConfig
from tessera.training.optim import OptimizerConfig

TINY = DiscreteVAEConfig(widths=(8, 16), blocks=(1, 1), levels=(4, 4), codebook_size=16, embedding_dim=4)
MIXED = LossConfig()
ADVERSARY = AdversarialConfig(weight=0.5, feature_matching=1.0, width=4, layers=2, start=0.5, ramp=0.0)


OFF = AdversarialConfig()


def objective(loss: LossConfig = MIXED, adversarial: AdversarialConfig = OFF) -> Objective:
    return Objective(loss=loss, schedule=ScheduleConfig(kl_share=0.0), adversarial=adversarial)


@pytest.mark.parametrize(
    ("quantizer", "names"),
    [
        ("fsq", {"l1", "l2"}),
        ("gumbel", {"l1", "l2", "kl"}),
        ("vq", {"l1", "l2", "commitment"}),
    ],
)
def test_the_total_is_the_weighted_sum_of_the_named_terms(quantizer: Any, names: set[str]) -> None:
    config = LossConfig(l1=0.5, l2=2.0, kl=3.0, commitment=0.1, codebook=0.7)
    model = DiscreteVAE(replace(TINY, quantizer=quantizer))
    losses = objective(config)(model, torch.rand(2, 3, 16, 24), progress=1.0)
    assert set(losses.terms) == names
    weights: dict[str, Any] = asdict(config)
    expected = sum(weights[name] * float(term.detach()) for name, term in losses.terms.items())
    assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-5)


def test_the_kl_is_per_pixel_value_and_follows_its_ramp() -> None:
    model = DiscreteVAE(replace(TINY, quantizer="gumbel")).eval()
    images = torch.rand(2, 3, 16, 24)
    ramped = Objective(loss=LossConfig(kl=6.6), schedule=ScheduleConfig(kl_share=0.5), adversarial=AdversarialConfig())
    early, late = (ramped(model, images, progress=progress) for progress in (0.25, 1.0))
    assert (early.schedule["kl_weight"], late.schedule["kl_weight"]) == pytest.approx((3.3, 6.6))
    raw = float(model(images).terms["kl"].detach())
    assert float(late.terms["kl"].detach()) == pytest.approx(raw * elbo_scale((16, 24)))
    assert float((late.total - early.total).detach()) == pytest.approx(3.3 * float(late.terms["kl"].detach()), rel=1e-3)


def test_one_backward_pass_serves_decoder_and_discriminator_each_with_its_own_terms() -> None:
    torch.manual_seed(0)
    model = DiscreteVAE(TINY)
    images = torch.rand(2, 3, 16, 16)
    together = objective(adversarial=ADVERSARY)
    losses = together(model, images, progress=1.0)
    assert {"generator", "feature_matching", "discriminator", "lecam"} <= set(losses.terms)
    losses.total.backward()
    reached = [parameter.grad for parameter in together.parameters()]
    assert reached and all(gradient is not None and gradient.abs().sum() > 0 for gradient in reached)
    alone = torch.autograd.grad(objective()(model, images, progress=1.0).total, model.last_layer)[0]
    assert not torch.allclose(model.last_layer.grad, alone), "the adversary reaches the decoder"  # type: ignore[arg-type]


def test_before_its_start_the_adversary_leaves_the_decoder_alone() -> None:
    torch.manual_seed(0)
    model = DiscreteVAE(TINY)
    images = torch.rand(2, 3, 16, 16)
    objective(adversarial=ADVERSARY)(model, images, progress=0.2).total.backward()
    alone = torch.autograd.grad(objective()(model, images, progress=0.2).total, model.last_layer)[0]
    torch.testing.assert_close(model.last_layer.grad, alone)


def test_the_discriminator_has_its_own_learning_rate() -> None:
    with_adversary = objective(adversarial=replace(ADVERSARY, learning_rate=2e-4))
    optimizer = with_adversary.build_optimizer(DiscreteVAE(TINY), OptimizerConfig(learning_rate=1e-3))
    apart = [group for group in optimizer.param_groups if group.get("apart")]
    assert [group["rate"] for group in apart] == [pytest.approx(0.2)]
    assert sum(p.numel() for p in apart[0]["params"]) == sum(p.numel() for p in with_adversary.parameters())
