"""What training a dVAE takes: counted parameters, and speed and memory that follow from the settings."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dvae.adversarial import AdversarialConfig
from dvae.model import DiscreteVAE, DiscreteVAEConfig
from dvae.train import TrainConfig
from recipes.estimate_dvae import Estimate, Parameters, count_parameters, estimate, estimate_lines
from recipes.estimate_timing import TimedBatch
from tessera.config import load
from tessera.data.config import DataConfig
from tessera.errors import UserError
from tessera.training.run import TrainerConfig

TINY = TrainConfig(
    data=DataConfig(image_size=(16, 24)),
    model=DiscreteVAEConfig(widths=(8, 16), blocks=(0, 1), levels=(4, 4)),
    trainer=TrainerConfig(device="cpu", precision="fp32", batch_size=4, max_steps=100),
)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.estimate_timing._SECONDS", 0.02)
    monkeypatch.setattr("recipes.estimate_timing._ENOUGH_SECONDS", 3600.0)  # however busy the machine is


def test_the_papers_network_has_the_papers_parameters() -> None:
    config = load(TrainConfig, ["configs/dvae/openai.yaml"], prog="tessera")
    with torch.device("meta"):
        found = count_parameters(DiscreteVAE(config.model))
    assert round(found.encoder / 1e6, 1) == 53.8
    assert round((found.quantizer + found.decoder) / 1e6, 1) == 43.8


def test_everything_is_counted_and_timed() -> None:
    found = estimate(TINY)
    vae = DiscreteVAE(TINY.model)
    assert found.parameters.total == sum(parameter.numel() for parameter in vae.parameters())
    assert found.measured_batch == 4
    assert min(found.train_images_per_second, found.encode_images_per_second, found.decode_images_per_second) > 0
    # weights, gradients, averages, one or two states of the optimizer
    assert 4 * 4 * found.parameters.total <= found.state_gib * 2**30 <= 5.1 * 4 * found.parameters.total
    assert found.discriminator == 0


def test_activations_grow_with_the_picture() -> None:
    small = estimate(TINY).activations_gib
    large = estimate(replace(TINY, data=DataConfig(image_size=(32, 48)))).activations_gib
    assert large == pytest.approx(4 * small, rel=0.15)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_grow_with_the_batch_and_weights_do_not(precision: Any) -> None:
    wide = replace(TINY, model=DiscreteVAEConfig(widths=(64, 128), blocks=(1, 1), levels=(4, 4)))

    def activations(batch_size: int) -> float:
        trainer = replace(TINY.trainer, batch_size=batch_size, precision=precision)
        return estimate(replace(wide, trainer=trainer)).activations_gib

    one, two, four = (activations(batch_size) for batch_size in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=1e-6)
    if precision == "bf16":
        assert two < 1.9 * one, "weights in bf16 are kept once, however many pictures there are"


def test_a_batch_in_parts_keeps_the_activations_of_one_part() -> None:
    def activations(batch_size: int, accumulate: int) -> float:
        trainer = replace(TINY.trainer, batch_size=batch_size, accumulate=accumulate)
        return estimate(replace(TINY, trainer=trainer)).activations_gib

    assert activations(6, 3) == pytest.approx(activations(2, 1))
    assert activations(6, 3) < 0.5 * activations(6, 1)


def test_a_step_takes_all_parts_of_its_batch_and_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def timed_batch(work_on: Any, device: torch.device, *, most: int, sample: str) -> TimedBatch:
        asked.append(most)
        return TimedBatch(most, 3.0)

    monkeypatch.setattr("recipes.estimate_dvae.timed_batch", timed_batch)
    monkeypatch.setattr("recipes.estimate_dvae.seconds_of_update", lambda optimizer, device, clip_norm: 1.0)
    found = estimate(replace(TINY, trainer=replace(TINY.trainer, batch_size=8, accumulate=4)))
    assert asked == [2], "no more at once than training takes"
    assert found.train_images_per_second == pytest.approx(8 / (4 * 3.0 + 1.0))


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 3 parts"):
        estimate(replace(TINY, trainer=replace(TINY.trainer, accumulate=3)))


def test_a_discriminator_is_counted_and_not_averaged() -> None:
    judged = replace(TINY, adversarial=AdversarialConfig(weight=0.1, width=8, layers=2))
    found, without = estimate(judged), estimate(replace(judged, optim=replace(judged.optim, ema_horizon=0.0)))
    assert found.discriminator > 0
    assert found.activations_gib > estimate(TINY).activations_gib
    averages = (found.state_gib - without.state_gib) * 2**30
    assert averages == pytest.approx(4 * found.parameters.total), "as `tessera.training.averaging` holds of `model`"


def test_the_lines_say_what_a_user_asks() -> None:
    found = Estimate(
        parameters=Parameters(1_000, 20, 3_000),
        discriminator=0,
        measured_batch=4,
        train_images_per_second=10.0,
        encode_images_per_second=50.0,
        decode_images_per_second=40.0,
        state_gib=0.25,
        activations_gib=2.0,
    )
    text = "\n".join(estimate_lines(TINY, found))
    assert "16x24 pixels as 2x3 of 16 codes (f = 8), 24 bits" in text
    assert "4,020: encoder 1,000, quantizer 20, decoder 3,000" in text
    assert "100 steps of 4 take about 40 s" in text
    assert "memory      about 3.5 GiB (estimated): weights and optimizer 0.25, activations of 4 at once 2.00" in text
    limited = replace(TINY, trainer=replace(TINY.trainer, budget_seconds=30.0))
    assert "trainer.budget_seconds ends it after 30 s" in "\n".join(estimate_lines(limited, found))
