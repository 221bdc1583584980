"""Makes a plan: looks at the corpus and the machine, measures, and lets `recipes.plan` decide."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from recipes.plan import DataFacts, Machine, Plan, check_image_size, draft, estimate_text_len, timed
from recipes.progress import counting
from recipes.run_folder import PLAN_FILE, Request, check_minutes
from recipes.speed import measure_machine, measure_speed
from tessera.config import load, to_plain
from tessera.data.config import DataConfig
from tessera.data.corpus import Corpus
from tessera.data.manifest import ingest
from tessera.errors import UserError
from tessera.plain_yaml import write_yaml

BUILT_IN = ("scenes", "emoji")
# Measuring the machine and its speed takes at most this share of the budget, and at most so many seconds.
_MEASURING_SHARE, _MOST_MEASURING_SECONDS = 0.02, 10.0
_COUNTED_CAPTIONS = 5_000
_LEAST_IMAGES = 2

Say = Callable[[str], None]


def make_plan(
    request: Request, *, cache_dir: Path | None, evaluation_images: int = 0, say: Say = print
) -> tuple[Plan, DataFacts, Corpus, Machine]:
    """Looks at the corpus and the machine and decides what to do; trains nothing."""
    data = DataConfig(
        path=request.path,
        image_size=request.image_size,
        seed=request.seed,
        font=request.font,
        cache_dir=str(cache_dir.absolute()) if cache_dir else None,
    )
    # Mistakes in overrides show before minutes of ingest, and those of `data` decide what is ingested.
    data = overridden(Plan(minutes=request.minutes, data=data), request.overrides).data
    corpus = open_training_split(data, say)
    facts = data_facts(corpus)
    if facts.num_images < _LEAST_IMAGES:
        raise UserError(f"{request.path} has {facts.num_images} usable image; a model needs at least {_LEAST_IMAGES}")
    machine = measure_machine(request.device)
    plan = draft(data, facts, machine, minutes=request.minutes, device=request.device, seed=request.seed)
    plan = overridden(plan, request.overrides)
    check_image_size(facts.image_size, plan.dvae.model)
    measuring = min(_MOST_MEASURING_SECONDS, _MEASURING_SHARE * request.minutes * 60)
    speed = measure_speed(plan, facts, seconds=measuring)
    plan = timed(plan, facts, speed, evaluation_images=evaluation_images)
    return overridden(plan, request.overrides), facts, corpus, machine


def data_facts(corpus: Corpus) -> DataFacts:
    """Counts what a plan needs to know."""
    step = max(1, len(corpus) // _COUNTED_CAPTIONS)
    captions = [text for index in range(0, len(corpus), step) for text in corpus.captions(index)]
    return DataFacts(
        name=corpus.name,
        num_images=len(corpus),
        image_size=corpus.image_size,
        text_len=estimate_text_len(captions),
    )


def overridden(plan: Plan, overrides: Sequence[str]) -> Plan:
    """The plan with key=value settings applied.

    Raises:
        UserError: for a key that is unknown or follows from others, a value of the wrong type, or values that do not
            fit together.
    """
    if not overrides:
        return plan
    for override in overrides:
        _check_not_following(override.split("=")[0])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / PLAN_FILE
        # Only the sections that are overridden: checking every one of a plan's settings takes a second.
        sections = {override.split("=")[0].split(".")[0] for override in overrides}
        write_yaml(file, {name: value for name, value in to_plain(plan).items() if name in sections})
        read = load(Plan, [str(file), *overrides], prog="tessera fit")
    check_minutes(read.minutes)
    if read.scorer.trainer.num_workers:  # said before the stages that come first have trained
        raise UserError(
            f"scorer.trainer.num_workers must be 0, for fit makes reconstructions in the process that trains; "
            f"got {read.scorer.trainer.num_workers}"
        )
    return replace(plan, **{name: getattr(read, name) for name in sections})


def _check_not_following(key: str) -> None:
    """Raises UserError for a setting of one stage that `placed` makes of what holds for all of them."""
    stage, *names = key.split(".")
    if stage not in ("dvae", "encode", "prior", "scorer") or not names:
        return
    if names[0] == "data":
        raise UserError(f"{key}: all stages share their data, set {'.'.join(names)}")
    if names[0] in ("out", "run_dir", "shards"):
        raise UserError(f"{key}: the folders of the stages follow from --out and --run-dir")
    if key == "encode.bpe_dropout":
        raise UserError(f"{key} follows prior.bpe_dropout: set that")


def open_training_split(data: DataConfig, say: Say) -> Corpus:
    """Opens the training split; image files are checked first, with a summary for the user."""
    if data.path not in BUILT_IN and Path(data.path).exists():
        with counting("checking images") as on_progress:
            manifest = ingest(Path(data.path), directory=data.cache_path, on_progress=on_progress)
        say(manifest.summary())
        if manifest.rejects and data.cache_path is not None:
            say(f"what was refused, and why: {data.cache_path / 'rejects.jsonl'}")
    return data.open("train")
