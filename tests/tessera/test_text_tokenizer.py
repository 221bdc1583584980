"""The tokenizer round-trips any text, survives any corpus, and draws the same dropout wherever it is asked."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tessera.errors import UserError
from tessera.text_tokenizer import TextTokenizer

CAPTIONS = [
    f"A {size} {color} {shape} {relation} the ring."
    for size in ("small", "large")
    for color in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "star")
    for relation in ("left of", "above")
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, vocab_size=512)


def test_caption_round_trips_in_lower_case(tokenizer: TextTokenizer) -> None:
    for caption in CAPTIONS:
        assert tokenizer.decode(tokenizer.encode(caption)) == caption.lower()


@pytest.mark.parametrize("text", ["красная звезда", "猫の絵、星", "नीला तारा", "🐈 🧑‍🚒", "tab\x00nul"])
def test_text_in_another_script_round_trips_by_bytes(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert 1 not in ids  # no unknown piece
    assert tokenizer.decode(ids) == text
    dropped = tokenizer.encode(text, dropout=0.3, seed=4)
    assert 1 not in dropped
    assert tokenizer.decode(dropped) == text


def test_known_words_are_short(tokenizer: TextTokenizer) -> None:
    assert len(tokenizer.encode("a red star")) == 3


@pytest.mark.parametrize("blank", ["", " ", "\n\t "])
def test_blank_caption_is_all_pads(tokenizer: TextTokenizer, blank: str) -> None:
    assert tokenizer.encode(blank) == []
    ids = tokenizer.encode_batch([blank, "a red star"], text_len=5)
    assert ids[0].tolist() == [tokenizer.vocab_size + position for position in range(5)]
    assert ids[1, 3:].tolist() == [tokenizer.vocab_size + 3, tokenizer.vocab_size + 4]
    assert ids.max() < tokenizer.vocab_size + 5


def test_long_caption_is_cut_and_decodes_without_pads(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode_batch(["a red star above the ring", "a red star"], text_len=4)
    assert ids.shape == (2, 4)
    assert ids.dtype == torch.int64
    assert ids[0].tolist() == tokenizer.encode("a red star above the ring")[:4]
    assert tokenizer.decode(ids[1].tolist()) == "a red star"
    assert tokenizer.encode_batch([], text_len=4).shape == (0, 4)


def test_dropout_depends_on_the_seed_alone(tokenizer: TextTokenizer) -> None:
    caption = "a large yellow circle above the ring"
    alone = tokenizer.encode(caption, dropout=0.5, seed=3)
    for seed in range(20):
        tokenizer.encode("something else", dropout=0.5, seed=seed)
    batch = tokenizer.encode_batch(["a red star", caption], text_len=64, dropout=0.5, seeds=[9, 3])
    assert tokenizer.encode(caption, dropout=0.5, seed=3) == alone
    assert batch[1, : len(alone)].tolist() == alone
    splits = {tuple(tokenizer.encode(caption, dropout=0.5, seed=seed)) for seed in range(20)}
    assert len(splits) > 10
    assert {tokenizer.decode(split) for split in splits} == {caption}


def test_another_process_draws_the_same_dropout(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """A run that is resumed must see the pieces that it would have seen."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.proto)
    program = """
import sys
from pathlib import Path
from tessera.text_tokenizer import TextTokenizer
tokenizer = TextTokenizer(Path(sys.argv[1]).read_bytes())
print([tokenizer.encode("a large yellow circle", dropout=0.5, seed=seed) for seed in range(5)])
"""
    command = [sys.executable, "-c", program, str(tmp_path / "tokenizer.model")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert printed == str([tokenizer.encode("a large yellow circle", dropout=0.5, seed=seed) for seed in range(5)])


@pytest.mark.parametrize(
    "text", [*CAPTIONS[:5], "  many   spaces ", "½ ﬁ Ω 猫 🐈", "<unk> <0x41>", "aaaaaaaaa", "a\u2581b"]
)
def test_dropout_that_drops_nothing_merges_as_without(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.encode(text, dropout=1e-12, seed=1) == tokenizer.encode(text)


def test_more_dropout_gives_more_pieces(tokenizer: TextTokenizer) -> None:
    counts = [
        sum(len(tokenizer.encode(caption, dropout=dropout, seed=seed)) for seed, caption in enumerate(CAPTIONS))
        for dropout in (0.0, 0.2, 0.5, 0.999)
    ]
    assert counts == sorted(set(counts))
    spelled = len("▁") + len("a red star")  # one piece for each character
    assert len(tokenizer.encode("a red star", dropout=1 - 1e-12, seed=1)) == spelled


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63, -5])
def test_any_integer_seeds_the_dropout(tokenizer: TextTokenizer, seed: int) -> None:
    first = tokenizer.encode("a large yellow circle", dropout=0.5, seed=seed)
    tokenizer.encode("a large yellow circle", dropout=0.5, seed=12345)
    assert tokenizer.encode("a large yellow circle", dropout=0.5, seed=seed) == first


