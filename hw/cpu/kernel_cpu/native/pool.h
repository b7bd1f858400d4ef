// A small pool of threads: work is handed out task by task, idle workers spin briefly and then sleep.
#pragma once
#include <cstddef>
#include <type_traits>

#define KC_API extern "C" __attribute__((visibility("default")))

namespace kc {

int thread_count();

// Runs task(context, 0 .. n-1), highest index first, on the calling thread and the workers; returns when all have ended.
// A call made while another thread uses the pool runs on the calling thread alone.
void run_tasks(int n, void (*task)(void *, int), void *context);

template <class F> void parallel(int n, F &&body) {
    if (n <= 0) return;
    if (n == 1 || thread_count() == 1) {
        for (int i = n - 1; i >= 0; --i) body(i);
        return;
    }
    run_tasks(n, [](void *f, int i) { (*(typename std::remove_reference<F>::type *)f)(i); }, (void *)&body);
}

// Splits [0, n) into ranges of at least `grain` and runs body(begin, end) on each.
template <class F> void parallel_ranges(long n, long grain, F &&body) {
    long parts = n / (grain > 0 ? grain : 1), most = (long)thread_count() * 4;
    parts = parts < 1 ? 1 : parts > most ? most : parts;
    parallel((int)parts, [&](int i) { body(n * i / parts, n * (i + 1) / parts); });
}

// Memory of the calling thread that grows and is reused; `which` tells apart buffers alive at the same time.
void *scratch(int which, size_t bytes);

}  // namespace kc
