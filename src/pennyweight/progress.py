"""Progress of long work on the terminal, through `progress(what, done, total)` callbacks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Callback = Callable[[str, int, int], None]

#: Work shorter than this shows no bar.
PATIENCE_SECONDS = 2.0

#: What the stages of the work are called on the terminal.
STAGES = {
    "timing": "timing layers",
    "observe": "reading calibration data",
    "offers": "pricing every layer",
    "compress": "compressing",
    "recover": "recovering",
    "train": "training",
}


@contextlib.contextmanager
def progress_bars(console: Console | None = None, quiet: bool = False) -> Iterator[Callback]:
    """A callback that draws one bar a stage on standard error, from the third second on; it leaves nothing behind.

        with progress_bars() as progress:
            small = pw.shrink(model, size="7MB", data=batches, progress=progress)

    quiet: draw nothing; so does a console that is no terminal.
    """
    console = console or Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip
    started = time.monotonic()
    tasks = {}

    def callback(what: str, done: int, total: int) -> None:
        if quiet or not console.is_terminal:
            return
        if what not in tasks:
            tasks[what] = bars.add_task(STAGES.get(what, what), total=total)
        bars.update(tasks[what], completed=done, total=total)
        if not bars.live.is_started and time.monotonic() - started > PATIENCE_SECONDS:
            bars.start()

    try:
        yield callback
    finally:
        if bars.live.is_started:
            bars.stop()
