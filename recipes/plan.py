"""How minutes become models: from data, hardware and measured speed to sizes, batches, steps and shares of the budget.

Everything here is a pure function; what has to be measured is measured in `recipes.speed`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dvae.encode import EncodeConfig
from dvae.train import TrainConfig as DVAETrainConfig
from recipes.continuing import (
    CONTINUED_RATE,
    LEAST_CONTINUED_STEPS,
    MOST_CONTINUED_EPOCHS,
    continued_sizes,
    learns_anew,
    starts_from,
)
from recipes.estimate_prior import training_memory_gib
from recipes.origin import Base, Origin
from recipes.plan_sizes import (
    DataFacts,
    Machine,
    affordable_sizes,
    batch_for,
    crop_for,
    dvae_memory_gib,
    layout_for,
    trained_size,
)
from scorer.train import TrainConfig as ScorerTrainConfig
from tessera.data.config import DataConfig
from tessera.errors import UserError
from tessera.training.optim import OptimizerConfig
from tessera.training.process_memory import process_gib
from tessera.training.run import TrainerConfig
from transformer.train import TrainConfig as PriorTrainConfig

STAGES = ("dvae", "encode", "prior", "scorer", "tuning")

# Shares of the training budget. What is left over is slack for what no stage accounts for: imports, saving, the card.
_SHARES = {"dvae": 0.18, "encode": 0.04, "prior": 0.57, "scorer": 0.12, "tuning": 0.05}
# Who gets the time of a stage that is skipped.
_HEIRS = ("prior", "scorer")

# Beyond so many passes a model only learns its images by heart; a few images still need some steps to be learned.
_MOST_EPOCHS = 400
_LEAST_STEPS = 300
# Steps end the schedule, seconds interrupt it: aiming higher than measured lets the clock decide on a machine that
# speeds up, and costs nothing on one that slows down.
STEP_HEADROOM = 1.3
_VALIDATIONS = 6  # in as many steps
_WORDS_TO_TOKENS = 1.6
_GIB = 2**30
# Judging a model takes so long before the first image is drawn, and at most this share of the budget in all.
_EVALUATION_START_SECONDS = 20.0
_MOST_TUNING_SECONDS = 60.0  # more trials would measure the same noise
_MOST_EVALUATION = 0.25
_PARSER_SECONDS = 0.002
_GUIDED = 1.7  # twice the rows, in forwards as full as without


# Compiling takes about half a minute on two cores and makes a step on a CPU a third faster.
_COMPILE_FROM_SECONDS = 150.0
COMPILED_SPEEDUP = 1.6


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Measured seconds of work, with models of the planned sizes."""

    dvae_step: float
    """one optimizer step"""
    prior_step: float
    """one optimizer step"""
    scorer_step: float
    """one optimizer step"""
    image: float
    """drawing one image without guidance in a full batch, and decoding it"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a fit is going to do; stored in its run folder, so that an interrupted one goes on with the same."""

    minutes: float = 20.0
    """time for everything, in minutes"""
    data: DataConfig = DataConfig()
    """what to train on; the stages' own data sections follow it"""
    dvae: DVAETrainConfig = DVAETrainConfig()
    """stage 1"""
    encode: EncodeConfig = EncodeConfig()
    """stage 2"""
    prior: PriorTrainConfig = PriorTrainConfig()
    """stage 3"""
    scorer: ScorerTrainConfig = ScorerTrainConfig()
    """stage 4"""
    evaluation_seconds: float = 0.0
    """set aside for measuring the model afterwards"""
    speed: Speed | None = None
    """what was measured when the plan was made; null in a plan without numbers of steps"""
    origin: Origin | None = None
    """the model whose weights the training starts from; null begins with new ones"""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise UserError(f"minutes must be positive; got {self.minutes}")

    @property
    def training_seconds(self) -> float:
        """The budget without what is set aside for evaluation."""
        return max(1.0, self.minutes * 60 - self.evaluation_seconds)

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that there are: a frozen dVAE is not trained."""
        frozen = ("dvae",) if self.origin is not None and not self.origin.train_dvae else ()
        return tuple(stage for stage in STAGES if stage not in frozen)


def estimate_text_len(captions: Sequence[str]) -> int:
    """Text positions that captions will need, before there is a tokenizer: a multiple of 8, at most 256."""
    words = sorted(len(caption.split()) for caption in captions)
    longest = words[int(0.999 * (len(words) - 1))] if words else 0
    return int(min(256, max(8, 8 * math.ceil(longest * _WORDS_TO_TOKENS / 8))))


def stage_seconds(training_seconds: float, *, stages: Sequence[str] = STAGES) -> dict[str, float]:
    """How a training budget is shared among the stages, in seconds; what long tuning would take is left unspent."""
    seconds = {name: share * training_seconds for name, share in _shares(stages).items()}
    return {**seconds, "tuning": min(seconds["tuning"], _MOST_TUNING_SECONDS)}


def seconds_for(stage: str, seconds_left: float, *, stages: Sequence[str] = STAGES) -> float:
    """What a stage may take when it begins with so many seconds left for itself, the stages after it and slack.

    Whatever earlier stages took too long or left over is shared by the later ones.
    """
    shares = _shares(stages)
    slack = 1 - sum(shares.values())
    later = sum(list(shares.values())[list(shares).index(stage) :])
    seconds = max(1.0, seconds_left * shares[stage] / (later + slack))
    return min(seconds, _MOST_TUNING_SECONDS) if stage == "tuning" else seconds


def _shares(stages: Sequence[str]) -> dict[str, float]:
    """Each stage's share of the training budget, with what the heirs get of stages that are left out."""
    freed = sum(share for name, share in _SHARES.items() if name not in stages)
    gain = 1 + freed / sum(_SHARES[name] for name in _HEIRS)
    return {name: share * (gain if name in _HEIRS else 1.0) for name, share in _SHARES.items() if name in stages}


