// Calls that were recorded as 64-bit slots, one an argument: KC_REPLAYABLE(f) after a function f makes f_slots, which unpacks them.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "pool.h"

namespace kc {

template <class T> T from_slot(int64_t slot) {
    if constexpr (std::is_pointer<T>::value) return reinterpret_cast<T>(slot);
    else if constexpr (std::is_same<T, float>::value) {
        int32_t bits = (int32_t)slot;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    } else return static_cast<T>(slot);
}

template <class R, class... A, size_t... I> int call_slots(R (*f)(A...), const int64_t *slots, std::index_sequence<I...>) {
    if constexpr (std::is_void<R>::value) return f(from_slot<A>(slots[I])...), 0;
    else return (int)f(from_slot<A>(slots[I])...);
}

template <class R, class... A> int call_slots(R (*f)(A...), const int64_t *slots) {
    return call_slots(f, slots, std::index_sequence_for<A...>{});
}

}  // namespace kc

#define KC_REPLAYABLE(f) \
    KC_API int f##_slots(const int64_t *slots) { return kc::call_slots(f, slots); }
