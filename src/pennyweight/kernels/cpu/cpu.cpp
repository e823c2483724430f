#include "cpu.h"

#include <cstdlib>
#include <stdexcept>

namespace pennyweight {

const char *name(Isa isa) {
    switch (isa) {
        case Isa::neon: return "neon";
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
        case Isa::avx512vnni: return "avx512vnni";
        default: return "plain";
    }
}

std::vector<Isa> available() {
    std::vector<Isa> found{Isa::plain};
#if defined(PENNYWEIGHT_HAS_NEON)
    found.push_back(Isa::neon);
#endif
#if defined(PENNYWEIGHT_HAS_X86)
#if defined(PENNYWEIGHT_EMULATED)  // by SIMDe, in a test build: every path runs on every processor
    found.insert(found.end(), {Isa::avx2, Isa::avx512, Isa::avx512vnni});
#else
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt")) {
        found.push_back(Isa::avx2);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
            found.push_back(Isa::avx512);
            if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vpopcntdq"))
                found.push_back(Isa::avx512vnni);
        }
    }
#endif
#endif
    return found;
}

Isa named(const std::string &wish) {
    std::string names;
    for (const Isa isa : available()) {
        if (wish == name(isa)) return isa;
        names += std::string(names.empty() ? "" : ", ") + name(isa);
    }
    throw std::runtime_error("instruction set " + wish + " (PENNYWEIGHT_ISA) is not available here; there is: " + names);
}

Isa chosen() {
    const char *wish = std::getenv("PENNYWEIGHT_ISA");
    return wish == nullptr || *wish == '\0' ? available().back() : named(wish);
}

}  // namespace pennyweight
