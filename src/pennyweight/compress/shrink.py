"""plan and shrink: name a size, get the best network of that size.

plan   = pw.plan(model, size="7MB", data=batches)      # a dry run
small  = pw.shrink(model, size="7MB", data=batches)    # or bits=2.0, ratio=12, plan=plan
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import registry
from ..bundle import halve, predict_bytes, round_to_stored
from ..errors import BudgetError, DataError, UnknownNameError, WeightError, warn
from ..layers.packed import install, packed_blobs, set_memory
from ..layers.sites import WeightSite, weight_sites
from .allocate import allocate
from .budget import Budget, parse_latency
from .contract import Candidate, compressor, sample_rows
from .data import Call, Output, calls, output_tensor
from .folding import fold_batch_norm
from .latency import Promise, Times, keep_promise, measure
from .norms import correct_bias
from .observe import Loss, Observation, observe, weight_only_view
from .plan import LayerInfo, Plan
from .realise import quantise_inputs, realise
from .recover import recover as distil
from .settle import knobs_of, settle

#: What competes by default, and what a preset allows.
PRESETS: dict[str, tuple[str, ...]] = {
    "balanced": ("dense", "entropy-gptq", "svd"),
    "smallest": ("dense", "entropy-gptq", "gptq", "rtn", "binary", "codebook", "svd", "rd-prune", "adaquant"),
    "no-data": ("dense", "entropy-gptq", "rtn", "binary", "codebook", "rd-prune"),
}

#: Layers larger than this are priced on a sample of their rows.
SAMPLE_VALUES = 1 << 17

Progress = Callable[[str, int, int], None]


def _silent(what: str, done: int, total: int) -> None:
    pass


@dataclasses.dataclass
class Record:
    """What is known of a shrunk model: kept on it for report and save.

    plan: as carried out, with real bytes. size: bytes of the files. recovered: loss before and after recovery, if any.
    promise: the latency asked for and the one measured, if any.
    """

    plan: Plan
    size: int
    recovered: tuple[float, float] | None = None
    promise: Promise | None = None


@dataclasses.dataclass
class _Job:
    """A model made ready.

    reference: the network to measure and to compare with; the user's own unless batch norms had to be folded. sites: of
    the reference. batches: the data as calls. parameters, original_bytes: the original's size.
    """

    reference: nn.Module
    sites: list[WeightSite]
    batches: list[Call]
    parameters: int
    original_bytes: int

    def overhead(self, blob_bytes: Mapping[str, int]) -> int:
        """Bytes of the files that are not blobs; the header's digits depend on how large those are."""
        return predict_bytes(self.reference, blob_bytes) - sum(blob_bytes.values())


def plan(
    model: nn.Module,
    *,
    size: int | str | None = None,
    bits: float | None = None,
    ratio: float | None = None,
    latency: float | str | None = None,
    latency_batch: int | None = None,
    data: Any = None,
    methods: Sequence[str] | None = None,
    preset: str = "balanced",
    distortion: str = "output",
    loss: Loss | None = None,
    output: Output = output_tensor,
    solver: str = "hull",
    seed: int = 0,
    progress: Progress = _silent,
) -> Plan:
    """A dry run: what each layer would become, the size, the expected distortion, the whole frontier.

    One of size ("7MB", bytes), bits (average per parameter, everything counted) and ratio names the budget of the
    written files (model.safetensors and config.json). latency ("3ms", seconds), alone or with one of them: the time one
    forward of the packed model may take here, running with memory="low" on the first batch of the data, or on
    latency_batch samples of it; layers are timed in all formats for that, unless they were before. data: calibration
    batches (see `calls`), None for data-free.
    methods: names that may compete (see `pennyweight methods`); preset: a list of them, of which those that keep zeros
    compete for a pruned layer (a quarter of exact zeros or more). distortion: "output", "loss" or
    "layer" (see `observe`). output: function(result, call) -> tensor, what of the model's output matters.
    The model is not changed. Raises BudgetError, DataError, WeightError, UnknownNameError.
    """
    job = _prepare(model, data)
    budget = _budget(job, size, bits, ratio, latency)
    times = None if latency is None else measure(job.reference, job.batches, latency, latency_batch, progress)
    observation = _observe(job, distortion, loss, output, seed, progress)
    offers = _offers(job, observation, methods, preset, progress)
    return _allocate(job, observation, offers, budget, solver, seed, times)


