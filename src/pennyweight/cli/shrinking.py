"""pennyweight plan, pennyweight shrink."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from torch import nn

from ..artifact import save
from ..compress.budget import parse_latency, time_text
from ..compress.plan import Plan
from ..compress.shrink import plan as make_plan
from ..compress.shrink import shrink as make_small
from ..errors import ArtifactError, BudgetError
from ..report import Report
from ..report import report as make_report
from ..report_page import size_text
from .screen import Json, Quiet, Screen
from .sources import Source, load_data, load_source

Model = Annotated[
    str, typer.Argument(help="Directory with safetensors or of a training, module:factory, or hub name owner/model.")
]
Size = Annotated[str | None, typer.Option(help="Bytes of all files, such as 7MB, 900kB, 6.5MiB.")]
Bits = Annotated[float | None, typer.Option(help="Or: bits on disk per parameter, everything counted.")]
Ratio = Annotated[float | None, typer.Option(help="Or: how many times smaller.")]
Latency = Annotated[str | None, typer.Option(help="Time a batch may take here, such as 3ms; alone or with a size.")]
LatencyBatch = Annotated[int | None, typer.Option(min=1, help="Samples in that batch; the default is the data's own.")]
Data = Annotated[str | None, typer.Option(help="Calibration data: text, .npy, .npz, .safetensors, module:function.")]
Samples = Annotated[int, typer.Option(min=1, help="Samples of the data to use at most.")]
Methods = Annotated[str | None, typer.Option(help="Methods that may compete, such as entropy-gptq,svd.")]
Preset = Annotated[str, typer.Option(help="balanced, smallest or no-data.")]
Distortion = Annotated[str, typer.Option(help="What to keep: output, loss or layer.")]
Solver = Annotated[str, typer.Option(help="hull, dynamic or integer.")]
Seed = Annotated[int, typer.Option(help="Same seed, same bytes.")]

DEFAULT_SAMPLES = 512


def plan(
    model: Model,
    size: Size = None,
    bits: Bits = None,
    ratio: Ratio = None,
    latency: Latency = None,
    latency_batch: LatencyBatch = None,
    data: Data = None,
    samples: Samples = DEFAULT_SAMPLES,
    methods: Methods = None,
    preset: Preset = "balanced",
    distortion: Distortion = "output",
    solver: Solver = "hull",
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the plan here, as YAML to edit.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A dry run: what each layer would become, and what the files would weigh."""
    screen = Screen(as_json, quiet)
    search = _search(size, bits, ratio, latency, methods, preset, distortion, solver, seed)
    with screen.working() as progress:
        source = load_source(model)
        made = make_plan(
            source.model,
            data=_calibration(screen, source, data, samples),
            output=source.output,
            progress=progress,
            latency_batch=latency_batch,
            **search,
        )
    if output is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            made.save(output)
        except OSError as error:
            raise ArtifactError(f"cannot write {output}: {error.strerror or error}") from error
    if as_json:
        screen.json(made.to_dict())
        return
    screen.show(made.table())
    screen.line(_plan_line(made))
    if output is not None:
        screen.line(f"[dim]{escape(str(output))}: edit it, then pennyweight shrink {escape(model)} --plan {output}[/]")


