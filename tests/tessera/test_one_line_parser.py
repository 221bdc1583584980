import pytest

from tessera.errors import UserError
from tessera.one_line_parser import OneLineParser


@pytest.fixture
def parser() -> OneLineParser:
    parser = OneLineParser(prog="tessera draw", description="Draws.")
    parser.add_argument("--number", type=int)
    return parser


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--number", "x"], "argument --number: invalid int value: 'x'; see `tessera draw --help`"),
        (["--numb", "3"], "unrecognized arguments: --numb 3; see `tessera draw --help`"),
        (["more"], "unrecognized arguments: more; see `tessera draw --help`"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_says_where_to_read_more(
    parser: OneLineParser, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught:
        parser.parse_args(argv)
    assert str(caught.value) == message
    assert capsys.readouterr() == ("", "")


def test_help_is_printed_and_is_no_error(parser: OneLineParser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--help"])
    assert caught.value.code == 0
    assert "Draws." in capsys.readouterr().out