def shrink(
    model: nn.Module,
    *,
    size: int | str | None = None,
    bits: float | None = None,
    ratio: float | None = None,
    latency: float | str | None = None,
    latency_batch: int | None = None,
    plan: Plan | None = None,
    data: Any = None,
    methods: Sequence[str] | None = None,
    preset: str = "balanced",
    distortion: str = "output",
    loss: Loss | None = None,
    output: Output = output_tensor,
    solver: str = "hull",
    sequential: bool = True,
    activations: int | None = None,
    recover: int = 0,
    recover_data: Any = None,
    seed: int = 0,
    progress: Progress = _silent,
) -> nn.Module:
    """The best network of a size: a packed copy of the model whose saved files fit the budget and use 99 % of it.

    Arguments as for `plan`; or plan=, a (perhaps edited) plan to carry out. With a latency, bytes of the budget that
    time forbids to use are left, the model comes back with memory="low", and a warning tells if it turns out more than
    10 % slower than promised. sequential: recalibrate each layer on
    inputs from the layers already compressed. activations: bits of the inputs of Linear and convolution layers,
    quantised per tensor with ranges from the data (None: left alone). recover: optimizer steps of label-free
    distillation against the original, on recover_data (more batches like data; data itself if None).
    Raises BudgetError (with the smallest reachable size), DataError, WeightError, PlanError, UnknownNameError.
    """
    job = _prepare(model, data)
    times = None
    if latency is not None and plan is None:
        times = measure(job.reference, job.batches, latency, latency_batch, progress)
    observation = _observe(job, distortion, loss, output, seed, progress)
    if plan is None:
        budget = _budget(job, size, bits, ratio, latency)
        offers = _offers(job, observation, methods, preset, progress)
        plan = _allocate(job, observation, offers, budget, solver, seed, times)
        del offers
    else:
        plan = _adopt(plan, job, size, bits, ratio, latency)
    small = _twin(job)
    sites = weight_sites(small)
    knobs = knobs_of(plan, sites)
    done = realise(
        small,
        job.reference,
        job.batches,
        sites,
        plan,
        observation,
        sequential=sequential and distortion != "layer",
        in_place=not recover and activations is None,
        keep=[site.name for site in knobs],
        progress=progress,
    )
    if activations is not None:
        if not job.batches:
            raise DataError("activations= needs calibration data: the ranges of the inputs come from it")
        quantise_inputs(small, job.batches, sites, activations)
        correct_bias(small, job.reference, job.batches)
    at_sites = {id(site.parameter) for site in sites}
    halve(p for p in small.parameters() if id(p) not in at_sites)
    originals = dict(job.reference.named_parameters())
    size_now = settle(small, originals, sites, plan, done, knobs, trained=False)
    recovered = None
    if recover:
        for site in knobs:
            site.parameter.data = site.to_parameter(done.packed[site.name].decode())
        recovered = distil(
            small,
            job.reference,
            job.batches if recover_data is None else calls(small, recover_data),
            sites,
            done,
            plan.budget,
            output=output,
            steps=recover,
            observation=observation if recover_data is None else None,
            seed=seed,
            progress=progress,
        )
        size_now = settle(small, originals, sites, plan, done, knobs, trained=recovered[1] < recovered[0])
    small = install(small, done.packed)
    promise = None
    if plan.latency is not None and job.batches:
        promise = keep_promise(small, job.batches, plan.latency, latency_batch or plan.latency_batch)
    set_memory(small, "fast" if plan.latency is None else "low")
    round_to_stored(small)
    final = dataclasses.replace(plan, choices={site.name: done.choices[site.name] for site in sites})
    small._pennyweight = Record(final, size_now, recovered, promise)  # type: ignore[assignment]
    return small


def _prepare(model: nn.Module, data: Any) -> _Job:
    if packed_blobs(model):
        raise WeightError("the model is packed already; shrink the original (unpacked) model instead")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightError(f"{name} holds NaN or infinite values; mend the checkpoint first")
    parameters = sum(p.numel() for p in model.parameters())
    original = sum(
        t.numel() * t.element_size() for t in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    )
    batches = calls(model, data) if data is not None else []
    reference = model
    if batches and any(isinstance(m, _BatchNorm) for m in model.modules()):
        reference = copy.deepcopy(model).eval()
        fold_batch_norm(reference, batches[0])
    sites = weight_sites(reference)
    if not sites:
        raise WeightError(
            f"{type(model).__name__} has no weight that can be packed (Linear, Embedding, convolution, recurrent)"
        )
    return _Job(reference, sites, batches, parameters, original)


def _twin(job: _Job) -> nn.Module:
    """A copy of the reference that borrows the weights at its sites, until `realise` puts others in their place."""
    borrowed = {id(s.parameter): nn.Parameter(s.parameter.detach(), s.parameter.requires_grad) for s in job.sites}
    return copy.deepcopy(job.reference, borrowed).eval()


