"""The two sides of benchmarks/versus_dalle_pytorch.py: the same pictures, captions and prompts, each in a process.

The peer's settings were found in short trials that nobody's clock counted: what is harmful by default in dalle-pytorch
(its KL term, its temperature, no schedule of the rate) is set right, its text is split by our tokenizer (its own has
49,408 ids, most of them without use here), and its weights are no fewer than ours.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipes.accuracy import SPLITS, fresh_scenes, interleaved_prompts
from recipes.run_folder import DATA_FOLDER
from tessera.data.config import DataConfig
from tessera.data.corpus import load_images
from tessera.data.scenes import Pairs, Prompt, SceneSpec
from tessera.errors import UserError
from tessera.precision import usable_cores
from tessera.text_tokenizer import TextTokenizer

# N images, P prompts, C candidates, M pictures, T text positions, H W image pixels.

Side = Literal["ours", "peer"]

PEER_VERSION = "dalle-pytorch 1.6.6"
CANDIDATES = 16
"""Ours ranks so many pictures per prompt."""
_PEER_CANDIDATES = 2  # it ranks none: more would cost it time and tell it nothing
_ROOT = Path(__file__).parents[1]
_VOCAB_SIZE = 4096  # most ids of the tokenizer, as `tessera encode` has it; scenes fill 627
_PEER_MODULE = "benchmarks.peers.dalle_pytorch_journey"

PEER_SETTINGS: dict[str, Any] = {
    # Larger ones learned less in the time, and fell apart at this rate; so did temperatures that ended at 1/16.
    "vae": {
        "codes": 128,
        "codebook_channels": 128,
        "channels": 32,
        "num_layers": 3,
        "resnet_blocks": 1,
        "smooth_l1": False,
        "straight_through": False,
        "reinmax": False,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "warmup": 0.02,
        "first_temperature": 1.0,
        "final_temperature": 0.5,
        "temperature_share": 1.0,
        "precision": "fp32",
    },
    "vae_share": 0.45,
    "prior": {
        "dim": 128,
        "depth": 4,
        "heads": 4,
        "head_channels": 32,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "warmup": 0.05,
        "betas": [0.9, 0.95],
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "precision": "bf16",
    },
    # pairs of filter_thres (the share of the joint vocabulary that is left out) and temperature; the first is drawn on
    # the clock, and the one that turns out best is what counts
    "draw": {
        "candidates": _PEER_CANDIDATES,
        "batch_size": 64,
        "settings": [[0.5, 1.0], [0.9, 1.0], [0.9, 0.75], [0.9, 0.5], [0.9, 0.25]],
    },
}


class Materials(NamedTuple):
    """What both sides are given, and what they are judged by."""

    prompts: list[tuple[Pairs, Prompt]]
    originals: NDArray[np.uint8]
    """pictures that nobody trained on, uint8 [M, H, W, 3]"""
    specs: list[SceneSpec]
    """what they show"""
    work: Path
    """folder with images, texts.npz, prompts.npy, originals.npy; and a folder for each side"""
    images: Path
    """training pictures, uint8 [N, H, W, 3], the file that both sides read"""
    text_ids: int


class Outcome(NamedTuple):
    """What one side has made."""

    samples: list[NDArray[np.uint8]]
    """uint8 [P, C, H, W, 3] for each of its sampling settings; of fewer prompts where time ran out"""
    first_candidates: NDArray[np.int64]
    """[P], where the candidate lies that was drawn first; candidates are sorted by the scorer, best first"""
    reconstructions: NDArray[np.uint8]
    """of the originals, uint8 [M, H, W, 3]"""
    log: dict[str, Any]
    """seconds in all and by phase, steps, parameters"""
    core_share: float
    """CPU time over wall-clock and cores: far below 1 means that it had to wait for other processes"""


def prepare(work: Path, *, seed: int, num_prompts: int, num_originals: int) -> Materials:
    """Writes what both sides read; none of it is on the clock.

    Args:
        work: receives it.
        seed: of scenes, prompts and originals.
        num_prompts: prompts of seen and as many of unseen pairs.
        num_originals: pictures of seen and as many of unseen pairs.
    """
    data = DataConfig(path="scenes", seed=seed)
    corpus = data.open("train")
    images = load_images(corpus, directory=work / "ours" / "run" / DATA_FOLDER)
    assert isinstance(images, np.memmap) and images.filename is not None
    captions = [corpus.captions(index) for index in range(len(corpus))]
    texts = [text for each in captions for text in each]
    tokenizer = TextTokenizer.train(texts, vocab_size=_VOCAB_SIZE)
    text_len = tokenizer.fitting_text_len(texts)
    first = np.cumsum([0, *map(len, captions)])  # [N + 1]
    np.savez(work / "texts.npz", ids=_text_ids(tokenizer, texts, text_len), first=first.astype(np.int64))
    prompts = interleaved_prompts(num_prompts, seed=seed)
    np.save(work / "prompts.npy", _text_ids(tokenizer, [prompt.text for _, prompt in prompts], text_len))
    # another seed than the prompts': these are pictures, those are sentences about pictures never drawn
    fresh = [fresh_scenes(num_originals, seed=seed + 1, pairs=pairs, image_size=corpus.image_size) for pairs in SPLITS]
    originals = np.concatenate([pictures for pictures, _ in fresh])
    np.save(work / "originals.npy", originals)
    return Materials(
        prompts=prompts,
        originals=originals,
        specs=[spec for _, specs in fresh for spec in specs],
        work=work,
        images=Path(images.filename),
        text_ids=tokenizer.vocab_size,
    )


def run_ours(materials: Materials, *, seconds: float, seed: int) -> None:
    """Trains and draws with Tessera."""
    job = {
        "prompts": [prompt.text for _, prompt in materials.prompts],
        "candidates": CANDIDATES,
        "originals": str(materials.work / "originals.npy"),
    }
    command = [sys.executable, "-m", "benchmarks.peers.tessera_journey"]
    _run("ours", command, job, materials.work, seconds=seconds, seed=seed)


def run_peer(materials: Materials, *, seconds: float, seed: int, python: Path) -> None:
    """Trains and draws with dalle-pytorch."""
    command = [str(python.absolute()), "-W", "ignore", "-m", _PEER_MODULE]
    # compiles and caches imports, as the imports of ours are by now
    subprocess.run([*command, "--check"], cwd=_ROOT, env=_environment(materials.work), check=True, capture_output=True)
    job = {
        **PEER_SETTINGS,
        "prior": {**PEER_SETTINGS["prior"], "text_ids": materials.text_ids},
        "threads": usable_cores(),
        "images": str(materials.images),
        **{name: str(materials.work / file) for name, file in _PEER_FILES.items()},
    }
    _run("peer", command, job, materials.work, seconds=seconds, seed=seed)


_PEER_FILES = {"texts": "texts.npz", "prompts": "prompts.npy", "originals": "originals.npy"}


def read_outcome(work: Path, side: Side) -> Outcome:
    """What a side has left.

    Raises:
        UserError: if it has not finished.
    """
    folder = work / side
    if not (folder / "core_share.json").exists():
        raise UserError(f"{folder} holds no finished run: leave out --only, or run that side first")
    if side == "ours":
        samples = [np.load(folder / "samples.npy")]
        first = np.load(folder / "candidates.npy").argmin(axis=1)
    else:
        count = len(PEER_SETTINGS["draw"]["settings"])
        samples = [np.load(folder / f"samples-{number}.npy") for number in range(count)]
        first = np.zeros(len(samples[0]), np.int64)
    log = json.loads((folder / "log.json").read_text())
    core_share = json.loads((folder / "core_share.json").read_text())
    return Outcome(samples, first, np.load(folder / "reconstructions.npy"), log, core_share)


def _run(side: Side, command: Sequence[str], job: dict[str, Any], work: Path, *, seconds: float, seed: int) -> None:
    folder = work / side
    folder.mkdir(parents=True, exist_ok=True)
    file, log = folder / "job.json", folder / "log.txt"
    print(f"{side}: {seconds / 60:g} minutes, its log is {log}", file=sys.stderr, flush=True)
    with log.open("w") as stream:
        before, began = _child_cpu_seconds(), time.monotonic()
        shared = {"began": began, "seconds": seconds, "seed": seed, "out": str(folder.absolute())}
        file.write_text(json.dumps({**job, **shared}, indent=1))
        code = subprocess.run(
            [*command, str(file.absolute())],
            cwd=_ROOT,
            env=_environment(work),
            stdout=stream,
            stderr=stream,
            check=False,
        ).returncode
        elapsed = time.monotonic() - began
    if code:
        last = log.read_text().strip().splitlines()[-1:]
        raise UserError(f"{side} ended with exit code {code}, see {log}: {' '.join(last)}")
    share = (_child_cpu_seconds() - before) / (elapsed * usable_cores())
    (folder / "core_share.json").write_text(json.dumps(share))


def _environment(work: Path) -> dict[str, str]:
    count = str(usable_cores())
    # no side may find a GPU
    found = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "CUDA_VISIBLE_DEVICES": ""}
    if found.pop("PYTHONDONTWRITEBYTECODE", ""):
        # else the peer would compile its imports on the clock, ten seconds
        found["PYTHONPYCACHEPREFIX"] = str(work.absolute() / "pycache")
    return found


def _child_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _text_ids(tokenizer: TextTokenizer, texts: Sequence[str], text_len: int) -> NDArray[np.int64]:
    """Ids [len(texts), T]; what is left over is 0, which dalle-pytorch replaces by padding of its own."""
    ids = np.zeros((len(texts), text_len), np.int64)
    for row, text in enumerate(texts):
        found = tokenizer.encode(text)[:text_len]
        ids[row, : len(found)] = found
    return ids
