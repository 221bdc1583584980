"""`tessera demo`: all of it on the built-in scenes. Trains, draws pictures for held-out prompts, judges them, reports.

out/demo/  model/  run/  report.html  report.json
"""

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.accuracy import refuse_tuning_seed
from recipes.card import model_card
from recipes.evaluate import Evaluation, accuracy_lines, evaluate
from recipes.fit import Fitted, example_prompt, fit, say
from recipes.ledger import Ledger
from recipes.plan import STAGES, evaluation_seconds_per_image
from recipes.plan_table import clock
from recipes.report import render_report
from recipes.run_folder import Request, RunFolder
from tessera.atomic_write import atomic_write
from tessera.errors import UserError, run_command
from tessera.model_folder import ModelFolder, write_card
from tessera.one_line_parser import OneLineParser
from tessera.precision import describe_hardware, versions
from tessera.progress import counting

DEFAULT_MINUTES = 10.0
DEFAULT_PROMPTS = 160
BEST_OF = 16
_LEAST_PROMPTS = 6  # one per class
_REPORT_SECONDS = 6.0  # for writing what has been measured


def demo(request: Request, *, out: Path, prompts: int, started: float, fresh: bool = False) -> dict[str, Any]:
    """Runs the demo, or goes on with it, or finds it done.

    Args:
        request: a fit on scenes.
        out: receives the model folder, the run folder and the reports.
        prompts: held-out prompts of each split; fewer are drawn where the budget is too small for so many.
        started: `time.monotonic()` when the work began.
        fresh: whether an earlier demo is replaced.

    Returns:
        The content of report.json.

    Raises:
        UserError: if `out` holds a demo of other settings.
        KeyboardInterrupt: after saving; the same call goes on.
    """
    model, run_dir, report_file = out / "model", out / "run", out / "report.json"
    fitted = fit(
        request,
        out=model,
        run_dir=run_dir,
        started=started,
        fresh=fresh,
        evaluation_images=2 * prompts * BEST_OF,
        say=say,
    )
    folder = ModelFolder.open(model)
    known = _known_report(report_file)
    is_same = known.get("model_sha256") == folder.sha256 and known.get("asked", {}).get("prompts") == prompts
    if fitted.reused and is_same:
        say(f"{out} is finished already; --fresh (make demo FRESH=1) starts over")
        return known
    ledger = fitted.ledger
    evaluation = _evaluate(fitted, model, prompts=prompts, seed=request.seed)
    figures = evaluation.figures
    steps = {part: int(folder.metadata(part)["steps"]) for part in folder.parts}
    seconds = {name: round(value, 1) for name, value in {**ledger.spent, "total": ledger.total}.items()}
    html = render_report(
        title="Tessera demo",
        model=str(model),
        plan=fitted.plan,
        run_dir=run_dir,
        figures=figures,
        seconds=seconds,
        steps=steps,
        tuning=fitted.tuned.how,
        trials=fitted.tuned.trials,
        judged=evaluation.judged,
        originals=evaluation.originals,
        reconstructions=evaluation.reconstructions,
        codes=evaluation.codes,
    )
    with atomic_write(out / "report.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    corpus = fitted.plan.data.open("train")
    card = model_card(
        folder,
        fitted.plan,
        corpus="scenes",
        num_images=fitted.facts.num_images,
        example=example_prompt(corpus),
        tuning=fitted.tuned.how,
        seconds={stage: ledger.spent[stage] for stage in STAGES if stage in ledger.spent},
        hardware=describe_hardware(),
        versions=versions(),
        figures=figures,
    )
    write_card(model, card)
    ledger.save()
    order = ["total", "dvae", "prior", "scorer", "sampling"]
    seconds = {**{name: seconds.get(name, 0.0) for name in order}, **seconds, "total": round(ledger.total, 1)}
    report = {
        "seconds": seconds,
        **{name: figures[name] for name in ("dvae", "prior", "scorer", "accuracy")},
        "sampling": figures["sampling"],
        "steps": steps,
        "hardware": figures["hardware"],
        "versions": figures["versions"],
        "asked": {"prompts": prompts, "minutes": request.minutes, "seed": request.seed},
        "model_sha256": figures["model_sha256"],
    }
    with atomic_write(report_file) as temporary:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _evaluate(fitted: Fitted, model: Path, *, prompts: int, seed: int) -> Evaluation:
    plan, ledger = fitted.plan, fitted.ledger
    # One that was interrupted after its training has less left than was set aside, but is judged all the same.
    seconds = max(plan.minutes * 60 - ledger.total, 0.5 * plan.evaluation_seconds) - _REPORT_SECONDS
    count = affordable_prompts(prompts, plan.evaluation_seconds, speed_per_image=_seconds_per_image(fitted))
    say(f"{clock(seconds)} left  judging {BEST_OF} candidates for {count} prompts of seen and {count} of unseen pairs")
    with ledger.phase("evaluation"), counting("judging prompts") as on_progress:
        return evaluate(
            model,
            plan.data,
            prompts=count,
            best_of=BEST_OF,
            seed=seed,
            device=plan.prior.trainer.device,
            deadline=time.monotonic() + max(seconds, 1.0),
            phase=_sampling_phase(ledger),
            on_progress=on_progress,
        )


def affordable_prompts(prompts: int, seconds: float, *, speed_per_image: float) -> int:
    """How many prompts of each split to begin with: as many as asked, or what twice the time set aside could judge.

    The deadline ends it in any case; this keeps a small budget from preparing prompts that it never comes to.
    """
    possible = 2 * seconds / max(2 * BEST_OF * speed_per_image, 1e-9)
    return int(min(prompts, max(_LEAST_PROMPTS, possible)))


def _seconds_per_image(fitted: Fitted) -> float:
    return evaluation_seconds_per_image(fitted.plan.speed) if fitted.plan.speed else 0.01


def _sampling_phase(ledger: Ledger) -> Callable[[str], AbstractContextManager[None]]:
    """The parts of an evaluation as phases; their names are not those of the stages that trained the parts."""

    def phase(name: str) -> AbstractContextManager[None]:
        return ledger.phase("sampling" if name == "sampling" else "measuring")

    return phase


def _known_report(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def main(argv: Sequence[str]) -> int:
    """The command."""
    started = time.monotonic()
    arguments = _parser().parse_intermixed_args(list(argv))
    if arguments.prompts < _LEAST_PROMPTS:
        raise UserError(f"--prompts must be at least {_LEAST_PROMPTS}, one per prompt class; got {arguments.prompts}")
    for override in arguments.overrides:
        if "=" not in override:
            raise UserError(f"{override!r} is neither an option nor KEY=VALUE; see `tessera demo --help`")
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, expected a folder")
    run = RunFolder(out / "run")
    goes_on = run.is_planned and not arguments.fresh
    known = run.read_plan().request if goes_on else Request(path="scenes", minutes=DEFAULT_MINUTES)
    given: dict[str, Any] = {
        "minutes": arguments.minutes,
        "device": arguments.device,
        "seed": arguments.seed,
        "overrides": tuple(arguments.overrides) or None,
    }
    request = replace(known, **{name: value for name, value in given.items() if value is not None})
    refuse_tuning_seed(request.seed)
    try:
        report = demo(request, out=out, prompts=arguments.prompts, started=started, fresh=arguments.fresh)
    except KeyboardInterrupt:
        going_on = [argument for argument in argv if argument != "--fresh"]
        print(f"to go on from here: {shlex.join(['tessera', 'demo', *going_on])}", file=sys.stderr)
        raise
    print()
    print("\n".join(accuracy_lines(report["accuracy"])))
    vae = report["dvae"]
    print(
        f"\ndVAE {vae['psnr']:.2f} dB, {vae['codebook_usage']:.1%} of its codes in use; "
        f"{clock(report['seconds']['total'])} minutes in all"
    )
    print(f"report: {out / 'report.html'}")
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="tessera demo",
        description="Train on the built-in scenes, draw pictures for held-out prompts, judge them, write a report.\n"
        "Run again, it goes on where it was interrupted, or shows what is finished.",
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="settings of the plan, as in `tessera fit`")
    parser.add_argument("--out", default="out/demo", metavar="DIR", help="folder for all of it (default: out/demo)")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help=f"time for everything, > 0 (default: {DEFAULT_MINUTES:g})"
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=DEFAULT_PROMPTS,
        metavar="N",
        help=f"held-out prompts of seen and as many of unseen pairs; a small budget takes fewer "
        f"(default: {DEFAULT_PROMPTS}, which makes {2 * DEFAULT_PROMPTS})",
    )
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--seed", type=int, metavar="S", help="of all that is random, from 0 (default: 0)")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier demo and start over")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))