def _observe(
    job: _Job, distortion: str, loss: Loss | None, output: Output, seed: int, progress: Progress
) -> Observation:
    if not job.batches:
        views = {site.name: weight_only_view(site) for site in job.sites}
        return Observation(views, set(views))
    seen = observe(
        job.reference,
        job.batches,
        job.sites,
        distortion=distortion,
        loss=loss,
        output=output,
        seed=seed,
        progress=lambda i, n: progress("observe", i, n),
    )
    for site in job.sites:
        if site.name not in seen.reached:
            warn(f"{site.name} is never reached by the calibration data and stays in half precision")
        elif not bool((seen.views[site.name].row_weight > 0).any()):
            warn(f"{site.name} has no influence on the model's output and is stored as small as possible")
    return seen


def _methods(methods: Sequence[str] | None, preset: str, job: _Job) -> list[str]:
    if methods is None:
        if preset not in PRESETS:
            raise UnknownNameError("preset", preset, PRESETS)
        methods = PRESETS[preset if job.batches else "no-data"]
    for name in methods:
        registry.get(name, "compress")
    return list(dict.fromkeys([*methods, "dense"]))


def _offers(
    job: _Job, observation: Observation, methods: Sequence[str] | None, preset: str, progress: Progress
) -> dict[str, list[Candidate]]:
    allowed = _methods(methods, preset, job)
    keeping = [name for name in allowed if compressor(name).keeps_zeros or methods is not None]
    offers: dict[str, list[Candidate]] = {}
    for i, site in enumerate(job.sites):
        view = observation.views[site.name]
        part, factor = sample_rows(view, SAMPLE_VALUES)
        wanted = allowed if view.kept is None else keeping
        wanted = wanted if site.name in observation.reached else ["dense"]
        found = [c for name in wanted for c in compressor(name).candidates(part)]
        if factor != 1.0:
            found = [c.for_more_rows(factor) for c in found]
        offers[site.name] = [c for c in found if math.isfinite(c.distortion)]
        progress("offers", i + 1, len(job.sites))
    return offers


def _budget(
    job: _Job, size: int | str | None, bits: float | None, ratio: float | None, latency: float | str | None
) -> int | None:
    """Bytes; None where only time is limited."""
    if latency is not None and size is None and bits is None and ratio is None:
        return None
    return Budget.parse(size, bits, ratio, n_parameters=job.parameters, original_bytes=job.original_bytes)


def _allocate(
    job: _Job,
    observation: Observation,
    offers: Mapping[str, list[Candidate]],
    budget: int | None,
    solver: str,
    seed: int,
    times: Times | None,
) -> Plan:
    rows = {site.name: site.view.matrix_shape[0] for site in job.sites}
    smallest = job.overhead({name: min(c.nbytes for c in found) for name, found in offers.items()})
    # A BudgetError of the first names what is truly the least.
    plan = allocate(offers, budget, smallest, solver, rows=rows, times=times)
    overhead = job.overhead({name: choice.nbytes or 0 for name, choice in plan.choices.items()})
    kept = {name: [c for c in found if c.method == "dense"] for name, found in offers.items()}
    dense = {name: found[0].nbytes for name, found in kept.items() if found}
    in_time = times is None or sum(float(taken.min()) for taken in times.of(kept)) <= times.limit
    if budget is not None and in_time and len(dense) == len(kept):
        offers = kept if job.overhead(dense) + sum(dense.values()) <= budget else offers  # nothing has to be lost
    with contextlib.suppress(BudgetError):  # so near the least that the larger header does not fit
        plan = allocate(offers, budget, overhead, solver, rows=rows, times=times)
    plan.original_bytes, plan.seed = job.original_bytes, seed
    plan.layers = {
        site.name: LayerInfo(
            tuple(site.parameter.shape),
            site.kind,
            site.parameter.numel() * site.parameter.element_size(),
            float(observation.views[site.name].row_weight.sum()),
        )
        for site in job.sites
    }
    return plan


def _adopt(
    plan: Plan,
    job: _Job,
    size: int | str | None,
    bits: float | None,
    ratio: float | None,
    latency: float | str | None,
) -> Plan:
    """A plan given by the user, checked against the model; a budget or latency given beside it replaces the plan's."""
    options = {
        entry.name: [
            name for name in inspect.signature(entry.target.compress).parameters if name not in ("self", "layer")
        ]
        for entry in registry.methods("compress")
    }
    plan.validate([site.name for site in job.sites], options)
    if any(value is not None for value in (size, bits, ratio)):
        plan = dataclasses.replace(plan, budget=_budget(job, size, bits, ratio, None))
    if latency is not None:
        plan = dataclasses.replace(plan, latency=parse_latency(latency))
    return plan
