"""`tessera fit PATH --out my-model`: from captioned images to a model folder, all stages in a row within a budget.

The model folder holds the model; the run folder beside it (`my-model.run`) holds the plan, checkpoints, token shards
and the time spent, from which the same command goes on after an interruption.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dvae.encode import encode
from dvae.model import load as load_vae
from dvae.reconstruct import decode_grids
from dvae.train import train as train_dvae
from recipes.card import model_card
from recipes.ledger import Ledger
from recipes.origin import Origin, check_apart, open_base, take_over
from recipes.plan import STAGES, Plan, placed, seconds_for
from recipes.plan_sizes import DataFacts
from recipes.plan_table import clock, plan_lines, steps_made
from recipes.planning import BUILT_IN, Say, make_plan, open_training_split
from recipes.run_folder import (
    DATA_FOLDER,
    DEFAULT_MINUTES,
    LEDGER_FILE,
    PLAN_FILE,
    Request,
    RunFolder,
    Stored,
    check_ours,
    check_sha256,
    start_over,
)
from recipes.tune import Tuned, tune
from scorer.batches import Reconstruct
from scorer.train import train as train_scorer
from tessera.data.corpus import Corpus, open_images
from tessera.data.reading import HUB_PREFIX
from tessera.data.shards import TokenShards
from tessera.data.source import EXPECTED
from tessera.errors import UserError, run_command
from tessera.model_folder import INDEX_FILE, ModelFolder, write_card, write_sampling_defaults
from tessera.one_line_parser import OneLineParser
from tessera.precision import describe_hardware, resolve_device, resolve_precision, versions
from tessera.progress import counting
from tessera.training.processes import refuse_several
from tessera.training.run import TrainerConfig
from transformer.train import train as train_prior

_LEAST_SIDE = 16  # two codes


class Fitted(NamedTuple):
    """A finished fit."""

    plan: Plan
    facts: DataFacts
    tuned: Tuned
    ledger: Ledger
    reused: bool
    """whether all of it was there already"""


def fit(
    request: Request,
    *,
    out: Path,
    run_dir: Path,
    started: float,
    fresh: bool = False,
    evaluation_images: int = 0,
    say: Say = print,
) -> Fitted:
    """Trains all parts of a model, or goes on with it, or finds it finished.

    Args:
        request: what to train on and how long.
        out: the model folder.
        run_dir: the run folder.
        started: `time.monotonic()` when the work began.
        fresh: whether what an earlier fit made is replaced; it stays until there is a plan for the new one.
        evaluation_images: how many images will be drawn afterwards within the same budget.
        say: takes lines for the user.

    Raises:
        UserError: if the run folder is another request's, or the corpus cannot be used.
        KeyboardInterrupt: after saving; the same call goes on.
    """
    refuse_several("tessera fit", "train on many GPUs with train-dvae, encode, train-prior and train-scorer")
    run = RunFolder(run_dir)
    if request.init_from is not None:
        check_apart(request.init_from, out, run_dir)
    if fresh:
        check_ours(out, run_dir)
    if run.is_planned and not fresh:
        run.check_request(request)
        stored = run.read_plan()
        plan, facts = stored.plan, stored.facts
        ledger = Ledger(run_dir / LEDGER_FILE, started=started)
        tuned = run.read_tuning()
        finished = run.finished_sha256
        if finished is not None and tuned is not None and (out / INDEX_FILE).exists():
            if ModelFolder.open(out).sha256 != finished:
                say(f"{out} has changed since it was finished: a part was trained again, or settings were written")
            return Fitted(plan, facts, tuned, ledger, reused=True)
        if request.init_from is not None:
            check_sha256(request, open_base(request.init_from).origin.sha256)
        say(f"going on with {run_dir}: {clock(ledger.total_before)} of {clock(plan.minutes * 60)} minutes are spent")
        corpus = open_training_split(plan.data, say)
        if corpus.fingerprint() != stored.fingerprint:
            raise UserError(
                f"the images or captions of {request.path} have changed since {run_dir} was planned: "
                "choose another --out, or start over with --fresh"
            )
    else:
        if (out / INDEX_FILE).exists() and not fresh:
            raise UserError(
                f"{out} holds a model already, and there is no {run_dir / PLAN_FILE} to go on with: "
                "choose another --out, or replace the model with --fresh"
            )
        plan, facts, corpus, machine = make_plan(
            request, cache_dir=run_dir / DATA_FOLDER, evaluation_images=evaluation_images, say=say
        )
        plan = placed(plan, out=str(out.absolute()), run_dir=str(run_dir.absolute()))
        say("\n".join(plan_lines(plan, facts, machine)))
        if fresh:
            start_over(out, run_dir)
        run.write_plan(Stored(request, plan, facts, corpus.fingerprint()))
        ledger = Ledger(run_dir / LEDGER_FILE, started=started)
        ledger.spent["planning"] = ledger.total
    with ledger.phase("data"), counting("reading images") as on_progress:
        open_images(corpus, directory=plan.data.cache_path, most_gib=plan.data.cache_gib, on_progress=on_progress)
    try:
        tuned = _run_stages(plan, request, ledger, run, out, say)
    finally:
        ledger.save()
    _write_card(plan, facts, corpus, tuned, ledger, out)
    run.finish(ModelFolder.open(out).sha256)
    return Fitted(plan, facts, tuned, ledger, reused=False)


def example_prompt(corpus: Corpus) -> str:
    """A caption to try a model with: the first one that says something."""
    captions = (corpus.captions(index)[0] for index in range(min(len(corpus), 100)))
    return next((caption for caption in captions if caption), "")


def _run_stages(plan: Plan, request: Request, ledger: Ledger, run: RunFolder, out: Path, say: Say) -> Tuned:
    def left() -> float:
        return max(0.0, plan.training_seconds - ledger.total)

    def with_budget(stage: str, trainer: TrainerConfig) -> TrainerConfig:
        if any(override.startswith(f"{stage}.trainer.budget_seconds=") for override in request.overrides):
            return trainer
        seconds = seconds_for(stage, left(), stages=plan.stages)
        return replace(trainer, budget_seconds=ledger.budget(stage, seconds))

    def announce(what: str) -> None:
        say(f"{clock(left())} left  {what}")

    if plan.origin is not None:
        take_over(plan.origin, out)
    if "dvae" in plan.stages:
        announce("training the dVAE")
        with ledger.phase("dvae"):
            result = train_dvae(replace(plan.dvae, trainer=with_budget("dvae", plan.dvae.trainer)))
        measured = result["metrics"]
        usage = measured["codebook_usage"]
        steps = steps_made(plan, "dvae", result["steps"])
        say(f"           {steps}, {measured['psnr']:.2f} dB, codebook usage {usage:.1%}")
    announce("encoding the images")
    with ledger.phase("encode"):
        encode(plan.encode)
    announce("training the prior")
    with ledger.phase("prior"):
        result = train_prior(replace(plan.prior, trainer=with_budget("prior", plan.prior.trainer)))
    measured = result["metrics"]
    loss = measured.get("val_image_loss", measured.get("image_loss", float("nan")))
    say(f"           {steps_made(plan, 'prior', result['steps'])}, {loss:.3f} nats per image token")
    announce("training the scorer")
    with ledger.phase("scorer"):
        trainer = with_budget("scorer", plan.scorer.trainer)
        result = train_scorer(replace(plan.scorer, trainer=trainer), reconstruct=_reconstruct(plan, out))
    found = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in result["metrics"].items())
    say(f"           {steps_made(plan, 'scorer', result['steps'])}, right on held-out images: {found}")
    tuned = run.read_tuning()
    if tuned is None:
        announce("tuning the sampling settings")
        with ledger.phase("tuning"):
            seconds = seconds_for("tuning", left(), stages=plan.stages)
            tuned = tune(out, plan.data, seconds=seconds, device=request.device, **_settings_before(plan.origin))
            run.write_tuning(tuned)
        say(f"           {', '.join(f'{name} {value:g}' for name, value in tuned.settings.items())} ({tuned.how})")
    write_sampling_defaults(out, tuned.settings)  # also into a folder that was made again beside its run folder
    return tuned


def _settings_before(origin: Origin | None) -> dict[str, Any]:
    """What `tune` takes where there is nothing to tune with: the settings of the model before, if it has any."""
    settings = ModelFolder.open(origin.path, parts=[]).sampling_defaults() if origin is not None else {}
    return {"defaults": settings, "whose": f"as {origin.name} has them"} if origin is not None and settings else {}


def _reconstruct(plan: Plan, out: Path) -> Reconstruct:
    """Gives training images as the dVAE reconstructs them: what the scorer will rank looks so."""
    shards = TokenShards(Path(plan.encode.shards))
    index = shards.index
    vae = load_vae(ModelFolder.open(out, parts=["dvae"]), device=resolve_device(plan.dvae.trainer.device))
    precision = resolve_precision("auto", next(vae.parameters()).device)

    def reconstruct(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        grids = shards.codes[rows, 0].reshape(-1, index.grid_height, index.grid_width)  # [n, h, w]
        return decode_grids(vae, grids, precision=precision)

    return reconstruct


def _write_card(plan: Plan, facts: DataFacts, corpus: Corpus, tuned: Tuned, ledger: Ledger, out: Path) -> None:
    card = model_card(
        ModelFolder.open(out),
        plan,
        corpus=corpus.name,
        num_images=facts.num_images,
        example=example_prompt(corpus),
        tuning=tuned.how,
        seconds={stage: ledger.spent[stage] for stage in STAGES if stage in ledger.spent},
        hardware=describe_hardware(),
        versions=versions(),
    )
    write_card(out, card)


def image_size(text: str) -> tuple[int, int]:
    """Reads "64" or "64x96" (height x width).

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < _LEAST_SIDE:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no image size: give 64, or 64x96 for height x width, at least {_LEAST_SIDE}"
        )
    return sides[0], sides[-1]


