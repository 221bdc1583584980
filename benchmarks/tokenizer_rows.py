"""What benchmarks/tokenizer.py makes of its results: rows with goals, and a picture."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from statistics import median

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks.record import Row
from benchmarks.tokenizer_contestants import ADVERSARIAL, DEFAULT, OURS, PEER_VERSION, PEERS, Settings
from benchmarks.tokenizer_jobs import Job
from benchmarks.tokenizer_speed import PRECISIONS, EncodeRate, median_ratio
from tessera.precision import usable_cores

# N images, H W image pixels.

Results = dict[Job, Settings]

SEEDED = ("fsq", "vq", "gumbel")
# Of the worst seed at the end of training.
_USAGE_GOALS = {"fsq": 0.95, "vq": 0.95, "gumbel": 0.6}
_LEAD_DB, _STEP_RATIO = 3.0, 2.0


def comparison_rows(results: Results, *, seconds: float) -> Iterator[Row]:
    """Ours against the better peer for every corpus and downsampling, at equal steps and after so many `seconds`."""
    for job, ours in results.items():
        if job.contestant not in OURS or job.seed or (job.until == "seconds" and job.amount != seconds):
            continue
        peers = [results[peer] for peer in (replace(job, contestant=name) for name in PEERS) if peer in results]
        shared = "equal steps" if job.until == "steps" else "equal time"
        place = f"{job.corpus} f={job.f}, {shared} ({job.amount:g} {job.until}), {job.contestant}"
        if not peers:
            yield Row(f"{place}: PSNR", ours["held_out"]["psnr"], "dB", "", None, None)
            continue
        peer = max(peers, key=lambda result: result["held_out"]["psnr"])
        name = peer["contestant"].replace("dalle-pytorch", PEER_VERSION)
        ours_db, peer_db = ours["held_out"]["psnr"], peer["held_out"]["psnr"]
        goal = _LEAD_DB if job.until == "seconds" else None
        yield Row(
            f"{place}: PSNR ahead", ours_db - peer_db, "dB", f"{name}: {peer_db:.2f}, ours {ours_db:.2f}", None, goal
        )
        if job.contestant == DEFAULT:
            ours_ssim, peer_ssim = ours["held_out"]["ssim"], peer["held_out"]["ssim"]
            yield Row(f"{place}: SSIM", ours_ssim, "", f"{name}: {peer_ssim:.3f}", ours_ssim / peer_ssim, 1.0)


def seed_rows(results: Results, *, seconds: float) -> Iterator[Row]:
    """Codebook use on emoji at f = 8 over the seeds, and how far apart they end after so many seconds."""
    for name in SEEDED:
        of_seeds = [
            result
            for job, result in results.items()
            if (job.contestant, job.corpus, job.f, job.until, job.amount) == (name, "emoji", 8, "seconds", seconds)
        ]
        if not of_seeds:
            continue
        which = f"worst of {len(of_seeds)} seeds" if len(of_seeds) > 1 else "seed 0"
        place = f"emoji f=8, {name}, {which}"
        usage = min(result["seen"]["codebook_usage"] for result in of_seeds)
        yield Row(f"{place}: codebook usage", usage, "share of K", "", None, _USAGE_GOALS[name])
        perplexities = [result["seen"]["perplexity"] for result in of_seeds]
        yield Row(f"{place}: perplexity", min(perplexities), "codes", f"best seed: {max(perplexities):.4g}", None, None)
        decibels = [result["held_out"]["psnr"] for result in of_seeds]
        yield Row(f"{place}: PSNR", min(decibels), "dB", f"best seed: {max(decibels):.2f}", None, None)


def design_rows(results: Results, *, seconds: float) -> Iterator[Row]:
    """Unseen designs next to the drawings trained on, without and with a discriminator; sharpness below 1 is blur."""
    for job, result in results.items():
        if (job.corpus, job.until, job.amount) != ("emoji", "seconds", seconds) or job.seed:
            continue
        if job.contestant not in (DEFAULT, ADVERSARIAL):
            continue
        for figure, unit in (("psnr", "dB"), ("ssim", ""), ("sharpness", "of the originals'")):
            against = f"drawings trained on: {result['seen'][figure]:.4g}"
            name = f"emoji f={job.f}, {job.contestant} after {job.amount:g} s, unseen designs: {figure}"
            yield Row(name, result["held_out"][figure], unit, against, None, None)


def time_rows(seconds: Mapping[int, Mapping[str, list[float]]], *, batch_size: int) -> Iterator[Row]:
    """Images per second in training on equal batches; the median ratio of turns that followed each other.

    The goal is that of each side in the precision that is faster for it.
    """
    for f, measured in seconds.items():
        per_step = {name: median(values) for name, values in measured.items()}
        goals: dict[tuple[str, str], float | None] = {
            (f"ours {precision}", f"peer {precision}"): None for precision in PRECISIONS
        }
        if "peer fp32" in measured:
            best_ours, best_peer = (
                min((f"{side} {precision}" for precision in PRECISIONS), key=per_step.__getitem__)
                for side in ("ours", "peer")
            )
            goals[best_ours, best_peer] = _STEP_RATIO
        for (ours, peer), goal in goals.items():
            name = f"f={f}, training step of {batch_size} whole pictures, {ours.removeprefix('ours ')}"
            against, ratio = "", None
            if peer in measured:
                against = f"{PEER_VERSION}, {peer.removeprefix('peer ')}: {batch_size / per_step[peer]:.4g}"
                ratio = median_ratio(measured[peer], measured[ours])
            yield Row(name, batch_size / per_step[ours], "images/s", against, ratio, goal)


def encode_rows(rate: EncodeRate) -> Iterator[Row]:
    """Image files to codes."""
    name = f"encode of 64 px PNG files, f=8, {usable_cores()} cores"
    yield Row(f"{name}: rate", rate.images_per_second, "images/s", "", None, None)
    yield Row(f"{name}: share spent waiting for files", rate.waiting_share, "of the time", "", None, None)
    yield Row(f"{name}: reading and decoding files alone", rate.decoding_share, "of the time", "", None, None)


def picture(columns: Mapping[str, NDArray[np.uint8]], *, scale: int = 2) -> Image.Image:
    """Columns of pictures under their names.

    Args:
        columns: name -> uint8 [N, H, W, 3], all of one shape; row n shows picture n of every column.
        scale: screen pixels per pixel.
    """
    count, height, width = next(iter(columns.values())).shape[:3]
    gap, head = 6, 20
    across, down = scale * width + gap, scale * height + gap
    canvas = Image.new("RGB", (gap + len(columns) * across, head + count * down), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for column, (name, images) in enumerate(columns.items()):
        x = gap + column * across
        draw.text((x, 2), name, fill="black", font=font)
        for row, image in enumerate(images):
            enlarged = Image.fromarray(image).resize((scale * width, scale * height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (x, head + row * down))
    return canvas
