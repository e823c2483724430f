// Compiled once for each instruction set, with its flags and PENNYWEIGHT_NAME; only `kernels_<name>` leaves this file.
#include "binary_kernels.h"
#include "integer_kernels.h"
#include "isa.h"
#include "optimizer_kernels.h"
#include "sparse_kernels.h"

#define PENNYWEIGHT_JOIN(a, b) a##b
#define PENNYWEIGHT_TABLE(name) PENNYWEIGHT_JOIN(kernels_, name)

namespace pennyweight {
extern const Kernels PENNYWEIGHT_TABLE(PENNYWEIGHT_NAME);
const Kernels PENNYWEIGHT_TABLE(PENNYWEIGHT_NAME) = {integer_kernels, binary_kernels, sparse_kernels, optimizer_kernels};
}  // namespace pennyweight
