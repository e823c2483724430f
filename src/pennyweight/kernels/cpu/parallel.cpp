#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace pennyweight {
namespace {

struct Team {
    const std::function<void(std::size_t)> &task;
    std::size_t count;
    std::atomic<std::size_t> next{0};
    std::mutex mutex;
    std::exception_ptr error;

    void work() {
        try {
            for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
        } catch (...) {
            next = count;
            const std::lock_guard<std::mutex> lock(mutex);
            if (!error) error = std::current_exception();
        }
    }
};

using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

Parallel gnu_openmp() {
#if defined(__linux__)
    static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

}  // namespace

void parallel_for(std::size_t count, unsigned threads, const std::function<void(std::size_t)> &task) {
    const std::size_t members = std::min<std::size_t>(count, threads);
    Team team{task, count, {}, {}, {}};
    if (members <= 1) {
        team.work();
    } else if (const Parallel parallel = gnu_openmp()) {
        parallel([](void *data) { static_cast<Team *>(data)->work(); }, &team, static_cast<unsigned>(members), 0);
    } else {
        std::vector<std::thread> others;
        for (std::size_t i = 1; i < members; ++i) others.emplace_back([&team] { team.work(); });
        team.work();
        for (std::thread &other : others) other.join();
    }
    if (team.error) std::rethrow_exception(team.error);
}

}  // namespace pennyweight
