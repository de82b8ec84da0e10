// Products with weights in panels. Lanes are outputs, and each output of each token has one running
// sum over the inputs, in order: its bits don't depend on how many tokens or panels there are.
#pragma once
#include "interface.h"
#include "vector.h"

namespace {

// The inputs of a product, [tokens, stride] in the form that the weight takes.
struct Inputs {
    float* plain;       // for float32, float16, and bfloat16 without instructions for it
    uint16_t* brain;    // bfloat16
    int8_t* codes;      // for int4 and int8: value = scale code, by GROUP
    float *scales, *sums;  // [tokens, stride / GROUP]; sums of the values of a group
    int32_t* code_sums;
    int64_t stride;

    Inputs from(int64_t token) const {
        int64_t at = token * stride, groups = at / GROUP;
        return {plain + at, brain + at, codes + at, scales + groups, sums + groups, code_sums + groups,
                stride};
    }
};

// Takes arrays one behind the other; without memory it only counts.
struct Arena {
    char* base;
    size_t used = 0;
    template <class T>
    T* take(int64_t count) {
        size_t at = used;
        used += (size_t(count) * sizeof(T) + 127) / 64 * 64;  // vectors may reach over the end
        return base ? (T*)(base + at) : nullptr;
    }
    Inputs inputs(int64_t tokens, int64_t size) {
        int64_t stride = (size + GROUP - 1) / GROUP * GROUP, all = tokens * stride;
        return {take<float>(all), take<uint16_t>(all), take<int8_t>(all), take<float>(all / GROUP),
                take<float>(all / GROUP), take<int32_t>(all / GROUP), stride};
    }
};

#if defined(__AVX512BF16__)
constexpr bool HAS_BRAIN = true;
#else
constexpr bool HAS_BRAIN = false;
#endif

// How one step of a kind of weight is read, and added to a running sum.
struct StepF32 {
    static constexpr int COLUMNS = 1, BYTES = 64;
    typedef float In;
    typedef V Weight;
    typedef V Input;
    static INLINE const In* inputs(const Inputs& x) { return x.plain; }
    static INLINE V load(const char* w, int part) { return load_as<V>(w + part * 4 * LANES); }
    static INLINE V spread(const float* x) { return all(*x); }
    static INLINE V add(V to, V w, V x) { return fma(w, x, to); }
};

struct StepF16 : StepF32 {
    static constexpr int BYTES = 32;
    static INLINE V load(const char* w, int part) {
        return from_half((const uint16_t*)w + part * LANES);
    }
};

#if defined(__AVX512BF16__)
struct StepBF16 {
    static constexpr int COLUMNS = 2, BYTES = 64;
    typedef uint16_t In;
    typedef U Weight;
    typedef U Input;
    static INLINE const In* inputs(const Inputs& x) { return x.brain; }
    static INLINE U load(const char* w, int) { return load_as<U>(w); }
    static INLINE U spread(const uint16_t* x) { return all_bits(load_as<uint32_t>(x)); }
    static INLINE V add(V to, U w, U x) {
        return (V)_mm512_dpbf16_ps((__m512)to, bits<__m512bh>(w), bits<__m512bh>(x));
    }
};
#else
struct StepBF16 {
    static constexpr int COLUMNS = 2, BYTES = 64;
    struct Pair {
        V even, odd;
    };
    typedef float In;
    typedef Pair Weight;
    typedef Pair Input;
    static INLINE const In* inputs(const Inputs& x) { return x.plain; }
    static INLINE Pair load(const char* w, int part) {
        U both = load_as<U>(w + part * 4 * LANES);
        return {bits<V>(both << 16), bits<V>(both & 0xffff0000u)};
    }
    static INLINE Pair spread(const float* x) { return {all(x[0]), all(x[1])}; }
    static INLINE V add(V to, Pair w, Pair x) { return fma(w.odd, x.odd, fma(w.even, x.even, to)); }
};
#endif

constexpr int AHEAD = 2048;  // bytes that are asked for before they are needed

// PANELS panels by TOKENS tokens, over columns begin … end; `more`: on top of what y holds.
template <class S, int PANELS, int TOKENS>
__attribute__((noinline)) void tile(const char* w, int64_t panel, const typename S::In* x,
                                    int64_t stride, int64_t begin, int64_t end, float* y,
                                    int64_t rows, bool more) {
    V sums[PANELS][TOKENS][PARTS];
    EACH(p, PANELS)
        EACH(t, TOKENS)
            EACH(i, PARTS)
                sums[p][t][i] = more ? load(y + t * rows + p * PANEL + i * LANES) : V{};
    for (int64_t k = begin; k < end; k += S::COLUMNS) {
        const char* here = w + k / S::COLUMNS * S::BYTES;
        EACH(p, PANELS) {
            __builtin_prefetch(here + p * panel + AHEAD);
            typename S::Weight weight[PARTS];
            EACH(i, PARTS) weight[i] = S::load(here + p * panel, i);
            EACH(t, TOKENS) {
                typename S::Input input = S::spread(x + t * stride + k);
                EACH(i, PARTS) sums[p][t][i] = S::add(sums[p][t][i], weight[i], input);
            }
        }
    }
    EACH(p, PANELS)
        EACH(t, TOKENS)
            EACH(i, PARTS)
                store(y + t * rows + p * PANEL + i * LANES, sums[p][t][i]);
}

constexpr int WIDEST = LANES == 16 ? 5 : 4;         // tokens of a tile
constexpr int TALLEST = LANES == 16 ? 4 : 2;        // panels of a tile
constexpr int64_t BLOCK = 256 << 10;                // bytes of weights that stay in a cache

template <class S, int PANELS>
void tiles(const char* w, int64_t columns, const Inputs& in, int64_t tokens, float* y,
           int64_t rows) {
    int64_t panel = (columns + S::COLUMNS - 1) / S::COLUMNS * S::BYTES;
    int64_t step = columns;
    if (tokens > WIDEST) {
        step = BLOCK / (PANELS * S::BYTES) * S::COLUMNS;
        if (step > columns) step = columns;
    }
    for (int64_t k = 0; k < columns; k += step) {
        int64_t end = k + step < columns ? k + step : columns;
        for (int64_t t = 0, left; (left = tokens - t) > 0;) {
            // As even as can be: 6 tokens are 3 and 3.
            int64_t tiles = (left + WIDEST - 1) / WIDEST, count = (left + tiles - 1) / tiles;
            const typename S::In* x = S::inputs(in) + t * in.stride;
            float* out = y + t * rows;
            using Tile = decltype(&tile<S, PANELS, 1>);
            static constexpr Tile table[] = {tile<S, PANELS, 1>, tile<S, PANELS, 2>, tile<S, PANELS, 3>,
                                             tile<S, PANELS, 4>, tile<S, PANELS, WIDEST>};
            table[count - 1](w, panel, x, in.stride, k, end, out, rows, k > 0);
            t += count;
        }
    }
}

template <class S>
void float_panels(const char* w, int64_t columns, const Inputs& in, int64_t tokens, float* y,
                  int64_t rows, int64_t begin, int64_t end) {
    int64_t panel = (columns + S::COLUMNS - 1) / S::COLUMNS * S::BYTES;
    int64_t p = begin;
    // With 16 registers there is no room for more.
    bool tall = LANES == 16 || tokens <= 2;
    for (; tall && p + TALLEST <= end; p += TALLEST)
        tiles<S, TALLEST>(w + p * panel, columns, in, tokens, y + p * PANEL, rows);
    for (; tall && p + 2 <= end; p += 2)
        tiles<S, 2>(w + p * panel, columns, in, tokens, y + p * PANEL, rows);
    for (; p < end; ++p) tiles<S, 1>(w + p * panel, columns, in, tokens, y + p * PANEL, rows);
}

// Weights in four or eight bits: sums of a group are exact integers; groups are added in order.
struct Int4Group {
    static constexpr int BYTES = 64 + 256;
    static constexpr bool HAS_LEAST = true;
    static constexpr int OFFSET = 0;
    static INLINE void load(const char* w, int part, U* codes) {
        EACH(j, 4) {
            U both = load_as<U>(w + 64 + j * 64 + part * 4 * LANES);
            codes[j] = both & 0x0f0f0f0fu;
            codes[j + 4] = (both >> 4) & 0x0f0f0f0fu;
        }
    }
    static INLINE I dot(I to, U code, U x) { return dot_int4(to, code, x); }
    static INLINE I total(I low, I high) { return total_int4(low, high); }
};

struct Int8Group {
    static constexpr int BYTES = 32 + 512;
    static constexpr bool HAS_LEAST = false;
    static constexpr int OFFSET = INT8_OFFSET;
    static INLINE void load(const char* w, int part, U* codes) {
        EACH(j, 8) codes[j] = load_as<U>(w + 32 + j * 64 + part * 4 * LANES);
    }
    static INLINE I dot(I to, U code, U x) { return dot_int8(to, code, x); }
    static INLINE I total(I low, I high) { return low + high; }
};

template <class G, int TOKENS>
__attribute__((noinline)) void group_tile(const char* w, int64_t columns, const Inputs& in,
                                          float* y, int64_t rows) {
    int64_t groups = columns / GROUP, ld = in.stride / GROUP;
    const int8_t* x = in.codes;
    const float *scales = in.scales, *x_sums = in.sums;
    const int32_t* code_sums = in.code_sums;
    // For more tokens, one part of the panel after the other: 16 registers have no room for both.
    constexpr int SPAN = TOKENS <= 2 ? PARTS : 1;
    for (int part = 0; part < PARTS; part += SPAN) {
        V sums[TOKENS][SPAN] = {};
        const char* here = w;
        for (int64_t g = 0; g < groups; ++g, here += G::BYTES) {
            for (int ahead = 0; ahead < G::BYTES; ahead += 64) __builtin_prefetch(here + AHEAD + ahead);
            EACH(i, SPAN) {
                U codes[8];
                G::load(here, part + i, codes);
                const uint16_t* halves = (const uint16_t*)here + (part + i) * LANES;
                V scale = from_half(halves);
                V least = G::HAS_LEAST ? from_half(halves + PANEL) : V{};
                EACH(t, TOKENS) {
                    I low = G::OFFSET ? G::OFFSET * code_sums[t * ld + g] - I{} : I{}, high = I{};
#pragma GCC unroll 8
                    for (int j = 0; j < 8; j += 2) {
                        const int8_t* at = x + t * in.stride + g * GROUP + j * 4;
                        low = G::dot(low, codes[j], all_bits(load_as<uint32_t>(at)));
                        high = G::dot(high, codes[j + 1], all_bits(load_as<uint32_t>(at + 4)));
                    }
                    V whole = __builtin_convertvector(G::total(low, high), V);
                    sums[t][i] = fma(whole, scale * scales[t * ld + g], sums[t][i]);
                    if (G::HAS_LEAST) sums[t][i] = fma(least, all(x_sums[t * ld + g]), sums[t][i]);
                }
            }
        }
        EACH(t, TOKENS)
            EACH(i, SPAN) store(y + t * rows + (part + i) * LANES, sums[t][i]);
    }
}

template <class G>
void group_panels(const char* w, int64_t columns, const Inputs& in, int64_t tokens, float* y,
                  int64_t rows, int64_t begin, int64_t end) {
    int64_t panel = columns / GROUP * G::BYTES;
    for (int64_t p = begin; p < end; ++p) {
        const char* here = w + p * panel;
        for (int64_t t = 0, left; (left = tokens - t) > 0;) {
            float* out = y + t * rows + p * PANEL;
            int power = left >= 8 ? 3 : left >= 4 ? 2 : left >= 2, count = 1 << power;
            static constexpr decltype(&group_tile<G, 1>) table[] = {group_tile<G, 1>, group_tile<G, 2>,
                                                                    group_tile<G, 4>, group_tile<G, 8>};
            table[power](here, columns, in.from(t), out, rows);
            t += count;
        }
    }
}

INLINE int64_t panel_bytes(const cl_weight& w) {
    switch (w.kind) {
        case CL_F32: return w.cols * 64;
        case CL_BF16: return (w.cols + 1) / 2 * 64;
        case CL_F16: return w.cols * 32;
        case CL_INT4: return w.cols / GROUP * Int4Group::BYTES;
        default: return w.cols / GROUP * Int8Group::BYTES;
    }
}

INLINE float half_at(const char* at) {
    uint16_t some[LANES] = {load_as<uint16_t>(at)};
    return from_half(some)[0];
}

// One number of a panel.
float weight_at(const cl_weight& w, const char* panel, int64_t row, int64_t column) {
    int64_t rest = column % GROUP, place = rest / 4 * 64 + row * 4 + rest % 4;
    if (w.kind == CL_F32) return load_as<float>(panel + (column * PANEL + row) * 4);
    if (w.kind == CL_F16) return half_at(panel + (column * PANEL + row) * 2);
    if (w.kind == CL_BF16) {
        const char* at = panel + (column / 2 * 2 * PANEL + row * 2 + column % 2) * 2;
        return bits<float>(uint32_t(load_as<uint16_t>(at)) << 16);
    }
    const char* g = panel + column / GROUP * (w.kind == CL_INT4 ? Int4Group::BYTES : Int8Group::BYTES);
    if (w.kind == CL_INT8) return float(int8_t(g[32 + place])) * half_at(g + row * 2);
    int both = uint8_t(g[64 + place % 256]);
    return fmaf(float(rest < 16 ? both & 15 : both >> 4), half_at(g + row * 2), half_at(g + 32 + row * 2));
}

INLINE int64_t panels_of(int64_t rows) { return (rows + PANEL - 1) / PANEL; }
INLINE int64_t padded(int64_t size) { return (size + GROUP - 1) / GROUP * GROUP; }

// Panels begin … end of a product: y [tokens, rows], rows a multiple of PANEL.
void product(const cl_weight& weight, const Inputs& in, int64_t tokens, float* y, int64_t rows,
             int64_t begin, int64_t end) {
    const char* w = (const char*)weight.data;
    int64_t columns = weight.cols;
    switch (weight.kind) {
        case CL_F32: return float_panels<StepF32>(w, columns, in, tokens, y, rows, begin, end);
        case CL_BF16: return float_panels<StepBF16>(w, columns, in, tokens, y, rows, begin, end);
        case CL_F16: return float_panels<StepF16>(w, columns, in, tokens, y, rows, begin, end);
        case CL_INT4: return group_panels<Int4Group>(w, columns, in, tokens, y, rows, begin, end);
        case CL_INT8: return group_panels<Int8Group>(w, columns, in, tokens, y, rows, begin, end);
    }
}

// Which of the forms of its inputs a weight takes.
enum Form { PLAIN = 1, BRAIN = 2, CODES = 4 };
INLINE int form_of(const cl_weight& weight) {
    if (weight.kind == CL_INT4 || weight.kind == CL_INT8) return CODES;
    return weight.kind == CL_BF16 && HAS_BRAIN ? BRAIN : PLAIN;
}

void quantize(const float* from, int64_t begin, int64_t end, const Inputs& in, int64_t token) {
    int8_t* codes = in.codes + token * in.stride;
    int64_t first = token * (in.stride / GROUP);
    for (int64_t g = begin / GROUP; g < end / GROUP; ++g) {
        // Compared as integers, NaN is above infinity: neither is lost.
        U top = {};
        for (int i = 0; i < GROUP; i += LANES) {
            U here = bits<U>(load(from + g * GROUP + i)) & 0x7fffffffu;
            top = here > top ? here : top;
        }
        uint32_t highest = 0;
        for (int i = 0; i < LANES; ++i) highest = top[i] > highest ? top[i] : highest;
        float most = bits<float>(highest), scale = most * (1.0f / 127);
        // Below this the inverse is no number; such values are as good as zeros.
        float inverse = most > 1e-30f && most - most == 0 ? 127 / most : 0;
        I sum = {};
        for (int i = 0; i < GROUP; i += LANES) {
            V scaled = load(from + g * GROUP + i) * inverse;
            V whole = inverse != 0 ? scaled + all(12582912.0f) : all(12582912.0f);
            I code = bits<I>(whole) - 0x4b400000;
            sum += code;
            for (int j = 0; j < LANES; ++j) codes[g * GROUP + i + j] = int8_t(code[j]);
        }
        int32_t total = 0;
        for (int i = 0; i < LANES; ++i) total += sum[i];
        in.scales[first + g] = scale;
        in.sums[first + g] = scale * float(total);
        in.code_sums[first + g] = total;
    }
}

// Turns numbers `begin` … `end` of in.plain, rounded to the model's kind, into the forms that are
// wanted; `begin` is a multiple of GROUP. Up to the end of the last group are zeros.
void prepare(const Inputs& in, int64_t token, int64_t begin, int64_t end, int forms) {
    float* from = in.plain + token * in.stride;
    int64_t whole = padded(end);
    for (int64_t i = end; i < whole; ++i) from[i] = 0;
    if (forms & BRAIN)
        for (int64_t i = begin; i < whole; i += LANES)
            BF16::store(in.brain + token * in.stride + i, load(from + i));
    if (forms & CODES) quantize(from, begin, whole, in, token);
}

}  // namespace
