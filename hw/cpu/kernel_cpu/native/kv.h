// Where the elements of the paged KV cache lie.
//
// A page is one block of one KV head, in strips of 16 tokens (the last one padded). A strip is its K, then its V:
//   K [D / 2][16] pairs (d, d + 1), or fp32 [D][16]; V [Dv / 16][8][16] pairs (token, token + 1), or fp32 [Dv / 16][16][16].
// So scores and outputs are plain matrix tiles with K and V as the B operand just as they lie.
#pragma once
#include <cstdint>

namespace kc {

constexpr int kStrip = 16;

struct Geometry {
    int block, heads, d, dv, dv_padded, strips;
    long k_strip, strip, page;  // in elements
    Geometry(int block, int heads, int d, int dv)
        : block(block), heads(heads), d(d), dv(dv), dv_padded((dv + 15) / 16 * 16), strips((block + kStrip - 1) / kStrip),
          k_strip((long)d * kStrip), strip(k_strip + (long)dv_padded * kStrip), page(strips * strip) {}

    int strip_of(int position) const { return position / block * strips + position % block / kStrip; }
};

}  // namespace kc
