"""Merging characters to pieces, with some merges left out."""

import random

from tessera.bpe_dropout import merge_with_dropout

SCORES = {"ab": -1.0, "bc": -2.0, "abc": -3.0, "aa": -4.0}


def merge(text: str, dropout: float, seed: int = 0) -> list[str]:
    return merge_with_dropout(text, SCORES, dropout=dropout, chance=random.Random(seed))


def test_the_best_pair_is_merged_first() -> None:
    assert merge("abc", 0.0) == ["abc"]
    assert merge("bcab", 0.0) == ["bc", "ab"]
    assert merge("aaa", 0.0) == ["aa", "a"], "of equals the one further left"
    assert merge("", 0.0) == [] and merge("xyz", 0.0) == ["x", "y", "z"]


def test_a_dropped_merge_lets_another_one_happen() -> None:
    found = {tuple(merge("abc", 0.5, seed)) for seed in range(50)}
    assert found == {("abc",), ("ab", "c"), ("a", "bc"), ("a", "b", "c")}
    assert merge("abcab", 0.5, 3) == merge("abcab", 0.5, 3)
