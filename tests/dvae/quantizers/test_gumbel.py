"""The relaxed categorical: its KL against closed forms, its limits, its hard codes."""

import math

import pytest
import torch

from dvae.losses import elbo_scale
from dvae.quantizers.gumbel import GumbelQuantizer, kl_to_uniform


def test_kl_is_zero_for_uniform_and_log_k_for_certain_logits() -> None:
    assert float(kl_to_uniform(torch.zeros(2, 16, 3, 3))) == pytest.approx(0, abs=1e-6)
    certain = torch.zeros(2, 16, 3, 5)
    certain[:, 7] = 100.0
    assert float(kl_to_uniform(certain)) == pytest.approx(15 * math.log(16), rel=1e-5)


def test_kl_matches_the_closed_form_of_two_codes() -> None:
    logit = 1.3
    p = 1 / (1 + math.exp(-logit))
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    logits = torch.tensor([logit, 0.0]).view(1, 2, 1, 1)
    assert float(kl_to_uniform(logits)) == pytest.approx(expected, rel=1e-5)


def test_kl_does_not_depend_on_the_batch_size() -> None:
    logits = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    values = [float(kl_to_uniform(logits.expand(batch, -1, -1, -1))) for batch in (1, 2, 8)]
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert values[2] == pytest.approx(values[0], rel=1e-6)


def test_the_papers_weight_is_beta_over_192_per_position() -> None:
    # f = 8: one grid position stands for 8 * 8 * 3 = 192 pixel values
    positions = (256 // 8) ** 2
    assert 6.6 * elbo_scale((256, 256)) * positions == pytest.approx(6.6 / 192)


def test_cold_samples_are_single_codes_and_follow_the_distribution() -> None:
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(4, 4)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.eye(4))
    probability = torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits = probability.log().view(1, 4, 1, 1).expand(1, 4, 100, 100)
    relaxed = quantizer.train()(logits, temperature=0.01).embedding  # with this codebook, the weights themselves
    assert (relaxed.detach().max(dim=1).values > 0.99).float().mean() > 0.95
    torch.testing.assert_close(relaxed.detach().mean(dim=(0, 2, 3)), probability, atol=0.02, rtol=0)


def test_evaluation_is_the_hard_argmax() -> None:
    quantizer = GumbelQuantizer(6, 3).eval()
    logits = torch.randn(2, 6, 4, 4)
    result = quantizer(logits)
    assert torch.equal(result.codes, logits.argmax(dim=1))
    torch.testing.assert_close(result.embedding, quantizer.lookup(result.codes))


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be positive; got 0"):
        GumbelQuantizer(4, 2)(torch.zeros(1, 4, 1, 1), temperature=0)


@pytest.mark.parametrize("tied", [False, True])
def test_the_relaxed_gradient_is_that_of_finite_differences(tied: bool) -> None:
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(5, 3, tied=tied).train()
    latents = torch.randn(1, quantizer.latent_dim, 2, 2, requires_grad=True)
    weights = torch.randn(1, 3, 2, 2)

    def loss(values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)  # the same noise every time
        result = quantizer(values, temperature=0.7)
        return (result.embedding * weights).sum() + result.terms["kl"]

    (gradient,) = torch.autograd.grad(loss(latents), latents)
    direction = torch.randn_like(latents)
    step = 1e-2
    with torch.no_grad():
        slope = (loss(latents + step * direction) - loss(latents - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=2e-2, abs=1e-3)


def test_tied_logits_are_cosines_and_the_nearest_embedding_wins() -> None:
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(32, 4, tied=True).eval()
    latents = torch.randn(2, 4, 3, 3)
    logits = quantizer.logits(latents).detach()
    scale = float(quantizer.log_scale.detach().exp())  # type: ignore[union-attr]
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, 4)
    cosines = torch.cosine_similarity(vectors[:, None], quantizer.codebook.detach()[None], dim=-1)
    torch.testing.assert_close(logits.permute(0, 2, 3, 1).reshape(-1, 32), scale * cosines)
    assert torch.equal(quantizer.codes(latents).flatten(), cosines.argmax(dim=1))
    torch.testing.assert_close(quantizer.logits(7 * latents).detach(), logits, msg="length says nothing")


def test_tied_embeddings_have_unit_variance_and_are_looked_up_as_decoded() -> None:
    quantizer = GumbelQuantizer(32, 4, tied=True).eval()
    result = quantizer(torch.randn(1, 4, 5, 5))
    torch.testing.assert_close(result.embedding, quantizer.lookup(result.codes))
    torch.testing.assert_close(result.embedding.detach().square().mean(dim=1), torch.ones(1, 5, 5))


def test_encoding_draws_nothing() -> None:
    quantizer = GumbelQuantizer(16, 4, tied=True).train()
    before = torch.get_rng_state()
    quantizer.codes(torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)
