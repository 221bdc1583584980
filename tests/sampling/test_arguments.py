"""Values of flags: the axes of a grid, read by the type of each setting."""

import pytest

from sampling.arguments import read_axes
from tessera.errors import UserError


def test_values_have_the_type_of_their_setting_and_axes_keep_their_order() -> None:
    axes = read_axes(["top-k=0, 16", "guidance=1,2.5", "guidance_schedule=linear,power-cosine"])
    assert list(axes.items()) == [
        ("top_k", [0, 16]),
        ("guidance", [1.0, 2.5]),
        ("guidance_schedule", ["linear", "power-cosine"]),
    ]
    assert [type(value) for value in (*axes["top_k"], *axes["guidance"])] == [int, int, float, float]
    assert read_axes([]) == {}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["guidance"], "cannot read --grid 'guidance': expected NAME=VALUE,VALUE"),
        (["=1,2"], "cannot read --grid"),
        (["guidance="], "cannot read --grid"),
        (["guidence=1,2"], "no option 'guidence'; did you mean guidance"),
        (["seed=1,2"], "no option 'seed'"),
        (["guidance=1,two"], "--grid guidance has a value 'two', expected a number"),
        (["guidance=1,,2"], "--grid guidance has a value '', expected a number"),
        (["top_k=1.5"], "--grid top_k has a value '1.5', expected an integer"),
        (["top_p=0.5,1.5"], "top_p is 1.5, expected"),
        (["temperature=nan"], "temperature is nan, expected"),
        (["guidance_schedule=cubic"], "guidance_schedule is 'cubic', expected one of"),
        (["guidance=1", "guidance=2"], "--grid guidance is given twice"),
        (["top-k=1", "top_k=2"], "--grid top_k is given twice"),
    ],
)
def test_axes_that_cannot_be_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_axes(texts)
