#include "cpu.h"

#include <cstdlib>
#include <stdexcept>

#if defined(PENNYWEIGHT_HAS_X86) && defined(__linux__) && !defined(PENNYWEIGHT_EMULATED)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pennyweight {
namespace {

#if defined(PENNYWEIGHT_HAS_X86) && !defined(PENNYWEIGHT_EMULATED)
// Tiles of bytes: the processor has them, the system saves them, and it lets this process use them.
bool has_amx() {
#if defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned tile = 1u << 24, int8 = 1u << 25, saved_by_xsave = 1u << 27, state = 3u << 17;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & saved_by_xsave) == 0) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tile) == 0 || (d & int8) == 0) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & state) != state) return false;
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h, for all threads
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
    return false;
#endif
}
#endif

}  // namespace

const char *name(Isa isa) {
    switch (isa) {
        case Isa::neon: return "neon";
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
        case Isa::avx512vnni: return "avx512vnni";
        case Isa::amx: return "amx";
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
    found.insert(found.end(), {Isa::avx2, Isa::avx512, Isa::avx512vnni, Isa::amx});
#else
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt")) {
        found.push_back(Isa::avx2);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
            found.push_back(Isa::avx512);
            if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vpopcntdq")) {
                found.push_back(Isa::avx512vnni);
                if (has_amx()) found.push_back(Isa::amx);
            }
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
