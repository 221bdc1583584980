import pickle
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import features

from tessera.data import emoji as emoji_module
from tessera.data.corpus import open_corpus
from tessera.data.emoji import TONES, EmojiCorpus, find_font, list_emoji
from tessera.errors import UserError

BY_NAME = {entry.captions[0]: entry for entry in list_emoji()}


@pytest.fixture(scope="module")
def font() -> str:
    try:
        return find_font()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def train(font: str) -> EmojiCorpus:
    return EmojiCorpus(font=font)


@pytest.fixture(scope="module")
def validation(font: str) -> EmojiCorpus:
    return EmojiCorpus(font=font, split="validation")


needs_ligatures = pytest.mark.skipif(not features.check("raqm"), reason="Pillow has no Raqm here (libfribidi0)")


@pytest.mark.parametrize(
    ("sequence", "captions"),
    [
        ("🍓", ("strawberry",)),
        ("👩🏿‍🚒", ("woman firefighter, dark skin tone", "woman firefighter with dark skin")),
        ("👩‍🚒", ("woman firefighter",)),
        ("🧑🏼‍🦯", ("person with white cane, medium-light skin tone", "person with white cane and medium-light skin")),
        ("👍🏽", ("thumbs up, medium skin tone", "thumbs up with medium skin")),
        ("👨🏾‍🦰", ("man, medium-dark skin tone, red hair", "man with medium-dark skin and red hair")),
        ("👩‍🦲", ("woman, bald", "bald woman")),
        ("🧔🏻", ("person, light skin tone, beard", "person with light skin and a beard")),
        ("🇩🇪", ("flag of Germany", "Germany flag")),
        ("🏴󠁧󠁢󠁷󠁬󠁳󠁿", ("flag of Wales", "Wales flag")),
        ("🏳️‍🌈", ("rainbow flag",)),
        ("👨‍👩‍👧‍👦", ("family, man, woman, girl and boy",)),
        ("👩🏻‍❤️‍👨🏿", ("couple with heart, woman and man, light skin tone, dark skin tone",)),
        ("5️⃣", ("keycap 5",)),
        ("🕗", ("eight o'clock",)),
        ("😂", ("face with tears of joy",)),
    ],
)
def test_captions_are_unicode_names_in_words(sequence: str, captions: tuple[str, ...]) -> None:
    assert BY_NAME[captions[0]].sequence == sequence
    assert BY_NAME[captions[0]].captions == captions


def test_names_are_unique_and_the_list_is_complete() -> None:
    assert len(list_emoji()) == len(BY_NAME) > 3_700
    assert len({entry.sequence for entry in list_emoji()}) == len(list_emoji())
    assert all("_" not in caption and ":" not in caption for entry in list_emoji() for caption in entry.captions)


def test_a_tenth_of_the_pairs_of_activity_and_tone_is_held_out() -> None:
    pairs = {(entry.activity, entry.tone) for entry in list_emoji() if entry.activity and entry.tone}
    held_out = {(entry.activity, entry.tone) for entry in list_emoji() if entry.is_held_out}
    assert len(pairs) > 300
    assert 0.08 < len(held_out) / len(pairs) < 0.12


def test_held_out_pairs_are_unseen_and_their_parts_are_seen() -> None:
    held_out = [entry for entry in list_emoji() if entry.is_held_out]
    seen = [entry for entry in list_emoji() if not entry.is_held_out]
    pairs = {(entry.activity, entry.tone) for entry in held_out}
    assert not any((entry.activity, entry.tone) in pairs for entry in seen)
    tones_of: dict[str | None, set[str]] = defaultdict(set)
    activities_of: dict[str, set[str]] = defaultdict(set)
    for entry in seen:
        if entry.activity and entry.tone:
            tones_of[entry.activity].add(entry.tone)
            activities_of[entry.tone].add(entry.activity)
    assert all(len(tones_of[entry.activity]) >= 4 for entry in held_out)
    assert all(len(activities_of[tone]) >= 50 for tone in TONES)
    assert {entry.tone for entry in held_out} == set(TONES)


def test_all_genders_and_directions_of_a_pair_are_held_out_together() -> None:
    forms: dict[tuple[str | None, str | None], set[bool]] = defaultdict(set)
    for entry in list_emoji():
        forms[entry.activity, entry.tone].add(entry.is_held_out)
    assert all(len(held_out) == 1 for held_out in forms.values())
    activity = BY_NAME["woman firefighter, dark skin tone"].activity
    assert activity == "firefighter"
    assert {BY_NAME[f"{who}firefighter, dark skin tone"].activity for who in ("", "man ", "woman ")} == {activity}
    assert BY_NAME["woman walking facing right, dark skin tone"].activity == "person walking"


def test_people_without_an_activity_are_never_held_out() -> None:
    for name in ("woman, dark skin tone", "man, light skin tone, red hair", "thumbs up, medium skin tone"):
        assert BY_NAME[name].activity is None and not BY_NAME[name].is_held_out


def test_the_split_is_the_one_that_was_published() -> None:
    # Figures for held-out emoji can only be compared while this holds; newer lists of Unicode may add to it.
    names = sorted(entry.captions[0] for entry in list_emoji() if entry.is_held_out)
    assert names[:3] == ["artist, light skin tone", "astronaut, dark skin tone", "factory worker, medium skin tone"]


