// Attention over the paged KV cache, for decode, prefill and anything between in one call.
//
// A query sees its keys in tiles of 4 strips and sections of 8 tiles, both counted from position 0 of its row. Inside a
// section runs the online softmax; sections are folded in order. Batch, chunking and threads decide who computes a
// section, never the arithmetic, so the result of a query depends on its own row alone.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "kv.h"
#include "pool.h"
#include "replay.h"
#include "tile.h"

using namespace kc;

namespace {

constexpr int NV = kStrip / W;  // vectors in a strip
constexpr int kTileStrips = 4, kTile = kTileStrips * kStrip;
constexpr int kSectionStrips = 8 * kTileStrips;
constexpr int kItemRows = 48;  // (token, head) rows of the query that one work item takes
constexpr int kPaddedRows = kItemRows + W;  // room for whole vectors
constexpr int kMaxRows = W == 16 ? 12 : 6;
constexpr int kAtOnce = W == 16 ? 2 : 1;  // strips, or columns of 16, that a register tile holds
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Call {
    Geometry g;
    const char *q, *kv;
    long q_token, q_head;  // bytes
    bool q_bf16;
    const int *q_start, *kv_len, *table;
    long table_width, blocks;
    int rows, group, window, first;  // first: positions below it are never read
    bool causal;
    float scale, cap, scale_after;  // scale_after: what is left to multiply scores by once capped
    const float *sinks;
    const uint8_t *tree;
    int tree_width;
    const long *positions;  // of the queries, where drafts branch; null: those of their slots
    char *out;
    long out_token, out_head;  // bytes

    int length(int row) const { return q_start[row + 1] - q_start[row]; }
    bool is_tree(int row) const { return tree && length(row) <= tree_width; }
    int first_position(int row) const { return kv_len[row] - length(row); }
    // What token j of a row sees: positions [low, high).
    int position(int row, int j) const { return positions ? (int)positions[q_start[row] + j] : first_position(row) + j; }
    int low(int row, int j) const { return window > 0 ? std::max(first, position(row, j) - window + 1) : first; }
    // The lowest of tokens [j, end): branches may go back in position.
    int lowest(int row, int j, int end) const {
        int lowest = low(row, j);
        for (int i = j + 1; positions && i < end; ++i) lowest = std::min(lowest, low(row, i));
        return lowest;
    }
    int high(int row, int j) const {
        if (is_tree(row)) return kv_len[row];
        if (causal) return first_position(row) + j + 1;
        return window > 0 ? std::min(kv_len[row], position(row, j) + window) : kv_len[row];
    }
};

struct Item {
    int row, head;
    int begin, end;  // rows of the query, token-major over the heads of the group
    int section0, section1;
    long partial;    // offset at which the states of its sections are left for the fold; -1: it folds and writes the output
};

// The running softmax of some query rows: maximum, sum and weighted values. A sum of 0 says that nothing was seen.
struct State {
    float *m, *l, *o;
    explicit State(float *base) : m(base), l(base + kPaddedRows), o(base + 2 * kPaddedRows) {}
    static long floats(int rows, int dv) { return (long)rows * dv + 2 * kPaddedRows; }
    void clear(int rows, int dv) {
        std::fill(m, m + kPaddedRows, kNone);
        std::fill(l, l + kPaddedRows + (long)rows * dv, 0.0f);
    }
};

float exp1(float x) { return vexp(splat(x))[0]; }

void fold(State into, State part, int rows, int dv) {
    for (int i = 0; i < rows; ++i) {
        if (part.l[i] == 0) continue;
        float *o = into.o + (long)i * dv;
        const float *po = part.o + (long)i * dv;
        if (into.l[i] == 0) {
            into.m[i] = part.m[i], into.l[i] = part.l[i];
            memcpy(o, po, sizeof(float) * dv);
            continue;
        }
        float m = std::max(into.m[i], part.m[i]), a = exp1(into.m[i] - m), b = exp1(part.m[i] - m);
        into.m[i] = m;
        into.l[i] = into.l[i] * a + part.l[i] * b;
        for (int j = 0; j < dv; j += W) store(o + j, load(o + j) * a + load(po + j) * b);
    }
}

// The output of an item from its folded state; a sink is one more key, without a value.
void finish(const Call &c, const Item &it, State total) {
    for (int i = 0; i < it.end - it.begin; ++i) {
        int flat = it.begin + i, head = it.head * c.group + flat % c.group;
        float m = total.m[i], l = total.l[i], a = 1.0f;
        if (c.sinks) {
            float top = std::max(m, c.sinks[head]);
            a = exp1(m - top);
            l = l * a + exp1(c.sinks[head] - top);
        }
        float by = total.l[i] == 0 ? 0.0f : a / l;
        const float *o = total.o + (long)i * c.g.dv_padded;
        char *out = c.out + (c.q_start[it.row] + flat / c.group) * c.out_token + head * c.out_head;
        for (int j = 0; j < c.g.dv; j += W) {
            vf y = load(o + j) * by;
            if (c.q_bf16) store_n((bf16 *)out + j, y, c.g.dv - j);
            else store_n((float *)out + j, y, c.g.dv - j);
        }
    }
}

// Bytes of a strip that one pair of dimensions or of tokens takes.
template <class T> constexpr int kFetch = std::is_same<T, float>::value ? 128 : 64;

template <class T> struct Strip {
    const T *k, *v;
    int position;  // of its first token
    int count;     // tokens of it that anyone sees; nothing is read past them
};

// S[MR][NP * 16] = A[d][MR] * NP strips of K. On the way it fetches `later`, the same strips of the next tile, `step` bytes for
// each pair.
template <class Src, int MR, int NP>
void scores(const float *a, const Strip<typename Src::Item> *strips, int pairs, float *s, int step) {
    const typename Src::Item *k = strips[0].k;
    const ptrdiff_t panel = NP > 1 ? strips[1].k - k : 0;
    const char *later[NP];
    KC_UNROLL for (int q = 0; q < NP; ++q) later[q] = (const char *)strips[kTileStrips + q].k;
    vf acc[MR][NP * NV] = {};
    for (int p = 0; p < pairs; ++p) {
        KC_UNROLL for (int q = 0; q < NP; ++q) {
            for (int o = 0; o < kFetch<typename Src::Item>; o += 64) __builtin_prefetch(later[q] + o);
            later[q] += step;
        }
        tile_pair<Src, MR, NP, NV, 1, MR>(acc, a, k, panel);
        a += Src::kDot ? MR : 2 * MR;
        k += Src::kStride;
    }
    KC_UNROLL for (int i = 0; i < MR; ++i) KC_UNROLL for (int v = 0; v < NP * NV; ++v) store(s + i * kTile + v * W, acc[i][v]);
}

// O[MR][NP * 16 columns] = O * alpha + P[MR][tile] * V; fetches as above. The dot source takes P as bf16.
template <class Src, int MR, int NP>
void values(const float *p, const Strip<typename Src::Item> *strips, int s0, int s1, long offset, float *o, long ldo,
            const float *alpha, int step) {
    constexpr ptrdiff_t kPanel = 8 * Src::kStride;
    vf acc[MR][NP * NV];
    KC_UNROLL for (int i = 0; i < MR; ++i) KC_UNROLL for (int v = 0; v < NP * NV; ++v)
        acc[i][v] = load(o + i * ldo + v * W) * alpha[i];
    for (int s = s0; s < s1; ++s) {
        const typename Src::Item *b = strips[s].v + offset;
        const float *a = p + s * kStrip / (Src::kDot ? 2 : 1);
        const char *later = (const char *)(strips[s + kTileStrips].v + offset);
        int t = 0;
        for (; t + 2 <= strips[s].count; t += 2, b += Src::kStride, later += step) {
            KC_UNROLL for (int q = 0; q < NP; ++q) for (int o = 0; o < kFetch<typename Src::Item>; o += 64)
                __builtin_prefetch(later + q * kPanel * (ptrdiff_t)sizeof(typename Src::Item) + o);
            tile_pair<Src, MR, NP, NV, kTile, 1>(acc, a, b, kPanel);
            a += Src::kDot ? 1 : 2;
        }
        if (t < strips[s].count) tile_half<Src, MR, NP, NV, kTile>(acc, a, b, kPanel);
    }
    KC_UNROLL for (int i = 0; i < MR; ++i) KC_UNROLL for (int v = 0; v < NP * NV; ++v) store(o + i * ldo + v * W, acc[i][v]);
}

template <class Src> using Scores = void (*)(const float *, const Strip<typename Src::Item> *, int, float *, int);
template <class Src>
using Values = void (*)(const float *, const Strip<typename Src::Item> *, int, int, long, float *, long, const float *, int);

template <class Src, int NP, int MR = kMaxRows> Scores<Src> pick_scores(int rows) {
    if constexpr (MR == 0) return nullptr;
    else return rows == MR ? scores<Src, MR, NP> : pick_scores<Src, NP, MR - 1>(rows);
}
template <class Src, int NP, int MR = kMaxRows> Values<Src> pick_values(int rows) {
    if constexpr (MR == 0) return nullptr;
    else return rows == MR ? values<Src, MR, NP> : pick_values<Src, NP, MR - 1>(rows);
}

// One work item. KSrc and VSrc are the sources of the two products; they share the element type.
template <class KSrc, class VSrc> class Worker {
    using T = typename VSrc::Item;
    static constexpr int kPerItem = std::is_same<T, float>::value ? 1 : 2;  // elements in a T

  public:
    Worker(const Call &c, const Item &it, float *partials) : c_(c), it_(it), rows_(it.end - it.begin), dv_(c.g.dv_padded) {
        tiles_ = (rows_ + kMaxRows - 1) / kMaxRows;
        long state = State::floats(rows_, dv_);
        q_ = (float *)scratch(2, sizeof(float) * ((long)rows_ * (c.g.d + kTile) + 2 * state + (long)dv_ * kStrip));
        s_ = q_ + (long)rows_ * c.g.d;
        part_ = it.partial < 0 ? s_ + (long)rows_ * kTile : partials + it.partial;
        total_ = s_ + (long)rows_ * kTile + state;
        edge_ = (T *)(total_ + state);
    }

    void run() {
        look();
        if (c_.first > 0 && highest_ > lowest_) blank_unread();
        for (int t = 0; t < tiles_; ++t) {
            if (c_.q_bf16) pack_queries<bf16>(t);
            else pack_queries<float>(t);
        }
        State part(part_), total(total_);
        total.clear(rows_, dv_);
        for (int section = it_.section0; section < it_.section1; ++section) {
            part.clear(rows_, dv_);
            attend(section, part);
            if (it_.partial < 0) fold(total, part, rows_, dv_);
            else part = State(part_ += State::floats(rows_, dv_));
        }
        if (it_.partial < 0) finish(c_, it_, total);
    }

  private:
    int tile_row(int t) const { return rows_ * t / tiles_; }

    void look() {
        lowest_ = narrow_high_ = c_.kv_len[it_.row], highest_ = narrow_low_ = 0;
        for (int i = 0; i < rows_; ++i) {
            int j = (it_.begin + i) / c_.group;
            low_[i] = c_.low(it_.row, j);
            high_[i] = c_.high(it_.row, j);
            lowest_ = std::min(lowest_, low_[i]);
            highest_ = std::max(highest_, high_[i]);
            narrow_low_ = std::max(narrow_low_, low_[i]);
            narrow_high_ = std::min(narrow_high_, high_[i]);
        }
    }

    // Positions below `first` may hold anything, even NaN: the strip that has some gets a copy of its V with zeros there.
    void blank_unread() {
        edge_strip_ = c_.g.strip_of(c_.first);
        if (c_.g.strip_of(lowest_) > edge_strip_) return;
        Strip<T> edge = strip(edge_strip_);
        memcpy(edge_, edge.v, sizeof(T) * dv_ * kStrip / kPerItem);
        for (int j = 0; j < dv_; j += 16)
            for (int t = 0; t < c_.first - edge.position; ++t)
                for (int d = 0; d < 16; ++d) {
                    if constexpr (kPerItem == 1) edge_[j * kStrip + t * 16 + d] = 0;
                    else ((uint16_t *)edge_)[j * kStrip + (t / 2 * 16 + d) * 2 + t % 2] = 0;
                }
        blanked_ = true;
    }

    // Rows of a tile interleaved, [d][MR], or [d / 2][MR] pairs for the dot source.
    template <class X> void pack_queries(int t) {
        int r = tile_row(t), rows = tile_row(t + 1) - r, d = c_.g.d;
        for (int i = 0; i < rows; ++i) {
            int flat = it_.begin + r + i, head = it_.head * c_.group + flat % c_.group;
            const X *from = (const X *)(c_.q + (c_.q_start[it_.row] + flat / c_.group) * c_.q_token + head * c_.q_head);
            if constexpr (KSrc::kDot && std::is_same<X, bf16>::value) {
                uint32_t *to = (uint32_t *)(q_ + (long)r * d) + i;
                for (int j = 0; j < d / 2; ++j) to[j * rows] = from[2 * j].bits | (uint32_t)from[2 * j + 1].bits << 16;
            } else {
                float *to = q_ + (long)r * d + i;
                for (int j = 0; j < d; ++j) to[j * rows] = to_float(from[j]);
            }
        }
    }

    void attend(int section, State &state) {
        int first = std::max(section * kSectionStrips, c_.g.strip_of(lowest_));
        int last = std::min((section + 1) * kSectionStrips, c_.g.strip_of(highest_ - 1) + 1);
        Strip<T> strips[2 * kTileStrips];
        fill(strips, first, last, first / kTileStrips);
        for (int tile = first / kTileStrips; tile * kTileStrips < last; ++tile) {
            int s0 = std::max(first - tile * kTileStrips, 0), s1 = std::min(last - tile * kTileStrips, kTileStrips);
            fill(strips + kTileStrips, first, last, tile + 1);
            step(strips, s0, s1, state);
            std::copy(strips + kTileStrips, strips + 2 * kTileStrips, strips);
        }
    }

    // The strips of a tile as far as they lie in [first, last); the others repeat the first that does not lie before it.
    void fill(Strip<T> *strips, int first, int last, int tile) const {
        for (int s = 0; s < kTileStrips; ++s) strips[s] = strip(std::min(std::max(tile * kTileStrips + s, first), last - 1));
    }

    Strip<T> strip(int index) const {
        const Geometry &g = c_.g;
        int column = index / g.strips, within = index % g.strips, position = column * g.block + within * kStrip;
        long page = (long)c_.table[it_.row * c_.table_width + column] * g.heads + it_.head;
        const T *k = (const T *)c_.kv + (page * g.page + within * g.strip) / kPerItem;
        int count = std::min({kStrip, g.block - within * kStrip, highest_ - position});
        return {k, blanked_ && index == edge_strip_ ? edge_ : k + g.k_strip / kPerItem, position, count};
    }

    // One tile of keys for all rows of the item.
    void step(const Strip<T> *strips, int s0, int s1, State &state) {
        float alpha[kPaddedRows];
        for (int s = s0, n; s < s1; s += n)
            for (int t = 0; n = std::min(kAtOnce, s1 - s), t < tiles_; ++t) {
                int r = tile_row(t), rows = tile_row(t + 1) - r;
                auto multiply = n == kAtOnce ? pick_scores<KSrc, kAtOnce>(rows) : pick_scores<KSrc, 1>(rows);
                multiply(q_ + (long)r * c_.g.d, strips + s, c_.g.d / 2, s_ + r * kTile + s * kStrip, t ? 0 : kFetch<T>);
            }
        soften(strips, s0, s1, state, alpha);
        for (int j = 0, n; j < dv_; j += 16 * n)
            for (int t = 0; n = std::min(kAtOnce, (dv_ - j) / 16), t < tiles_; ++t) {
                int r = tile_row(t), rows = tile_row(t + 1) - r;
                auto multiply = n == kAtOnce ? pick_values<VSrc, kAtOnce>(rows) : pick_values<VSrc, 1>(rows);
                multiply(s_ + r * kTile, strips, s0, s1, (long)j * kStrip / kPerItem, state.o + (long)r * dv_ + j, dv_, alpha + r,
                         t ? 0 : kFetch<T>);
            }
    }

    // Scores of all rows become weights; alpha is what the earlier output of each row is multiplied by.
    void soften(const Strip<T> *strips, int s0, int s1, State &state, float *alpha) {
        float top[kPaddedRows], base[kPaddedRows];
        bool ragged = c_.is_tree(it_.row) || !whole(strips, s0, s1);
        for (int i = 0; i < rows_; ++i) {
            float *s = s_ + i * kTile;
            if (c_.cap > 0) cap(s, s0, s1);
            if (ragged) hide(strips, s0, s1, i, s);
            top[i] = s1 - s0 == kTileStrips ? largest_score<kTileStrips>(s) : largest_score<1>(s + s0 * kStrip, s1 - s0);
        }
        for (int i = 0; i < rows_; i += W) {
            vf before = load(state.m + i), m = vmax(before, load(top + i) * c_.scale_after);
            // Rows that have seen nothing yet: any finite base makes their weights 0.
            vf finite = select((vi)(m == kNone), vf{}, m);
            store(base + i, finite);
            store(alpha + i, select((vi)(before == m), splat(1.0f), vexp(before - finite)));
            store(state.m + i, m);
        }
        for (int i = 0; i < rows_; ++i) {
            float *s = s_ + i * kTile;
            float total = s1 - s0 == kTileStrips ? weights<kTileStrips>(s, 0, base[i]) : weights<1>(s, s0, base[i], s1 - s0);
            state.l[i] = state.l[i] * alpha[i] + total;
        }
    }

    // Whether every row sees all of these strips.
    bool whole(const Strip<T> *strips, int s0, int s1) const {
        for (int s = s0; s < s1; ++s)
            if (strips[s].position < narrow_low_ || strips[s].position + kStrip > narrow_high_ || strips[s].count < kStrip) return false;
        return true;
    }

    void cap(float *s, int s0, int s1) const {
        for (int j = s0 * kStrip; j < s1 * kStrip; j += W) store(s + j, vtanh(load(s + j) * (c_.scale / c_.cap)) * c_.cap);
    }

    template <int N> static float largest_score(const float *s, int times = 1) {
        vf top = splat(kNone);
        for (int t = 0; t < times; ++t, s += N * kStrip)
            KC_UNROLL for (int j = 0; j < N * kStrip; j += W) top = vmax(load(s + j), top);
        return largest(top);
    }

    // exp(score - base) in place, as bf16 for the dot source; returns their sum before rounding, added up in the order of strips.
    template <int N> float weights(float *row, int strip, float base, int times = 1) const {
        const float scale = c_.scale_after;
        vf total = {};
        for (int j = strip * kStrip, end = j + times * N * kStrip; j < end; j += N * kStrip)
            KC_UNROLL for (int i = 0; i < N * kStrip; i += W) {
                vf p = vexp(fma(load(row + j + i), splat(scale), splat(-base)));
                total += p;
                if constexpr (VSrc::kDot) store_weight((bf16 *)row + j + i, p);
                else store(row + j + i, p);
            }
        return sum(total);
    }

    // Writes -inf over the scores of keys that row i does not see.
    void hide(const Strip<T> *strips, int s0, int s1, int i, float *s) const {
        const uint8_t *tree = nullptr;
        if (c_.is_tree(it_.row)) tree = c_.tree + (long)(c_.q_start[it_.row] + (it_.begin + i) / c_.group) * c_.tree_width;
        int chunk = c_.first_position(it_.row);
        for (int k = s0; k < s1; ++k) {
            const Strip<T> &strip = strips[k];
            int a = low_[i] - strip.position, b = std::min(high_[i] - strip.position, strip.count);
            if (tree)
                for (int j = std::max(0, chunk - strip.position); j < b; ++j)
                    if (!tree[strip.position + j - chunk]) s[k * kStrip + j] = kNone;
            if (a <= 0 && b >= kStrip) continue;
            for (int j = 0; j < kStrip; j += W) {
                vi lane = lanes() + j;
                vi seen = (vi)(lane >= a) & (vi)(lane < b);
                store(s + k * kStrip + j, select(seen, load(s + k * kStrip + j), splat(kNone)));
            }
        }
    }

    const Call &c_;
    const Item &it_;
    int rows_, dv_, tiles_;
    int lowest_, highest_;          // what some row sees
    int narrow_low_, narrow_high_;  // what every row sees
    int low_[kItemRows], high_[kItemRows];
    float *q_, *s_, *part_, *total_;
    T *edge_;
    int edge_strip_ = 0;
    bool blanked_ = false;
};

struct Plan {
    std::vector<Item> items, folds;
    std::vector<float> partials;
};

// Sections that rows [begin, end) of the query see; {0, 0} for none.
std::pair<int, int> sections(const Call &c, int row, int begin, int end) {
    int low = c.lowest(row, begin / c.group, (end - 1) / c.group + 1), high = c.high(row, (end - 1) / c.group);
    if (high <= low) return {0, 0};
    return {c.g.strip_of(low) / kSectionStrips, c.g.strip_of(high - 1) / kSectionStrips + 1};
}

void plan(const Call &c, Plan &p) {
    p.items.clear(), p.folds.clear();
    for (int r = 0; r < c.rows; ++r) {
        int flat = c.length(r) * c.group, parts = (flat + kItemRows - 1) / kItemRows;
        for (int i = 0; i < parts; ++i) {
            int begin = (int)((long)flat * i / parts), end = (int)((long)flat * (i + 1) / parts);
            auto [s0, s1] = sections(c, r, begin, end);
            for (int h = 0; h < c.g.heads; ++h) p.items.push_back({r, h, begin, end, s0, s1, -1});
        }
    }
    // Where the rows alone would leave threads idle, sections become items of their own, folded afterwards.
    if ((int)p.items.size() >= 3 * thread_count() || thread_count() == 1) return;
    std::vector<Item> whole;
    whole.swap(p.items);
    long used = 0;
    for (Item &it : whole) {
        if (it.section1 - it.section0 < 2) {
            p.items.push_back(it);
            continue;
        }
        it.partial = used;
        p.folds.push_back(it);
        for (int s = it.section0; s < it.section1; ++s) {
            p.items.push_back({it.row, it.head, it.begin, it.end, s, s + 1, used});
            used += State::floats(it.end - it.begin, c.g.dv_padded);
        }
    }
    if ((long)p.partials.size() < used) p.partials.resize(used);
}

// Every block that some token of the call sees must exist.
bool valid(const Call &c) {
    for (int r = 0; r < c.rows; ++r) {
        if (c.length(r) <= 0) continue;
        const int *table = c.table + r * c.table_width;
        int last = (c.kv_len[r] - 1) / c.g.block;
        if (c.first_position(r) < 0 || last >= c.table_width) return false;
        for (int b = c.low(r, 0) / c.g.block; b <= last; ++b)
            if (table[b] < 0 || table[b] >= c.blocks) return false;
    }
    return true;
}

template <class KSrc, class VSrc> void run(const Call &c) {
    static thread_local Plan mine;
    Plan &p = mine;
    plan(c, p);
    parallel((int)p.items.size(), [&](int i) { Worker<KSrc, VSrc>(c, p.items[i], p.partials.data()).run(); });
    parallel((int)p.folds.size(), [&](int i) {
        const Item &it = p.folds[i];
        const int rows = it.end - it.begin, dv = c.g.dv_padded;
        float *part = p.partials.data() + it.partial;
        State total(part);
        for (int s = it.section0 + 1; s < it.section1; ++s) fold(total, State(part += State::floats(rows, dv)), rows, dv);
        finish(c, it, total);
    });
}

}  // namespace

