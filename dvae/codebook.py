"""What each code of a dVAE looks like and how often it is used: `tessera codebook MODEL [PATH]`.

Writes a picture with one tile per code and, beside it, a JSON file with the counts.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dvae.model import DiscreteVAE, load
from dvae.reconstruct import decode_grids, encode_images
from dvae.sheets import Order, codebook_sheet
from dvae.usage import usage_of_counts
from tessera.atomic_write import atomic_write
from tessera.data.corpus import Corpus, open_corpus, read_views
from tessera.data.images import save_png
from tessera.data.shards import batches
from tessera.data.views import Views
from tessera.errors import UserError
from tessera.model_folder import ModelFolder, short_sha256
from tessera.one_line_parser import OneLineParser
from tessera.precision import Precision, resolve_device, resolve_precision
from tessera.progress import counting

# K codebook size, n shown codes, f side in pixels of what one code stands for, s side of a field of codes.

MOST_TILES = 8_192
BUILT_IN_CORPORA = ("scenes", "emoji")

_FIELD = 5  # s: with 3 the field's border still shows in its middle, by 1 of 255 on average and by up to 22
_FIELDS_AT_ONCE = 1_024  # decoded pixels that are held
_IMAGES_AT_ONCE = 64
_IMAGE_SIZE = 256, 256  # where a model does not say which it was trained on

OnProgress = Callable[[int, int], None]  # (done, total)


def decode_codebook(
    vae: DiscreteVAE, codes: NDArray[np.integer] | None = None, *, precision: Precision, field: int = _FIELD
) -> NDArray[np.uint8]:
    """What each code decodes to among its like: the middle of a field filled with that code alone.

    A convolutional decoder draws no code by itself: what lies around a code decides its pixels too. A field of one code
    favors no neighbor and keeps its border away from the middle (the paper's network sees further than the default
    field, so that a trace of the border may show). A tile gives a code's color and texture, and where it stands for an
    edge or a corner, the like of that edge; in an image the same code is drawn to fit its neighbors.

    Args:
        vae: in evaluation mode.
        codes: integers [n] in [0, K); None takes all of them in their order.
        precision: to decode in.
        field: s, side of the field in codes; odd.

    Returns:
        uint8 [n, f, f, 3].

    Raises:
        ValueError: for an even field.
    """
    if field < 1 or field % 2 == 0:
        raise ValueError(f"a field needs a code in its middle, so an odd side; got {field}")
    if codes is None:
        codes = np.arange(vae.codebook_size)
    f = vae.downsampling
    middle = slice(field // 2 * f, (field // 2 + 1) * f)
    tiles = np.empty((len(codes), f, f, 3), np.uint8)
    for span in batches(len(codes), _FIELDS_AT_ONCE):
        place = slice(span.start, span.stop)
        grids = np.broadcast_to(codes[place, None, None], (len(span), field, field))  # [n, s, s]
        tiles[place] = decode_grids(vae, grids, precision=precision)[:, middle, middle]
    return tiles


def count_uses(
    vae: DiscreteVAE, corpus: Corpus, *, precision: Precision, on_progress: OnProgress | None = None
) -> NDArray[np.int64]:
    """How often each code occurs in a corpus, int64 [K].

    Args:
        vae: in evaluation mode.
        corpus: pictures whose sides f divides.
        precision: to encode in.
        on_progress: called with (pictures done, pictures in all).
    """
    counts = np.zeros(vae.codebook_size, np.int64)
    done = 0
    with closing(read_views(corpus, Views(), batch_size=_IMAGES_AT_ONCE)) as batches_read:
        for views in batches_read:  # [n, 1, H, W, 3]
            codes = encode_images(vae, views[:, 0], precision=precision)
            counts += np.bincount(codes.ravel(), minlength=len(counts))
            done += len(views)
            if on_progress is not None:
                on_progress(done, len(corpus))
    return counts


def shown_codes(counts: NDArray[np.int64] | None, codebook_size: int, *, order: Order, most: int) -> NDArray[np.int64]:
    """Which codes a picture shows, in which order, int64 [n].

    Args:
        counts: uses of every code [K]; None where nothing was counted.
        codebook_size: K.
        order: `use` begins with the most used code, equal ones by index; `index` keeps the order of the codebook.
        most: where K is larger, only so many: the most used ones in either order, without counts the first ones.
    """
    if counts is None:
        return np.arange(min(codebook_size, most))
    codes = np.argsort(-counts, kind="stable")[:most]
    return codes if order == "use" else np.sort(codes)


def draw_codebook(
    vae: DiscreteVAE,
    counts: NDArray[np.int64] | None,
    *,
    precision: Precision,
    source: str = "",
    order: Order = "use",
    most: int = MOST_TILES,
) -> NDArray[np.uint8]:
    """The picture of a codebook; see `dvae.sheets.codebook_sheet`.

    Args:
        vae: in evaluation mode.
        counts: uses of every code, int64 [K], at least one of them above 0; None where nothing was counted, which shows
            the codes by index.
        precision: to decode in.
        source: what was counted, for the header.
        order: by use or by index.
        most: tiles at most.

    Returns:
        uint8 [height, width, 3].
    """
    if counts is None:
        order = "index"
    codes = shown_codes(counts, vae.codebook_size, order=order, most=most)
    whole = len(codes) == vae.codebook_size
    return codebook_sheet(
        decode_codebook(vae, codes, precision=precision),
        codes,
        counts,
        order=order,
        columns=digit_columns(vae.config.code_digits, len(codes)) if order == "index" and whole else None,
        title=_headline(vae.codebook_size, counts),
        lines=_explanation(vae.codebook_size, counts, num_shown=len(codes), source=source, order=order),
    )


def digit_columns(digits: Sequence[int], num_codes: int) -> int | None:
    """Columns that keep codes of equal low digits below each other; None where codes have no digits.

    Args:
        digits: values of each digit of a code, least significant first.
        num_codes: K; of the products of leading digits, the one closest to a square grid is taken.
    """
    products = np.cumprod(digits)[:-1]
    if not len(products):
        return None
    return int(products[np.abs(np.log(products / num_codes**0.5)).argmin()])


def _headline(codebook_size: int, counts: NDArray[np.int64] | None) -> str:
    if counts is None:
        return f"Codebook of {codebook_size:,} codes"
    usage = usage_of_counts(torch.from_numpy(counts))
    return (
        f"Codebook of {codebook_size:,} codes: {usage.share:.1%} used, {usage.dead:,} dead, "
        f"perplexity {usage.perplexity:,.1f}"
    )


def _explanation(
    codebook_size: int, counts: NDArray[np.int64] | None, *, num_shown: int, source: str, order: Order
) -> list[str]:
    if counts is None:
        rest = "" if num_shown == codebook_size else f", the first {num_shown:,} of {codebook_size:,}"
        told = [f"By index{rest}; to the left the index of a row's first code. Uses were not counted."]
    else:
        of = f" of {source}" if source else ""
        rest = "" if num_shown == codebook_size else f" Shown are the {num_shown:,} most used of {codebook_size:,}."
        sorting = (
            "Most used first; to the left the uses of a row's first code."
            if order == "use"
            else "By index; to the left the index of a row's first code."
        )
        told = [
            f"Counted over {counts.sum():,} codes{of}.{rest}",
            f"{sorting} Bars: uses on a logarithmic scale, full at {counts.max():,}; crossed out: never used.",
        ]
    return [
        *told,
        f"A tile is the middle of {_FIELD}x{_FIELD} times the same code, decoded; in an image its neighbors change it.",
    ]


class _Counted(NamedTuple):
    counts: NDArray[np.int64]
    source: str
    figures: dict[str, Any]


def _count(
    arguments: argparse.Namespace, metadata: Mapping[str, Any], vae: DiscreteVAE, precision: Precision
) -> _Counted | None:
    """Counts over PATH, or over the built-in corpus of the training; None, and the reason on stderr, without either."""
    is_given, trained_on = arguments.path is not None, str(metadata.get("corpus", ""))
    if not is_given and trained_on not in BUILT_IN_CORPORA:
        known = f"the model was trained on {trained_on!r}" if trained_on else "the model names no corpus"
        print(f"tessera: uses are not counted: {known}; give PATH to count them", file=sys.stderr)
        return None
    height, width = arguments.image_size or metadata.get("image_size", _IMAGE_SIZE)
    try:
        vae.grid(height, width)
    except ValueError as error:
        raise UserError(f"--image-size: {error}") from error
    try:
        with counting("reading") as on_progress:
            corpus = open_corpus(
                arguments.path if is_given else trained_on,
                image_size=(height, width),
                split="train",
                limit=arguments.limit,
                font=arguments.font,
                on_progress=on_progress,
            )
    except UserError as error:
        if is_given:
            raise
        print(f"tessera: uses are not counted: {error}", file=sys.stderr)
        return None
    with counting("counting codes") as on_progress:
        counts = count_uses(vae, corpus, precision=precision, on_progress=on_progress)
    usage = usage_of_counts(torch.from_numpy(counts))
    figures = {
        "corpus": corpus.name,
        "corpus_fingerprint": corpus.fingerprint(),
        "images": len(corpus),
        "image_size": [height, width],
        "codes": int(counts.sum()),
        "usage": usage.share,
        "perplexity": usage.perplexity,
        "dead_codes": usage.dead,
    }
    return _Counted(counts, f"{len(corpus):,} training images of {corpus.name}, {height}x{width} px", figures)


def _sides(text: str) -> tuple[int, int]:
    """Reads "64" or "64x96" (height x width)."""
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no image size: give 64, or 64x96 for height x width")
    return sides[0], sides[-1]


def _at_least_1(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="tessera codebook",
        description="Shows what each code of a dVAE looks like and how often it is used.",
        epilog="Beside the picture stands a JSON file of the same name with the uses of every code.",
    )
    parser.add_argument("model", metavar="MODEL", help="model folder")
    parser.add_argument(
        "path",
        metavar="PATH",
        nargs="?",
        help="what to count codes over: scenes, emoji, a folder of captioned images or a manifest, its training split "
        "(default: the built-in corpus that the dvae was trained on; else nothing is counted)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("codebook.png"), metavar="FILE", help="the picture (default: %(default)s)"
    )
    parser.add_argument(
        "--order",
        choices=get_args(Order),
        default="use",
        help="most used codes first, or in the order of the codebook (default: %(default)s)",
    )
    parser.add_argument(
        "--most",
        type=_at_least_1,
        default=MOST_TILES,
        metavar="N",
        help="of a larger codebook show the N most used codes (default: %(default)s)",
    )
    parser.add_argument("--limit", type=_at_least_1, metavar="N", help="count over N images (default: all)")
    parser.add_argument(
        "--image-size",
        type=_sides,
        metavar="PIXELS",
        help="side, or HEIGHTxWIDTH, to which images are fitted (default: as the model was trained)",
    )
    parser.add_argument("--font", metavar="FILE", help="emoji: color font; searched for by default")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, without the counts")
    return parser


def main(argv: Sequence[str]) -> int:
    """The command."""
    arguments = _parser().parse_intermixed_args(list(argv))
    out: Path = arguments.out
    if out.is_dir() or out.parent.is_file() or out.suffix.lower() != ".png":
        raise UserError(f"--out must name a .png file in a folder; got {out}")
    folder = ModelFolder.open(arguments.model, parts=["dvae"])
    device = resolve_device(arguments.device)
    vae, precision = load(folder, device=device), resolve_precision("auto", device)
    out.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made must fail before minutes of counting
    counted = _count(arguments, folder.metadata("dvae"), vae, precision)
    figures = {
        "model": short_sha256(folder.part_sha256("dvae")),
        "codebook_size": vae.codebook_size,
        "downsampling": vae.downsampling,
        **(counted.figures if counted else {}),
    }
    picture = draw_codebook(
        vae,
        counted.counts if counted else None,
        precision=precision,
        source=counted.source if counted else "",
        order=arguments.order,
        most=arguments.most,
    )
    save_png(out, picture, {"tessera": json.dumps({"kind": "codebook", **figures}, ensure_ascii=False)})
    with atomic_write(out.with_suffix(".json")) as temporary:
        listed = {**figures, "counts": counted.counts.tolist()} if counted else figures
        temporary.write_text(json.dumps(listed, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps({"path": str(out), **figures}, ensure_ascii=False))
    elif counted:
        print(f"{out}: {_headline(vae.codebook_size, counted.counts)}; {counted.source}")
    else:
        print(f"{out}: {_headline(vae.codebook_size, None)} by index")
    return 0


if __name__ == "__main__":
    from tessera.errors import run_command

    sys.exit(run_command(main, sys.argv[1:]))
