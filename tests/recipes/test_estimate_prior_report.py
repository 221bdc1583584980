"""The lines about a prior's training: what they say, and whether it is measured or estimated."""

from dataclasses import replace

import pytest

from recipes.estimate_prior_report import Question, measure_step, prior_lines
from tessera.errors import UserError
from tessera.precision import describe_hardware
from tessera.training.run import TrainerConfig
from transformer.model import PriorConfig, SequenceLayout
from transformer.train import TrainConfig

TINY = TrainConfig(
    model=PriorConfig(
        dim=16,
        depth=2,
        heads=2,
        layout=SequenceLayout(text_len=4, grid_height=2, grid_width=3, text_vocab_size=20, codebook_size=30),
    ),
    trainer=TrainerConfig(device="cpu", precision="fp32", batch_size=8, max_steps=1000),
)
H200 = Question(device_flops=989e12, device_memory_gib=139.0)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.estimate_timing._SECONDS", 0.0)
    monkeypatch.setattr("recipes.estimate_timing._ENOUGH_SECONDS", 3600.0)  # however busy the machine is


def text_of(config: TrainConfig, question: Question | None = None) -> str:
    return "\n".join(prior_lines(config, question or Question()))


def with_trainer(**settings: object) -> TrainConfig:
    return replace(TINY, trainer=replace(TINY.trainer, **settings))  # type: ignore[arg-type]


def test_a_small_prior_is_measured_here() -> None:
    text = text_of(TINY)
    assert "s per step (measured: forward and backward with 8 at once" in text
    assert "1,000 steps of 8 take about" in text
    assert "4 text positions of 24 ids, then 2x3 image positions of 30 codes: 10 in all" in text
    assert "GiB per process (estimated), 8 samples at once" in text
    assert "keys and values of one image" in text


def test_no_more_samples_are_measured_at_once_than_training_takes() -> None:
    assert "forward and backward with 2 at once" in text_of(with_trainer(accumulate=4))
    assert "forward and backward with 2 at once" in text_of(with_trainer(accumulate=2), Question(processes=2))


def test_the_step_that_is_measured_is_the_whole_one() -> None:
    timed, update_seconds = measure_step(TINY, most=3)
    assert timed.size == 3
    assert min(timed.seconds, update_seconds) > 0


def test_what_takes_too_long_here_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.estimate_prior_report._LONGEST_SECONDS", 0.0)
    text = text_of(TINY)
    assert "estimated: one sample takes too long here; a large matrix product does" in text
    assert "measured" not in text


def test_what_does_not_fit_here_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**describe_hardware(), "memory_gib": 1.0}
    monkeypatch.setattr("recipes.estimate_prior_report.describe_hardware", lambda: small)
    text = text_of(TINY)
    assert "estimated: not even one sample fits the memory here" in text
    assert "does not fit" in text
    assert "of 1 GiB, not even one sample at once fits" in text


def test_another_device_is_estimated_and_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **settings: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("recipes.estimate_prior_report.measure_step", fail)
    monkeypatch.setattr("recipes.estimate_prior_report.measure_machine", fail)
    text = text_of(with_trainer(precision="auto"), H200)
    assert "989 TFLOP/s used to 40% and 139 GiB, bf16; it is not here, so that all of this is estimated" in text
    assert "s per step (estimated; so short a step is spent on starting kernels" in text
    assert "measured" not in text
    assert "needs --device-flops" in text_of(TINY, Question(device_memory_gib=80.0))


def test_processes_have_a_line_for_each_way_to_share() -> None:
    lines = prior_lines(with_trainer(strategy="fsdp"), replace(H200, processes=4))
    assert sum(line.lstrip().startswith("4 processes, ") for line in lines) == 4
    configured = [line for line in lines if "<- as configured" in line]
    assert len(configured) == 1
    assert "4 processes, fsdp " in configured[0]
    assert "2 samples at once" in "\n".join(lines)
    assert "gathered weights" in "\n".join(lines)


def test_a_batch_that_does_not_fit_comes_with_what_would() -> None:
    large = replace(TINY, model=replace(TINY.model, dim=1024, depth=8, heads=16))
    large = replace(large, trainer=replace(TINY.trainer, batch_size=65536, precision="bf16"))
    text = text_of(large, replace(H200, processes=2))
    assert "does not fit  <- as configured" in text
    parts = int(text.split("trainer.accumulate=")[1].split()[0])
    assert 65536 % (2 * parts) == 0
    fitting = replace(large, trainer=replace(large.trainer, accumulate=parts))
    assert "fits  <- as configured" in text_of(fitting, replace(H200, processes=2))
    assert "  does not fit  <- as configured" not in text_of(fitting, replace(H200, processes=2))


def test_a_budget_that_ends_it_is_mentioned() -> None:
    assert "trainer.budget_seconds ends it after 30 s" in text_of(
        with_trainer(budget_seconds=30.0, max_steps=10**12), H200
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"processes": 0}, "--processes must be at least 1; got 0"),
        ({"utilization": 40.0, "device_flops": 1e12}, r"--utilization must lie in \(0, 1\]; got 40"),
        ({"utilization": 0.5}, "give both"),
        ({"device_memory_gib": 0.0}, "--device-memory must be positive"),
    ],
)
def test_questions_without_an_answer_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Question(**settings)  # type: ignore[arg-type]


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 3 processes x 2 parts; got 8"):
        prior_lines(with_trainer(accumulate=2), replace(H200, processes=3))
