#pragma once
#include <cstddef>
#include <functional>

namespace pennyweight {

// Calls task(i) for i in 0..count-1, on up to `threads` threads, and returns when all are done. Which thread does which
// task is left open, so a task must not depend on that. An exception of a task is thrown again here, once all stopped.
//
// The threads are those of the OpenMP library that PyTorch has loaded, where it is GNU's: a second pool would find its
// cores taken by PyTorch's threads, which keep spinning for a while after their work. Elsewhere new threads are started.
void parallel_for(std::size_t count, unsigned threads, const std::function<void(std::size_t)> &task);

}  // namespace pennyweight
