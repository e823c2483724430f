"""llama.cpp's products y = x W^T, timed alone: its library ggml, called through ctypes.

    library = Library(folder, threads=2)                 # what benchmarks/build_ggml.sh built
    codes = library.quantise("TQ2_0", weight)            # float32 [out, in] to bytes
    product = Product(library, "TQ2_0", codes, x)        # computes it once and checks that
    product()                                            # y = x W^T, what is timed
    product.y                                            # float32 [n, out]

A weight is held as llama.cpp holds it on this processor: in the first of ggml's buffer types that can multiply it. On
AVX2 that interleaves the rows of Q4_0 and Q4_K and leaves the ternary types as they are. Inputs are float32; a product
quantises them anew to 8 bits with a scale for every 32 or 256 (F16: rounds them), as llama.cpp does in a model.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

#: The numbers that GGUF files give these types.
TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 8, "Q2_K": 10, "Q4_K": 12, "TQ1_0": 34, "TQ2_0": 35, "Q1_0": 41}
FLOAT32 = 0
#: The most that 8-bit inputs may change a product of Gaussian inputs, as a share of its norm. The step is at most the
#: largest of 256 inputs / 127, some 0.024 standard deviations, whose rounding error is 0.024 / sqrt(12) = 0.7 %.
TOLERANCE = 0.01


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", c_char_p),
        ("block_size", c_int64),
        ("block_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
        ("from_float", c_void_p),
    )


#: library -> function -> (type of the result, types of the arguments), from ggml's public headers.
FUNCTIONS: dict[str, dict[str, tuple[Any, list[Any]]]] = {
    "ggml-base": {
        "ggml_version": (c_char_p, []),
        "ggml_get_type_traits": (ctypes.POINTER(_TypeTraits), [c_int]),
        "ggml_row_size": (c_size_t, [c_int, c_int64]),
        "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
        "ggml_init": (c_void_p, [_InitParams]),
        "ggml_free": (None, [c_void_p]),
        "ggml_tensor_overhead": (c_size_t, []),
        "ggml_graph_overhead": (c_size_t, []),
        "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
        "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
        "ggml_new_graph": (c_void_p, [c_void_p]),
        "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
        "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
        "ggml_backend_buffer_free": (None, [c_void_p]),
        "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
        "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
        "ggml_backend_supports_op": (c_bool, [c_void_p, c_void_p]),
        "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
        "ggml_backend_cpu_buffer_type": (c_void_p, []),
        "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
        "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    },
    "ggml-cpu": {
        "ggml_backend_cpu_init": (c_void_p, []),
        "ggml_backend_cpu_reg": (c_void_p, []),
        "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    },
}


class Library:
    """ggml and its CPU backend, for the life of the process. threads: of every product.

    FileNotFoundError: the libraries are not in the folder.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self.c: Any = SimpleNamespace()  # the functions
        for name, functions in FUNCTIONS.items():
            found = sorted(folder.glob(f"lib{name}.so*")) + sorted(folder.glob(f"lib{name}*.dylib"))
            if not found:
                raise FileNotFoundError(f"no lib{name} in {folder}: run benchmarks/build_ggml.sh")
            loaded = ctypes.CDLL(str(found[0].resolve()), mode=ctypes.RTLD_GLOBAL)  # ggml-cpu finds ggml-base loaded
            for function, (result, arguments) in functions.items():
                call = getattr(loaded, function)
                call.restype, call.argtypes = result, arguments
                setattr(self.c, function, call)
        self.backend: int = self.c.ggml_backend_cpu_init()
        self.c.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.version: str = self.c.ggml_version().decode()

    def buffer_types(self) -> Iterator[int]:
        """The places for a weight, in llama.cpp's order: those that rearrange it, then plain memory."""
        registry = self.c.ggml_backend_cpu_reg()
        address = self.c.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if address:
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)
            for buffer_type in extra(self.c.ggml_backend_reg_dev_get(registry, 0)):
                if not buffer_type:  # the list ends with NULL
                    break
                yield buffer_type
        yield self.c.ggml_backend_cpu_buffer_type()

    def quantise(self, kind: str, weight: np.ndarray) -> np.ndarray:
        """The bytes of a float32 [rows, columns] weight in a type: uint8 [rows, bytes of a row].

        ValueError: the library is another version's, or a row is no whole number of the type's blocks.
        """
        number = TYPES[kind]
        traits = self.c.ggml_get_type_traits(number).contents
        name = traits.type_name.decode()
        if name.lower() != kind.lower():
            raise ValueError(
                f"ggml {self.version} has {name} as type {number}, not {kind}: run benchmarks/build_ggml.sh"
            )
        rows, columns = weight.shape
        if columns % traits.block_size:
            raise ValueError(f"{kind} needs rows of a multiple of {traits.block_size} weights, not {columns}")
        out = np.empty((rows, self.c.ggml_row_size(number, columns)), np.uint8)
        weight = np.ascontiguousarray(weight, np.float32)
        self.c.ggml_quantize_chunk(number, weight.ctypes.data, out.ctypes.data, 0, rows, columns, None)
        return out

    def dequantise(self, kind: str, codes: np.ndarray, columns: int) -> np.ndarray:
        """What those bytes stand for: float32 [rows, columns]."""
        out = np.empty((len(codes), columns), np.float32)
        traits = self.c.ggml_get_type_traits(TYPES[kind]).contents
        traits.to_float(codes.ctypes.data, out.ctypes.data, out.size)
        return out


