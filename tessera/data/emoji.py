"""The `emoji` corpus: every emoji that a color font of this machine can draw, captioned with its Unicode name.

Names and sequences are those of Unicode's emoji-test.txt (as the `emoji` package carries them), fully qualified ones
only. The validation split holds (activity, skin tone) pairs that never occur in training, with all genders of the pair:
a model that draws them has put together two things that it saw only apart.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import emoji as unicode_emoji
import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from tessera.errors import UserError

VERSION = 1
INSTALL_HINT = (
    "install fonts-noto-color-emoji (Debian, Ubuntu), google-noto-emoji-color-fonts (Fedora), noto-fonts-emoji (Arch) "
    "or set data.font=PATH"
)
RAQM_HINT = "Pillow needs FriBiDi to join the signs of an emoji; install libfribidi0 (Debian, Ubuntu) or fribidi"
# The share of activities that lose one skin tone to the validation split: a tenth of the (activity, tone) pairs.
HELD_OUT_ACTIVITIES = 0.5
# What is left white around a drawing, as a share of the picture's side.
MARGIN = 0.03

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
_TONE_MODIFIERS = "".join(chr(0x1F3FB + number) for number in range(5))
_TONE_NAME = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
_FEATURES = ("red hair", "curly hair", "white hair", "blond hair", "bald", "beard")
_FEATURE_NAME = re.compile(rf"^(man|woman|person)(| .*skin tone) ({'|'.join(_FEATURES)})$")
_PEOPLE_NAME = re.compile(r"^(kiss|couple with heart|family)((?: (?:man|woman|person|adult|child|girl|boy)){2,})(.*)$")
_JOINER, _PICTURE_STYLE = "\u200d", "\ufe0f"
# The same drawing in its mirror is no other activity, or a held-out tone could be seen there.
_GENDER_OR_DIRECTION = re.compile(f"{_JOINER}[\u2640\u2642\u27a1]")
_MAN, _WOMAN, _PERSON = "\U0001f468", "\U0001f469", "\U0001f9d1"
_GROUPS = "\U0001f46f\U0001f93c"  # bunny ears and wrestlers: one skin tone, two people
_HANDSHAKE = "\U0001f91d"
_SMILE = "\U0001f600"
_NONCHARACTER = "\U0010ffff"  # no font has a picture of it

_FONT_FILES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto-emoji/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji-fonts/NotoColorEmoji.ttf",
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "~/.fonts/NotoColorEmoji.ttf",
    "/System/Library/Fonts/Apple Color Emoji.ttc",
    "~/Library/Fonts/NotoColorEmoji.ttf",
    "C:/Windows/Fonts/seguiemj.ttf",
)
# Fonts made of bitmaps open at their own sizes only: 109 and 136 Noto, 160 to 64 Apple.
_BITMAP_SIZES = (109, 136, 128, 160, 96, 64, 72)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Emoji:
    """One emoji of Unicode's list."""

    sequence: str
    """Its code points, fully qualified."""
    captions: tuple[str, ...]
    """Unicode's name in words ("woman firefighter, dark skin tone"), then more natural wordings if there are any."""
    tone: str | None = None
    """Skin tone, if there is exactly one."""
    activity: str | None = None
    """What a single person does or is ("firefighter"), the same for all genders and tones."""
    is_held_out: bool = False
    """Whether its (activity, tone) is kept out of training."""


class EmojiCorpus:
    """The emoji of a font as captioned pictures, drawn when they are asked for.

    Args:
        image_size: (height, width) in pixels.
        split: "train", or "validation" for the held-out (activity, skin tone) pairs.
        font: path of a color font; searched for if None.
        limit: keep only so many, chosen by a keyed hash.

    Raises:
        UserError: no font is found, or the font has no color pictures.
    """

    name = "emoji"

    def __init__(
        self,
        image_size: tuple[int, int] = (64, 64),
        *,
        split: Literal["train", "validation"] = "train",
        font: str | None = None,
        limit: int | None = None,
    ) -> None:
        self.image_size = image_size
        self.split = split
        self.font = find_font(font)
        self._painter = _Painter(self.font, image_size)
        drawable = _drawable_emoji(self.font, os.stat(self.font).st_mtime_ns)
        self.num_unsupported = len(list_emoji()) - len(drawable)
        if not features.check("raqm"):
            _logger.warning(
                "%d emoji, most of them of several signs, cannot be drawn: %s", self.num_unsupported, RAQM_HINT
            )
        self.held_out = tuple(entry.captions[0] for entry in drawable if entry.is_held_out)
        entries = [entry for entry in drawable if entry.is_held_out == (split == "validation")]
        if limit is not None and limit < len(entries):
            chosen = set(sorted(entries, key=lambda entry: _share(entry.sequence, "limit"))[:limit])
            entries = [entry for entry in entries if entry in chosen]
        self.entries = tuple(entries)
        if not self.entries:
            hint = INSTALL_HINT if features.check("raqm") else RAQM_HINT
            raise UserError(f"{self.font} draws no emoji of the {split} split: {hint}")

    def __len__(self) -> int:
        return len(self.entries)

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the Unicode name in words and, for some, a second wording."""
        return self.entries[index].captions

    def image(self, index: int) -> np.ndarray:
        """Draws emoji `index` in the middle of a white picture: uint8 [height, width, 3], RGB."""
        return self._painter.draw(self.entries[index].sequence)

    def fingerprint(self) -> str:
        """Returns a sha256 over all that determines the pictures and captions, the font's bytes among it."""
        identity = {
            "name": self.name,
            "version": VERSION,
            "font": hashlib.sha256(Path(self.font).read_bytes()).hexdigest(),
            "image_size": list(self.image_size),
            "entries": [[entry.sequence, *entry.captions] for entry in self.entries],
        }
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


