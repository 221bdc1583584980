"""How minutes become models: from data, hardware and measured speed to sizes, batches, steps and shares of the budget.

Everything here is a pure function; what has to be measured is measured in `recipes.speed`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dvae.encode import EncodeConfig
from dvae.model import DiscreteVAEConfig
from dvae.train import TrainConfig as DVAETrainConfig
from recipes.estimate_prior import training_memory_gib
from recipes.origin import Base, Origin
from scorer.train import TrainConfig as ScorerTrainConfig
from tessera.data.config import DataConfig
from tessera.errors import UserError
from tessera.precision import PrecisionName
from tessera.training.optim import OptimizerConfig
from tessera.training.run import TrainerConfig
from transformer.masks import MaskKind
from transformer.model import PriorConfig, SequenceLayout
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
# Measured products are the best case; a small model's step spends much of its time on everything else.
_UTILIZATION = {"cpu": 0.4, "cuda": 0.3}
_MOST_CODES = {"cpu": 256, "cuda": 1024}
_WORDS_TO_TOKENS = 1.6
_GIB = 2**30
_PROCESS_GIB = 1.2  # Python with torch and lightning
# Judging a model takes so long before the first image is drawn, and at most this share of the budget in all.
_EVALUATION_START_SECONDS = 20.0
_MOST_TUNING_SECONDS = 60.0  # more trials would measure the same noise
_MOST_EVALUATION = 0.25
_PARSER_SECONDS = 0.002
_GUIDED = 1.7  # twice the rows, in forwards as full as without


class DVAERow(NamedTuple):
    """One size of the dVAE and what it takes to be worth it."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    batch_size: int
    learning_rate: float
    least_steps: int
    least_images: int


class PriorRow(NamedTuple):
    """One size of the prior and what it takes to be worth it."""

    dim: int
    depth: int
    heads: int
    attention: tuple[MaskKind, ...]
    batch_size: int
    learning_rate: float
    bpe_dropout: float
    least_steps: int
    least_images: int


