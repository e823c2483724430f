"""The peers, one function each: from a trained model to what it would store.

A quantiser gets the model, the bits wanted for each weight (a linear, convolution or embedding weight as a matrix
[out, in * kernel]) and calibration batches, and answers with a `Stored` for each weight: the tensors that must lie on
disk and the float32 matrix decoded from exactly those tensors. So every peer is measured in the same dense forward
pass, on the values its own runtime would multiply with. Metadata is fp16 before it is decoded, as each peer writes it.

The peers pack like this, always the tightest each offers:
    rtn         b-bit codes, fp16 scale and minimum per group; at 1 bit signs and one fp16 scale (mean magnitude)
    hqq         its own BitPack (3-bit codes ten to an int32), fp16 scale and zero; group 64, its default axis
    quanto      its own PackedTensor, fp16 scale and shift; its default group 128 at 2 and 4 bits, rows at 8
    torchao     b-bit codes and zero points, fp16 scale: what its ARM packing stores (on x86 it keeps a byte per code)
    auto-round  b-bit codes and zero points, fp16 scale, as in its own checkpoint format
    gptq        the same; the algorithm is written out here (arXiv 2210.17323), group 64, asymmetric, 1 % damping

Only hqq, quanto and torchao (fed the table as if it were a linear layer) quantise embedding tables in their own way.
auto-round and GPTQ have no gradient or Hessian for a table, so tables take their round-to-nearest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 64

Bits = Mapping[str, int]
Batches = Sequence[dict[str, Tensor]]


@dataclass
class Stored:
    """tensors: what is written to disk. matrix: float32 [rows, cols], decoded from them."""

    tensors: list[Tensor]
    matrix: Tensor


class PeerUnavailable(Exception):
    """The peer is not installed, or refuses this model; the message goes into the table."""


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes 0..2^bits-1 of any shape -> uint8, `bits` bits each without gaps, least significant first."""
    flat = codes.reshape(-1, 1).to(torch.uint8).numpy()
    return torch.from_numpy(np.packbits(np.unpackbits(flat, axis=1, count=bits, bitorder="little"), bitorder="little"))


def matrix_of(model: nn.Module, name: str) -> Tensor:
    """The named weight as float32 [out, in * kernel]."""
    return model.get_parameter(name).detach().float().flatten(1)


def each_matrix(quantise: Callable[[Tensor, int], Stored]) -> Callable[[nn.Module, Bits, Batches], dict[str, Stored]]:
    """A data-free quantiser of one matrix -> a quantiser of a model."""

    def quantise_model(model: nn.Module, bits: Bits, batches: Batches) -> dict[str, Stored]:
        return {name: quantise(matrix_of(model, name), b) for name, b in bits.items()}

    return quantise_model


def grouped(matrix: Tensor) -> Tensor:
    """[rows, cols] -> [rows * groups, GROUP] views of the groups; short rows are padded with their last column."""
    short = -matrix.shape[1] % GROUP
    if short:
        matrix = torch.cat([matrix, matrix[:, -1:].expand(-1, short)], 1)
    return matrix.reshape(-1, GROUP)


