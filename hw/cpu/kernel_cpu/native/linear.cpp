// y = x W^T + b with W packed in panels: [N / NR][K / 2][NR] pairs of bf16, or [N / NR][K][NR] floats or int8.
// NR = 2 vectors. K is padded to even and N to NR with zeros.
// Every output is one accumulator that runs over k in order, so row i does not depend on the other rows of the batch.
#include <algorithm>
#include <type_traits>

#include "pool.h"
#include "replay.h"
#include "tile.h"

using namespace kc;

namespace {

constexpr int NV = 2, NR = NV * W;
constexpr int kMaxRows = W == 16 ? 12 : 6;   // rows of the register tile: 24 or 12 accumulators
constexpr int kBlockRows = 96;               // rows whose A block stays in L2
constexpr int kChunkRows = 576;              // rows packed at a time
constexpr long kShortBlock = 64, kLongBlock = 832;  // pairs of k that are multiplied at a time
constexpr long kAhead = 1024;                // bytes of prefetch, over all panels read at once
constexpr long kTaskBytes = 512 << 10;

enum Format { kBf16 = 0, kF32 = 1, kI8 = 2 };

struct Problem {
    const void *x, *w, *bias;
    const float *scale;
    void *out;
    long ldx, ldo, m, n, k, pairs, panels;
    bool x_bf16, bias_bf16;
    Format format;
};

template <class Src> constexpr int kPairBytes = Src::kStride * sizeof(typename Src::Item);

constexpr int panels_at_once(int rows) { return rows * 4 <= kMaxRows ? 4 : rows * 2 <= kMaxRows ? 2 : 1; }

// On the way it fetches from b + ahead on, `step` bytes for each pair, in every panel; where that is past the end of a panel,
// from the panels after these.
// C[MR][NP * NR] (+)= A[pairs][2][MR] * B; the dot source takes A as [pairs][MR] pairs of bf16.
template <class Src, int MR, int NP>
void tile_kernel(const float *a, const typename Src::Item *b, ptrdiff_t panel, long pairs, long ahead, int step, float *c,
                 ptrdiff_t ldc, bool first) {
    const char *later = (const char *)b + ahead;
    vf acc[MR][NP * NV];
    KC_UNROLL for (int i = 0; i < MR; ++i) KC_UNROLL for (int j = 0; j < NP * NV; ++j)
        acc[i][j] = first ? vf{} : load(c + i * ldc + j * W);
    const long turn = NP > 1 ? pairs - ahead / kPairBytes<Src> : -1;
    for (long p = 0; p < pairs; ++p, later += step) {
        if (p == turn) later += (NP - 1) * panel * (ptrdiff_t)sizeof(typename Src::Item);
        KC_UNROLL for (int q = 0; q < NP; ++q) for (int o = 0; o < kPairBytes<Src>; o += 64)
            __builtin_prefetch(later + q * panel * (ptrdiff_t)sizeof(typename Src::Item) + o);
        tile_pair<Src, MR, NP, NV, 1, MR>(acc, a, b, panel);
        a += Src::kDot ? MR : 2 * MR;
        b += Src::kStride;
    }
    KC_UNROLL for (int i = 0; i < MR; ++i) KC_UNROLL for (int j = 0; j < NP * NV; ++j)
        store(c + i * ldc + j * W, acc[i][j]);
}

template <class Src>
using Kernel = void (*)(const float *, const typename Src::Item *, ptrdiff_t, long, long, int, float *, ptrdiff_t, bool);

template <class Src, int MR, int NP> Kernel<Src> pick_panels(int panels) {
    if constexpr (NP > 1)
        if (panels < NP) return pick_panels<Src, MR, NP / 2>(panels);
    return tile_kernel<Src, MR, NP>;
}

template <class Src, int MR> Kernel<Src> pick(int rows, int panels) {
    if constexpr (MR > 0) {
        if (rows != MR) return pick<Src, MR - 1>(rows, panels);
        return pick_panels<Src, MR, panels_at_once(MR)>(panels);
    } else {
        return nullptr;
    }
}

// Rows [begin, end) of x as A tiles: the rows of a tile interleaved, so that the kernel reads them with one pointer.
struct Tiles {
    long rows, count;
    long row(long t) const { return rows * t / count; }
};

Tiles tiles_of(long rows) { return {rows, (rows + kMaxRows - 1) / kMaxRows}; }

template <class X> void pack_tile(const X *x, long ldx, int rows, long k, long pairs, float *a) {
    for (int i = 0; i < rows; ++i) {
        const X *from = x + i * ldx;
        float *to = a + i;
        if (rows == 1) {
            for (long j = 0; j < k; j += W) store_n(to + j, load_n(from + j, (int)std::min<long>(W, k - j)), (int)(k - j));
        } else {
            for (long j = 0; j < k; ++j) to[j * rows] = to_float(from[j]);
        }
        if (k < 2 * pairs) to[k * rows] = 0;
    }
}

// Words of 4 * G rows or a few less, transposed, as long as words follow that make good what is written past the rows.
template <int G> long transpose_words(const char *x, long row_bytes, int rows, long words, uint32_t *a) {
    long j = 0;
#if defined(__SSE2__)
    const char *from[4 * G];
    for (int i = 0; i < 4 * G; ++i) from[i] = x + std::min(i, rows - 1) * row_bytes;
    for (; j + 4 < words; j += 4, a += 4 * rows) {
        __m128i column[4][G];
        KC_UNROLL for (int g = 0; g < G; ++g) {
            __m128i row[4];
            KC_UNROLL for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_si128((const __m128i *)(from[4 * g + i] + 4 * j));
            __m128i a01 = _mm_unpacklo_epi32(row[0], row[1]), b01 = _mm_unpackhi_epi32(row[0], row[1]);
            __m128i a23 = _mm_unpacklo_epi32(row[2], row[3]), b23 = _mm_unpackhi_epi32(row[2], row[3]);
            column[0][g] = _mm_unpacklo_epi64(a01, a23), column[1][g] = _mm_unpackhi_epi64(a01, a23);
            column[2][g] = _mm_unpacklo_epi64(b01, b23), column[3][g] = _mm_unpackhi_epi64(b01, b23);
        }
        KC_UNROLL for (int i = 0; i < 4; ++i) KC_UNROLL for (int g = 0; g < G; ++g)
            _mm_storeu_si128((__m128i *)(a + i * rows + 4 * g), column[i][g]);
    }
#endif
    return j;
}

void pack_tile_pairs(const bf16 *x, long ldx, int rows, long k, long pairs, uint32_t *a) {
    const auto transpose = rows > 8 ? transpose_words<3> : rows > 4 ? transpose_words<2> : transpose_words<1>;
    long done = k / 2;
    if (rows == 1) memcpy(a, x, done * 4);
    else done = transpose((const char *)x, ldx * 2, rows, done, a);
    for (int i = 0; i < rows; ++i) {
        const bf16 *from = x + i * ldx;
        for (long j = done; j < k / 2; ++j) a[j * rows + i] = from[2 * j].bits | (uint32_t)from[2 * j + 1].bits << 16;
        if (k < 2 * pairs) a[(pairs - 1) * rows + i] = from[k - 1].bits;
    }
}

void pack_rows(const Problem &p, bool dot, long row0, const Tiles &tiles, float *a) {
    auto one = [&](long t) {
        long r = tiles.row(t);
        int rows = (int)(tiles.row(t + 1) - r);
        if (dot) pack_tile_pairs((const bf16 *)p.x + (row0 + r) * p.ldx, p.ldx, rows, p.k, p.pairs, (uint32_t *)a + r * p.pairs);
        else if (p.x_bf16) pack_tile((const bf16 *)p.x + (row0 + r) * p.ldx, p.ldx, rows, p.k, p.pairs, a + r * 2 * p.pairs);
        else pack_tile((const float *)p.x + (row0 + r) * p.ldx, p.ldx, rows, p.k, p.pairs, a + r * 2 * p.pairs);
    };
    if (tiles.rows * p.k < 65536) {
        for (long t = 0; t < tiles.count; ++t) one(t);
    } else {
        parallel((int)tiles.count, one);
    }
}

// Accumulators of rows x cols -> scale, bias, rounding, out.
template <class X> void finish(const Problem &p, const float *c, ptrdiff_t ldc, long row, long rows, long col, long cols) {
    for (long i = 0; i < rows; ++i) {
        X *out = (X *)p.out + (row + i) * p.ldo + col;
        for (long j = 0; j < cols; j += W) {
            int n = (int)std::min<long>(W, cols - j);
            vf y = load(c + i * ldc + j);
            if (p.scale) y *= load_n(p.scale + col + j, n);
            if (p.bias && p.bias_bf16) y += load_n((const bf16 *)p.bias + col + j, n);
            else if (p.bias) y += load_n((const float *)p.bias + col + j, n);
            store_n(out + j, y, n);
        }
    }
}

template <class Src> struct Block {
    const Problem &p;
    const float *a;      // packed tiles of rows [row0, row0 + tiles.rows)
    Tiles tiles;
    long row0, t0, t1;   // the tiles of this block
};

// In which pieces a block of rows is multiplied: `at_once` of `panels` panels, `pairs` of k. The weights of one tile stream by.
// Two small tiles read each piece from L1, and the pieces in the order in which they lie in memory. With more rows, the
// arithmetic takes longer than the memory, and long pieces spare the accumulators.
struct Order {
    long panels, pairs;
    int at_once;
};

Order order_of(int tiles, int rows, long pairs, long panels) {
    if (tiles == 1) return {panels, pairs, panels_at_once(rows)};
    if (tiles == 2 && rows < kMaxRows * 3 / 2) return {1, kShortBlock, 1};
    return {panels, kLongBlock, 1};
}

// One block of rows times panels [begin, end); what this thread reads afterwards begins at panel `after`.
template <class Src> void multiply(const Block<Src> &k, long begin, long end, long after) {
    const Problem &p = k.p;
    using Item = typename Src::Item;
    const ptrdiff_t panel = p.pairs * Src::kStride;
    const long r0 = k.tiles.row(k.t0), rows = k.tiles.row(k.t1) - r0;
    const ptrdiff_t ldc = (end - begin) * NR;
    const int tiles = (int)(k.t1 - k.t0);
    const int a_step = Src::kDot ? 1 : 2, step = (kPairBytes<Src> + tiles - 1) / tiles;
    const Order order = order_of(tiles, (int)rows, p.pairs, end - begin);
    const long parts = (p.pairs + order.pairs - 1) / order.pairs;
    float *c = (float *)scratch(1, sizeof(float) * rows * ldc);
    for (long q0 = begin; q0 < end; q0 += order.panels) {
        const long q1 = std::min(end, q0 + order.panels);
        for (long part = 0; part < parts; ++part) {
            const long b = p.pairs * part / parts, b1 = p.pairs * (part + 1) / parts, pairs = b1 - b;
            int np = order.at_once;
            for (long q = q0; q < q1; q += np) {
                while (np > q1 - q) np /= 2;
                const Item *w = (const Item *)p.w + q * panel + b * Src::kStride;
                // One tile: a little further on. Several: what comes after this piece, each tile its share of it.
                const long q2 = q + np < q1 ? q + np : part + 1 < parts ? q0 : q1 < end ? q1 : after;
                const long b2 = q + np < q1 ? b : part + 1 < parts ? b1 : 0;
                const long next = tiles == 1 ? kAhead / np : ((q2 - q) * panel + (b2 - b) * Src::kStride) * (long)sizeof(Item);
                for (long t = k.t0; t < k.t1; ++t) {
                    long r = k.tiles.row(t);
                    int mr = (int)(k.tiles.row(t + 1) - r);
                    pick<Src, kMaxRows>(mr, np)(k.a + (r * p.pairs + b * mr) * a_step, w, panel, pairs,
                                                next + (t - k.t0) * step * pairs, step,
                                                c + (r - r0) * ldc + (q - begin) * NR, ldc, b == 0);
                }
            }
        }
    }
    long col = begin * NR, cols = std::min(end * NR, p.n) - col;
    if (p.x_bf16) finish<bf16>(p, c, ldc, k.row0 + r0, rows, col, cols);
    else finish<float>(p, c, ldc, k.row0 + r0, rows, col, cols);
}

// The panels of a product as tasks, which are begun from the last to the first: away from where another thread fetches ahead,
// and with small ones at the end, so that all threads end together.
struct Cut {
    long panels, group, small, smalls;
    long count() const { return smalls + (panels - small * smalls + group - 1) / group; }
    long begin(long i) const { return i < smalls ? small * i : small * smalls + group * (i - smalls); }
    long end(long i) const { return std::min(panels, begin(i + 1)); }
};

template <class Src> Cut cut_of(const Tiles &tiles, long blocks, long pairs, long panels) {
    const long threads = thread_count();
    if (tiles.count == 1) {
        long group = std::max<long>(4, kTaskBytes / (pairs * kPairBytes<Src>));
        group = std::max<long>(4, std::min(group, panels / (4 * threads)));
        return {panels, group / 4 * 4, 2, std::min<long>(threads, panels / 2)};
    }
    long group = std::max<long>(1, std::min<long>(tiles.rows <= 32 ? 4 : 8, panels * blocks / (4 * threads)));
    if (group > 4) group = group / 4 * 4;
    return {panels, group, 1, threads == 1 ? 0 : std::min(panels / 4, group * (threads - 1))};
}

template <class Src> void run(const Problem &p) {
    const long chunks = (p.m + kChunkRows - 1) / kChunkRows;
    for (long chunk = 0; chunk < chunks; ++chunk) {
        const long row0 = p.m * chunk / chunks;
        Tiles tiles = tiles_of(p.m * (chunk + 1) / chunks - row0);
        float *a = (float *)scratch(0, sizeof(float) * tiles.rows * 2 * p.pairs);
        pack_rows(p, Src::kDot, row0, tiles, a);
        const long blocks = (tiles.rows + kBlockRows - 1) / kBlockRows;
        const Cut cut = cut_of<Src>(tiles, blocks, p.pairs, p.panels);
        const int tasks = (int)(cut.count() * blocks);
        auto body = [&](int task) {
            const long g = task / blocks, b = task % blocks, next = std::max(0, task - thread_count()) / blocks;
            Block<Src> block{p, a, tiles, row0, tiles.count * b / blocks, tiles.count * (b + 1) / blocks};
            multiply(block, cut.begin(g), cut.end(g), cut.begin(next));
        };
        // A product this small ends before a sleeping worker has woken.
        if (tiles.rows * p.n * p.k < 100000) {
            for (int i = tasks - 1; i >= 0; --i) body(i);
        } else {
            parallel(tasks, body);
        }
    }
}

// Packs panel q of row-major w [n, k] through put(pair, half, lane, value of w or zero).
template <class T, class Put> void pack_panel(const T *w, long ldw, long n, long k, long q, Put put) {
    long pairs = (k + 1) / 2;
    for (int lane = 0; lane < NR; ++lane) {
        long row = q * NR + lane;
        for (long j = 0; j < 2 * pairs; ++j) put(j / 2, j % 2, lane, row < n && j < k ? w[row * ldw + j] : T{});
    }
}

// The 32-bit words of NR rows, transposed: out[word][lane] = row[lane][word]. bf16 comes in pairs, so both formats are this.
void transpose_rows(const char *w, long row_bytes, long words, uint32_t *out) {
    constexpr long kStep = 16;  // one cache line of every row
    for (long j = 0; j < words; j += kStep) {
        long step = std::min(kStep, words - j);
        for (int lane = 0; lane < NR; ++lane) {
            uint32_t part[kStep];
            const char *from = w + lane * row_bytes + j * 4;
            __builtin_prefetch(from + NR * row_bytes);  // short rows: no stream long enough for the hardware
            memcpy(part, from, step == kStep ? sizeof part : step * 4);
            if (step == kStep) KC_UNROLL for (int i = 0; i < kStep; ++i) out[(j + i) * NR + lane] = part[i];
            else for (long i = 0; i < step; ++i) out[(j + i) * NR + lane] = part[i];
        }
    }
}

}  // namespace