# Smallest first; the largest row that the budget can train for `least_steps` is taken, the first one whatever happens.
# In little time small models learn more, because they see more: in 110 seconds of two cores a prior of 128 channels
# came to 0.77 nats per token with 4 layers, 0.83 with 6, and one of 192 channels to 1.07. With twelve minutes of emoji
# it was the other way round, 2.35 against 1.77 on held-out drawings, after dVAEs of about equal quality. Small batches
# learn more, too: 1,200 steps of 16 captioned images were worth more than 600 of 32. A prior that sees every caption
# only a few times cannot afford to see its words in pieces as well: skipping one merge in ten breaks four words in ten.
DVAE_ROWS = (
    DVAERow((48, 96), (1, 2), 48, 3e-3, 0, 0),
    DVAERow((64, 128), (1, 3), 48, 3e-3, 6_000, 0),
    DVAERow((96, 192), (2, 3), 64, 2e-3, 8_000, 2_000),
    DVAERow((128, 384), (2, 4), 128, 1e-3, 20_000, 50_000),
)
_ROWS_THEN_FULL: tuple[MaskKind, ...] = ("row", "column", "row", "full")
PRIOR_ROWS = (
    PriorRow(128, 4, 4, _ROWS_THEN_FULL, 16, 6e-3, 0.0, 0, 0),
    PriorRow(128, 6, 4, _ROWS_THEN_FULL, 16, 6e-3, 0.0, 6_000, 0),
    PriorRow(192, 6, 6, _ROWS_THEN_FULL, 16, 5e-3, 0.0, 6_000, 0),
    PriorRow(256, 8, 4, _ROWS_THEN_FULL, 64, 3e-3, 0.1, 5_000, 2_000),
    PriorRow(512, 12, 8, _ROWS_THEN_FULL, 256, 1.5e-3, 0.1, 6_000, 10_000),  # 50 M parameters with its embeddings
    PriorRow(1024, 24, 16, _ROWS_THEN_FULL, 256, 6e-4, 0.1, 20_000, 100_000),  # 350 M
)
# Few images fill few codes: (images from which on, levels).
CODEBOOKS = ((0, (8, 5, 5, 5)), (200_000, (8, 8, 8, 6, 5)))
_MOST_MEMORY = 0.8  # of what the device has
# What a stage that starts from a model's weights learns at, as a share of the rate for new weights, and for how many
# passes at most: it has less to learn, and few images are soon learned by heart. From 1.47 nats per held-out token of
# recolored scenes a prior came in 3 passes over 750 of them to 1.04 at the full rate, 0.98 at three tenths, 1.05 at a
# tenth; over 225 of them to 1.16 in 5 passes at three tenths, but 1.60 in 18, and 2.99 with new weights.
CONTINUED_RATE = 0.3
MOST_CONTINUED_EPOCHS = 10
_LEAST_CONTINUED_STEPS = 100
# Compiling takes about half a minute on two cores and makes a step on a CPU a third faster.
_COMPILE_FROM_SECONDS = 150.0
COMPILED_SPEEDUP = 1.6


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a plan needs to know about a corpus."""

    name: str
    """as the corpus calls itself"""
    num_images: int
    """in the training split"""
    image_size: tuple[int, int]
    """height and width in pixels"""
    text_len: int
    """estimated text positions of the longest captions"""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan needs to know about the hardware."""

    kind: str
    """cpu or cuda"""
    memory_gib: float
    """of the device that trains"""
    flops: float
    """measured floating-point operations per second of a large matrix product in the precision of training"""
    precision: PrecisionName
    """of training"""
    can_compile: bool = False
    """whether torch.compile has what it needs: on CPUs a C++ compiler"""


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
    sizes = _affordable(facts, machine, minutes=minutes) if base is None else _continued(base, facts, machine)
    start = TrainerConfig(device=device, seed=seed, checkpoint_every_seconds=30)
    plan = Plan(minutes=minutes, data=data, origin=base.origin if base is not None else None)
    prior_seconds = stage_seconds(minutes * 60, stages=plan.stages)["prior"]
    scorer = ScorerTrainConfig()
    plan = replace(
        plan,
        dvae=DVAETrainConfig(
            model=sizes.vae,
            optim=OptimizerConfig(learning_rate=sizes.vae_row.learning_rate),
            trainer=replace(start, batch_size=_batch(sizes.vae_row.batch_size, facts)),
            crop=crop_for(facts.image_size, sizes.vae),
        ),
        encode=EncodeConfig(device=device),
        prior=PriorTrainConfig(
            model=sizes.prior,
            optim=OptimizerConfig(learning_rate=sizes.prior_row.learning_rate),
            trainer=replace(
                start,
                batch_size=_batch(sizes.prior_row.batch_size, facts),
                compile=machine.can_compile and prior_seconds >= _COMPILE_FROM_SECONDS,
            ),
            bpe_dropout=sizes.prior_row.bpe_dropout,
        ),
        scorer=replace(scorer, trainer=replace(start, batch_size=_batch(scorer.trainer.batch_size, facts))),
    )
    if base is not None:
        plan = _starting_from(base, plan)
    return placed(plan, out="", run_dir="")


class _Sizes(NamedTuple):
    """What is trained, and the rows whose rates and batches suit it."""

    vae: DiscreteVAEConfig
    vae_row: DVAERow
    prior: PriorConfig
    prior_row: PriorRow