def test_no_font_is_one_line_that_names_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_module, "_FONT_FILES", ())
    monkeypatch.setattr(emoji_module, "_fonts_of_fontconfig", list)
    with pytest.raises(UserError, match="no color emoji font found: install fonts-noto-color-emoji") as caught:
        open_corpus("emoji", image_size=(64, 64), split="train")
    assert "\n" not in str(caught.value) and "data.font=PATH" in str(caught.value)


def test_a_wrong_font_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.ttf").write_text("no font")
    for name, reason in {"missing.ttf": "no such file", "text.ttf": "not a font"}.items():
        with pytest.raises(UserError, match=rf"data\.font=.*{name}: .*{reason}"):
            find_font(str(tmp_path / name))


def test_a_font_without_colors_is_refused() -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="only for the black and white font that it brings")
    with pytest.raises(UserError, match="no color pictures"):
        find_font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"))


@needs_ligatures
def test_nearly_all_emoji_are_drawn(train: EmojiCorpus, validation: EmojiCorpus) -> None:
    assert len(train) + len(validation) + train.num_unsupported == len(list_emoji())
    assert len(train) > 3_000 and len(validation) > 80
    assert train.held_out == validation.held_out == tuple(validation.captions(i)[0] for i in range(len(validation)))
    assert not {entry.sequence for entry in train.entries} & {entry.sequence for entry in validation.entries}


def test_pictures_are_colorful_drawings_on_white(train: EmojiCorpus) -> None:
    colorful = 0
    for index in range(0, len(train), 40):
        image = train.image(index)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and image.flags.c_contiguous
        assert (image[[0, -1]] == 255).all() and (image[:, [0, -1]] == 255).all(), train.captions(index)
        ink = (image < 250).any(axis=2)
        assert ink.mean() > 0.01, train.captions(index)
        colorful += bool((image.max(axis=2).astype(int) - image.min(axis=2)).max() > 50)
    assert colorful > 0.8 * len(range(0, len(train), 40))


@needs_ligatures
def test_skin_tones_darken_the_same_drawing(train: EmojiCorpus) -> None:
    index = {train.captions(i)[0]: i for i in range(len(train))}
    means = [train.image(index[f"thumbs up, {tone} skin tone"]).mean() for tone in TONES]
    assert means == sorted(means, reverse=True) and len(set(means)) == 5


@pytest.mark.parametrize("size", [(32, 32), (48, 96), (200, 128)])
def test_pictures_come_in_any_size(font: str, size: tuple[int, int]) -> None:
    corpus = EmojiCorpus(size, font=font, limit=3)
    assert len(corpus) == 3
    for index in range(3):
        image = corpus.image(index)
        rows, columns = np.nonzero((image < 250).any(axis=2))
        assert image.shape == (*size, 3)
        # In the middle, and undistorted: as far from the left as from the right.
        assert abs(columns.min() + columns.max() - size[1] + 1) < 0.3 * min(size)
        assert rows.max() - rows.min() <= min(size) and columns.max() - columns.min() <= min(size)


def test_what_a_font_lacks_is_found_out(train: EmojiCorpus) -> None:
    painter = train._painter
    assert painter.can_draw("😀")
    for sequence in ("\U0010ffff", "\ue000", "😀😀", "🍓‍🍓", "😀🏿", "😀\U000e0061\U000e007f", "5\u20e35\u20e3"):
        assert not painter.can_draw(sequence), ascii(sequence)


def test_without_text_layout_single_signs_remain_and_the_reason_is_given(
    font: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(features, "check", lambda _: False)
    emoji_module._drawable_emoji.cache_clear()
    try:
        corpus = EmojiCorpus(font=font)
        assert 1_000 < len(corpus) < 2_000
        assert all(len(entry.sequence.replace("\ufe0f", "")) == 1 for entry in corpus.entries)
        assert "libfribidi0" in caplog.text
        with pytest.raises(UserError, match="no emoji of the validation split: .*libfribidi0"):
            EmojiCorpus(font=font, split="validation")
    finally:
        emoji_module._drawable_emoji.cache_clear()


def test_the_same_emoji_is_the_same_picture_in_every_process(train: EmojiCorpus) -> None:
    copy = pickle.loads(pickle.dumps(train))
    assert (copy.image(7) == train.image(7)).all()
    assert copy.fingerprint() == train.fingerprint()


def test_the_fingerprint_follows_size_split_and_font(
    train: EmojiCorpus, validation: EmojiCorpus, font: str, tmp_path: Path
) -> None:
    prints = {train.fingerprint(), validation.fingerprint()}
    few = EmojiCorpus(font=font, limit=3)
    prints |= {few.fingerprint(), EmojiCorpus((32, 32), font=font, limit=3).fingerprint()}
    few.font = str(tmp_path / "other.ttf")
    Path(few.font).write_bytes(Path(font).read_bytes() + b"\0")
    assert len(prints | {few.fingerprint()}) == 5


def test_emoji_open_by_name(font: str, train: EmojiCorpus) -> None:
    corpus = open_corpus("emoji", image_size=(64, 64), split="train", font=font, limit=50)
    assert corpus.name == "emoji" and len(corpus) == 50
    assert {corpus.captions(index) for index in range(50)} < {entry.captions for entry in train.entries}