KC_API int kc_panel() { return NR; }

KC_API int kc_simd_width() { return W; }

KC_API int kc_has_dot() { return KC_DOT; }

KC_API void kc_linear(const void *x, int x_bf16, long ldx, const void *w, int format, const float *scale, const void *bias,
                      int bias_bf16, void *out, long ldo, long m, long n, long k) {
    Problem p{x, w, bias, scale, out, ldx, ldo, m, n, k, (k + 1) / 2, (n + NR - 1) / NR, !!x_bf16, !!bias_bf16, (Format)format};
    if (format == kF32) return run<F32Source<NV>>(p);
#if KC_DOT
    if (x_bf16 && format == kI8) return run<I8DotSource<NV>>(p);
    if (x_bf16) return run<Bf16DotSource<NV>>(p);
#endif
    if (format == kI8) return run<I8Source<NV>>(p);
    run<Bf16Source<NV>>(p);
}
KC_REPLAYABLE(kc_linear)

KC_API void kc_pack(const void *w, long ldw, int format, void *out, long n, long k) {
    long pairs = (k + 1) / 2, panels = (n + NR - 1) / NR;
    parallel_ranges(panels, 1, [&](long begin, long end) {
        for (long q = begin; q < end; ++q) {
            long size = format == kBf16 ? 2 : 4, words = k * size / 4;
            if ((q + 1) * NR <= n && k % 2 == 0) {
                transpose_rows((const char *)w + q * NR * ldw * size, ldw * size, words, (uint32_t *)out + q * words * NR);
            } else if (format == kBf16) {
                uint16_t *to = (uint16_t *)out + q * pairs * 2 * NR;
                pack_panel((const uint16_t *)w, ldw, n, k, q,
                           [&](long p, int h, int lane, uint16_t v) { to[(p * NR + lane) * 2 + h] = v; });
            } else {
                float *to = (float *)out + q * pairs * 2 * NR;
                pack_panel((const float *)w, ldw, n, k, q,
                           [&](long p, int h, int lane, float v) { to[(p * 2 + h) * NR + lane] = v; });
            }
        }
    });
}