def _affordable(facts: DataFacts, machine: Machine, *, minutes: float) -> _Sizes:
    """The largest rows that the budget can train long enough on this machine."""
    budget = stage_seconds(minutes * 60)
    flops = machine.flops * _UTILIZATION.get(machine.kind, 1.0)
    vae_row = DVAE_ROWS[0]
    for row in DVAE_ROWS:
        candidate_vae = _vae_config(row, facts, machine)
        crop = crop_for(facts.image_size, candidate_vae)
        trained_size = (crop, crop) if crop else facts.image_size
        needed = row.least_steps * dvae_step_flops(candidate_vae, trained_size, row.batch_size)
        if needed <= flops * budget["dvae"] and facts.num_images >= row.least_images:
            vae_row = row
    vae = _vae_config(vae_row, facts, machine)
    check_image_size(facts.image_size, vae)
    layout = layout_for(facts, vae)
    prior_row = PRIOR_ROWS[0]
    for row_ in PRIOR_ROWS:
        candidate = _prior_config(row_, layout)
        needed = row_.least_steps * prior_step_flops(candidate, row_.batch_size)
        fits = _prior_fits(candidate, row_.batch_size, machine)
        if needed <= flops * budget["prior"] and fits and facts.num_images >= row_.least_images:
            prior_row = row_
    return _Sizes(vae, vae_row, _prior_config(prior_row, layout), prior_row)


def _continued(base: Base, facts: DataFacts, machine: Machine) -> _Sizes:
    """The sizes of a model to go on from, and the rows next to them, with smaller batches where memory is short."""
    vae_row = next((row for row in reversed(DVAE_ROWS) if row.widths[0] <= base.vae.widths[0]), DVAE_ROWS[0])
    prior_row = next((row for row in reversed(PRIOR_ROWS) if row.dim <= base.prior.dim), PRIOR_ROWS[0])
    batch_size = _batch(prior_row.batch_size, facts)
    while batch_size > 1 and not _prior_fits(base.prior, batch_size, machine):
        batch_size //= 2
    return _Sizes(base.vae, vae_row, base.prior, prior_row._replace(batch_size=batch_size))


def _prior_fits(config: PriorConfig, batch_size: int, machine: Machine) -> bool:
    """Whether the device can train it, with room for what else there is."""
    needed = training_memory_gib(config, batch_size, kind=machine.kind, precision=machine.precision)
    return needed <= _MOST_MEMORY * machine.memory_gib


def _starting_from(base: Base, plan: Plan) -> Plan:
    """The plan with weights and rates of stages that go on from a model, and its way to read captions."""

    def gentle(optim: OptimizerConfig) -> OptimizerConfig:
        return replace(optim, learning_rate=CONTINUED_RATE * optim.learning_rate)

    path = base.origin.path
    if base.origin.train_dvae:
        plan = replace(plan, dvae=replace(plan.dvae, init_from=path, optim=gentle(plan.dvae.optim)))
    if base.scorer is not None:
        optim = gentle(plan.scorer.optim)
        plan = replace(plan, scorer=replace(plan.scorer, model=base.scorer, init_from=path, optim=optim))
    return replace(
        plan,
        encode=replace(plan.encode, text_len=base.prior.layout.text_len),
        prior=replace(plan.prior, init_from=path, optim=gentle(plan.prior.optim)),
    )


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
        most_steps = useful_steps(settings.batch_size, facts.num_images, is_new=_learns_anew(plan, stage))
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


def _learns_anew(plan: Plan, stage: str) -> bool:
    """Whether a stage has as much to learn as with new weights, such as a prior whose codes come to mean others."""
    if plan.origin is None or stage not in plan.origin.parts:
        return True
    return plan.origin.train_dvae and stage != "scorer"


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
    least, epochs = (_LEAST_STEPS, _MOST_EPOCHS) if is_new else (_LEAST_CONTINUED_STEPS, MOST_CONTINUED_EPOCHS)
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


def crop_for(image_size: tuple[int, int], vae: DiscreteVAEConfig) -> int | None:
    """Side of the crops that the dVAE trains on: about half the shorter side, None if that is less than three codes."""
    f = vae.downsampling
    side = f * round(min(image_size) / 2 / f)
    return side if side >= 3 * f else None


