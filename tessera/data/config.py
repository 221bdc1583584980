"""Which images to train on, and at what size: the `data` section of every stage's configuration."""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from torch import distributed

from tessera.data.corpus import Corpus, ManifestCorpus, open_corpus
from tessera.data.ingest import OnProgress
from tessera.data.manifest import REJECTS_NAME
from tessera.errors import UserError
from tessera.progress import counting


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A corpus and how its pictures are cut."""

    path: str = "scenes"
    """scenes, emoji, a folder of captioned images, a tar, Parquet or metadata file, hf:NAME, or a manifest"""
    image_size: tuple[int, int] = (64, 64)
    """height and width in pixels; pictures are cropped to this aspect around their center and resized"""
    limit: int | None = None
    """use only so many pictures; for scenes their number; null for all (scenes: 20,000)"""
    seed: int = 0
    """which scenes are drawn"""
    font: str | None = None
    """color font for emoji; null searches for one"""
    cache_dir: str | None = None
    """where manifests, rejects and decoded pictures are kept between runs; null keeps them for one run only"""
    cache_gib: float = 64.0
    """most GiB that all decoded pictures may take as one array on the disk; those of a larger corpus are decoded when
    needed. Without cache_dir, where the array is in memory, also no more than a quarter of that"""

    def __post_init__(self) -> None:
        if min(self.image_size) < 8:
            raise UserError(
                f"data.image_size must be at least 8x8 pixels; got {self.image_size[0]}x{self.image_size[1]}"
            )

        if self.cache_gib < 0:
            raise UserError(f"data.cache_gib must be at least 0; got {self.cache_gib}")

    @property
    def cache_path(self) -> Path | None:
        """`cache_dir` as a path."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else None

    def open(self, split: Literal["train", "validation"], *, beside: Corpus | None = None) -> Corpus:
        """The corpus of one split.

        Where image files have to be checked for it, the first process shows how far that is and then says, on stderr
        and once, what was kept, what was refused and why.

        Args:
            split: "train", or "validation" for pictures that are never trained on.
            beside: the other split, if it is open: image files are not looked at again then.

        Raises:
            UserError: if there is none, or nothing in it can be used.
        """
        limit = self.limit
        if split == "validation" and limit is not None:
            limit = max(1, limit // 20)
        if isinstance(beside, ManifestCorpus):
            return ManifestCorpus(beside.manifest, image_size=self.image_size, split=split, limit=limit)
        with ExitStack() as shown:
            bars: list[OnProgress] = []  # one, if images are checked; none, where a manifest is only read

            def show(done: int, total: int | None) -> None:
                if not bars:
                    bars.append(shown.enter_context(counting("checking images")))
                bars[0](done, total)

            corpus = open_corpus(
                self.path,
                image_size=self.image_size,
                split=split,
                seed=self.seed,
                limit=limit,
                font=self.font,
                cache_dir=self.cache_path,
                on_progress=show if _is_first_process() else None,
            )
        if bars:
            _say_once(self.path, "\n".join(self.ingest_lines(corpus)))
        return corpus

    def ingest_lines(self, corpus: Corpus) -> list[str]:
        """What was kept and what was refused of image files, and where the refusals are kept; of others, nothing."""
        if not isinstance(corpus, ManifestCorpus):
            return []
        lines = [corpus.manifest.summary()]
        rejects = corpus.manifest.path.with_name(REJECTS_NAME)
        if len(corpus.manifest.rejects) and self.cache_path is not None and rejects.exists():
            lines.append(f"what was refused, and why: {rejects}")
        return lines


@lru_cache(maxsize=64)
def _say_once(path: str, text: str) -> None:
    """Without a folder to keep manifests in, each split that is opened is an ingest of its own, and finds the same."""
    print(text, file=sys.stderr, flush=True)


def _is_first_process() -> bool:
    """As `tessera.training.processes` has it, which needs Lightning."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
