"""How fast packed weights multiply on this processor, beside PyTorch's and ONNX Runtime's products of the same shape.

    python benchmarks/kernels.py                                     # about 2 minutes on 2 cores
    python benchmarks/kernels.py --side 1024 --rounds 3 --skip-minilm   # a look

1. Products of a square weight with one row of inputs (decode) and with many (batch). All contenders take turns, round
   by round; cells are medians over rounds. Decode is measured with what the caches hold after a run of the same product
   (warm: a small model stays there) and with caches emptied (cold: a large one does not). `bandwidth` is the
   bytes of the weight over the time, as a share of what reading a large tensor reaches here; `operations` the
   multiplications over the time, as a share of what PyTorch's float32 product of large matrices reaches.
2. The sentence encoder that `pennyweight demo` makes, with memory="low": milliseconds a sentence and resident memory
   beside the float32 original's, each in a process of its own.
The goals are those of the project's plan, which were set on a processor with AVX-512. The exit code is 1 if one is
missed. ONNX Runtime (`pip install onnxruntime onnx`) and llama.cpp (`sh benchmarks/build_ggml.sh`) are left out, with a
word, where they are not there.
"""

from __future__ import annotations

import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import common
import data
import ggml
import pennyweight as pw
import sts
from common import Result, Row, Table, verdict
from pennyweight.formats.base import PackedWeight
from pennyweight.formats.binary import Binary
from pennyweight.formats.integer import Integer
from pennyweight.kernels import _cpu
from pennyweight.kernels.integer import ActivationBits
from pennyweight.memory import return_freed_memory
from pennyweight.progress import progress_bars

Product = Callable[[], Any]

PEERS = ("torch float32", "torch bfloat16", "ONNX Runtime 4-bit", "ONNX Runtime 2-bit")
#: contender -> [(at least so many times as fast, as whom)], one row of inputs.
DECODE_GOALS = {
    "binary, group 64": [(10.0, "torch bfloat16"), (3.0, "ONNX Runtime 4-bit")],
    "ternary, row scale": [(8.0, "torch bfloat16"), (3.0, "ONNX Runtime 2-bit")],
    "int2, group 64": [(8.0, "torch bfloat16"), (3.0, "ONNX Runtime 2-bit")],
    "int4, group 64": [(1.0, "ONNX Runtime 4-bit")],
}
#: The same, many rows.
BATCH_GOALS = {f"int{bits}, group 64": [(1 / 1.2, "torch bfloat16")] for bits in (2, 3, 4)}
#: (weight, type of llama.cpp that holds a weight in about as many bits).
LLAMA_CPP_PAIRS = [
    ("binary, group 64", "Q1_0"), ("ternary, row scale", "TQ1_0"), ("ternary, row scale", "TQ2_0"),
    ("int2, group 64", "Q2_K"), ("int4, group 64", "Q4_0"), ("int4, group 64", "Q4_K"), ("int8, group 64", "Q8_0"),
]  # fmt: skip
#: The packed encoder's milliseconds and bytes, as shares of the original's.
ENCODER_GOALS = {"batch 1": 1.0, "batch 32": 1.0, "resident": 0.4}


def weights(side: int) -> dict[str, PackedWeight]:
    """The packed weights [side, side] that are timed."""
    weight = torch.randn(side, side)
    ternary = torch.randint(-1, 2, (side, side))
    made: dict[str, PackedWeight] = {
        "binary, group 64": Binary.encode(weight, 64),
        "ternary, row scale": Integer.from_codes(ternary, torch.rand(side, 1), bits=2, group=0),
    }
    for bits in (2, 3, 4, 8):
        made[f"int{bits}, group 64"] = Integer.encode(weight, bits, 64, symmetric=True)
    return made


