from tessera.data.candidates import Candidate, Location, Reject
from tessera.data.layouts.caption_table import CaptionTable, one_per_image


def row(image: str, *captions: str) -> Candidate:
    return Candidate(Location(image), captions)


def test_captions_of_an_image_are_joined_in_the_order_of_rows() -> None:
    rows = [row("b.png", "one"), Reject("x:2", "damaged"), row("a.png", "two"), row("b.png", "three", "one")]
    assert list(one_per_image(rows, no_caption="no caption")) == [
        Reject("x:2", "damaged"),
        row("b.png", "one", "three"),
        row("a.png", "two"),
    ]


def test_an_image_without_captions_in_any_row_is_refused() -> None:
    rows = [row("a.png"), row("b.png"), row("b.png", "late")]
    assert list(one_per_image(rows, no_caption="no caption")) == [Reject("a.png", "no caption"), row("b.png", "late")]


def test_what_was_taken_is_not_left_over() -> None:
    with CaptionTable() as table:
        assert not list(table.fill([row("a.png", "a"), row("b.png", "b"), row("c.png")]))
        assert table.take("b.png") == ("b",)
        assert table.take("c.png") == ()
        assert table.take("d.png") is None
        assert list(table.not_taken()) == ["a.png"]


def test_names_that_are_not_text_survive() -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    assert list(one_per_image([row(name, "coffee")], no_caption="")) == [row(name, "coffee")]
