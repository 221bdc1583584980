"""Progress of things that are counted: a bar with rate and time left on a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_LINE_EVERY_SECONDS = 20.0


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Gives a function of (done, in all or None where that is not known) that moves the bar.

    There is none before the first call, so that a bar of something that has to be done first can be in its place.

    Args:
        what: the activity, in a word or two.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(what)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
    )
    # Redirected, what a program prints would go to the terminal, and not to where its output is sent.
    progress = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    task = progress.add_task(what, total=None)

    def show(done: int, total: int | None) -> None:
        progress.update(task, completed=done, total=total)
        progress.start()  # once is enough, more does no harm

    try:
        yield show
    finally:
        progress.stop()


def _lines(what: str) -> Callable[[int, int | None], None]:
    began = shown = time.monotonic()

    def show(done: int, total: int | None) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < _LINE_EVERY_SECONDS or not done:
            return
        shown = now
        if total is None:
            told = f"{done:,}  {done / (now - began):,.0f} a second"
        else:
            told = f"{done:,} of {total:,}  {(now - began) * (total - done) / done:,.0f} s left"
        print(f"{what}  {told}", file=sys.stderr, flush=True)

    return show