@cache
def list_emoji() -> tuple[Emoji, ...]:
    """All fully-qualified emoji in the order of their names, whether a font can draw them or not."""
    wanted = unicode_emoji.STATUS["fully_qualified"]
    names = {
        sequence: entry["en"].strip(":").replace("_", " ").replace("\u2019", "'")
        for sequence, entry in unicode_emoji.EMOJI_DATA.items()
        if entry["status"] == wanted
    }
    activities = _activities(names)
    entries = []
    for sequence, name in sorted(names.items(), key=lambda item: item[1]):
        captions, tone, activity = _captions(sequence, name), _tone(sequence), activities.get(sequence)
        entries.append(_hold_out(Emoji(sequence=sequence, captions=captions, tone=tone, activity=activity)))
    return tuple(entries)


def find_font(path: str | None = None) -> str:
    """Finds a color emoji font that Pillow can draw.

    Args:
        path: the font that the user named, if any.

    Returns:
        The path of the font file.

    Raises:
        UserError: there is none, or the named one is missing or has no color pictures.
    """
    if path is not None:
        problem = _problem_of_font(os.path.expanduser(path))
        if problem:
            raise UserError(f"data.font={path}: {problem}")
        return os.path.expanduser(path)
    for candidate in [os.path.expanduser(known) for known in _FONT_FILES] + _fonts_of_fontconfig():
        if os.path.isfile(candidate) and _problem_of_font(candidate) is None:
            return candidate
    raise UserError(f"no color emoji font found: {INSTALL_HINT}")


@cache
def _drawable_emoji(font: str, _modified: int) -> tuple[Emoji, ...]:
    """Those that a font has; it takes a second, and each split and size asks again."""
    painter = _Painter(font, (64, 64))
    return tuple(entry for entry in list_emoji() if painter.can_draw(entry.sequence))


class _Painter:
    """Draws emoji sequences with one font at one picture size."""

    def __init__(self, font: str, image_size: tuple[int, int]) -> None:
        height, width = image_size
        self._has_ligatures = features.check("raqm")
        self._font = _load_font(font, preferred_size=max(136, height, width))
        self._size = (width, height)
        # All emoji are placed like the smiling face, so that a hat stays above and a shoe below.
        left, top, right, bottom = self._font.getbbox(_SMILE)
        side = max(right - left, bottom - top) / (1 - 2 * MARGIN)
        scale = side / min(width, height)
        self._canvas_size = (round(width * scale), round(height * scale))
        self._offset = ((self._canvas_size[0] - right - left) / 2, (self._canvas_size[1] - bottom - top) / 2)
        self._lengths: dict[str, float] = {}
        self._advance = self._length(_SMILE)
        self._missing_box = self._font.getbbox(_NONCHARACTER)
        self._missing = self._paint(_NONCHARACTER).tobytes()

    def draw(self, sequence: str) -> np.ndarray:
        canvas = self._paint(sequence)
        return np.array(canvas.resize(self._size, Image.Resampling.LANCZOS), dtype=np.uint8)  # [H, W, 3]

    def can_draw(self, sequence: str) -> bool:
        """Whether the font has one picture for the whole sequence, rather than one for each part or none."""
        length = self._length(self._text(sequence))
        if length > 1.2 * self._advance:
            return False
        parts = [self._length(part) for part in sequence if part not in (_JOINER, _PICTURE_STYLE)]
        if sum(part > 0 for part in parts) > 1:
            return length < sum(parts) - 1
        if len(parts) > 1:
            # Signs without a width, as in the flag of Wales: a font that does not know them shows the first one alone.
            return self._paint(sequence).tobytes() not in (self._missing, self._paint(sequence[0]).tobytes())
        # Boxes are quicker to get than pictures, and differ for nearly all.
        box = self._font.getbbox(self._text(sequence))
        return box != self._missing_box or self._paint(sequence).tobytes() != self._missing

    def _length(self, text: str) -> float:
        if text not in self._lengths:
            self._lengths[text] = self._font.getlength(text)
        return self._lengths[text]

    def _text(self, sequence: str) -> str:
        # Without Raqm the style selector would be drawn as a sign of its own.
        return sequence if self._has_ligatures else sequence.replace(_PICTURE_STYLE, "")

    def _paint(self, sequence: str) -> Image.Image:
        canvas = Image.new("RGB", self._canvas_size, "white")
        text = self._text(sequence)
        ImageDraw.Draw(canvas).text(self._offset, text, font=self._font, embedded_color=True, fill="black")
        return canvas