def products(side: int, n: int, llama_cpp: ggml.Library | None) -> tuple[dict[str, Product], dict[str, int]]:
    """(contender -> its product, contender -> bytes of its weight) for n rows of inputs."""
    x, weight = torch.randn(n, side), torch.randn(side, side)
    half, half_weight = x.bfloat16(), weight.bfloat16()
    made: dict[str, Product] = {
        "torch float32": lambda: F.linear(x, weight),
        "torch bfloat16": lambda: F.linear(half, half_weight),
    }
    nbytes = {"torch float32": weight.nbytes, "torch bfloat16": half_weight.nbytes}
    for bits in (4, 2):
        run, size = onnx_product(x.numpy(), side, bits)
        if run is not None:
            made[f"ONNX Runtime {bits}-bit"], nbytes[f"ONNX Runtime {bits}-bit"] = run, size
    if llama_cpp is not None:
        for kind in ggml.TYPES:
            codes = llama_cpp_weight(llama_cpp, kind, side)
            made[f"llama.cpp {kind}"] = ggml.Product(llama_cpp, kind, codes, x.numpy())
            nbytes[f"llama.cpp {kind}"] = codes.nbytes
    for name, packed in weights(side).items():
        matrix: Any = packed.for_running()
        made[name] = lambda m=matrix.matrix: m.linear(x, None, 8)
        made[f"{name}, 16-bit inputs"] = lambda m=matrix.matrix: m.linear(x, None, 16)
        nbytes[name] = nbytes[f"{name}, 16-bit inputs"] = matrix.matrix.nbytes
    return made, nbytes


def llama_cpp_library(folder: Path, threads: int) -> ggml.Library | None:
    """llama.cpp's kernels; None if they are not in that folder."""
    try:
        return ggml.Library(folder, threads)
    except FileNotFoundError as error:
        print(f"llama.cpp is left out: {error}", file=sys.stderr)
        return None


@functools.cache
def llama_cpp_weight(library: ggml.Library, kind: str, side: int) -> np.ndarray:
    """A random weight [side, side] in that type, of ternary values for the ternary types."""
    ternary = kind.startswith("TQ")
    weight = torch.randint(-1, 2, (side, side)).float() if ternary else torch.randn(side, side)
    return library.quantise(kind, weight.numpy())


def onnx_product(x: np.ndarray, side: int, bits: int) -> tuple[Product | None, int]:
    """ONNX Runtime's MatMulNBits, inputs quantised to 8 bits (accuracy level 4), groups of 64; None if it is absent."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        print("ONNX Runtime is left out: pip install onnxruntime onnx", file=sys.stderr)
        return None, 0
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (side, side // 64, 8 * bits), dtype=np.uint8)
    scale = rng.random(side * side // 64, dtype=np.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scale"], ["y"], domain="com.microsoft",
        K=side, N=side, bits=bits, block_size=64, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, side])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scale, "scale")],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it keeps the others from their cores
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as error:  # a version without this bit width
        print(f"ONNX Runtime {bits}-bit is left out: {error}", file=sys.stderr)
        return None, 0
    return lambda: session.run(None, {"x": x}), codes.nbytes + scale.nbytes


def medians(made: dict[str, Product], rounds: int, cold: bool = False) -> dict[str, float]:
    """Median seconds of each, all taking turns. cold: with caches emptied before each run; else runs follow each other,
    four a turn, of which the first does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in made}
    sweep = torch.ones(1 << 24)  # 64 MB, more than the caches hold
    for _ in range(rounds):
        for name, run in made.items():
            for turn in range(2 if cold else 4):
                if cold:
                    sweep.add_(1.0)
                start = time.perf_counter()
                run()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def ceilings(rounds: int) -> tuple[float, float]:
    """(bytes a second when reading a large tensor, multiplications a second of a large float32 product) of PyTorch."""
    large, square = torch.ones(1 << 26), torch.randn(2048, 2048)
    taken = medians({"read": large.sum, "multiply": lambda: square @ square}, rounds)
    return large.nbytes / taken["read"], 2048**3 / taken["multiply"]