def ungrouped(groups: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `grouped`."""
    return groups.reshape(shape[0], -1)[:, : shape[1]]


def half(x: Tensor) -> Tensor:
    """Rounded to what fp16 can hold."""
    return x.half().float()


# ---------------------------------------------------------------------------------------------- round to nearest


def rtn(matrix: Tensor, bits: int) -> Stored:
    """Min-max round-to-nearest with fp16 scale and minimum; at 1 bit, signs times the group's mean magnitude."""
    groups = grouped(matrix)
    if bits == 1:
        positive, scale = groups >= 0, half(groups.abs().mean(1, keepdim=True))
        decoded = torch.where(positive, scale, -scale)
        codes, metadata = positive, [scale.half()]
    else:
        minimum = half(groups.amin(1, keepdim=True))
        scale = half((groups.amax(1, keepdim=True) - minimum) / (2**bits - 1)).clamp_min(2**-24)
        codes = ((groups - minimum) / scale).round().clamp(0, 2**bits - 1)
        decoded, metadata = codes * scale + minimum, [scale.half(), minimum.half()]
    return Stored([pack_bits(ungrouped(codes, matrix.shape), bits), *metadata], ungrouped(decoded, matrix.shape))


def scale_and_zero(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Asymmetric min-max grid with an integer zero point, each [n, 1]; the scale is fp16-exact."""
    low, high = groups.amin(1, keepdim=True).clamp_max(0), groups.amax(1, keepdim=True).clamp_min(0)
    scale = half((high - low) / (2**bits - 1)).clamp_min(2**-24)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def rtn_integer_zero(matrix: Tensor, bits: int) -> Stored:
    """Round-to-nearest on the grid of `scale_and_zero`."""
    groups = grouped(matrix)
    scale, zero = scale_and_zero(groups, bits)
    codes = ((groups / scale).round() + zero).clamp(0, 2**bits - 1)
    packed = [pack_bits(ungrouped(codes, matrix.shape), bits), scale.half(), pack_bits(zero, bits)]
    return Stored(packed, ungrouped((codes - zero) * scale, matrix.shape))


# ------------------------------------------------------------------------------------------------- hqq, quanto, torchao


def hqq(matrix: Tensor, bits: int, axis: int = 1) -> Stored:
    """Half-quadratic quantisation: zero points fitted by a proximal solver, no data.

    axis: 1 groups neighbours in a row (hqq's default, which its kernels want), 0 groups weights from 64 places of the
    matrix (which its authors recommend for quality).
    """
    Quantizer, BaseQuantizeConfig = _import("hqq.core.quantize", "Quantizer", "BaseQuantizeConfig")
    options = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=axis)["weight_quant_params"]
    groups = matrix.reshape(-1, GROUP) if axis == 1 else matrix.reshape(GROUP, -1)
    short = -len(groups) % (8 // bits)  # its BitPack drops last rows that fill no byte, so give it more of them
    codes, meta = Quantizer.quantize(
        torch.cat([groups, groups[-1:].expand(short, -1)]), device="cpu", compute_dtype=torch.float32, **options
    )
    meta |= {"compute_dtype": torch.float32, "scale": half(meta["scale"]), "zero": half(meta["zero"])}
    return Stored(
        [codes, meta["scale"].half(), meta["zero"].half()],
        Quantizer.dequantize(codes, meta)[: len(groups)].view_as(matrix),
    )


def hqq_axis0(matrix: Tensor, bits: int) -> Stored:
    """hqq with its other grouping."""
    return hqq(matrix, bits, axis=0)


def quanto(matrix: Tensor, bits: int) -> Stored:
    """optimum-quanto's qint2, qint4 and qint8 with its default range optimizers."""
    names = ("quantize_weight", "AbsmaxOptimizer", "MaxOptimizer", "qtypes")
    quantize_weight, AbsmaxOptimizer, MaxOptimizer, qtypes = _import("optimum.quanto", *names)
    qtype = qtypes[f"qint{bits}"]
    if bits == 8:
        scale = half(AbsmaxOptimizer()(matrix, qtype=qtype, axis=0))
        q = quantize_weight(matrix, qtype, 0, scale, optimized=False)
        return Stored([q._data, scale.half()], q.dequantize())
    group = 128 if matrix.shape[1] % 128 == 0 else None
    scale, shift = map(half, MaxOptimizer()(matrix, qtype=qtype, axis=0, group_size=group))
    q = quantize_weight(matrix, qtype, 0, scale, shift, group, optimized=False)
    return Stored([q._data._data, scale.half(), shift.half()], q.dequantize())


def torchao(matrix: Tensor, bits: int, algorithm: str = "AFFINE") -> Stored:
    """Weight-only intx (int8 by rows at 8 bits). algorithm: AFFINE (min-max, asymmetric) or HQQ_SCALE_ONLY."""
    quantize_, IntxWeightOnlyConfig, Int8WeightOnlyConfig, PerGroup, MappingType = _import(
        "torchao.quantization", "quantize_", "IntxWeightOnlyConfig", "Int8WeightOnlyConfig", "PerGroup", "MappingType"
    )
    (algorithms,) = _import("torchao.quantization.quant_api", "IntxChooseQParamsAlgorithm")
    holder = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    holder.weight = nn.Parameter(matrix.clone(), requires_grad=False)
    if bits == 8:
        quantize_(holder, Int8WeightOnlyConfig())
        quantised: Any = holder.weight
        codes, scale = quantised.qdata, half(quantised.scale)
        return Stored([codes, scale.half()], codes * scale)
    symmetric = algorithm == "HQQ_SCALE_ONLY"
    config = IntxWeightOnlyConfig(
        getattr(torch, f"int{bits}"),
        PerGroup(GROUP),
        MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        intx_choose_qparams_algorithm=algorithms[algorithm],
    )
    quantize_(holder, config)
    quantised: Any = holder.weight
    codes, scale, zero = quantised.qdata, half(quantised.scale), quantised.zero_point
    expand = {"repeats": GROUP, "dim": 1}
    decoded = (codes - zero.repeat_interleave(**expand)) * scale.repeat_interleave(**expand)
    lowest = -(2 ** (bits - 1))
    zeros = [] if symmetric else [pack_bits(zero - lowest, bits)]
    return Stored([pack_bits(codes - lowest, bits), scale.half(), *zeros], decoded)


def torchao_hqq(matrix: Tensor, bits: int) -> Stored:
    """torchao's intx with scales fitted by its port of hqq, symmetric."""
    return torchao(matrix, bits, "AFFINE" if bits == 8 else "HQQ_SCALE_ONLY")


def _import(module: str, *names: str) -> list[Any]:
    import importlib

    try:
        found = importlib.import_module(module)
        return [getattr(found, name) for name in names]
    except ImportError as error:
        raise PeerUnavailable(f"not installed ({error}); see benchmarks/requirements-peers.txt") from error


# --------------------------------------------------------------------------------------------------------- auto-round


def auto_round(model: nn.Module, bits: Bits, batches: Batches) -> dict[str, Stored]:
    """AutoRound's default recipe (200 sign-gradient steps a block; group 64, asymmetric) on the linear layers.

    It drops padding masks of the user's batches, so the same sentences are given as full windows of 64 tokens.
    """
    (AutoRound,) = _import("auto_round", "AutoRound")
    from sts import tokenizer

    linear = [name for name in bits if isinstance(_owner(model, name), nn.Linear)]
    (wanted,) = {bits[name] for name in linear}
    tokens = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    windows = list(tokens[: len(tokens) // 64 * 64].reshape(-1, 1, 64))
    logging.getLogger("autoround").setLevel(logging.ERROR)
    with torch.enable_grad():
        AutoRound(
            model.get_submodule("bert"), tokenizer=tokenizer(), bits=wanted, group_size=GROUP, sym=False,
            dataset=windows, nsamples=min(128, len(windows)), seqlen=64, batch_size=8, device_map="cpu", amp=False,
            enable_torch_compile=False,
        ).quantize()  # fmt: skip
    stored = {name: rtn_integer_zero(matrix_of(model, name), b) for name, b in bits.items() if name not in linear}
    for name in linear:
        layer = _owner(model, name)
        weight = matrix_of(model, name)
        scale, zero = (getattr(layer, field).float().reshape(-1, 1) for field in ("scale", "zp"))
        codes = ((grouped(weight) / scale).round() + zero).clamp(0, 2**wanted - 1)
        decoded = ungrouped((codes - zero) * half(scale), weight.shape)
        if not torch.allclose(decoded, weight, atol=2e-3 * float(weight.abs().max())):
            raise PeerUnavailable(f"codes of {name} could not be recovered from the quantised layer")
        stored[name] = Stored([pack_bits(codes, wanted), scale.half(), pack_bits(zero, wanted)], decoded)
    return stored


# --------------------------------------------------------------------------------------------------------------- GPTQ


@torch.no_grad()
def gptq(model: nn.Module, bits: Bits, batches: Batches) -> dict[str, Stored]:
    """GPTQ as in the paper: layers in the order they run, each on inputs that the quantised ones before it produce.
    Tables come first and are rounded to nearest, so that the layers make up for their errors too."""
    stored: dict[str, Stored] = {}

    def store(name: str, new: Stored) -> None:
        stored[name] = new
        model.get_parameter(name).copy_(new.matrix.view_as(model.get_parameter(name)))

    tables = [name for name in bits if isinstance(_owner(model, name), nn.Embedding)]
    for name in tables:
        store(name, rtn_integer_zero(matrix_of(model, name), bits[name]))
    for names in _in_order(model, [name for name in bits if name not in tables], batches[0]):
        hessian = _second_moment(model, _owner(model, names[0]), batches)
        for name in names:
            store(name, gptq_matrix(matrix_of(model, name), hessian, bits[name]))
    return stored


def gptq_matrix(matrix: Tensor, hessian: Tensor, bits: int, damping: float = 0.01) -> Stored:
    """One matrix [rows, cols] with the second moment of its inputs [cols, cols]: column by column, the error of each
    is spread over the columns still to come, by the Cholesky factor of the inverse Hessian."""
    weight, hessian = matrix.clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    codes, decoded, scales, zeros = torch.empty_like(weight), torch.empty_like(weight), [], []
    for start in range(0, weight.shape[1], GROUP):
        stop = min(start + GROUP, weight.shape[1])
        scale, zero = scale_and_zero(weight[:, start:stop], bits)
        errors = torch.empty(len(weight), stop - start)
        for column in range(start, stop):
            w = weight[:, column : column + 1]
            code = ((w / scale).round() + zero).clamp(0, 2**bits - 1)
            codes[:, column : column + 1], decoded[:, column : column + 1] = code, (code - zero) * scale
            error = (weight[:, column] - decoded[:, column]) / factor[column, column]
            weight[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
        scales.append(scale)
        zeros.append(zero)
    packed = [pack_bits(codes, bits), torch.cat(scales, 1).half(), pack_bits(torch.cat(zeros, 1), bits)]
    return Stored(packed, decoded)


class _Reached(Exception):
    """Ends a forward pass once the layer of interest has seen its input."""


def _owner(model: nn.Module, name: str) -> Any:
    """The module that holds the named weight."""
    return model.get_submodule(name.rpartition(".")[0])


def _in_order(model: nn.Module, names: list[str], batch: dict[str, Tensor]) -> list[list[str]]:
    """The weights' names in the order in which their layers run; those that read the same tensor stand together."""
    order: list[list[str]] = []
    inputs: list[Tensor] = []

    def visit(name: str, x: Tensor) -> None:
        if inputs and inputs[-1] is x:
            order[-1].append(name)
        else:
            order.append([name])
            inputs.append(x)

    hooks = [_owner(model, n).register_forward_pre_hook(lambda _, args, n=n: visit(n, args[0])) for n in names]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return order


def _second_moment(model: nn.Module, layer: Any, batches: Batches) -> Tensor:
    """float64 [cols, cols]: sum of x x^T over the layer's inputs (patches for a convolution) but for padded tokens."""
    total: Tensor | None = None
    keep: Tensor | None = None

    def capture(module: Any, inputs: tuple[Tensor, ...]) -> None:
        nonlocal total
        x = inputs[0]
        if isinstance(module, nn.Conv2d):
            shape: Any = (module.kernel_size, module.dilation, module.padding, module.stride)
            x = F.unfold(x, *shape).transpose(1, 2)
        x = x[keep] if keep is not None else x.reshape(-1, x.shape[-1])
        total = (x.T @ x).double() + (0 if total is None else total)
        raise _Reached

    hook = layer.register_forward_pre_hook(capture)
    for batch in batches:
        keep = batch["attention_mask"].bool() if "attention_mask" in batch else None
        try:
            model(**batch)
        except _Reached:
            continue
    hook.remove()
    assert total is not None
    return total


QUANTISERS: dict[str, Callable[[nn.Module, Bits, Batches], dict[str, Stored]]] = {
    "rtn": each_matrix(rtn),
    "hqq": each_matrix(hqq),
    "hqq-axis0": each_matrix(hqq_axis0),
    "quanto": each_matrix(quanto),
    "torchao": each_matrix(torchao),
    "torchao-hqq": each_matrix(torchao_hqq),
    "auto-round": auto_round,
    "gptq": gptq,
}
