"""Codebook statistics on counted examples."""

import pytest
import torch

from dvae.usage import UsageWindow, code_usage


def test_even_use_has_full_perplexity() -> None:
    usage = code_usage(torch.arange(8).repeat(3), 8)
    assert usage.share == 1
    assert usage.perplexity == pytest.approx(8)
    assert usage.dead == 0


def test_a_collapsed_codebook_shows() -> None:
    usage = code_usage(torch.full((2, 4, 4), 3), 16)
    assert usage.share == 1 / 16
    assert usage.perplexity == pytest.approx(1)
    assert usage.dead == 15


def test_no_codes_is_an_error() -> None:
    with pytest.raises(ValueError, match="no codes"):
        code_usage(torch.empty(0, dtype=torch.int64), 4)


def test_a_window_forgets_what_has_left_it() -> None:
    window = UsageWindow(8, length=2)
    with pytest.raises(ValueError, match="no codes"):
        window.usage()
    for code in (1, 2, 3):
        window.add(torch.full((2, 3, 3), code))
    usage = window.usage()
    assert (usage.share, usage.dead) == (2 / 8, 6)
    assert usage.perplexity == pytest.approx(2)
