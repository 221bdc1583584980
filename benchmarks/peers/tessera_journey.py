"""Our side of benchmarks/versus_dalle_pytorch.py: `python -m benchmarks.peers.tessera_journey JOB.json`.

`tessera fit scenes` and then samples, within the same time as the peer and counted as the peer's is: the clock began
when the process was asked for.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dvae.reconstruct import reconstruct
from recipes.fit import fit
from recipes.run_folder import Request
from sampling.generated_image import GeneratedImage
from sampling.pipeline import Pipeline
from tessera.errors import run_command
from tessera.model_folder import ModelFolder

# P prompts, C candidates, M pictures, H W image pixels.

_LEFT_OVER_SECONDS = 1.0  # for writing files


def journey(job: dict[str, Any]) -> None:
    """All of it; writes samples.npy and candidates.npy within the time, then reconstructions.npy and log.json.

    Args:
        job: began (`time.monotonic()` of whoever asked), seconds (for everything), seed, prompts (texts), candidates,
            originals (path of uint8 [M, H, W, 3], to be reconstructed), out (folder; the pictures to train on may lie
            in its run folder already).
    """
    out, began, end = Path(job["out"]), job["began"], job["began"] + job["seconds"]
    model = out / "model"
    fitted = fit(
        Request(path="scenes", minutes=job["seconds"] / 60, device="cpu", seed=job["seed"]),
        out=model,
        run_dir=out / "run",
        started=began,
        evaluation_images=len(job["prompts"]) * job["candidates"],
    )
    trained = time.monotonic()
    pipeline = Pipeline.load(model, device="cpu")
    drawn = draw(pipeline, job["prompts"], candidates=job["candidates"], seed=job["seed"], end=end)
    np.save(out / "samples.npy", np.stack([np.stack([image.image for image in images]) for images in drawn]))
    np.save(out / "candidates.npy", np.array([[image.image_index for image in images] for images in drawn]))
    total = time.monotonic() - began

    originals = np.load(job["originals"])
    np.save(out / "reconstructions.npy", reconstruct(pipeline.vae, originals, precision=pipeline.precision).images)
    folder = ModelFolder.open(model)
    log = {
        "seconds": total,
        "spent": {**fitted.ledger.spent, "fit": trained - began, "drawing": began + total - trained},
        **{f"{part}_steps": int(folder.metadata(part)["steps"]) for part in folder.parts},
        **{f"{name}_parameters": count for name, count in parameters(pipeline).items()},
        "settings": drawn[0][0].recipe()["settings"],
        "tuning": fitted.tuned.how,
    }
    (out / "log.json").write_text(json.dumps(log, indent=1))


def draw(
    pipeline: Pipeline, prompts: Sequence[str], *, candidates: int, seed: int, end: float
) -> list[list[GeneratedImage]]:
    """All candidates of as many prompts as there is time for, the scorer's pick first; at least those of one."""
    seeds = range(seed, seed + len(prompts))
    drawn: list[list[GeneratedImage]] = []
    longest, asked = 0.0, time.monotonic()
    for images in pipeline.stream(prompts, n=candidates, seed=seeds, scorer="clip", on_warning=lambda _: None):
        drawn.append(images)
        now = time.monotonic()
        longest, asked = max(longest, now - asked), now
        if now + longest + _LEFT_OVER_SECONDS > end:  # several prompts are drawn at once
            break
    return drawn


def parameters(pipeline: Pipeline) -> dict[str, int]:
    """Of each part that there is."""
    parts = {"dvae": pipeline.vae, "prior": pipeline.prior, "scorer": pipeline.scorer}
    return {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in parts.items()
        if isinstance(part, nn.Module)
    }


def main(argv: Sequence[str]) -> int:
    """Reads the job and does it."""
    journey(json.loads(Path(argv[0]).read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