def test_training_is_deterministic_and_the_proto_restores_it(tokenizer: TextTokenizer) -> None:
    again = TextTokenizer.train(iter(CAPTIONS), vocab_size=512)
    restored = TextTokenizer(tokenizer.proto)
    assert again.proto == tokenizer.proto
    assert restored.sha256 == again.sha256
    assert restored.encode(CAPTIONS[5]) == tokenizer.encode(CAPTIONS[5])


@pytest.mark.parametrize(
    "captions",
    [[], ["", "  "], ["a"], ["猫"], ["x" * 20_000], ["a b " * 2_000, "é"]],
    ids=["none", "blank", "one letter", "one ideograph", "one long word", "one long caption"],
)
@pytest.mark.parametrize("vocab_size", [1, 300, 16_384])
def test_small_corpora_never_crash(captions: list[str], vocab_size: int) -> None:
    tokenizer = TextTokenizer.train(captions, vocab_size=vocab_size)
    assert 260 <= tokenizer.vocab_size <= max(vocab_size, 264)
    assert tokenizer.decode(tokenizer.encode("a star 猫")) == "a star 猫"


def test_a_large_alphabet_is_covered_by_bytes() -> None:
    captions = [chr(0x4E00 + i) + chr(0x4E00 + i // 2) for i in range(3_000)]
    tokenizer = TextTokenizer.train(captions, vocab_size=512)
    assert tokenizer.decode(tokenizer.encode(captions[17])) == captions[17]


def test_more_captions_than_are_read_are_sampled_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.text_tokenizer._MAX_TRAINING_CAPTIONS", 10)
    first = TextTokenizer.train(CAPTIONS, vocab_size=400, seed=0)
    assert first.proto == TextTokenizer.train(CAPTIONS, vocab_size=400, seed=0).proto
    assert first.proto != TextTokenizer.train(CAPTIONS, vocab_size=400, seed=1).proto


def test_lone_surrogate_is_refused_in_one_line(tokenizer: TextTokenizer) -> None:
    with pytest.raises(UserError, match="U\\+D800"):
        tokenizer.encode("a \ud800 star")
    with pytest.raises(UserError, match="surrogate"):
        TextTokenizer.train(["a \udfff"], vocab_size=300)


@pytest.mark.parametrize("damage", [b"", b"not a model", "half"])
def test_damaged_model_is_refused(tokenizer: TextTokenizer, damage: bytes | str) -> None:
    proto = tokenizer.proto[:1000] if damage == "half" else damage
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        TextTokenizer(proto)  # type: ignore[arg-type]


def test_dropout_without_seeds_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="expected 2, got none"):
        tokenizer.encode_batch(["a", "b"], text_len=4, dropout=0.1)
    with pytest.raises(ValueError, match="0, 1"):
        tokenizer.encode("a", dropout=1.0)
