"""`tessera generate`: prompts in, PNG files that say how they were made out.

tessera generate my-model "a red star left of a blue ring" -n 4 --best-of 32 --seed 7 --out out/
tessera generate my-model "a red star" --init photo.png --mask mask.png --seam blend
tessera generate my-model "a red star" --init photo.png --outpaint right=4,bottom=2
tessera generate my-model "a red star" --grid guidance=1,2,4 --grid temperature=0.8,1
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from sampling.arguments import (
    add_candidate_arguments,
    add_device_argument,
    add_editing_arguments,
    add_precision_argument,
    add_sampling_arguments,
    read_axes,
)
from sampling.generated_image import GeneratedImage
from sampling.image_edit import parse_rectangle
from sampling.outpainting import Margins, parse_margins
from sampling.pipeline import Pipeline
from sampling.request import Request
from sampling.saving import description, save_image, save_sheet
from sampling.settings import SamplingSettings, SettingsOverrides, override
from tessera.errors import UserError, run_command
from tessera.one_line_parser import OneLineParser

_MAX_SHEET_IMAGES = 100

# A flag makes sense with one of those beside it, and not with any of the others.
_NEEDS = {
    "--mask": ("--init",),
    "--keep-rows": ("--init",),
    "--keep": ("--init",),
    "--outpaint": ("--init",),
    "--init": ("--mask", "--keep-rows", "--keep", "--outpaint"),
    "--seam": ("--mask",),
    "--outpaint-step": ("--outpaint",),
    "--prune-after": ("--prune-keep",),
}
_EXCLUDES = {
    "--mask": ("--keep-rows", "--keep", "--outpaint"),
    "--keep-rows": ("--keep", "--outpaint"),
    "--keep": ("--outpaint",),
    "--outpaint": ("--scorer", "--prune-keep", "--all"),
    "--grid": ("--init", "-n", "--best-of", "--prune-keep"),
    "--all": ("--prune-keep", "--grid"),
}


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(list(argv))
    prompts = _prompts(arguments.prompts, arguments.prompts_file)
    axes = read_axes(arguments.grid)
    margins = None if arguments.outpaint is None else parse_margins(arguments.outpaint)
    _check(parser, arguments, axes, num_prompts=len(prompts))
    console = Console(stderr=True)

    def warn(message: str) -> None:
        console.print(f"[yellow]note:[/yellow] {escape(message)}", highlight=False, soft_wrap=True)

    # A folder that cannot be made must fail before minutes of work, not after.
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, expected a folder")
    out.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline.load(
        arguments.model,
        device=arguments.device,
        precision=arguments.precision,
        deterministic=arguments.deterministic,
    )
    num_candidates = arguments.n if arguments.best_of is None else arguments.best_of
    num_combinations = math.prod(len(values) for values in axes.values())
    num_shown = len(prompts) * num_combinations * arguments.n
    images: list[GeneratedImage] = []
    kept: list[GeneratedImage] = []
    num_saved = 0
    with _progress(console) as progress:
        num_drawn = len(prompts) * num_combinations * num_candidates
        task = progress.add_task("drawing", total=num_drawn)
        try:
            for images in _drawn(
                pipeline,
                prompts,
                arguments,
                axes=axes,
                margins=margins,
                on_share=lambda share: progress.update(task, completed=share * num_drawn),
                on_warning=warn,
            ):
                for image in images:
                    path = save_image(image, out, model_name=Path(arguments.model).name, axes=list(axes))
                    num_saved += 1
                    _report(image, path, as_json=arguments.json)
                best = images if axes else images[: arguments.n]
                kept.extend(best[: _MAX_SHEET_IMAGES - len(kept)])
        except KeyboardInterrupt:
            if num_saved:
                is_part = margins is None and images[0].candidates < num_candidates
                of_part = f"; the last are the best of the {images[0].candidates} candidates that were finished"
                warn(f"{num_saved} images are in {out}{of_part if is_part else ''}")
            raise KeyboardInterrupt("the same command draws all images again") from None
    if not arguments.no_sheet:
        if num_shown > len(kept):
            warn(f"the contact sheet shows the first {len(kept)} of {num_shown} images")
        _save_sheet(kept, out, axes=axes, as_json=arguments.json, on_warning=warn)
    return 0


def _drawn(
    pipeline: Pipeline,
    prompts: Sequence[str],
    arguments: argparse.Namespace,
    *,
    axes: dict[str, Sequence[Any]],
    margins: Margins | None,
    on_share: Callable[[float], None],
    on_warning: Callable[[str], None],
) -> Iterator[list[GeneratedImage]]:
    """Images of one prompt at a time; tells the share of all the work that is done."""
    settings = _overrides(arguments)
    scorer = None if arguments.scorer == "none" else arguments.scorer
    if axes:
        yield pipeline.grid(
            prompts[0],
            axes=axes,
            seed=arguments.seed,
            scorer=scorer,
            on_progress=lambda done, total: on_share(done / total),
            on_warning=on_warning,
            **settings,
        )
    elif margins is not None:
        for place, prompt in enumerate(prompts):
            yield pipeline.outpaint(
                prompt,
                init=arguments.init,
                margins=margins,
                n=arguments.n,
                best_of=arguments.best_of,
                seed=arguments.seed,
                step=arguments.outpaint_step,
                on_progress=lambda done, total, place=place: on_share((place + done / total) / len(prompts)),
                on_warning=on_warning,
                **settings,
            )
    else:
        yield from pipeline.stream(
            prompts,
            n=arguments.best_of if arguments.all and arguments.best_of is not None else arguments.n,
            best_of=arguments.best_of,
            seed=arguments.seed,
            scorer=scorer,
            init=arguments.init,
            mask=arguments.mask,
            keep_rows=arguments.keep_rows,
            keep=arguments.keep,
            seam=arguments.seam,
            prune_keep=arguments.prune_keep,
            prune_after=arguments.prune_after,
            on_progress=lambda done, total: on_share(done / total),
            on_warning=on_warning,
            **settings,
        )


def _check(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, axes: Mapping[str, Sequence[Any]], num_prompts: int
) -> None:
    """Refuse what cannot be before anything is loaded."""
    given = _given(parser, arguments)
    for flag in sorted(given):
        if flag in _NEEDS and given.isdisjoint(_NEEDS[flag]):
            raise UserError(f"{flag} needs {' or '.join(_NEEDS[flag])} beside it")
        for other in _EXCLUDES.get(flag, ()):
            if other in given:
                raise UserError(f"{flag} does not go with {other}: give one of them")
    for name in axes:
        if getattr(arguments, name) is not None:
            raise UserError(f"--grid {name} does not go with --{name.replace('_', '-')}: the grid says all values")
    if axes and num_prompts > 1:
        raise UserError(f"--grid is for one prompt, got {num_prompts}")
    if arguments.scorer == "context" and arguments.init is None:
        raise UserError("--scorer context asks how well what is kept of --init fits what is drawn: give --init")
    for flag in ("init", "mask"):
        path = getattr(arguments, flag)
        if path is None or (flag == "mask" and parse_rectangle(path) is not None):
            continue
        if not Path(path).is_file():
            raise UserError(f"--{flag} {path}: there is no such file, expected an image")
    override(SamplingSettings(), _overrides(arguments))
    num_candidates = arguments.n if arguments.best_of is None else arguments.best_of
    Request(prompt="", seed=arguments.seed, n=arguments.n, num_candidates=num_candidates)
    if arguments.scorer == "none" and num_candidates > arguments.n:
        raise UserError(f"--best-of {num_candidates} of -n {arguments.n} needs a scorer to choose by, got none")
    if 0 < arguments.prune_keep < 1 and math.ceil(arguments.prune_keep * num_candidates) < arguments.n:
        raise UserError(
            f"--prune-keep {arguments.prune_keep:g} of {num_candidates} candidates leaves fewer than -n {arguments.n}: "
            "raise --best-of"
        )


def _given(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> set[str]:
    """The flags whose values are not the default."""
    return {
        flag
        for flag in {*_NEEDS, *_EXCLUDES, *(other for others in _EXCLUDES.values() for other in others)}
        if getattr(arguments, dest := flag.lstrip("-").replace("-", "_")) != parser.get_default(dest)
    }


def _overrides(arguments: argparse.Namespace) -> SettingsOverrides:
    given: dict[str, Any] = {name: getattr(arguments, name) for name in SettingsOverrides.__annotations__}
    return given  # type: ignore[return-value]


def _save_sheet(
    images: Sequence[GeneratedImage],
    folder: Path,
    *,
    axes: Mapping[str, Sequence[Any]],
    as_json: bool,
    on_warning: Callable[[str], None],
) -> None:
    try:
        path = save_sheet(images, folder, axes=axes)
    except UserError as error:  # too many large images for one picture; they are saved, each by itself
        on_warning(f"no contact sheet: {error}")
        return
    if not as_json:
        print(f"contact sheet: {path}")


def _report(image: GeneratedImage, path: Path, *, as_json: bool) -> None:
    """One line per image on stdout, at once, so that a reader of the pipe can follow."""
    if as_json:
        print(json.dumps({"path": str(path), **description(image)}, ensure_ascii=False), flush=True)
    else:
        scores = "  ".join(f"{name} {value:.3f}" for name, value in image.scores.items())
        print(f"{path}  {scores}".rstrip(), flush=True)


def _prompts(given: Sequence[str], prompts_file: str | None) -> list[str]:
    prompts = list(given)
    if prompts_file is not None:
        try:
            lines = Path(prompts_file).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{prompts_file} is not a UTF-8 text file: expected one prompt per line") from error
        except OSError as error:
            raise UserError(f"{prompts_file}: {error.strerror}; expected a file with one prompt per line") from error
        prompts.extend(line for line in lines if line.strip())
        if not prompts:
            raise UserError(f"{prompts_file} has no prompt: expected one per line")
    if not prompts:
        raise UserError('no prompt given: expected text in quotes, or --prompts-file FILE ("" draws without a prompt)')
    return prompts


class _RateColumn(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:.2f} images/s", style="progress.data.speed")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} images"),
        _RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # through the bar on a terminal, untouched into a pipe
        disable=not console.is_terminal,
    )


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="tessera generate",
        description="Make images for prompts. Same seed, same machine: same pixels.",
        epilog="Each PNG carries prompt, seed, image index, settings, scores and model hash "
        "(text chunks `tessera`, JSON, and `parameters`).",
    )
    parser.add_argument("model", metavar="MODEL", help="a model folder, as `tessera fit` writes it")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help='what to draw, in quotes; "" is no prompt')
    parser.add_argument("--prompts-file", metavar="FILE", help="more prompts, UTF-8 text, one per line")
    add_device_argument(parser)
    add_precision_argument(parser, with_int8=True)
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="on GPUs: images do not depend on what is drawn beside them, to the last bit; slower (on CPUs always so)",
    )
    add_candidate_arguments(parser)
    add_sampling_arguments(parser)
    add_editing_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", default="out", metavar="FOLDER", help="where images go (default: %(default)s)")
    output.add_argument("--all", action="store_true", help="save all candidates, not only the best -n")
    output.add_argument("--no-sheet", action="store_true", help="write no contact sheet")
    output.add_argument(
        "--json", action="store_true", help="print one JSON object per image on stdout, and nothing else there"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))