def draft(
    data: DataConfig,
    facts: DataFacts,
    machine: Machine,
    *,
    minutes: float,
    device: str,
    seed: int,
    base: Base | None = None,
) -> Plan:
    """Chooses the sizes: those of the model that is gone on from, else the largest that the budget can train.

    Args:
        data: what to train on.
        facts: about that corpus.
        machine: measured.
        minutes: the budget for everything.
        device: for every stage.
        seed: for every stage.
        base: the model to go on from.

    Returns:
        A plan without numbers of steps; `timed` fills them in.

    Raises:
        UserError: if the image sides do not fit the downsampling.
    """
    origin = base.origin if base is not None else None
    plan = Plan(minutes=minutes, data=data, origin=origin)
    if base is None:
        budget = stage_seconds(minutes * 60)
        sizes = affordable_sizes(facts, machine, dvae_seconds=budget["dvae"], prior_seconds=budget["prior"])
    else:
        sizes = continued_sizes(base, facts, machine)
    start = TrainerConfig(device=device, seed=seed, checkpoint_every_seconds=30)
    prior_seconds = stage_seconds(minutes * 60, stages=plan.stages)["prior"]
    scorer = ScorerTrainConfig()

    def optim(stage: str, settings: OptimizerConfig) -> OptimizerConfig:
        share = CONTINUED_RATE if starts_from(origin, stage) else 1.0
        return replace(settings, learning_rate=share * settings.learning_rate)

    plan = replace(
        plan,
        dvae=DVAETrainConfig(
            model=sizes.vae,
            optim=optim("dvae", OptimizerConfig(learning_rate=sizes.vae_row.learning_rate)),
            trainer=replace(start, batch_size=batch_for(sizes.vae_row.batch_size, facts)),
            crop=crop_for(facts.image_size, sizes.vae),
            init_from=starts_from(origin, "dvae"),
        ),
        encode=EncodeConfig(device=device, text_len=base.prior.layout.text_len if base is not None else None),
        prior=PriorTrainConfig(
            model=sizes.prior,
            optim=optim("prior", OptimizerConfig(learning_rate=sizes.prior_row.learning_rate)),
            trainer=replace(
                start,
                batch_size=batch_for(sizes.prior_row.batch_size, facts),
                compile=machine.can_compile and prior_seconds >= _COMPILE_FROM_SECONDS,
            ),
            bpe_dropout=sizes.prior_row.bpe_dropout,
            init_from=starts_from(origin, "prior"),
        ),
        scorer=replace(
            scorer,
            model=base.scorer if base is not None and base.scorer is not None else scorer.model,
            optim=optim("scorer", scorer.optim),
            trainer=replace(start, batch_size=batch_for(scorer.trainer.batch_size, facts)),
            init_from=starts_from(origin, "scorer"),
        ),
    )
    return placed(plan, out="", run_dir="")


def placed(plan: Plan, *, out: str, run_dir: str) -> Plan:
    """The plan with its folders, and with one data section for all stages."""
    return replace(
        plan,
        dvae=replace(plan.dvae, data=plan.data, out=out, run_dir=f"{run_dir}/dvae"),
        encode=replace(
            plan.encode, data=plan.data, out=out, shards=f"{run_dir}/shards", bpe_dropout=plan.prior.bpe_dropout
        ),
        prior=replace(plan.prior, shards=f"{run_dir}/shards", out=out, run_dir=f"{run_dir}/prior"),
        scorer=replace(plan.scorer, data=plan.data, out=out, run_dir=f"{run_dir}/scorer"),
    )


