"""A plan as a small table for people, printed before anything starts."""

from recipes.plan import Plan, peak_memory_gib, stage_seconds, stage_trainer, step_seconds
from recipes.plan_sizes import DataFacts, Machine
from tessera.model_folder import short_sha256
from tessera.precision import describe_hardware
from tessera.training.run import TrainerConfig

# of the expected steps: speeds are measured in a few seconds, and are no better than that
_FAR_ENOUGH = 0.8


def plan_lines(plan: Plan, facts: DataFacts, machine: Machine) -> list[str]:
    """Data, device, one line per stage, and estimates of time and memory."""
    hardware = describe_hardware()
    device = hardware["gpu"] if machine.kind == "cuda" else f"{hardware['cpu']}, {hardware['cores']} cores"
    sizes, trainers = planned_sizes(plan), stage_trainers(plan)
    lines = [
        f"data    {facts.name}: {facts.num_images:,} images to train on",
        f"device  {device}, {machine.precision}, {machine.flops / 1e9:,.0f} GFLOP/s",
        *origin_lines(plan),
        "",
        f"{'stage':<11}{'time':>7}{'steps':>9}{'batch':>7}  size",
    ]
    total = 0.0
    for stage, seconds in stage_seconds(plan.training_seconds, stages=plan.stages).items():
        trainer = trainers.get(stage)
        steps = expected_steps(plan, stage)
        if steps is not None and plan.speed is not None:
            seconds = min(seconds, steps * step_seconds(plan, stage))
        total += seconds
        shown = "" if steps is None else f"{steps:,}"
        batch = "" if trainer is None else str(trainer.batch_size)
        lines.append(f"{stage:<11}{clock(seconds):>7}{shown:>9}{batch:>7}  {sizes[stage]}".rstrip())
    if plan.evaluation_seconds:
        lines.append(f"{'evaluation':<11}{clock(plan.evaluation_seconds):>7}")
        total += plan.evaluation_seconds
    where = "GPU memory" if machine.kind == "cuda" else "memory"
    lines += [
        "",
        f"about {clock(total)} minutes, at most {clock(plan.minutes * 60)}; "
        f"peak {where} about {peak_memory_gib(plan, facts, machine):.1f} of {machine.memory_gib:.0f} GiB",
    ]
    return lines


def origin_lines(plan: Plan) -> list[str]:
    """Where each part of a model comes from that goes on from another one; none for a new model."""
    origin = plan.origin
    if origin is None:
        return []
    taken, trained_on = f"from {origin.name}, frozen", f"from {origin.name}, trained on"
    come_from = {
        "tokenizer": taken,
        "dvae": f"{trained_on}: its codes change, and the prior has to relearn them" if origin.train_dvae else taken,
        "prior": trained_on,
        "scorer": trained_on if "scorer" in origin.parts else f"new: {origin.name} has none for pictures of this size",
    }
    return [
        f"from    {origin.path}, sha256 {short_sha256(origin.sha256)}",
        "",
        *(f"{part:<11}{text}" for part, text in come_from.items()),
    ]


def planned_sizes(plan: Plan) -> dict[str, str]:
    """What each stage makes, in a few words."""
    vae, prior = plan.dvae.model, plan.prior.model
    height, width = plan.data.image_size
    codes = vae.num_codes
    return {
        "dvae": f"{height}x{width} pixels as {height // vae.downsampling}x{width // vae.downsampling} of {codes:,} "
        f"codes, widths {'-'.join(map(str, vae.widths))}",
        "encode": "token shards and text tokenizer",
        "prior": f"{prior.depth} layers of {prior.dim}",
        "scorer": f"{plan.scorer.model.image_layers} layers of {plan.scorer.model.dim}, matching head",
        "tuning": "sampling settings",
    }


def stage_trainers(plan: Plan) -> dict[str, TrainerConfig]:
    """The trainer's settings of the stages that have any."""
    return {stage: stage_trainer(plan, stage) for stage in ("dvae", "prior", "scorer")}


def expected_steps(plan: Plan, stage: str) -> int | None:
    """How many steps a stage is likely to make: the clock ends it before its last one unless the data is small."""
    trainer = stage_trainers(plan).get(stage)
    if trainer is None:
        return None
    if plan.speed is None or trainer.budget_seconds is None:
        return trainer.max_steps
    return min(trainer.max_steps, max(1, int(trainer.budget_seconds / step_seconds(plan, stage))))


def clock(seconds: float) -> str:
    """Minutes and seconds, such as 2:05."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


def steps_made(plan: Plan, stage: str, steps: int) -> str:
    """How many steps a stage made, and of how many, if other work left too little time for them."""
    expected = expected_steps(plan, stage)
    if expected is None or steps >= _FAR_ENOUGH * expected:
        return f"{steps:,} steps"
    return f"{steps:,} steps of {expected:,} expected: there was no time for more"