// Symmetric, one scale per output channel: w[n][k] ~ scale[n] * q, q in [-127, 127].
KC_API void kc_pack_int8(const void *w, int w_bf16, long ldw, int8_t *out, float *scale, long n, long k) {
    long pairs = (k + 1) / 2, panels = (n + NR - 1) / NR;
    parallel_ranges(panels, 1, [&](long begin, long end) {
        for (long q = begin; q < end; ++q) {
            float inverse[NR] = {};
            for (int lane = 0; lane < NR && q * NR + lane < n; ++lane) {
                long row = q * NR + lane;
                float top = 0;
                for (long j = 0; j < k; ++j) {
                    float v = w_bf16 ? to_float(((const bf16 *)w)[row * ldw + j]) : ((const float *)w)[row * ldw + j];
                    top = std::max(top, std::fabs(v));
                }
                scale[row] = top / 127.0f;
                inverse[lane] = top > 0 ? 127.0f / top : 0.0f;
            }
            int8_t *to = out + q * pairs * 2 * NR;
            auto put = [&](long p, int h, int lane, auto v) {
                float r = std::nearbyint(to_float(v) * inverse[lane]);
                to[(p * 2 + h) * NR + lane] = (int8_t)std::min(127.0f, std::max(-127.0f, r));
            };
            if (w_bf16) pack_panel((const bf16 *)w, ldw, n, k, q, put);
            else pack_panel((const float *)w, ldw, n, k, q, put);
        }
    });
}

// Rows of a packed bf16 or fp32 weight, unpacked: out[i] = w[ids[i]]. Returns 1 when an id is out of range.
KC_API int kc_unpack_rows(const void *w, int format, const int64_t *ids, long count, void *out, long n, long k) {
    long pairs = (k + 1) / 2;
    for (long i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= n) return 1;
    parallel_ranges(count, std::max<long>(1, 16384 / k), [&](long begin, long end) {
        for (long i = begin; i < end; ++i) {
            long q = ids[i] / NR, lane = ids[i] % NR;
            if (format == kBf16) {
                const uint32_t *from = (const uint32_t *)w + q * pairs * NR + lane;
                uint16_t *to = (uint16_t *)out + i * k;
                for (long j = 0; j < k; ++j) to[j] = (uint16_t)(from[j / 2 * NR] >> (j % 2 * 16));
            } else {
                const float *from = (const float *)w + q * pairs * 2 * NR + lane;
                for (long j = 0; j < k; ++j) ((float *)out)[i * k + j] = from[j * NR];
            }
        }
    });
    return 0;
}
KC_REPLAYABLE(kc_unpack_rows)
