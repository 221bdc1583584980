"""Captions to token ids: BPE with byte fallback and dropout (Sennrich et al. 2016; Provilkov et al. 2020).

A thin face on sentencepiece that fixes what this project relies on: text is lower-cased and NFKC-normalized by the
model file itself, text in any script is legal (unknown characters become bytes), the vocabulary size never crashes on a
small corpus, and dropout depends on the caption's seed alone. Positions after the end of a caption get ids of their
own, one per position (Ramesh et al. 2021), so that the prior sees where the caption ends and how much room is left.

Dimensions: B batch, T text positions (text_len).
"""

import hashlib
import io
import math
import random
from collections.abc import Iterable, Sequence

import sentencepiece
import torch

from tessera.bpe_dropout import merge_with_dropout
from tessera.errors import UserError

PAD_ID, UNKNOWN_ID, BEGIN_ID, END_ID = 0, 1, 2, 3
_NUM_SPECIAL = 4
_NUM_BYTES = 256
_NORMALIZATION = "nmt_nfkc_cf"  # NFKC and case folding, stored in the model file
_MAX_TRAINING_CAPTIONS = 100_000  # more lines cost time and do not move the merges of a BPE
_MAX_ALPHABET = 1_000  # a larger one (CJK) is covered to 99.95 % of its occurrences; bytes cover the rest
_MAX_SENTENCE_BYTES = 1 << 20  # the trainer silently drops longer lines; its default of 4,192 is short for captions
_MAX_COUNTED_CAPTIONS = 50_000
_DROPOUT_ROOM = 1.25  # dropout splits captions into more pieces


