"""Code tables: digits, lookups and logits agree; what one code learns helps those that share a digit."""

import torch

from dvae.quantizers.fsq import FiniteScalarQuantizer
from transformer.code_table import CodeTable

LEVELS = (4, 3, 2)


def random_table(levels: tuple[int, ...] = LEVELS) -> CodeTable:
    torch.manual_seed(0)
    table = CodeTable(24, levels, 8)
    table.init_weights(std=1)
    return table


def test_digits_are_those_of_the_quantizer() -> None:
    centers = FiniteScalarQuantizer(LEVELS).lookup(torch.arange(24).view(1, 1, 24))[0, :, 0]  # [D, K]
    table = CodeTable(24, LEVELS, dim=len(LEVELS))
    table.init_weights(std=0)
    with torch.no_grad():
        for place, (level, digits) in enumerate(zip(LEVELS, table.digits, strict=True)):
            assert isinstance(digits, torch.nn.Embedding)
            digits.weight[:, place] = (2 * torch.arange(level) + 1) / level - 1
    torch.testing.assert_close(table.vectors().T, centers)


def test_logits_are_products_with_the_looked_up_vectors() -> None:
    for levels in (LEVELS, ()):
        table = random_table(levels)
        x = torch.randn(5, 2, 8)
        torch.testing.assert_close(table.logits(x), x @ table(torch.arange(24)).T)


def test_a_code_never_seen_learns_from_those_that_share_its_digits() -> None:
    table = random_table()
    table.init_weights(std=0)
    x = torch.randn(1, 8)
    never, shares_two_digits, shares_none = 0, 1, 23  # digits (0, 0, 0), (1, 0, 0) and (3, 2, 1)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(table.logits(x), torch.tensor([shares_two_digits])).backward()
        optimizer.step()
    logits = table.logits(x)[0]
    assert logits[never] > logits[shares_none]


def test_zero_weights_give_equal_logits() -> None:
    table = random_table()
    table.init_weights(std=0)
    assert not table.logits(torch.randn(3, 8)).any()
