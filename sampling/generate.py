"""`tessera generate`: prompts in, PNG files that say how they were made out.

tessera generate my-model "a red star left of a blue ring" -n 4 --best-of 32 --seed 7 --out out/
"""

import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

import tessera
from sampling.arguments import (
    SCORER_CHOICES,
    add_device_argument,
    add_precision_argument,
    add_sampling_arguments,
)
from sampling.generated_image import GeneratedImage
from sampling.pictures import Tile, contact_sheet
from sampling.pipeline import Pipeline
from tessera.data.images import ImageError, read_png_text, save_png
from tessera.errors import UserError, run_command
from tessera.model_folder import short_sha256
from tessera.one_line_parser import OneLineParser

METADATA_KEY = "tessera"
_SLUG_BYTES = 80  # leaves room for seed, index and counter in the 255 bytes of a file name
_MAX_SHEET_IMAGES = 100


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    arguments = _parser().parse_intermixed_args(list(argv))
    prompts = _prompts(arguments.prompts, arguments.prompts_file)
    console = Console(stderr=True)

    def warn(message: str) -> None:
        console.print(f"[yellow]note:[/yellow] {escape(message)}", highlight=False, soft_wrap=True)

    # A folder that cannot be made must fail before minutes of work, not after.
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, expected a folder")
    out.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline.load(arguments.model, device=arguments.device, precision=arguments.precision)
    num_candidates = arguments.n if arguments.best_of is None else arguments.best_of
    kept: list[GeneratedImage] = []
    num_saved = 0
    with _progress(console) as progress:
        image_len = pipeline.prior.layout.image_len
        task = progress.add_task("drawing", total=len(prompts) * num_candidates, unit=1)
        stream = pipeline.stream(
            prompts,
            n=num_candidates if arguments.all else arguments.n,
            best_of=arguments.best_of,
            seed=arguments.seed,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            guidance=arguments.guidance,
            scorer=None if arguments.scorer == "none" else arguments.scorer,
            on_progress=lambda done, _: progress.update(task, completed=done / image_len),
            on_warning=warn,
        )
        try:
            for images in stream:
                for image in images:
                    path = save_image(image, out, model_name=Path(arguments.model).name)
                    num_saved += 1
                    _report(image, path, as_json=arguments.json)
                if len(kept) < _MAX_SHEET_IMAGES:
                    kept.extend(images[: arguments.n])
        except KeyboardInterrupt:
            if num_saved:
                warn(f"{num_saved} images are in {out}")
            raise
    if not arguments.no_sheet:
        if len(prompts) * arguments.n > _MAX_SHEET_IMAGES:
            warn(f"the contact sheet shows the first {_MAX_SHEET_IMAGES} of {len(prompts) * arguments.n} images")
        path = save_sheet(kept[:_MAX_SHEET_IMAGES], out)
        if not arguments.json:
            print(f"contact sheet: {path}")
    return 0


def save_image(image: GeneratedImage, folder: Path, *, model_name: str = "") -> Path:
    """Write one image as PNG with its recipe, scores and an A1111-readable `parameters` text.

    The same recipe writes the same file again; a file that holds anything else is left alone and the name numbered.

    Args:
        image: what the pipeline returned.
        folder: where to write; must exist.
        model_name: for the `parameters` text.

    Returns:
        The path written: <slug of the prompt>-<seed>-<image index>.png, or with -2, -3, ... before the suffix.
    """
    stem = f"{slug(image.prompt)}-{image.seed}-{image.image_index}"
    description = {"kind": "image", "tessera": tessera.__version__, **image.description()}
    text = {
        METADATA_KEY: json.dumps(description, ensure_ascii=False),
        "parameters": parameters_text(image, model_name=model_name),
    }
    path = free_path(folder, stem, same={"kind": "image", **image.recipe()})
    save_png(path, image.image, text)
    return path