// Returns 1, having done nothing, when a row is longer than its cache or names a block that does not exist.
KC_API int kc_attention(const void *q, int q_bf16, long q_token, long q_head, const void *kv, int kv_bf16, long blocks, int block,
                        int heads, int d, int dv, const int *q_start, const int *kv_len, const int *table, long table_width,
                        int rows, int q_heads, float scale, int window, int first, float cap, const float *sinks, const uint8_t *tree,
                        int tree_width, const long *positions, int causal, void *out, long out_token, long out_head) {
    const long size = q_bf16 ? 2 : 4;
    Call c{Geometry(block, heads, d, dv), (const char *)q, (const char *)kv, q_token * size, q_head * size, !!q_bf16,
           q_start, kv_len, table, table_width, blocks, rows, q_heads / heads, window, first, !!causal, scale, cap, cap > 0 ? 1.0f : scale, sinks, tree, tree_width,
           positions, (char *)out, out_token * size, out_head * size};
    if (!valid(c)) return 1;
    if (!kv_bf16) return run<F32Source<NV>, F32Source<NV>>(c), 0;
#if KC_DOT
    if (q_bf16) return run<Bf16DotSource<NV>, Bf16DotSource<NV>>(c), 0;
#endif
    return run<Bf16Source<NV>, Bf16Source<NV>>(c), 0;
}
KC_REPLAYABLE(kc_attention)
