"""Our image tokenizers against DiscreteVAE of dalle-pytorch 1.6.6: quality, codebook use, speed.

python -m benchmarks.tokenizer [--quick] [--out FILE] [--peer-python .venv-peers/bin/python]

Scenes and emoji of 64 px, f = 8 and f = 4, 1,024 codes, about as many parameters on both sides, in these sections:

    steps        equal optimizer steps, the same batches of the same whole pictures
    seconds      equal training time, each side with its own batch size, crops and rates
    seeds        emoji, f = 8: five seeds of fsq, vq and gumbel
    adversarial  emoji, f = 8: what a discriminator changes at equal training time
    times        training steps of both sides in turns, fp32 and bf16
    encode       image files to codes

Emoji are trained on without a twentieth of their designs, in all tones and genders; those are what is measured, next
to the pictures trained on. benchmarks/peers/install.sh installs the peer; without it ours is measured alone. What was
interrupted goes on where it ended; --fresh begins anew, which a change of the code calls for.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.record import Row, write_results
from benchmarks.tokenizer_contestants import (
    ADVERSARIAL,
    DEFAULT,
    OURS,
    PEER_PARAMETERS,
    PEER_VERSION,
    PEERS,
    SIDE_ISSUES,
    num_parameters,
    ours_settings,
    peer_settings,
)
from benchmarks.tokenizer_corpora import CorpusName, Pictures, prepare
from benchmarks.tokenizer_jobs import Job, JobError, Place, kept_pictures, run_ours, run_peer, spread, stored
from benchmarks.tokenizer_rows import (
    SEEDED,
    Results,
    comparison_rows,
    design_rows,
    encode_rows,
    picture,
    seed_rows,
    time_rows,
)
from benchmarks.tokenizer_speed import EncodeRate, encode_rate, step_seconds
from tessera.errors import run_command
from tessera.precision import usable_cores

CLAIM = (
    "at equal training time our tokenizers reconstruct 3 dB better than DiscreteVAE of dalle-pytorch 1.6.6, train "
    "twice as fast per image, and use their codebook"
)
_LONGEST_SECONDS = 3600.0  # that the step times could take: the schedules move slowly beneath them

_SECTIONS = ("seconds", "steps", "adversarial", "seeds", "times", "encode")
_CORPORA: tuple[CorpusName, ...] = ("emoji", "scenes")


class Scale(NamedTuple):
    """How much is done."""

    fs: tuple[Literal[4, 8], ...]
    ours: tuple[str, ...]
    peers: tuple[str, ...]
    sections: tuple[str, ...]
    num_seeds: int
    steps: int
    seconds: float
    seed_seconds: float
    """training time where seeds are compared"""
    batch_size: int
    """where steps are equal, and for the step times"""
    limit: int | None
    """training pictures of a corpus"""
    rounds: int
    """turns of every process of the step times"""
    slice_seconds: float
    """length of a turn"""


FULL = Scale(
    fs=(8, 4),
    ours=tuple(OURS),
    peers=tuple(PEERS),
    sections=_SECTIONS,
    num_seeds=5,
    steps=200,
    seconds=60.0,
    seed_seconds=40.0,
    batch_size=32,
    limit=None,
    rounds=7,
    slice_seconds=3.0,
)
QUICK = FULL._replace(
    fs=(8,),
    ours=SEEDED,
    peers=("dalle-pytorch tuned",),
    sections=("seconds", "times", "encode"),
    num_seeds=1,
    seconds=10.0,
    seed_seconds=10.0,
    limit=2000,
    rounds=3,
    slice_seconds=1.0,
)
DRY = FULL._replace(
    fs=(8,),
    peers=("dalle-pytorch tuned",),
    num_seeds=2,
    steps=3,
    seconds=0.5,
    seed_seconds=0.4,
    batch_size=4,
    limit=60,
    rounds=2,
    slice_seconds=0.1,
)


def plan(scale: Scale, *, with_peer: bool) -> list[tuple[str, Job]]:
    """All trainings with the sections that they belong to, the most telling ones first."""
    contestants = (*(scale.peers if with_peer else ()), *scale.ours)
    jobs: list[tuple[str, Job]] = []
    for until, amount in (("seconds", scale.seconds), ("steps", scale.steps)):
        for f in scale.fs:
            for corpus in _CORPORA:
                for name in contestants:
                    if name in SIDE_ISSUES and (until, f, corpus) != ("steps", 8, "emoji"):
                        continue
                    job = Job(contestant=name, corpus=corpus, f=f, until=until, amount=amount)
                    jobs.append((until, job))
    reference = Job(contestant=DEFAULT, corpus="emoji", f=8, until="seconds", amount=scale.seconds)
    jobs.append(("adversarial", replace(reference, contestant=ADVERSARIAL)))
    for seed in range(scale.num_seeds):
        short = replace(reference, seed=seed, amount=scale.seed_seconds)
        jobs += [("seeds", replace(short, contestant=name)) for name in SEEDED]
    return [(section, job) for section, job in jobs if section in scale.sections]


def compare(results: Results, corpora: Mapping[CorpusName, Pictures], scale: Scale, place: Place) -> Image.Image | None:
    """The picture of all contestants at f = 8 and equal time: emoji of unseen designs above, scenes below."""
    names = (*scale.peers, *scale.ours, ADVERSARIAL)
    shown = {job.contestant for job in results if job.amount == scale.seconds and job.f == 8}
    columns: dict[str, list[NDArray[np.uint8]]] = {"original": []}
    for corpus, rows in (("emoji", slice(1, 16, 2)), ("scenes", slice(0, 16, 5))):
        held_out = np.load(corpora[corpus].held_out)
        original = held_out[spread(len(held_out))[rows]]
        columns["original"].append(original)
        for name in (name for name in names if name in shown):
            job = Job(contestant=name, corpus=corpus, f=8, until="seconds", amount=scale.seconds)
            kept = kept_pictures(place, job) if job in results else None
            blank = np.full_like(original, 255)
            columns.setdefault(name, []).append(blank if kept is None else kept[rows])
    if not shown:
        return None
    return picture({name: np.concatenate(parts) for name, parts in columns.items()})


def main(argv: Sequence[str]) -> int:
    """Runs what is missing, writes rows, raw results and the picture; 1 if a contestant failed."""
    arguments = _parser().parse_args(argv)
    scale = DRY if arguments.dry else QUICK if arguments.quick else FULL
    scale = scale._replace(
        seconds=arguments.seconds or scale.seconds,
        steps=arguments.steps or scale.steps,
    )
    only = tuple(arguments.only or scale.sections)
    kind = "dry" if arguments.dry else "quick" if arguments.quick else "full"
    work = arguments.work / kind
    if arguments.fresh or arguments.dry:
        for stale in ("jobs", "steps", "encode"):
            shutil.rmtree(work / stale, ignore_errors=True)
    peer_python = arguments.peer_python if arguments.peer_python.exists() else None
    if peer_python is None:
        print(f"no peer: {arguments.peer_python} is not there, benchmarks/peers/install.sh makes it", file=sys.stderr)
    place = Place(work=work, threads=arguments.threads, peer_python=peer_python, in_process=arguments.dry)
    torch.set_num_threads(arguments.threads)
    _print_parameters()

    corpora = {name: prepare(name, work / "corpora" / name, limit=scale.limit) for name in _CORPORA}
    results, failed = _train_all(scale, only, corpora, place)
    rows = [
        *comparison_rows(results, seconds=scale.seconds),
        *seed_rows(results, seconds=scale.seed_seconds),
        *design_rows(results, seconds=scale.seconds),
    ]
    raw: list[Any] = [{"name": job.name, **result} for job, result in results.items()]
    if "times" in scale.sections:
        seconds = _step_times(scale, corpora["emoji"], place, measure_now="times" in only)
        rows += time_rows(seconds, batch_size=scale.batch_size)
        raw += [{"name": f"seconds per step, f={f}", "rounds": rounds} for f, rounds in seconds.items()]
    if "encode" in scale.sections:
        rows += _encode_rows(scale, results, corpora["emoji"], place, measure_now="encode" in only)

    out, pictured = (
        (work / "tokenizer.json", work / "comparison.png")
        if arguments.dry
        else (arguments.out, arguments.picture or arguments.out.with_suffix(".png"))
    )
    write_results(out, claim=CLAIM, rows=rows)
    out.write_text(json.dumps({**json.loads(out.read_text()), "raw": raw}, indent=1) + "\n")
    sheet = compare(results, corpora, scale, place)
    if sheet is not None:
        pictured.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(pictured)
        print(f"written to {pictured}")
    if arguments.dry:
        print("a dry run: its figures mean nothing")
    if failed:
        print(f"{len(failed)} failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _train_all(
    scale: Scale, only: Sequence[str], corpora: Mapping[CorpusName, Pictures], place: Place
) -> tuple[Results, list[str]]:
    """Runs what is missing in these sections; returns all results, also of other sections, and what failed."""
    results: Results = {}
    failed: list[str] = []
    jobs = plan(scale, with_peer=place.peer_python is not None)
    for number, (section, job) in enumerate(jobs, 1):
        equal_steps = scale.batch_size if job.until == "steps" else None
        is_peer = job.contestant in PEERS
        settings = (peer_settings if is_peer else ours_settings)(job.contestant, job.f, equal_steps=equal_steps)
        pictures = corpora[job.corpus]
        if section not in only and stored(job, settings, pictures, place) is None:
            continue
        try:
            results[job] = result = (run_peer if is_peer else run_ours)(job, settings, pictures, place)
        except JobError as error:
            failed.append(f"{job.name}: {error}")
            print(f"[{number}/{len(jobs)}] {failed[-1]}", file=sys.stderr)
            continue
        held_out, usage = result["held_out"], result["seen"]["codebook_usage"]
        print(
            f"[{number}/{len(jobs)}] {job.name}: {held_out['psnr']:.2f} dB, ssim {held_out['ssim']:.3f}, "
            f"usage {usage:.0%}, {result['steps']:,} steps, {result['seconds']:.0f} s",
            flush=True,
        )
    return results, failed


def _step_times(
    scale: Scale, pictures: Pictures, place: Place, *, measure_now: bool
) -> dict[int, dict[str, list[float]]]:
    """f -> seconds per step, now or from an earlier run with the same settings."""
    seconds: dict[int, dict[str, list[float]]] = {}
    for f in scale.fs:
        job = Job(contestant=DEFAULT, corpus="emoji", f=f, until="seconds", amount=_LONGEST_SECONDS)
        ours = ours_settings(DEFAULT, f, equal_steps=scale.batch_size)
        peer = peer_settings(scale.peers[0], f, equal_steps=scale.batch_size)
        path = place.work / "steps" / f"f{f}.json"
        found: Any = json.loads(path.read_text()) if path.exists() else None
        if found is None or found["settings"] != [ours, peer]:
            if not measure_now:
                continue
            measured = step_seconds(
                job, ours, peer, pictures, place, rounds=scale.rounds, slice_seconds=scale.slice_seconds
            )
            found = {"settings": [ours, peer], "seconds": measured}
            path.write_text(json.dumps(found))
        seconds[f] = found["seconds"]
    return seconds


def _encode_rows(
    scale: Scale, results: Results, pictures: Pictures, place: Place, *, measure_now: bool
) -> Iterator[Row]:
    """The encode rate of the default at f = 8, now or from an earlier run."""
    job = Job(contestant=DEFAULT, corpus="emoji", f=8, until="seconds", amount=scale.seconds)
    path = place.work / "encode" / "rate.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if measure_now and job in results and not path.exists():
        rate = encode_rate(place.work / "jobs" / job.name / "model", pictures, scratch=path.parent)
        path.write_text(json.dumps(rate))
    if path.exists():
        yield from encode_rows(EncodeRate(*json.loads(path.read_text())))


def _print_parameters() -> None:
    for f, of_peer in PEER_PARAMETERS.items():
        counts = {name: num_parameters(name, f) for name in (*OURS, ADVERSARIAL)}
        shown = ", ".join(f"{name} {count:,} ({count / of_peer:.2f})" for name, count in counts.items())
        print(f"parameters at f={f}: {PEER_VERSION} {of_peer:,}; {shown}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--quick", action="store_true", help="five minutes: f = 8, few contestants, ten seconds each")
    parser.add_argument("--dry", action="store_true", help="a minute: all of the logic, no figures that count")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tokenizer.json"), help="where to write")
    parser.add_argument(
        "--picture", type=Path, help="where to write the picture, such as docs/tokenizer.png (default: beside --out)"
    )
    parser.add_argument("--work", type=Path, default=Path("out/tokenizer"), help="keeps what is done")
    parser.add_argument(
        "--peer-python", type=Path, default=Path(".venv-peers/bin/python"), help="interpreter of the peer's environment"
    )
    parser.add_argument("--only", nargs="+", choices=_SECTIONS, help="these sections")
    parser.add_argument("--seconds", type=float, help="training time where it is equal")
    parser.add_argument("--steps", type=int, help="optimizer steps where they are equal")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of each process")
    parser.add_argument("--fresh", action="store_true", help="forget what is done")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
