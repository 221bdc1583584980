"""Makes a plan: looks at the corpus and the machine, measures, and lets `recipes.plan` decide."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from recipes.origin import Base, Origin, caption_line, count_captions, open_base
from recipes.plan import Plan, draft, estimate_text_len, timed
from recipes.plan_sizes import DataFacts, Machine, check_image_size
from recipes.run_folder import PLAN_FILE, Request, check_minutes, check_sha256
from recipes.speed import measure_machine, measure_speed
from tessera.config import load, to_plain
from tessera.data.config import DataConfig
from tessera.data.corpus import Corpus, open_corpus
from tessera.errors import UserError
from tessera.plain_yaml import write_yaml
from tessera.progress import counting

BUILT_IN = ("scenes", "emoji")
# Measuring the machine and its speed takes at most this share of the budget, and at most so many seconds.
_MEASURING_SHARE, _MOST_MEASURING_SECONDS = 0.02, 10.0
_COUNTED_IMAGES = 5_000
_LEAST_IMAGES = 2

Say = Callable[[str], None]


def make_plan(
    request: Request, *, cache_dir: Path | None, evaluation_images: int = 0, say: Say = print
) -> tuple[Plan, DataFacts, Corpus, Machine]:
    """Looks at the corpus, the model to go on from and the machine and decides what to do; trains nothing."""
    base = None
    if request.init_from is not None:
        base = open_base(request.init_from, train_dvae=request.train_dvae)
        check_sha256(request, base.origin.sha256)
    data = DataConfig(
        path=request.path,
        image_size=request.image_size,
        seed=request.seed,
        font=request.font,
        cache_dir=str(cache_dir.absolute()) if cache_dir else None,
    )
    # Mistakes in overrides show before minutes of ingest, and those of `data` decide what is ingested.
    origin = base.origin if base is not None else None
    data = overridden(Plan(minutes=request.minutes, data=data, origin=origin), request.overrides).data
    if base is not None:
        _check_same_size(data, base)
    corpus = open_training_split(data, say)
    captions = _some_captions(corpus)
    facts = DataFacts(
        name=corpus.name,
        num_images=len(corpus),
        image_size=corpus.image_size,
        text_len=base.prior.layout.text_len if base is not None else estimate_text_len(captions),
    )
    if facts.num_images < _LEAST_IMAGES:
        raise UserError(f"{request.path} has {facts.num_images} usable image; a model needs at least {_LEAST_IMAGES}")
    if base is not None:
        counts = count_captions(captions, base.tokenizer, text_len=facts.text_len)
        say(caption_line(counts, text_len=facts.text_len))
    machine = measure_machine(request.device)
    plan = draft(data, facts, machine, minutes=request.minutes, device=request.device, seed=request.seed, base=base)
    plan = overridden(plan, request.overrides)
    check_image_size(facts.image_size, plan.dvae.model)
    measuring = min(_MOST_MEASURING_SECONDS, _MEASURING_SHARE * request.minutes * 60)
    speed = measure_speed(plan, facts, seconds=measuring)
    plan = timed(plan, facts, speed, evaluation_images=evaluation_images)
    return overridden(plan, request.overrides), facts, corpus, machine


def _some_captions(corpus: Corpus) -> list[str]:
    """Enough of them to know what they are like."""
    step = max(1, len(corpus) // _COUNTED_IMAGES)
    return [text for index in range(0, len(corpus), step) for text in corpus.captions(index)]


def _check_same_size(data: DataConfig, base: Base) -> None:
    """Raises UserError if other pictures are asked for than the model to go on from draws."""
    if data.image_size != base.image_size:
        asked, drawn = ("x".join(map(str, size)) for size in (data.image_size, base.image_size))
        raise UserError(
            f"--image-size {asked}: the model that --from names, {base.origin.path}, draws {drawn} pixels, and what is "
            "trained on from it does too: leave --image-size out"
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
        key = override.split("=")[0]
        _check_not_following(key)
        if plan.origin is not None:
            _check_not_taken_over(key, plan.origin)
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
    if stage == "origin":
        raise UserError(f"{key}: what is gone on from follows from --from and --train-dvae")
    if stage not in ("dvae", "encode", "prior", "scorer") or not names:
        return
    if names[0] == "init_from":
        raise UserError(f"{key}: all stages start from the same model, give --from")
    if names[0] == "data":
        raise UserError(f"{key}: all stages share their data, set {'.'.join(names)}")
    if names[0] in ("out", "run_dir", "shards"):
        raise UserError(f"{key}: the folders of the stages follow from --out and --run-dir")
    if key == "encode.bpe_dropout":
        raise UserError(f"{key} follows prior.bpe_dropout: set that")


def _check_not_taken_over(key: str, origin: Origin) -> None:
    """Raises UserError for a setting that cannot differ from that of the model to go on from."""
    stage, *names = key.split(".")
    if not names:
        return
    if stage == "dvae" and not origin.train_dvae:
        raise UserError(f"{key}: the dvae of {origin.path} is taken as it is; --train-dvae trains it on")
    if names[0] == "model" and stage in origin.parts:
        raise UserError(f"{key}: the sizes of the {stage} are those of {origin.path}, as --from says")
    if key == "encode.text_len" or names[0] == "vocab_size":
        raise UserError(f"{key}: captions are read as {origin.path} reads them, as --from says")


def open_training_split(data: DataConfig, say: Say) -> Corpus:
    """Opens the training split; image files are checked first, with a summary for the user."""
    with counting("checking images") as on_progress:
        corpus = open_corpus(
            data.path,
            image_size=data.image_size,
            split="train",
            seed=data.seed,
            limit=data.limit,
            font=data.font,
            cache_dir=data.cache_path,
            on_progress=on_progress,
        )
    for line in data.ingest_lines(corpus):
        say(line)
    return corpus
