"""BPE dropout (Provilkov et al. 2020, "BPE-Dropout: simple and effective subword regularization"), repeatable by seed.

sentencepiece can do this, but mixes into every seed what differs from process to process: a run that is resumed would
see other pieces than before, and so would another number of loader processes.
"""

import heapq
import random
from collections.abc import Mapping


def merge_with_dropout(text: str, scores: Mapping[str, float], *, dropout: float, chance: random.Random) -> list[str]:
    """Merges the characters of a text, best pair first; each pair that comes up is dropped with a probability.

    Args:
        text: normalized, as the merges were learned on.
        scores: of every piece that merges may make; the highest is merged first, of equals the one further left.
        dropout: probability in [0, 1); 0 merges as BPE does.
        chance: where the choices come from.

    Returns:
        Pieces that joined give the text; single characters may have no score.
    """
    symbols = list(text)  # one that has been merged with the one before it is empty
    before, after = list(range(-1, len(text) - 1)), list(range(1, len(text) + 1))  # the neighbors that are left
    agenda: list[tuple[float, int, int, str]] = []  # -score, place, place of the right one, what they make

    def propose(left: int, right: int) -> None:
        if left >= 0 and right < len(symbols):
            pair = symbols[left] + symbols[right]
            if pair in scores:
                heapq.heappush(agenda, (-scores[pair], left, right, pair))

    for place in range(1, len(symbols)):
        propose(place - 1, place)
    while agenda:
        _, left, right, pair = heapq.heappop(agenda)
        if symbols[left] + symbols[right] != pair or not symbols[left] or not symbols[right]:
            continue  # one of the two has been merged with another since
        if chance.random() < dropout:
            continue
        symbols[left], symbols[right] = pair, ""
        after[left] = after[right]
        if after[left] < len(symbols):
            before[after[left]] = left
        propose(before[left], left)
        propose(left, after[left])
    return [symbol for symbol in symbols if symbol]