def check_image_size(image_size: tuple[int, int], vae: DiscreteVAEConfig) -> None:
    """Raises UserError if a side is not divisible by the downsampling factor."""
    height, width = image_size
    f = vae.downsampling
    if height % f or width % f:
        lower, upper = f * max(1, height // f), f * (height // f + 1)
        near = lower if height - lower <= upper - height else upper
        raise UserError(
            f"--image-size {height}x{width}: both sides must be divisible by {f}; for example {near} "
            f"(one number is a square, HEIGHTxWIDTH anything else)"
        )


def layout_for(facts: DataFacts, vae: DiscreteVAEConfig) -> SequenceLayout:
    """The sequence that the prior will have, as far as it is known before there are shards."""
    height, width = facts.image_size
    return SequenceLayout(
        text_len=facts.text_len,
        grid_height=height // vae.downsampling,
        grid_width=width // vae.downsampling,
        text_vocab_size=1024,
        codebook_size=vae.num_codes,
        codebook_levels=vae.code_digits,
    )


def dvae_step_flops(config: DiscreteVAEConfig, image_size: tuple[int, int], batch_size: int) -> float:
    """Operations of one training step of the residual blocks, which do nearly all the work."""
    operations = 0.0
    for level, (width, blocks) in enumerate(zip(config.widths, config.blocks, strict=True)):
        positions = math.prod(image_size) / (config.patch_size * 2**level) ** 2
        taps = config.encoder_kernel_size**2 + 9  # of the encoder's and the decoder's convolutions
        # two convolutions per block, multiply and add, forward and twice that backward
        operations += positions * blocks * 2 * taps * width**2 * 2 * 3
    return operations * batch_size


def prior_step_flops(config: PriorConfig, batch_size: int) -> float:
    """Operations of one training step: six per weight and position, heads at their own positions only."""
    layout = config.layout
    hidden = 32 * math.ceil(config.dim * config.mlp_ratio / 32)
    layers = config.depth * (4 * config.dim**2 + 3 * config.dim * hidden + 2 * layout.seq_len * config.dim)
    heads = config.dim * (layout.image_len * layout.codebook_size + layout.text_len * layout.num_text_ids)
    return 6.0 * batch_size * (layout.seq_len * layers + heads)


def dvae_memory_gib(config: DiscreteVAEConfig, image_size: tuple[int, int], batch_size: int) -> float:
    """Peak memory of training the dVAE: activations of the blocks, images and reconstructions."""
    pixels = math.prod(image_size)
    total = 24.0 * 4 * pixels * batch_size
    for level, (width, blocks) in enumerate(zip(config.widths, config.blocks, strict=True)):
        positions = pixels / (config.patch_size * 2**level) ** 2
        total += batch_size * positions * width * 2 * (blocks + 1) * 24
    return total / _GIB


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
        trained.append(dvae_memory_gib(plan.dvae.model, facts.image_size, plan.dvae.trainer.batch_size))
    return _PROCESS_GIB + images + max(trained)


def _vae_config(row: DVAERow, facts: DataFacts, machine: Machine) -> DiscreteVAEConfig:
    """A row's model, with one more resolution for every factor of two by which the images are too large."""
    levels = next(levels for images, levels in reversed(CODEBOOKS) if facts.num_images >= images)
    widths, blocks = row.widths, row.blocks
    config = DiscreteVAEConfig(widths=widths, blocks=blocks, levels=levels)
    while math.prod(facts.image_size) / config.downsampling**2 > _MOST_CODES.get(machine.kind, 256):
        widths, blocks = (*widths, 2 * widths[-1] if len(widths) < 3 else widths[-1]), (*blocks, blocks[-1])
        config = DiscreteVAEConfig(widths=widths, blocks=blocks, levels=levels)
    return config


def _prior_config(row: PriorRow, layout: SequenceLayout) -> PriorConfig:
    # sparse masks are for long sequences; a short one only loses sight of what it has drawn already
    attention: tuple[MaskKind, ...] = row.attention if layout.image_len > _MOST_CODES["cpu"] else ("full",)
    return PriorConfig(layout=layout, dim=row.dim, depth=row.depth, heads=row.heads, attention=attention)


def _batch(batch_size: int, facts: DataFacts) -> int:
    return min(batch_size, max(4, facts.num_images))
