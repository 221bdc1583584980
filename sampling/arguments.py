"""Command-line flags of the commands of this package, and what their values say."""

import argparse
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from sampling.editing import Seam
from sampling.settings import GuidanceSchedule, SamplingSettings, override
from tessera.errors import UserError

SCORER_CHOICES = ("auto", "clip", "likelihood", "combined", "none")
PRECISION_CHOICES = ("auto", "bf16", "fp32")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, cuda:1 (default: auto, a GPU if there is one)",
    )


def add_precision_argument(parser: argparse.ArgumentParser, *, with_int8: bool = False) -> None:
    """Add --precision; int8 is for commands that draw images."""
    int8 = "; int8 stores the prior's weights in 8 bits while drawing, for the lowest latency" if with_int8 else ""
    parser.add_argument(
        "--precision",
        default="auto",
        choices=(*PRECISION_CHOICES, "int8") if with_int8 else PRECISION_CHOICES,
        help=f"number format of the matrix products (default: auto, bf16 where the hardware multiplies it){int8}",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sampling settings; a flag that is not given leaves the model's own default in force."""
    group = parser.add_argument_group("sampling (defaults: the model's own, tuned when it was trained)")
    group.add_argument(
        "--temperature",
        type=float,
        metavar="TAU",
        help="number >= 0; 0 takes the likeliest code every time, 1 is neutral",
    )
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K most likely codes, integer >= 0; 0 keeps all")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="keep the likeliest codes that sum to P, number in (0, 1]; 1 keeps all"
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="keep codes at least P times as likely as the likeliest, number in [0, 1]; 0 keeps all",
    )
    group.add_argument(
        "--guidance",
        type=float,
        metavar="W",
        help="number >= 0: logits become u + W (c - u); 0 ignores the prompt, 1 is off (and twice as fast), "
        "above 1 follows the prompt more closely",
    )
    group.add_argument(
        "--guidance-schedule",
        choices=get_args(GuidanceSchedule),
        help="how guidance grows from 1 to W along the image: at once, linearly, or by (1 - cos(pi s^P)) / 2 at share "
        "s of the image",
    )
    group.add_argument(
        "--guidance-power", type=float, metavar="P", help="the P of power-cosine, number > 0; the larger, the later"
    )
    group.add_argument(
        "--guidance-threshold",
        type=float,
        metavar="W",
        help="no guidance where the schedule is below W, number >= 0; 0 is never",
    )
    group.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=V,V,...",
        help="one image for each value of a setting, such as guidance=1,2,4; given again, for each combination; the "
        "contact sheet has one row for each value of the first; for one prompt",
    )


def add_candidate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how many candidates to draw, and how to choose."""
    group = parser.add_argument_group("candidates")
    group.add_argument("-n", type=int, default=1, metavar="N", help="images per prompt (default: %(default)s)")
    group.add_argument(
        "--best-of",
        type=int,
        metavar="N",
        help="candidates per prompt, of which the best -n are kept (default: -n); drawn as many at a time as fit the "
        "memory",
    )
    group.add_argument("--seed", type=int, default=0, help="integer from 0 to 2^63 - 1 (default: %(default)s)")
    group.add_argument(
        "--scorer",
        default="auto",
        choices=(*SCORER_CHOICES[:-1], "context", SCORER_CHOICES[-1]),
        help="what ranks the candidates: clip (the model's scorer part), likelihood (of the prior), context (how "
        "likely the kept part of --init is after the drawn one), combined, none (default: auto, the model's own "
        "choice, and combined with --init)",
    )
    group.add_argument(
        "--prune-keep",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the candidates that is finished, the likeliest so far, number in (0, 1] (default: 1, all)",
    )
    group.add_argument(
        "--prune-after",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="after which share of the image the others are given up, number in (0, 1) (default: %(default)s)",
    )


def add_editing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the given image, and what of it is kept."""
    group = parser.add_argument_group(
        "editing (with --init, one of --mask, --keep-rows, --keep and --outpaint; a cell is what one code covers, "
        "such as 8x8 pixels)"
    )
    group.add_argument("--init", metavar="FILE", help="image to edit; cropped to the model's aspect and resized")
    group.add_argument(
        "--mask",
        metavar="FILE",
        help="inpaint: image of the size of --init; what is white, or transparent, is drawn anew; or a rectangle "
        "LEFT,TOP,RIGHT,BOTTOM in pixels of --init",
    )
    group.add_argument(
        "--keep-rows", type=int, metavar="N", help="complete: keep the first N rows of cells, integer >= 1"
    )
    group.add_argument(
        "--keep", type=float, metavar="SHARE", help="vary: keep a random share of the cells, number in (0, 1)"
    )
    group.add_argument(
        "--seam",
        default="none",
        choices=get_args(Seam),
        help="with --mask: how kept pixels join drawn ones; blend fades from one to the other, reencode codes both "
        "together once more (default: none, all pixels are as decoded)",
    )
    group.add_argument(
        "--outpaint",
        metavar="MARGINS",
        help="extend by cells on each side, such as right=4,bottom=2; also left and top, which go on less well",
    )
    group.add_argument(
        "--outpaint-step",
        type=int,
        metavar="N",
        help="new rows or columns per step, cells, integer >= 1; fewer are slower and see more (default: half the "
        "image)",
    )


def read_axes(texts: Sequence[str]) -> dict[str, Sequence[Any]]:
    """Read the axes of a grid as the command line gives them.

    Args:
        texts: such as ["guidance=1,2,4", "top-k=0,16"].

    Returns:
        Setting -> values, in the order given; every value is in its range.

    Raises:
        UserError: another form, a setting that does not exist or comes twice, or a value that it cannot take.
    """
    axes: dict[str, Sequence[Any]] = {}
    types = get_type_hints(SamplingSettings)
    for text in texts:
        name, _, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not name or not values:
            raise UserError(f"cannot read --grid {text!r}: expected NAME=VALUE,VALUE,..., such as guidance=1,2,4")
        if name in axes:
            raise UserError(f"--grid {name} is given twice: list all its values in one, as {name}=V,V,...")
        axes[name] = [_read_setting(name, value.strip(), types.get(name, str)) for value in values.split(",")]
    return axes


def _read_setting(name: str, text: str, kind: Any) -> Any:
    try:
        value = kind(text) if kind in (int, float) else text
    except ValueError as error:
        expected = "an integer" if kind is int else "a number"
        raise UserError(f"--grid {name} has a value {text!r}, expected {expected}") from error
    override(SamplingSettings(), {name: value})  # type: ignore[misc]  # refuses unknown names and values out of range
    return value