def shrink(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    size: Size = None,
    bits: Bits = None,
    ratio: Ratio = None,
    latency: Latency = None,
    latency_batch: LatencyBatch = None,
    plan: Annotated[Path | None, typer.Option(help="Carry out this plan, perhaps edited.")] = None,
    data: Data = None,
    samples: Samples = DEFAULT_SAMPLES,
    methods: Methods = None,
    preset: Preset = "balanced",
    distortion: Distortion = "output",
    solver: Solver = "hull",
    recover: Annotated[int, typer.Option(min=0, help="Steps of training against the original, without labels.")] = 0,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The best network of a size, in files that fit it."""
    screen = Screen(as_json, quiet)
    search = _search(size, bits, ratio, latency, methods, preset, distortion, solver, seed, planned=plan is not None)
    chosen = Plan.load(plan) if plan is not None else None
    with screen.working() as progress:
        source = load_source(model)
        batches = _calibration(screen, source, data, samples)
        small = make_small(
            source.model,
            plan=chosen,
            data=batches,
            output=source.output,
            recover=recover,
            progress=progress,
            latency_batch=latency_batch,
            **search,
        )
        made = make_report(small, inputs=batches, original=source.model, name=source.name)
        write(source, small, made, output)
    if as_json:
        screen.json(made.to_dict() | {"directory": str(output)})
        return
    screen.line(summary(made))
    screen.line(f"[dim]{escape(str(output))}: model.safetensors, config.json; plan.yaml, report.json, report.html[/]")


def write(source: Source, small: nn.Module, made: Report, directory: Path) -> None:
    """The artifact with its plan, its reports, and what the source brought beside its weights."""
    assert made.plan is not None
    written = save(
        small,
        directory,
        plan=made.plan.to_yaml(),
        report=made.to_dict() | {"source": source.name},
    )
    assert written == made.size, (written, made.size)
    source.copy_files(directory)
    made.save(directory / "report.html")


def summary(made: Report) -> str:
    """ "6.99 MB (6,993,120 bytes), 99.9 % of the budget, 13.0 times smaller, 2.46 bits a parameter"."""
    parts = [f"[bold]{size_text(made.size)}[/] ({made.size:,} bytes)"]
    if made.budget is not None:
        parts.append(f"{100 * made.size / made.budget:.2f} % of the budget")
    if made.ratio is not None:
        parts.append(f"{made.ratio:.1f} times smaller")
    parts.append(f"{made.effective_bits:.2f} bits a parameter")
    if made.distortion is not None:
        parts.append(f"distortion {made.distortion:.3g}")
    if made.promise is not None:
        parts.append(f"{time_text(made.promise.measured)} of {time_text(made.promise.asked)}")
    if made.recovered is not None:
        parts.append(f"recovery took the loss from {made.recovered[0]:.3g} to {made.recovered[1]:.3g}")
    return ", ".join(parts)


def _plan_line(made: Plan) -> str:
    """The size, the loss, and how small it could get."""
    parts = []
    if made.total is not None:
        of_budget = "" if made.budget is None else f" of {size_text(made.budget)}"
        parts.append(f"[bold]{size_text(made.total)}[/]{of_budget}")
    if made.distortion is not None:
        parts.append(f"distortion {made.distortion:.3g}")
    if made.seconds is not None and made.latency is not None:
        parts.append(f"{time_text(made.seconds)} of {time_text(made.latency)}")
    if made.frontier:
        parts.append(f"smallest reachable {size_text(made.frontier[-1][0])}")
    return ", ".join(parts)


def _calibration(screen: Screen, source: Source, data: str | None, samples: int) -> list[Any] | None:
    batches = load_data(data, source, samples)
    if data is None and source.recipe is not None:
        screen.note(f"no --data: calibrating on the data of its training, {source.recipe.data.name}")
    elif data is None and batches is not None:
        screen.note("no --data: calibrating on Python's own English documentation; text of your own does better")
    elif batches is None:
        screen.note("no --data: the weights alone decide (preset no-data); a few samples of real data do much better")
    return batches


def _search(
    size: str | None,
    bits: float | None,
    ratio: float | None,
    latency: str | None,
    methods: str | None,
    preset: str,
    distortion: str,
    solver: str,
    seed: int,
    planned: bool = False,
) -> dict[str, Any]:
    """What to look for and how, as the library's `plan` and `shrink` take it.

    Raises BudgetError unless one size is given (or none, with a latency or a plan already made) and the latency can be
    read: before the model is loaded, which may take long.
    """
    given = [name for name, value in (("--size", size), ("--bits", bits), ("--ratio", ratio)) if value is not None]
    if latency is not None:
        parse_latency(latency)
    if len(given) > 1 or not (given or planned or latency is not None):
        what = f"{' and '.join(given)} were given" if given else "none was given"
        raise BudgetError(f"give exactly one of --size, --bits and --ratio (or --latency); {what}")
    return {
        "size": size,
        "bits": bits,
        "ratio": ratio,
        "latency": latency,
        "methods": None if methods is None else [name.strip() for name in methods.split(",") if name.strip()],
        "preset": preset,
        "distortion": distortion,
        "solver": solver,
        "seed": seed,
    }
