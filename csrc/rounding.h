// Weights in panels rounded to four bits, as `quantize` of kernels/native_weights.py rounds.
#pragma once
#include "products.h"

namespace {

// Columns k and k + 1 of the rows of one part of a panel; k is even.
INLINE void two_columns(const cl_weight& w, const char* panel, int64_t k, int part, V* to) {
    if (w.kind == CL_BF16) {
        U both = load_as<U>(panel + k / 2 * 64 + part * 4 * LANES);
        to[0] = bits<V>(both << 16);
        to[1] = bits<V>(both & 0xffff0000u);
        return;
    }
    for (int64_t i = 0; i < 2; ++i) {
        if (w.kind == CL_F32) to[i] = load_as<V>(panel + (k + i) * 64 + part * 4 * LANES);
        else if (w.kind == CL_F16) to[i] = from_half((const uint16_t*)panel + (k + i) * PANEL + part * LANES);
        else
            for (int row = 0; row < LANES; ++row)
                to[i][row] = weight_at(w, panel, part * LANES + row, k + i);
    }
}

// Writes 16 bits a lane, and gives what they stand for.
INLINE V put_half(char* to, V v) {
    uint16_t half[LANES];
    to_half(half, v);
    memcpy(to, half, sizeof half);
    return from_half(half);
}

// A group of a panel, from column `begin` on.
void round_group(const cl_weight& w, const char* panel, int64_t begin, char* to) {
    for (int part = 0; part < PARTS; ++part) {
        V values[GROUP];
        for (int k = 0; k < GROUP; k += 2) two_columns(w, panel, begin + k, part, values + k);
        V low = values[0], high = values[0];
        for (V v : values) low = v < low ? v : low, high = larger(v, high);
        // Codes are found for the scale and least that will be read.
        V least = put_half(to + 2 * PANEL + part * 2 * LANES, low);
        V scale = put_half(to + part * 2 * LANES, larger((high - least) / 15.0f, all(1e-7f)));
        U codes[GROUP];
        for (int k = 0; k < GROUP; ++k) {
            V code = (values[k] - least) / scale;
            code = larger(code > 15.0f ? all(15.0f) : code, all(0.0f));
            codes[k] = bits<U>(code + all(12582912.0f)) & 15;  // rounded to even
        }
        for (int quad = 0; quad < 4; ++quad) {
            U bytes = {};
            for (int i = 0; i < 4; ++i)
                bytes |= (codes[4 * quad + i] | codes[4 * quad + i + 16] << 4) << (8 * i);
            memcpy(to + 4 * PANEL + quad * 64 + part * 4 * LANES, &bytes, sizeof bytes);
        }
    }
}

struct Rounding {
    const cl_weight& w;
    char* to;

    static void work(Team&, void* argument, int thread, int threads, char*) {
        Rounding& job = *(Rounding*)argument;
        int64_t groups = job.w.cols / GROUP;
        for (Range r(panels_of(job.w.rows), thread, threads); r.begin < r.end; ++r.begin) {
            const char* panel = (const char*)job.w.data + r.begin * panel_bytes(job.w);
            char* to = job.to + r.begin * groups * Int4Group::BYTES;
            for (int64_t g = 0; g < groups; ++g)
                round_group(job.w, panel, g * GROUP, to + g * Int4Group::BYTES);
        }
    }
};

}  // namespace