def timed(plan: Plan, facts: DataFacts, speed: Speed, *, evaluation_images: int = 0) -> Plan:
    """Fills in how many steps each stage makes, from measured seconds per step.

    Args:
        plan: with sizes.
        facts: about the corpus.
        speed: measured with models of these sizes.
        evaluation_images: how many images will be drawn afterwards to judge the model, within the same budget.
    """
    wanted = evaluation_images * evaluation_seconds_per_image(speed) + _EVALUATION_START_SECONDS
    set_aside = min(wanted, _MOST_EVALUATION * plan.minutes * 60) if evaluation_images else 0.0
    plan = replace(plan, speed=speed, evaluation_seconds=round(set_aside, 1))
    budget = stage_seconds(plan.training_seconds, stages=plan.stages)

    def trainer(stage: str) -> TrainerConfig:
        if stage not in budget:
            return stage_trainer(plan, stage)
        settings, seconds = stage_trainer(plan, stage), step_seconds(plan, stage)
        most_steps = useful_steps(settings.batch_size, facts.num_images, is_new=learns_anew(plan.origin, stage))
        return with_steps(settings, seconds, budget[stage], most_steps=most_steps)

    return replace(
        plan,
        dvae=replace(plan.dvae, trainer=trainer("dvae")),
        prior=replace(plan.prior, trainer=trainer("prior")),
        scorer=replace(plan.scorer, trainer=trainer("scorer")),
    )


def stage_trainer(plan: Plan, stage: str) -> TrainerConfig:
    """The trainer's settings of a stage that trains: dvae, prior or scorer."""
    return {"dvae": plan.dvae, "prior": plan.prior, "scorer": plan.scorer}[stage].trainer


def step_seconds(plan: Plan, stage: str) -> float:
    """What an optimizer step of a stage takes by the plan's measured speed; compiled models are measured uncompiled."""
    assert plan.speed is not None
    measured = {"dvae": plan.speed.dvae_step, "prior": plan.speed.prior_step, "scorer": plan.speed.scorer_step}[stage]
    return measured / (COMPILED_SPEEDUP if stage_trainer(plan, stage).compile else 1.0)


def evaluation_seconds_per_image(speed: Speed) -> float:
    """What it takes to draw an image with guidance, score it and let a parser read it."""
    return _GUIDED * speed.image + _PARSER_SECONDS


def useful_steps(batch_size: int, num_images: int, *, is_new: bool) -> int:
    """Steps after which a stage only learns its images by heart; one that goes on from a model gets there sooner."""
    least, epochs = (_LEAST_STEPS, _MOST_EPOCHS) if is_new else (LEAST_CONTINUED_STEPS, MOST_CONTINUED_EPOCHS)
    return max(least, int(epochs * num_images / batch_size))


def with_steps(trainer: TrainerConfig, step_seconds: float, seconds: float, *, most_steps: int) -> TrainerConfig:
    """The trainer's settings for a stage of so many seconds: steps, budget, and how often it logs and validates."""
    affordable = STEP_HEADROOM * seconds / max(step_seconds, 1e-6)
    steps = max(1, int(min(affordable, most_steps)))
    return replace(
        trainer,
        max_steps=steps,
        budget_seconds=round(seconds, 1),
        log_every_steps=max(1, min(10, steps // 40)),
        validate_every_steps=max(1, steps // _VALIDATIONS),
    )


def peak_memory_gib(plan: Plan, facts: DataFacts, machine: Machine) -> float:
    """Estimate of the peak memory of the whole fit, with the process itself and the images."""
    images = facts.num_images * math.prod(facts.image_size) * 3 / _GIB
    trainer = plan.prior.trainer
    prior = training_memory_gib(
        replace(plan.prior.model, layout=layout_for(facts, plan.dvae.model)),
        trainer.batch_size // trainer.accumulate,
        kind=machine.kind,
        precision=machine.precision,
        optim=plan.prior.optim,
        checkpoint_activations=trainer.checkpoint_activations,
    )
    trained = [prior]
    if "dvae" in plan.stages:
        size, trainer = trained_size(facts.image_size, plan.dvae.crop), plan.dvae.trainer
        trained.append(dvae_memory_gib(plan.dvae.model, size, trainer.batch_size // trainer.accumulate))
    return process_gib(machine.kind) + images + max(trained)
