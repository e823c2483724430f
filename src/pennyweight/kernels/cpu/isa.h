#pragma once
#include "binary.h"
#include "cpu.h"
#include "integer.h"
#include "optimizer.h"
#include "sparse.h"

namespace pennyweight {

struct Kernels {
    IntegerKernels integer;
    BinaryKernels binary;
    SparseKernels sparse;
    OptimizerKernels optimizer;
};

// Those of the instruction set in use. Throws std::runtime_error if PENNYWEIGHT_ISA names what is not there.
const Kernels &kernels();

// From now on, those of this one, which must be among `available()`; for tests and measurements.
void use(Isa isa);

}  // namespace pennyweight