def table(
    caption: str,
    taken: dict[str, float],
    nbytes: dict[str, int],
    operations: int,
    limits: tuple[float, float],
    goals: dict[str, list[tuple[float, str]]],
) -> tuple[Table, list[bool]]:
    """Rows of one shape, and whether each goal is met."""
    rows: dict[str, list[Any]] = {}
    met: list[bool] = []
    for name, seconds in taken.items():
        wanted = [(factor, peer) for factor, peer in goals.get(name, []) if peer in taken]
        reached = [taken[peer] / seconds >= factor for factor, peer in wanted]
        met += reached
        rows[name] = [
            f"{1e3 * seconds:.3f}", f"{nbytes[name] / 1e6:.2f}",
            *(f"{taken[peer] / seconds:.2f}" if peer in taken else "" for peer in PEERS),
            f"{nbytes[name] / seconds / limits[0]:.0%}", f"{operations / seconds / limits[1]:.0%}",
            ", ".join(f"{factor:.3g}x {peer}" for factor, peer in wanted), verdict(all(reached) if wanted else None),
        ]  # fmt: skip
    columns = ["contender", "ms", "MB", *(f"times as fast as {peer}" for peer in PEERS)]
    columns += ["bandwidth", "operations", "goal", "met"]
    return Table(caption, columns, rows), met


def beside_llama_cpp(taken: dict[str, dict[str, float]], nbytes: dict[str, int], side: int) -> Table:
    """llama.cpp's time over ours in each shape, weights of about as many bits side by side."""
    rows = {
        f"{name}, beside {kind}": [
            f"{8 * nbytes[name] / side**2:.2f}", f"{8 * nbytes[f'llama.cpp {kind}'] / side**2:.2f}",
            *(f"{times[f'llama.cpp {kind}'] / times[name]:.2f}" for times in taken.values()),
        ]
        for name, kind in LLAMA_CPP_PAIRS
    }  # fmt: skip
    caption = "Times as fast as llama.cpp, which quantises inputs to 8 bits, a scale for each 32 or 256; here one a row"
    return Table(caption, ["weight", "bits a weight", "llama.cpp's", *taken], rows)


# ----------------------------------------------------------------------------------------------------- the encoder


def artifact() -> Path:
    """The encoder at 7 MB, made if an earlier run has not left it."""
    folder = common.OUT / "encoder-7mb"
    if not folder.exists():
        batches = sts.batches(data.calibration_sentences(256))
        with progress_bars() as progress:
            small = pw.shrink(sts.load_encoder(), size="7MB", data=batches, progress=progress)
        pw.save(small, folder)
    return folder


def encoder(folder: Path | None, activation_bits: ActivationBits, threads: int) -> Row:
    """Milliseconds a sentence and resident bytes of the original (folder None) or of the artifact there."""
    common.start(threads)
    return_freed_memory()
    sentences = data.fidelity_sentences(64)
    together = {batch: sts.batches(sentences, batch) for batch in (1, 32)}

    def load() -> torch.nn.Module:
        if folder is None:
            model = sts.load_encoder()
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()  # from the file's pages to memory of its own
            return model
        return pw.load(folder, sts.empty_encoder, memory="low", activation_bits=activation_bits)

    @torch.inference_mode()
    def run(model: torch.nn.Module, batch: int) -> None:
        for inputs in together[batch]:
            model(**inputs)

    run(load(), 1)  # loads what is loaded on first use
    gc.collect()
    before = common.memory_now()
    model = load()
    run(model, 1)
    gc.collect()
    row: Row = {"resident": common.memory_now() - before}
    for batch in (1, 32):
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            run(model, batch)
            taken.append(1e3 * (time.perf_counter() - start) / len(sentences))
        row[f"batch {batch}"] = statistics.median(taken)
    return row