def request_of(arguments: argparse.Namespace, run: RunFolder) -> Request:
    """The request of a command line; what it leaves open is as in the run folder, if there is a plan in it."""
    path = arguments.path
    if path not in BUILT_IN and not path.startswith(HUB_PREFIX):
        if not Path(path).expanduser().exists():
            raise UserError(f"no data {path!r}: expected scenes, emoji, {EXPECTED}")
        path = str(Path(path).expanduser().resolve())
    for override in arguments.overrides:
        if "=" not in override:
            raise UserError(f"{override!r} is neither an option nor KEY=VALUE; see `tessera fit --help`")
    base = open_base(arguments.init_from) if arguments.init_from is not None else None
    given: dict[str, Any] = {
        "minutes": arguments.minutes,
        "image_size": arguments.image_size or (base.image_size if base is not None else None),
        "device": arguments.device,
        "seed": arguments.seed,
        "font": arguments.font,
        "overrides": tuple(arguments.overrides) or None,
        "init_from": base.origin.path if base is not None else None,
        "init_sha256": base.origin.sha256 if base is not None else None,
        "train_dvae": arguments.train_dvae or None,
    }
    goes_on = run.is_planned and not arguments.fresh and not arguments.dry_run
    known = asdict(run.read_request()) if goes_on else {}
    settings: dict[str, Any] = {
        **known,
        "path": path,
        **{name: value for name, value in given.items() if value is not None},
    }
    return Request(**settings)