class TextTokenizer:
    """A trained byte-pair tokenizer for captions.

    Args:
        proto: bytes of a sentencepiece model (`tokenizer.model` of a model folder).

    Raises:
        UserError: if `proto` is not a sentencepiece model that holds the 256 byte pieces.
    """

    def __init__(self, proto: bytes) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise UserError(
                "the text tokenizer is not a sentencepiece model: restore or retrain tokenizer.model"
            ) from error
        # A truncated protobuf can parse as a model with fewer pieces, and so can an empty one with none.
        if self._processor.vocab_size() < _NUM_SPECIAL + _NUM_BYTES or not self._processor.is_byte(_NUM_SPECIAL):
            raise UserError("the text tokenizer has no byte pieces: restore or retrain tokenizer.model")
        self.proto = proto
        self.sha256 = hashlib.sha256(proto).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        pieces = range(_NUM_SPECIAL + _NUM_BYTES, self.vocab_size)
        self._ids = {self._processor.id_to_piece(piece): piece for piece in pieces}
        self._score_of = {name: self._processor.get_score(piece) for name, piece in self._ids.items()}

    @classmethod
    def train(cls, captions: Iterable[str], *, vocab_size: int, seed: int = 0) -> "TextTokenizer":
        """Learns the merges from captions; equal arguments give an equal model.

        Args:
            captions: any number of captions, blank ones included. Repeats count once, and beyond 100,000 distinct
                captions a sample is taken.
            vocab_size: the number of pieces aimed at. It is an upper limit for a small corpus, which may not hold so
                many merges, and it is raised to the floor of 260 + the number of distinct characters.
            seed: chooses the sample, where one is taken.

        Returns:
            The tokenizer. A corpus of blank captions alone gives one that spells everything in bytes.

        Raises:
            UserError: if a caption holds a lone surrogate or `vocab_size` is not positive.
        """
        if vocab_size < 1:
            raise UserError(f"vocab_size must be at least 1, got {vocab_size}")
        # The trainer refuses an empty corpus; one letter is the smallest that it accepts.
        lines = list(dict.fromkeys(caption for caption in captions if caption.strip())) or ["a"]
        if len(lines) > _MAX_TRAINING_CAPTIONS:
            chosen = random.Random(seed).sample(range(len(lines)), _MAX_TRAINING_CAPTIONS)
            lines = [lines[i] for i in sorted(chosen)]
        for line in lines:
            _check_encodable(line)

        normalizer = sentencepiece.SentencePieceNormalizer(rule_name=_NORMALIZATION)
        alphabet = set().union(*(normalizer.normalize(line) for line in lines))
        floor = _NUM_SPECIAL + _NUM_BYTES + len(alphabet)
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=max(vocab_size, floor),
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=1.0 if len(alphabet) <= _MAX_ALPHABET else 0.9995,
            normalization_rule_name=_NORMALIZATION,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            num_threads=1,  # stored in the model file, so it must not follow the machine
            pad_id=PAD_ID,
            unk_id=UNKNOWN_ID,
            bos_id=BEGIN_ID,
            eos_id=END_ID,
            minloglevel=2,
        )
        return cls(model.getvalue())

    def encode(self, caption: str, *, dropout: float = 0.0, seed: int = 0) -> list[int]:
        """Splits a caption into piece ids, without begin, end or pad ids.

        Args:
            caption: any text; blank gives an empty list.
            dropout: probability in [0, 1) that a merge is skipped (BPE dropout).
            seed: the dropout's randomness; the same caption, dropout and seed give the same ids.

        Returns:
            Ids in [0, vocab_size).

        Raises:
            UserError: if the caption holds a lone surrogate.
            ValueError: if `dropout` lies outside [0, 1).
        """
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        _check_encodable(caption)
        if dropout == 0.0:
            return self._processor.encode(caption)
        text = self._processor.normalize(caption)
        pieces = merge_with_dropout(text, self._score_of, dropout=dropout, chance=random.Random(int(seed) % 2**64))
        return [token for piece in pieces for token in self._spelled(piece)]

    def _spelled(self, piece: str) -> list[int]:
        """The id of a piece; the bytes of a character that is none."""
        known = self._ids.get(piece)
        return [_NUM_SPECIAL + byte for byte in piece.encode()] if known is None else [known]

    def decode(self, ids: Iterable[int]) -> str:
        """Joins piece ids to text; special ids and per-position pads are skipped.

        Args:
            ids: ids as `encode` or `pad` give them.

        Returns:
            The normalized caption. Bytes that are no valid UTF-8 become U+FFFD.
        """
        return self._processor.decode([int(i) for i in ids if _NUM_SPECIAL <= int(i) < self.vocab_size])

    def pad(self, ids: Sequence[int], *, text_len: int) -> list[int]:
        """Cuts or fills ids to `text_len`; the pad at position p is id vocab_size + p.

        Args:
            ids: piece ids of one caption.
            text_len: number of text positions T.

        Returns:
            T ids in [0, vocab_size + text_len).
        """
        kept = list(ids[:text_len])
        return kept + [self.vocab_size + position for position in range(len(kept), text_len)]

    def fitting_text_len(self, captions: Iterable[str], *, dropout: float = 0.0, most: int = 256) -> int:
        """Returns how many text positions captions need.

        Args:
            captions: any number; of more than 50,000 distinct ones an evenly spaced part is counted.
            dropout: chance that a merge will be skipped, 0 to 1; above 0 there is room for a quarter more pieces.
            most: never more than this.

        Returns:
            A multiple of 4, at least 8, with room for 999 in 1,000 captions.
        """
        distinct = list(dict.fromkeys(captions))
        lengths = sorted(len(self.encode(text)) for text in distinct[:: max(1, len(distinct) // _MAX_COUNTED_CAPTIONS)])
        longest = lengths[math.ceil(0.999 * len(lengths)) - 1] if lengths else 0
        room = _DROPOUT_ROOM if dropout > 0 else 1.0
        return min(most, max(8, 4 * math.ceil(longest * room / 4)))

    def encode_batch(
        self, captions: Sequence[str], *, text_len: int, dropout: float = 0.0, seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Encodes and pads captions.

        Args:
            captions: B captions; blank ones become all pads.
            text_len: number of text positions T; longer captions are cut.
            dropout: probability in [0, 1) that a merge is skipped.
            seeds: B seeds of the dropout; required when `dropout` > 0.

        Returns:
            int64 [B, T].

        Raises:
            UserError: if a caption holds a lone surrogate.
            ValueError: if `dropout` > 0 without one seed per caption.
        """
        if dropout > 0.0 and (seeds is None or len(seeds) != len(captions)):
            got = "none" if seeds is None else str(len(seeds))
            raise ValueError(f"dropout needs one seed per caption: expected {len(captions)}, got {got}")
        if seeds is None:
            seeds = [0] * len(captions)
        rows = [
            self.pad(self.encode(caption, dropout=dropout, seed=seed), text_len=text_len)
            for caption, seed in zip(captions, seeds, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(captions), text_len)  # [B, T], also for B = 0


def _check_encodable(caption: str) -> None:
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the caption holds a lone surrogate (U+{ord(caption[error.start]):04X}): give valid Unicode"
        ) from error
