#include "replay.h"

struct Step {
    int (*run)(const int64_t *);
    const int64_t *slots;
};

// Runs recorded calls in order. Returns 0, or the number, counted from 1, of the call that refused; the rest is not run.
KC_API int kc_replay(const Step *steps, long count) {
    for (long i = 0; i < count; ++i)
        if (steps[i].run(steps[i].slots)) return (int)i + 1;
    return 0;
}
