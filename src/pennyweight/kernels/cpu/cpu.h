#pragma once
#include <string>
#include <vector>

namespace pennyweight {

// The instruction sets that kernels are compiled for. A better one comes later.
enum class Isa { plain, neon, avx2, avx512, avx512vnni, amx };

const char *name(Isa isa);

// Those compiled in that this processor has, worst first; `plain` is always there.
std::vector<Isa> available();

// What PENNYWEIGHT_ISA names, else the best there is. Throws std::runtime_error if it names what is not available.
Isa chosen();

// The available one of that name. Throws std::runtime_error if there is none.
Isa named(const std::string &wish);

}  // namespace pennyweight