def save_sheet(images: Sequence[GeneratedImage], folder: Path) -> Path:
    """Write the contact sheet of images as sheet-<slug of the first prompt>-<seed>.png; returns the path."""
    prompts = list(dict.fromkeys(image.prompt for image in images))
    one_prompt = len(prompts) == 1
    tiles = [
        Tile(image.image, "" if one_prompt else image.prompt or "(no prompt)", _note(image, with_seed=one_prompt))
        for image in images
    ]
    title = (prompts[0] or "(no prompt)") if one_prompt else f"{len(images)} images for {len(prompts)} prompts"
    columns = None
    if not one_prompt and len(images) % len(prompts) == 0 and len(images) > len(prompts):
        columns = min(8, len(images) // len(prompts))  # one row per prompt
    sheet = contact_sheet(tiles, columns=columns, title=title)
    same = {"kind": "contact sheet", "images": [image.recipe() for image in images]}
    text = {METADATA_KEY: json.dumps({**same, "tessera": tessera.__version__}, ensure_ascii=False)}
    path = free_path(folder, f"sheet-{slug(prompts[0])}-{images[0].seed}", same=same)
    save_png(path, np.asarray(sheet), text)
    return path


def read_metadata(path: Path) -> dict[str, Any] | None:
    """What `save_image` or `save_sheet` wrote into a PNG; None if the file is not one of theirs."""
    try:
        content = json.loads(read_png_text(path).get(METADATA_KEY, "null"))
    except (ImageError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def free_path(folder: Path, stem: str, *, same: dict[str, Any]) -> Path:
    """The first of stem.png, stem-2.png, ... that does not exist, or whose metadata agree with `same`."""
    number = 1
    while True:
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        if not path.exists():
            return path
        found = read_metadata(path)
        if found is not None and {key: found.get(key) for key in same} == json.loads(json.dumps(same)):
            return path
        number += 1


def slug(prompt: str) -> str:
    """A prompt as a file name: its words in lower case, joined by hyphens, in any script, at most 80 bytes."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).lower())
    joined = "-".join(words).encode()[:_SLUG_BYTES].decode(errors="ignore")  # a character cut in two is dropped
    return joined.strip("-_") or "image"


def parameters_text(image: GeneratedImage, *, model_name: str = "") -> str:
    """The recipe in the form that the Stable Diffusion web UI writes, which many viewers show and search."""
    height, width, _ = image.image.shape
    settings = image.settings
    fields = {
        "Steps": image.codes.size,
        "Sampler": "tessera",
        "CFG scale": settings.guidance,
        "Seed": image.seed,
        "Size": f"{width}x{height}",
        "Model hash": short_sha256(image.model_sha256),
        **({"Model": model_name} if model_name else {}),
        "Image index": image.image_index,
        "Temperature": settings.temperature,
        "Top-k": settings.top_k,
        "Top-p": settings.top_p,
        "Min-p": settings.min_p,
        "Version": f"tessera {tessera.__version__}",
    }
    return f"{image.prompt}\nNegative prompt: \n" + ", ".join(f"{name}: {value}" for name, value in fields.items())


def _note(image: GeneratedImage, *, with_seed: bool) -> str:
    parts = [f"seed {image.seed} / {image.image_index}"] if with_seed else []
    if image.scorer is not None:
        parts.append(f"{image.scorer} {image.scores[image.scorer]:.2f}")
    return ", ".join(parts)


def _report(image: GeneratedImage, path: Path, *, as_json: bool) -> None:
    """One line per image on stdout, at once, so that a reader of the pipe can follow."""
    if as_json:
        print(json.dumps({"path": str(path), **image.description()}, ensure_ascii=False), flush=True)
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
    parser.add_argument("-n", type=int, default=1, metavar="N", help="images per prompt (default: %(default)s)")
    parser.add_argument(
        "--best-of", type=int, metavar="N", help="candidates per prompt, of which the best -n are kept (default: -n)"
    )
    parser.add_argument("--seed", type=int, default=0, help="integer from 0 to 2^63 - 1 (default: %(default)s)")
    parser.add_argument(
        "--scorer",
        default="auto",
        choices=SCORER_CHOICES,
        help="what ranks the candidates: clip (the model's scorer part), likelihood (of the prior), combined, none "
        "(default: auto, the model's own choice)",
    )
    add_sampling_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", default="out", metavar="FOLDER", help="where images go (default: %(default)s)")
    output.add_argument("--all", action="store_true", help="save all candidates, not only the best -n")
    output.add_argument("--no-sheet", action="store_true", help="write no contact sheet")
    output.add_argument(
        "--json", action="store_true", help="print one JSON object per image on stdout, and nothing else there"
    )
    add_device_argument(parser)
    add_precision_argument(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))
