"""What a command prints: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import PennyweightWarning
from ..progress import Callback, progress_bars

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only results and errors: no progress, no notes.")]


class Screen:
    """Made once a command."""

    def __init__(self, json_wanted: bool = False, quiet: bool = False) -> None:
        self.json_wanted = json_wanted
        self.quiet = quiet
        self.out = Console()
        self.err = Console(stderr=True)

    def note(self, text: str) -> None:
        if not self.quiet:
            self.err.print(f"[dim]note:[/] {escape(text)}", soft_wrap=True, highlight=False)

    def show(self, renderable: Any) -> None:
        self.out.print(renderable)

    def line(self, text: str = "") -> None:
        """One line with rich's markup, not broken."""
        self.out.print(text, soft_wrap=True, highlight=False)

    def json(self, value: Any) -> None:
        typer.echo(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))

    @contextlib.contextmanager
    def working(self) -> Iterator[Callback]:
        """Progress bars, and the library's warnings as notes, each once."""
        told: set[str] = set()

        def tell(message: Warning | str, *_: Any, **__: Any) -> None:
            if str(message) not in told:
                told.add(str(message))
                self.note(str(message))

        with warnings.catch_warnings(), progress_bars(self.err, self.quiet) as progress:
            warnings.simplefilter("ignore")  # those of other libraries are not for the user of a command
            warnings.simplefilter("always", PennyweightWarning)
            warnings.showwarning = tell
            yield progress


def error_line(error: BaseException) -> None:
    """The one line of a user's mistake."""
    Console(stderr=True).print(
        f"[bold red]error:[/] {escape(' '.join(str(error).split()))}", soft_wrap=True, highlight=False
    )
