"""The command line: `pennyweight plan | shrink | train | inspect | eval | bench | methods | demo`.

A user's mistake (`PennyweightError`) ends in one line on standard error and exit code 2.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import PennyweightError
from ..kernels import check_instruction_set
from ..memory import return_freed_memory
from . import bench, demonstration, looking, shrinking, training
from .screen import error_line


class _Commands(TyperGroup):
    """Commands in the order they are entered; the users' mistakes of all of them end here."""

    def invoke(self, ctx: Any) -> Any:
        return_freed_memory()
        try:
            check_instruction_set()
            return super().invoke(ctx)
        except PennyweightError as error:
            error_line(error)
            raise typer.Exit(2) from None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


app = typer.Typer(
    cls=_Commands,
    help="Name a size, get the best network of that size, in a file that fits.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("plan")(shrinking.plan)
app.command("shrink")(shrinking.shrink)
app.command("train")(training.train)
app.command("inspect")(looking.inspect)
app.command("eval")(looking.evaluate)
app.add_typer(bench.app, name="bench")
app.command("methods")(looking.methods)
app.command("demo")(demonstration.demo)