def main(argv: Sequence[str]) -> int:
    """The command."""
    started = time.monotonic()
    arguments = _parser().parse_intermixed_args(list(argv))
    out = Path(arguments.out)
    run_dir = Path(arguments.run_dir or f"{out}.run")
    for folder in (out, run_dir):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, expected a folder")
    request = request_of(arguments, RunFolder(run_dir))
    if arguments.dry_run:
        plan, facts, _, machine = make_plan(request, cache_dir=None)
        print("\n".join(plan_lines(plan, facts, machine)))
        return 0
    try:
        fitted = fit(request, out=out, run_dir=run_dir, started=started, fresh=arguments.fresh, say=say)
    except KeyboardInterrupt:
        going_on = [argument for argument in argv if argument != "--fresh"]
        print(f"to go on from here: {shlex.join(['tessera', 'fit', *going_on])}", file=sys.stderr)
        raise
    if fitted.reused:
        print(f"{out} is finished already; --fresh starts over")
    else:
        print(f"{out} is ready after {clock(fitted.ledger.total)} minutes; what it is: {out / 'README.md'}")
    example = shlex.quote(example_prompt(fitted.plan.data.open("train")))
    print(f"try: tessera generate {shlex.quote(str(out))} {example} -n 4 --best-of 16 --out out")
    return 0


def say(text: str) -> None:
    """Prints at once, also into a pipe."""
    print(text, flush=True)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="tessera fit",
        description="Train a model on captioned images: dVAE, prior and scorer, sized to data, hardware and time.\n"
        "With --from, train on a model that there is already. After an interruption the same command goes on.",
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        help=f"{EXPECTED}; scenes; emoji",
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="settings of the plan, e.g. prior.model.depth=8 dvae.flip=true data.limit=1000: "
        "the settings of the train-* commands behind dvae., prior. and scorer.",
    )
    parser.add_argument("--out", default="my-model", metavar="DIR", help="model folder to make (default: my-model)")
    parser.add_argument(
        "--from",
        dest="init_from",
        metavar="MODEL",
        help="start from the weights of this model folder, which is only read: its sizes, its dvae and its text "
        "tokenizer stay as they are, prior and scorer learn the new images (default: new weights)",
    )
    parser.add_argument(
        "--train-dvae",
        action="store_true",
        help="with --from: train its dvae on, too, for pictures of another kind than it has seen; the codes then "
        "change their meaning, which the prior has to learn again",
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help=f"time for everything, > 0 (default: {DEFAULT_MINUTES:g})"
    )
    parser.add_argument(
        "--image-size",
        type=image_size,
        metavar="PIXELS",
        help="side, or HEIGHTxWIDTH, in pixels (default: 64, or as MODEL of --from)",
    )
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--seed", type=int, metavar="S", help="of all that is random, from 0 (default: 0)")
    parser.add_argument("--font", metavar="FILE", help="emoji: color font; searched for by default")
    parser.add_argument(
        "--run-dir", metavar="DIR", help="plan, checkpoints and shards (default: --out with .run added)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="delete the model and the run folder of an earlier fit and start over"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))
