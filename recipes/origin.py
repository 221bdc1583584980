"""The model folder that a fit goes on from: what a plan takes of it, what is copied, and how it reads new captions.

New words need no new text tokenizer: it spells what it does not know in letters and bytes (Sennrich et al. 2016), and
the prior learns to read those.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dvae.model import DiscreteVAEConfig
from scorer.model import ClipScorerConfig
from tessera.atomic_write import atomic_write
from tessera.config import from_plain
from tessera.errors import UserError
from tessera.model_folder import INDEX_FILE, PART_FILES, TOKENIZER_FILE, ModelFolder
from tessera.plain_yaml import read_yaml, write_yaml
from tessera.text_tokenizer import END_ID, TextTokenizer
from transformer.model import PriorConfig

_BYTE_IDS = range(END_ID + 1, END_ID + 1 + 256)  # where a text tokenizer has them


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The model that a plan goes on from, as a run folder remembers it."""

    path: str
    """its folder, absolute"""
    sha256: str
    """of the folder"""
    parts: tuple[str, ...]
    """whose weights are taken over: dvae, prior, and scorer if there is one that fits"""
    train_dvae: bool = False
    """whether the dvae is trained on as well; false keeps it as it is"""

    @property
    def name(self) -> str:
        """How lines for people call it."""
        return Path(self.path).name


class Base(NamedTuple):
    """What decides the sizes of a model that goes on from another one.

    Attributes:
        origin: where that one lies.
        image_size: (height, width) in pixels of the pictures that its prior draws.
        vae: its dVAE's config.
        prior: its prior's config, with the sequence that it reads.
        scorer: its scorer's config; None if it has none for pictures of this size.
        tokenizer: its text tokenizer.
    """

    origin: Origin
    image_size: tuple[int, int]
    vae: DiscreteVAEConfig
    prior: PriorConfig
    scorer: ClipScorerConfig | None
    tokenizer: TextTokenizer


class CaptionCounts(NamedTuple):
    """How a text tokenizer copes with captions that it was not made from."""

    captions: int
    """Different ones."""
    in_bytes: int
    """Of them with a character that it does not know."""
    cut: int
    """Of them longer than the prior's text."""


def open_base(path: str | Path, *, train_dvae: bool = False) -> Base:
    """Opens the model folder that `--from` names.

    Raises:
        UserError: if it cannot be opened, or has no prior.
    """
    path = Path(path).expanduser().resolve()
    try:
        folder = ModelFolder.open(path)
    except UserError as error:
        raise UserError(f"--from {error}") from error
    for part in ("dvae", "prior"):
        if not folder.has(part):
            raise UserError(f"--from {path}: it has no {part}, so there is no model to go on from; fit without --from")

    def config_of(part: str, config_class: type) -> Any:
        return from_plain(config_class, folder.config(part), source=f"{path}/{part}/config.yaml")

    vae, prior = config_of("dvae", DiscreteVAEConfig), config_of("prior", PriorConfig)
    layout, f = prior.layout, vae.downsampling
    image_size = (layout.grid_height * f, layout.grid_width * f)
    scorer = config_of("scorer", ClipScorerConfig) if folder.has("scorer") else None
    if scorer is not None and scorer.image_size != image_size:
        scorer = None
    parts = ("dvae", "prior", *(["scorer"] if scorer is not None else []))
    return Base(
        origin=Origin(path=str(path), sha256=folder.sha256, parts=parts, train_dvae=train_dvae),
        image_size=image_size,
        vae=vae,
        prior=prior,
        scorer=scorer,
        tokenizer=TextTokenizer(folder.tokenizer_proto()),
    )


def check_apart(path: str, *folders: Path) -> None:
    """Raises UserError if one of the folders, which are written to, lies in the model to go on from or around it."""
    origin = Path(path).resolve()
    for folder in folders:
        written = folder.expanduser().resolve()
        if origin == written or origin in written.parents or written in origin.parents:
            raise UserError(
                f"--from {path} is only read, and {folder} would be written: choose an --out that is neither "
                "the same folder nor inside it or around it"
            )


def take_over(origin: Origin, out: Path) -> None:
    """Copies what stays as it is, byte for byte: the text tokenizer and, if it is frozen, the dVAE.

    Args:
        origin: read only.
        out: the new model folder; left alone if it holds all of that already.
    """
    parts = [] if origin.train_dvae else ["dvae"]
    source = ModelFolder.open(origin.path, parts=parts)
    if _holds(out, source):
        return
    out.mkdir(parents=True, exist_ok=True)
    for name in (TOKENIZER_FILE, *(f"{part}/{file}" for part in parts for file in PART_FILES)):
        (out / name).parent.mkdir(exist_ok=True)
        with atomic_write(out / name) as temporary:
            shutil.copyfile(source.path / name, temporary)
    index = read_yaml(source.path / INDEX_FILE)
    kept = {part: index["parts"][part] for part in parts}
    write_yaml(out / INDEX_FILE, {**index, "parts": kept, "sampling": {}})


def _holds(out: Path, source: ModelFolder) -> bool:
    try:
        held = ModelFolder.open(out, parts=source.parts)
    except UserError:
        return False
    return held.sha256 == source.sha256


def count_captions(captions: Iterable[str], tokenizer: TextTokenizer, *, text_len: int) -> CaptionCounts:
    """Counts different captions: those that a tokenizer spells in bytes, those too long for `text_len` positions."""
    encoded = [tokenizer.encode(caption) for caption in dict.fromkeys(captions)]
    return CaptionCounts(
        captions=len(encoded),
        in_bytes=sum(any(piece in _BYTE_IDS for piece in pieces) for pieces in encoded),
        cut=sum(len(pieces) > text_len for pieces in encoded),
    )


def caption_line(counts: CaptionCounts, *, text_len: int) -> str:
    """The counts for people."""
    return (
        f"of {counts.captions:,} different captions, {counts.in_bytes:,} have characters that the text tokenizer "
        f"spells in bytes, and {counts.cut:,} are cut at {text_len} text positions"
    )