def encoders(threads: int, kept: common.Kept) -> tuple[Table, list[bool]]:
    """The table of the encoder, and whether each goal is met. The contenders take turns."""
    small = artifact()
    contenders: dict[str, tuple[Path | None, ActivationBits]] = {
        "float32 original": (None, 32), "packed, 16-bit inputs": (small, 16), "packed, 8-bit inputs": (small, 8),
    }  # fmt: skip
    found: dict[str, list[Row]] = {name: [] for name in contenders}
    for turn in range(3):
        for name, (folder, bits) in contenders.items():
            measure = functools.partial(common.in_fresh_process, encoder, folder, bits, threads)
            found[name].append(kept.row(f"{name}, turn {turn}, {threads} threads", measure))
    middle = {n: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for n, rows in found.items()}
    original = middle["float32 original"]
    rows, met = {}, []
    for name, row in middle.items():
        cells: list[Any] = []
        for key, most in ENCODER_GOALS.items():
            if name == "packed, 16-bit inputs":
                met.append(row[key] <= most * original[key])
            shown = f"{row[key] / 1e6:.1f}" if key == "resident" else f"{row[key]:.2f}"
            cells += [shown, f"{row[key] / original[key]:.2f}"]
        rows[name] = cells
    columns = ["model", "ms a sentence, alone", "share", "ms a sentence, of 32", "share", "resident MB", "share"]
    goals = ", ".join(f"{key} {most:g}" for key, most in ENCODER_GOALS.items())
    return Table(f"all-MiniLM-L6-v2 at 7 MB; goals of the packed one, as shares at most: {goals}", columns, rows), met


def main() -> int:
    parser = common.flags(__doc__)
    parser.add_argument("--side", type=int, default=4096, metavar="N", help="rows and columns of the weights")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="rows of inputs in a batch")
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    parser.add_argument("--skip-minilm", action="store_true")
    parser.add_argument(
        "--ggml", type=Path, default=common.OUT / "llama.cpp" / "build" / "bin", metavar="FOLDER",
        help="llama.cpp's libraries (default: where benchmarks/build_ggml.sh leaves them)",
    )  # fmt: skip
    args = parser.parse_args()
    common.start(args.threads)
    kept = common.Kept("kernels", args.resume)
    llama_cpp = llama_cpp_library(args.ggml, args.threads)
    with torch.inference_mode():
        limits = ceilings(args.rounds)
        tables, met, values, nbytes = [], [], {}, {}
        for n, cold, goals in ((1, False, DECODE_GOALS), (1, True, {}), (args.batch, False, BATCH_GOALS)):
            made, nbytes = products(args.side, n, llama_cpp)
            taken = medians(made, args.rounds if n == 1 else max(3, args.rounds // 3), cold)
            shape = f"{n} x {args.side} x {args.side}, {'cold' if cold else 'warm'}"
            made_table, reached = table(shape, taken, nbytes, n * args.side**2, limits, goals)
            tables.append(made_table)
            met += reached
            values[shape] = taken
    if llama_cpp is not None:
        tables.append(beside_llama_cpp(dict(values), nbytes, args.side))
    if not args.skip_minilm:
        made_table, reached = encoders(args.threads, kept)
        tables.append(made_table)
        met += reached
        values["encoder"] = made_table.rows
    instruction_sets = _cpu.instruction_sets() if _cpu is not None else ["none: plain torch"]
    conclusions = [
        f"Goals met: {sum(met)} of {len(met)}.",
        f"Instruction sets that this processor has of those compiled: {', '.join(instruction_sets)}; the last is used.",
        f"Reading memory reaches {limits[0] / 1e9:.1f} GB/s, float32 products {limits[1] / 1e9:.0f} billion "
        "multiplications a second.",
    ]
    if llama_cpp is not None:
        conclusions.append(f"llama.cpp's kernels are those of ggml {llama_cpp.version}, built for this processor.")
    result = Result(
        "Products of packed weights",
        "packed weights of 1 to 4 bits multiply faster than float ones and hold far fewer bytes",
        f"random weights; {args.threads} threads; medians of interleaved rounds", tables, conclusions, values, all(met),
    )  # fmt: skip
    return common.finish("kernels", result, args)


if __name__ == "__main__":
    sys.exit(main())