class Product:
    """y = x W^T of a weight [out, in], the bytes that `quantise` made of it, and float32 x [n, in]; calling computes y.

    RuntimeError: y is not x times the dequantised weight.
    """

    def __init__(self, library: Library, kind: str, codes: np.ndarray, x: np.ndarray) -> None:
        self._library, self._shape = library, (len(x), len(codes))
        for buffer_type in library.buffer_types():
            with ExitStack() as memory:
                w, inputs = self._place(memory, kind, buffer_type, x.shape[1])
                if library.c.ggml_backend_supports_op(library.backend, self._y):  # else the weight may not be set
                    weakref.finalize(self, memory.pop_all().close)
                    break
        else:
            raise RuntimeError(f"ggml {library.version} has no product with {kind} on this processor")
        x = np.ascontiguousarray(x, np.float32)
        library.c.ggml_backend_tensor_set(w, codes.ctypes.data, 0, codes.nbytes)  # rearranges it
        library.c.ggml_backend_tensor_set(inputs, x.ctypes.data, 0, x.nbytes)
        self._check(kind, codes, x)

    def _place(self, memory: ExitStack, kind: str, buffer_type: int, columns: int) -> tuple[int, int]:
        """The graph of the product and its empty tensors (weight, inputs), the weight in that buffer type."""
        c, (n, rows) = self._library.c, self._shape
        size = 4 * c.ggml_tensor_overhead() + c.ggml_graph_overhead()

        def context() -> int:
            made = c.ggml_init(_InitParams(size, None, True))
            memory.callback(c.ggml_free, made)
            return made

        def allocate(owner: int, buffer_type: int) -> None:
            buffer = c.ggml_backend_alloc_ctx_tensors_from_buft(owner, buffer_type)
            memory.callback(c.ggml_backend_buffer_free, buffer)

        held, fed = context(), context()
        w = c.ggml_new_tensor_2d(held, TYPES[kind], columns, rows)
        allocate(held, buffer_type)
        inputs = c.ggml_new_tensor_2d(fed, FLOAT32, columns, n)
        self._y = c.ggml_mul_mat(fed, w, inputs)
        self._graph = c.ggml_new_graph(fed)
        c.ggml_build_forward_expand(self._graph, self._y)
        allocate(fed, c.ggml_backend_cpu_buffer_type())
        return w, inputs

    def _check(self, kind: str, codes: np.ndarray, x: np.ndarray) -> None:
        self()
        wanted = x @ self._library.dequantise(kind, codes, x.shape[1]).T
        error = float(np.linalg.norm(self.y - wanted) / np.linalg.norm(wanted))
        if not error <= TOLERANCE:
            raise RuntimeError(f"ggml's product with {kind} is off by {error:.1%} of its norm")

    def __call__(self) -> None:
        status = self._library.c.ggml_backend_graph_compute(self._library.backend, self._graph)
        if status:
            raise RuntimeError(f"ggml stopped with status {status}")

    @property
    def y(self) -> np.ndarray:
        """What the last call computed, float32 [n, out]."""
        out = np.empty(self._shape, np.float32)
        self._library.c.ggml_backend_tensor_get(self._y, out.ctypes.data, 0, out.nbytes)
        return out
