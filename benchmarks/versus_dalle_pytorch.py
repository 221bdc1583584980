"""Tessera against dalle-pytorch 1.6.6 from pixels to samples: the same pictures, the same time, the same cores.

python -m benchmarks.versus_dalle_pytorch [--minutes 10 | --quick] [--peer-python .venv-peers/bin/python]
    [--out FILE] [--picture docs/versus-dalle-pytorch.png] [--only ours | --only peer]

Both sides are given the 20,000 scenes of the training split at 64 x 64 as one array on the disk, with their captions,
and so many minutes of wall-clock, imports included, to train all that they have and to draw pictures for the same
held-out prompts. A parser reads the pictures (docs/scenes.md); half of the prompts name a shape in a color that no
training picture shows.

How the peer is helped: its classes are as they were released, but for the argument by which its cache reaches the
model; around them are loops of ours, as its scripts do not run on current versions of their dependencies. It is trained
with settings that were found in trials off the clock (benchmarks/versus_dalle_pytorch_sides.py names them), from codes
that are made once, on text ids that it need not find itself. It draws with several temperatures, one of them on the
clock, and the one with the most right pictures counts. Ours finds its settings on the clock, by the parser's verdicts
on other prompts; it also trains a scorer on the clock and ranks 16 candidates with it. dalle-pytorch can rank by a CLIP
of its own, which would have to be trained as well; it is left out, and therefore ours is given without ranking, too: a
single picture of ours, the mean over all candidates, against a single one of the peer's. Its guidance does not work (it
empties the prompt after the first token) and is off.

Also judged: fresh renders, which says what the parser is worth, and what each dVAE makes of them, which no sample can
surpass. A peer with no right picture at all is counted as if half a picture had been right.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.record import Row, write_results
from benchmarks.versus_dalle_pytorch_judging import Accuracy, Verdict, accuracy, attribute_accuracy, judge
from benchmarks.versus_dalle_pytorch_sides import (
    CANDIDATES,
    PEER_SETTINGS,
    PEER_VERSION,
    Materials,
    Outcome,
    Side,
    prepare,
    read_outcome,
    run_ours,
    run_peer,
)
from sampling.pictures import Tile, contact_sheet
from tessera.data.scenes import ATTRIBUTES, PROMPT_CLASSES
from tessera.errors import run_command
from tessera.precision import usable_cores

# P prompts, C candidates, H W image pixels.

CLAIM = (
    "with the same minutes of wall-clock on the same CPU, from pixels to samples, Tessera's pictures show what was "
    "asked for more often than those of dalle-pytorch 1.6.6, with and without ranking"
)
_PARSER_GOAL = 0.99
_MINUTES, _QUICK_MINUTES = 10.0, 1.5
_BUSY = 0.7  # of the cores: a side that had less shared them with somebody


class Counts(NamedTuple):
    """How much is judged."""

    prompts: int
    """of seen pairs, and as many of unseen ones"""
    originals: int
    """pictures of seen pairs, and as many of unseen ones"""


_COUNTS, _QUICK_COUNTS = Counts(150, 300), Counts(24, 60)


class Judged(NamedTuple):
    """Verdicts on everything that one side has made."""

    by_prompt: list[list[Verdict]]
    """[P][C] of the sampling settings with the most right pictures"""
    chosen: int
    """which settings"""
    by_settings: list[Accuracy]
    """of single pictures, for all of the settings"""
    reconstructions: list[Verdict]

    def flat(self) -> list[Verdict]:
        """All candidates of all prompts."""
        return [verdict for verdicts in self.by_prompt for verdict in verdicts]


def judge_outcome(outcome: Outcome, materials: Materials, *, num_prompts: int) -> Judged:
    """Judges what a side has made for the first prompts."""
    by_settings: list[list[list[Verdict]]] = []
    for samples in outcome.samples:
        count = samples.shape[1]
        specs = [prompt.spec for _, prompt in materials.prompts[:num_prompts] for _ in range(count)]
        verdicts = judge(samples[:num_prompts].reshape(-1, *samples.shape[2:]), specs)
        by_settings.append([verdicts[first : first + count] for first in range(0, len(verdicts), count)])
    shares = [accuracy(verdict for verdicts in by_prompt for verdict in verdicts) for by_prompt in by_settings]
    chosen = max(range(len(shares)), key=lambda number: shares[number].share)
    return Judged(by_settings[chosen], chosen, shares, judge(outcome.reconstructions, materials.specs))


def rows(
    ours: Judged, peer: Judged, materials: Materials, renders: Sequence[Verdict], logs: Mapping[Side, Any]
) -> Iterator[Row]:
    """Whole captions, classes and attributes; what the dVAEs keep; what the parser is worth; time and sizes."""
    prompts = materials.prompts[: len(ours.by_prompt)]
    everything = range(len(prompts))
    groups: dict[str, list[int]] = {"all prompts": list(everything)}
    for pairs in ("seen", "unseen"):
        groups[f"{pairs} pairs"] = [index for index in everything if prompts[index][0] == pairs]
    for group, indices in groups.items():
        theirs = accuracy(verdict for index in indices for verdict in peer.by_prompt[index])
        single = accuracy(verdict for index in indices for verdict in ours.by_prompt[index])
        best = accuracy(ours.by_prompt[index][0] for index in indices)
        yield _row(f"{group}: a single picture is right", single, theirs, goal=1.0)
        yield _row(f"{group}: the best of {CANDIDATES} is right, by our scorer", best, theirs, goal=1.0)
    for name in PROMPT_CLASSES:
        indices = [index for index in everything if prompts[index][1].spec.prompt_class == name]
        single, theirs = (
            accuracy(verdict for index in indices for verdict in side.by_prompt[index]) for side in (ours, peer)
        )
        if indices:
            yield _row(f"prompts of class {name}: a single picture is right", single, theirs)
    for name in ATTRIBUTES:
        single, theirs = (attribute_accuracy(side.flat(), name) for side in (ours, peer))
        if single.count:
            yield _row(f"{name}, where asked for: right in a single picture", single, theirs, goal=1.0)
    after, theirs = accuracy(ours.reconstructions), accuracy(peer.reconstructions)
    yield _row("fresh renders after the dVAE: right", after, theirs, goal=1.0)
    yield Row("fresh renders: right", accuracy(renders).share, "of the pictures", "", None, _PARSER_GOAL)
    seconds = {side: log["seconds"] for side, log in logs.items()}
    yield Row("wall-clock", seconds["ours"], "s", f"{PEER_VERSION}: {seconds['peer']:.0f}", None, None)
    for part, of_peer in (("dvae", "vae"), ("prior", "prior")):
        count = logs["peer"][f"{of_peer}_parameters"]
        yield Row(
            f"{part}, parameters", logs["ours"][f"{part}_parameters"], "", f"{PEER_VERSION}: {count:,}", None, None
        )


def _row(name: str, ours: Accuracy, theirs: Accuracy, *, goal: float | None = None) -> Row:
    against = f"{PEER_VERSION}: {theirs.share:.3f}"
    return Row(name, ours.share, "of the pictures", against, ours.share / theirs.at_least_half_a_picture, goal)


class Shown(NamedTuple):
    """One row of the sheet: a picture for each prompt, and whether it is right."""

    name: str
    pictures: NDArray[np.uint8]
    """uint8 [P, H, W, 3]"""
    verdicts: list[Verdict]


def sheet(
    materials: Materials, outcomes: Mapping[Side, Outcome], ours: Judged, peer: Judged, *, minutes: float
) -> Image.Image:
    """The first prompt of each class and its first pictures, seen pairs above and unseen ones below: none is chosen."""
    count = len(ours.by_prompt)
    first = outcomes["ours"].first_candidates[:count]
    samples = outcomes["ours"].samples[0][:count]  # [P, C, H, W, 3]
    rows = (
        Shown(
            PEER_VERSION,
            outcomes["peer"].samples[peer.chosen][:count, 0],
            [verdicts[0] for verdicts in peer.by_prompt],
        ),
        Shown(
            "Tessera, first one",
            samples[np.arange(count), first],
            [verdicts[place] for verdicts, place in zip(ours.by_prompt, first, strict=True)],
        ),
        Shown(f"Tessera, best of {CANDIDATES}", samples[:, 0], [verdicts[0] for verdicts in ours.by_prompt]),
    )
    tiles = []
    for pairs in ("seen", "unseen"):
        of_class: dict[str, int] = {}
        for index, (split, prompt) in reversed(list(enumerate(materials.prompts[:count]))):
            if split == pairs:
                of_class[prompt.spec.prompt_class] = index
        for row in rows:
            for name in PROMPT_CLASSES:
                index = of_class[name]
                note = f"{row.name}: {'right' if row.verdicts[index].is_right else 'not right'}"
                tiles.append(Tile(row.pictures[index], materials.prompts[index][1].text, note))
    return contact_sheet(
        tiles,
        columns=len(PROMPT_CLASSES),
        title=f"The same {minutes:g} minutes on the same {usable_cores()} CPU cores, from pixels to samples; "
        "pairs of shape and color seen in training above, never seen below",
    )


def _any_right(judged: Judged) -> float:
    """What a perfect scorer would achieve."""
    return sum(any(verdict.is_right for verdict in row) for row in judged.by_prompt) / len(judged.by_prompt)


def main(argv: Sequence[str]) -> int:
    """Runs both sides one after the other, judges, and writes rows, raw results and the sheet."""
    arguments = _parser().parse_args(argv)
    minutes = arguments.minutes or (_QUICK_MINUTES if arguments.quick else _MINUTES)
    peer_python = arguments.peer_python if arguments.peer_python.exists() else None
    if peer_python is None and arguments.only != "ours":
        print(
            f"nothing measured: {arguments.peer_python} is not there, benchmarks/peers/install.sh makes it",
            file=sys.stderr,
        )
        return 0
    scale = _QUICK_COUNTS if arguments.quick else _COUNTS
    work = arguments.work / ("quick" if arguments.quick else "full")
    sides: tuple[Side, ...] = (arguments.only,) if arguments.only else ("ours", "peer")
    for side in sides:
        shutil.rmtree(work / side, ignore_errors=True)
    materials = prepare(work, seed=arguments.seed, num_prompts=scale.prompts, num_originals=scale.originals)
    if "ours" in sides:
        run_ours(materials, seconds=60 * minutes, seed=arguments.seed)
    if "peer" in sides and peer_python is not None:
        run_peer(materials, seconds=60 * minutes, seed=arguments.seed, python=peer_python)

    outcomes: dict[Side, Outcome] = {"ours": read_outcome(work, "ours"), "peer": read_outcome(work, "peer")}
    for side, outcome in outcomes.items():
        if outcome.core_share < _BUSY:
            print(f"{side} had {outcome.core_share:.0%} of the cores: is the machine busy?", file=sys.stderr)
    num_prompts = min(len(outcome.samples[0]) for outcome in outcomes.values())
    judged = {side: judge_outcome(outcome, materials, num_prompts=num_prompts) for side, outcome in outcomes.items()}
    ours, peer = judged["ours"], judged["peer"]
    renders = judge(materials.originals, materials.specs)
    logs: dict[Side, Any] = {side: outcome.log for side, outcome in outcomes.items()}
    found = list(rows(ours, peer, materials, renders, logs))
    raw = {
        "minutes": minutes,
        "seed": arguments.seed,
        "prompts": num_prompts,
        "logs": logs,
        "core_shares": {side: outcome.core_share for side, outcome in outcomes.items()},
        "peer_settings": PEER_SETTINGS,
        "peer_by_filter_and_temperature": [
            [*settings, accuracy.share]
            for settings, accuracy in zip(PEER_SETTINGS["draw"]["settings"], peer.by_settings, strict=True)
        ],
        "any_of_16_is_right": _any_right(ours),
        "right": {side: [sum(v.is_right for v in row) for row in each.by_prompt] for side, each in judged.items()},
        "candidates": {side: len(each.by_prompt[0]) for side, each in judged.items()},
    }
    write_results(arguments.out, claim=CLAIM, rows=found, raw=raw)
    picture = arguments.picture or arguments.out.with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    sheet(materials, outcomes, ours, peer, minutes=minutes).save(picture)
    print(f"written to {picture}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versus_dalle_pytorch", description=CLAIM)
    parser.add_argument(
        "--minutes", type=float, help=f"for each side (default: {_MINUTES:g}, quick {_QUICK_MINUTES:g})"
    )
    parser.add_argument("--quick", action="store_true", help="five minutes in all, and fewer prompts")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/versus_dalle_pytorch.json"), help="where to write"
    )
    parser.add_argument(
        "--picture", type=Path, help="where to write the sheet: docs/versus-dalle-pytorch.png (default: beside --out)"
    )
    parser.add_argument("--work", type=Path, default=Path("out/versus"), help="keeps what both sides have made")
    parser.add_argument(
        "--peer-python", type=Path, default=Path(".venv-peers/bin/python"), help="interpreter of the peer's environment"
    )
    parser.add_argument(
        "--only", choices=("ours", "peer"), help="run this side, and judge it with the other's last run"
    )
    parser.add_argument("--seed", type=int, default=0, help="of pictures, prompts, weights and drawing")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
