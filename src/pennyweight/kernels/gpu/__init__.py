"""Products with packed weights on the GPU, in Triton. Importing this does not import Triton; the first product does.

`GpuIntegers` holds a weight of 1 to 8 bits and multiplies by it; `pack_signs` and `xnor_product` are the product of two
matrices of signs. Each has a reference in plain torch that needs neither Triton nor a GPU.
"""

from __future__ import annotations

from .signs import pack_signs, pack_signs_reference, xnor_product, xnor_product_reference
from .weights import GpuIntegers

__all__ = ["GpuIntegers", "pack_signs", "pack_signs_reference", "xnor_product", "xnor_product_reference"]
