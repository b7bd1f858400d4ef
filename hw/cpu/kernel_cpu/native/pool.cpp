#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "pool.h"

namespace kc {
namespace {

constexpr auto kSpin = std::chrono::microseconds(40);

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until `ready` or the time is up; true when ready.
template <class F> bool spin(F &&ready) {
    auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 64; ++i) {
            if (ready()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
    return ready();
}

class Pool {
  public:
    explicit Pool(int threads) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> hold(sleep_);
            stop_ = true;
        }
        wake_.notify_all();
        for (auto &worker : workers_) worker.join();
    }

    int size() const { return (int)workers_.size() + 1; }

    void run(int n, void (*task)(void *, int), void *context) {
        std::unique_lock<std::mutex> mine(caller_, std::try_to_lock);
        if (!mine.owns_lock()) {
            for (int i = n - 1; i >= 0; --i) task(context, i);
            return;
        }
        uint64_t generation = ((ticket_.load() >> 32) + 1) << 32;
        ticket_.store(generation);
        task_.store(task);
        context_.store(context);
        pending_.store(n);
        ticket_.store(generation | (uint32_t)n);
        if (sleepers_.load()) {
            { std::lock_guard<std::mutex> hold(sleep_); }
            if (n == 2) wake_.notify_one();
            else wake_.notify_all();
        }
        take();
        if (!spin([&] { return pending_.load() == 0; })) {
            std::unique_lock<std::mutex> hold(done_);
            finished_.wait(hold, [&] { return pending_.load() == 0; });
        }
    }

  private:
    // The ticket is (generation, tasks left). A task is claimed by a compare-and-swap, so a worker that is late for one
    // job can never take a task of the next with the old job's function.
    void take() {
        for (;;) {
            uint64_t ticket = ticket_.load();
            uint32_t left = (uint32_t)ticket;
            if (!left) return;
            auto task = task_.load();
            auto context = context_.load();
            if (!ticket_.compare_exchange_weak(ticket, ticket - 1)) continue;
            task(context, (int)left - 1);
            if (pending_.fetch_sub(1) == 1) {
                { std::lock_guard<std::mutex> hold(done_); }
                finished_.notify_one();
            }
        }
    }

    void work() {
        auto ready = [this] { return (uint32_t)ticket_.load() != 0 || stop_; };
        for (;;) {
            if (!spin(ready)) {
                std::unique_lock<std::mutex> hold(sleep_);
                sleepers_.fetch_add(1);
                wake_.wait(hold, ready);
                sleepers_.fetch_sub(1);
            }
            if (stop_) return;
            take();
        }
    }

    std::vector<std::thread> workers_;
    std::mutex caller_, sleep_, done_;
    std::condition_variable wake_, finished_;
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int> pending_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::atomic<void (*)(void *, int)> task_{nullptr};
    std::atomic<void *> context_{nullptr};
};

int available_cores() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
    int n = (int)std::thread::hardware_concurrency();
    return n > 0 ? n : 1;
}

std::mutex g_lock;
std::atomic<Pool *> g_pool{nullptr};
std::atomic<int> g_threads{0};

// A forked child has the memory of the pool but none of its threads: forget it there, never join it.
void after_fork() {
    g_pool.store(nullptr);
    new (&g_lock) std::mutex;
}

Pool &pool() {
    Pool *p = g_pool.load();
    if (p) return *p;
    std::lock_guard<std::mutex> hold(g_lock);
    if (!(p = g_pool.load())) {
        static bool hooked = pthread_atfork(nullptr, nullptr, after_fork) == 0;
        (void)hooked;
        g_pool.store(p = new Pool(thread_count()));
    }
    return *p;
}

struct Scratch {
    void *data[8] = {};
    size_t size[8] = {};
    ~Scratch() {
        for (void *p : data) free(p);
    }
};

}  // namespace

int thread_count() {
    int n = g_threads.load(std::memory_order_relaxed);
    if (n == 0) g_threads.store(n = available_cores());
    return n;
}

void run_tasks(int n, void (*task)(void *, int), void *context) { pool().run(n, task, context); }

void *scratch(int which, size_t bytes) {
    static thread_local Scratch mine;
    if (mine.size[which] < bytes) {
        free(mine.data[which]);
        size_t rounded = (bytes + 4095) / 4096 * 4096;
        mine.data[which] = aligned_alloc(64, rounded);
        mine.size[which] = mine.data[which] ? rounded : 0;
        if (!mine.data[which]) throw std::bad_alloc();
    }
    return mine.data[which];
}

}  // namespace kc

KC_API void kc_set_threads(int n) {
    std::lock_guard<std::mutex> hold(kc::g_lock);
    n = n < 1 ? 1 : n;
    kc::Pool *old = kc::g_pool.load();
    kc::g_threads.store(n);
    if (old && old->size() != n) {
        kc::g_pool.store(nullptr);
        delete old;
    }
}

KC_API int kc_threads() { return kc::thread_count(); }

// Asks for huge pages inside a buffer before it is first written: a stream of weights then misses the TLB far less.
KC_API void kc_advise_huge(char *data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    uintptr_t begin = ((uintptr_t)data + 4095) & ~(uintptr_t)4095, end = ((uintptr_t)data + bytes) & ~(uintptr_t)4095;
    if (end > begin) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}