def _load_font(path: str, *, preferred_size: int) -> ImageFont.FreeTypeFont:
    layout = ImageFont.Layout.RAQM if features.check("raqm") else ImageFont.Layout.BASIC
    for size in (preferred_size, *_BITMAP_SIZES):
        try:
            return ImageFont.truetype(path, size, layout_engine=layout)
        except OSError:
            continue
    raise UserError(f"{path} is not a font that FreeType can open")


def _problem_of_font(path: str) -> str | None:
    if not os.path.isfile(path):
        return "no such file"
    try:
        painter = _Painter(path, (64, 64))
        pixels = painter.draw(_SMILE).astype(np.int16)
    except (OSError, ValueError, ZeroDivisionError) as error:
        return str(error) or "not a font"
    if (pixels.max(axis=2) - pixels.min(axis=2)).max() < 32:
        return "it has no color pictures that Pillow can draw (bitmaps or COLR version 0); " + INSTALL_HINT
    return None


def _fonts_of_fontconfig() -> list[str]:
    program = shutil.which("fc-list")
    if program is None:
        return []
    try:
        command = [program, ":color=True", "--format=%{file}\n"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return []
    return sorted({line for line in found.stdout.splitlines() if line}, key=lambda file: ("moji" not in file, file))


def _captions(sequence: str, name: str) -> tuple[str, ...]:
    """Unicode's name, with commas where the `emoji` package dropped its punctuation, and a natural wording."""
    if _is_flag_of_region(sequence):
        region = name.replace("&", "and")
        return f"flag of {region}", f"{region} flag"
    tones = _TONE_NAME.findall(name)
    if match := _FEATURE_NAME.match(name):
        person, _, feature = match.groups()
        return ", ".join([person, *_tone_words(tones), feature]), _with_feature(person, tones, feature)
    base = _TONE_NAME.sub("", name)
    if match := _PEOPLE_NAME.match(base):
        *others, last = match[2].split()
        base = f"{match[1]}, {', '.join(others)} and {last}"
    captions = [", ".join([base, *_tone_words(tones)])]
    if len(tones) == 1:
        captions.append(f"{base} {'and' if ' with ' in base else 'with'} {tones[0]} skin")
    return tuple(captions)


def _with_feature(person: str, tones: Sequence[str], feature: str) -> str:
    skin = [f"{tone} skin" for tone in tones]
    if feature == "bald":
        return " with ".join([f"bald {person}", *skin])
    return f"{person} with {' and '.join([*skin, 'a beard' if feature == 'beard' else feature])}"


def _tone_words(tones: Sequence[str]) -> list[str]:
    return [f"{tone} skin tone" for tone in tones]


def _is_flag_of_region(sequence: str) -> bool:
    """Pairs of regional letters, and the flags that are spelled with invisible tags behind a black flag."""
    return all("\U0001f1e6" <= sign <= "\U0001f1ff" for sign in sequence) or sequence[-1] == "\U000e007f"


def _tone(sequence: str) -> str | None:
    modifiers = [_TONE_MODIFIERS.index(sign) for sign in sequence if sign in _TONE_MODIFIERS]
    return TONES[modifiers[0]] if len(modifiers) == 1 else None


def _activities(names: dict[str, str]) -> dict[str, str]:
    """Sequence -> activity, for those of a single person that exist in several genders and in all skin tones."""
    groups: dict[str, list[str]] = defaultdict(list)
    for sequence in names:
        groups[_without_gender_and_tone(sequence)].append(sequence)
    activities = {}
    for neutral, sequences in groups.items():
        # The form without gender and tone gives the name: "firefighter", "person biking".
        plain = next((sequence for sequence in sequences if sequence.replace(_PICTURE_STYLE, "") == neutral), None)
        genders = len(sequences) / (len(TONES) + 1)
        described_person = any(_FEATURE_NAME.match(names[sequence]) for sequence in sequences)
        single_person = neutral != _PERSON and neutral[0] not in _GROUPS and _HANDSHAKE not in neutral
        if plain is not None and genders >= 2 and single_person and not described_person:
            activities.update(dict.fromkeys(sequences, names[plain]))
    return activities


def _without_gender_and_tone(sequence: str) -> str:
    untoned = "".join(sign for sign in sequence if sign not in _TONE_MODIFIERS + _PICTURE_STYLE)
    plain = _GENDER_OR_DIRECTION.sub("", untoned)
    return _PERSON + plain[1:] if plain[0] in _MAN + _WOMAN else plain


def _hold_out(entry: Emoji) -> Emoji:
    """Half of the activities lose one tone: each is seen in four tones or more, and each tone in many activities."""
    if entry.activity is None or entry.tone is None or _share(entry.activity, "activity") >= HELD_OUT_ACTIVITIES:
        return entry
    lost = TONES[int(_share(entry.activity, "skin tone") * len(TONES))]
    return replace(entry, is_held_out=entry.tone == lost)


def _share(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the text alone: the split is the same on every machine and for every font."""
    digest = hashlib.blake2b(text.encode(), key=f"tessera emoji {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
