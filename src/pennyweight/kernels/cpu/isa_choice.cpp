#include <atomic>

#include "cpu.h"
#include "isa.h"

namespace pennyweight {

extern const Kernels kernels_plain;
#if defined(PENNYWEIGHT_HAS_X86)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512vnni, kernels_amx;
#endif
#if defined(PENNYWEIGHT_HAS_NEON)
extern const Kernels kernels_neon;
#endif

namespace {

std::atomic<const Kernels *> current{nullptr};

const Kernels &of(Isa isa) {
    switch (isa) {
#if defined(PENNYWEIGHT_HAS_X86)
        case Isa::avx2: return kernels_avx2;
        case Isa::avx512: return kernels_avx512;
        case Isa::avx512vnni: return kernels_avx512vnni;
        case Isa::amx: return kernels_amx;
#endif
#if defined(PENNYWEIGHT_HAS_NEON)
        case Isa::neon: return kernels_neon;
#endif
        default: return kernels_plain;
    }
}

}  // namespace

const Kernels &kernels() {
    const Kernels *found = current.load(std::memory_order_acquire);
    if (found == nullptr) {
        found = &of(chosen());
        current.store(found, std::memory_order_release);
    }
    return *found;
}

void use(Isa isa) { current.store(&of(isa), std::memory_order_release); }

}  // namespace pennyweight
