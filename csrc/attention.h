// Attention of one token over the slots that it sees: its own first, then chunks of slots with fixed
// borders, in order. So its bits don't depend on other tokens, on who computes which chunk, or on
// how much the cache could hold.
#pragma once
#include "threads.h"
#include "vector.h"

namespace {

using conflayers::Range;

constexpr int64_t CHUNK = 128;  // slots
constexpr int STATE = 16;       // floats before a state's sum

// A softmax under way, in memory: [0] the highest score, [1] the sum of weights, [STATE …] the
// weighted sum of values, `width` floats: a head's features rounded up to PANEL.
INLINE int64_t state_size(int64_t width) { return STATE + width; }

// Some slots of a chunk of one head's keys or values, widened: [CHUNK, width], from `first` on.
// Meanwhile `next`, what is read after it, is asked for: rows as these.
template <class K>
void widen(const typename K::T* from, const typename K::T* next, int64_t stride, Range slots,
           int64_t first, int64_t size, int64_t width, float* to) {
    for (int64_t s = slots.begin; s < slots.end; ++s) {
        for (int64_t d = 0; d < size; d += 64 / sizeof(*from))
            __builtin_prefetch(next + s * stride + d, 0, 2);
        for (int64_t d = 0; d < width; d += LANES)
            store(to + (s - first) * width + d, load_some<K>(from + s * stride + d, size - d));
    }
}

// Scores of one query at slots begin … end, counted from the chunk's first; -infinity elsewhere.
void score(const float* query, int64_t width, const float* keys, int64_t begin, int64_t end,
           float scaling, float* scores) {
    for (int64_t s = 0; s < CHUNK; s += LANES) {
        V out = all(-HUGE_VALF);
        if (s < end && s + LANES > begin) {
            V sums[LANES] = {};
            for (int64_t d = 0; d < width; d += LANES) {
                V q = load(query + d);
                EACH(i, LANES)
                    sums[i] = fma(q, load(keys + (s + i) * width + d), sums[i]);
            }
            V found = sums_of(sums) * scaling;
            I slot;
            for (int i = 0; i < LANES; ++i) slot[i] = int32_t(s) + i;
            out = slot >= int32_t(begin) - I{} ? slot < int32_t(end) - I{} ? found : out : out;
        }
        store(scores + s, out);
    }
}

// Weighted sums of values by HEADS queries' weights [HEADS, CHUNK], VECTORS vectors of features.
template <int HEADS, int VECTORS>
void weigh(const float* weights, const float* values, int64_t width, int64_t begin, int64_t end,
           float* out, int64_t stride) {
    V sums[HEADS][VECTORS] = {};
    for (int64_t s = begin; s < end; ++s) {
        EACH(h, HEADS) {
            V weight = all(weights[h * CHUNK + s]);
            EACH(i, VECTORS)
                sums[h][i] = fma(weight, load(values + s * width + i * LANES), sums[h][i]);
        }
    }
    EACH(h, HEADS)
        EACH(i, VECTORS) store(out + h * stride + i * LANES, sums[h][i]);
}

template <int HEADS>
void chunk_heads(const float* query, int64_t width, const float* keys, const float* values,
                 int64_t begin, int64_t end, float scaling, float* states) {
    int64_t stride = state_size(width);
    float scores[HEADS * CHUNK];
    for (int h = 0; h < HEADS; ++h) {
        float* mine = scores + h * CHUNK;
        score(query + h * width, width, keys, begin, end, scaling, mine);
        V high = load(mine), total = {};
        for (int64_t i = LANES; i < CHUNK; i += LANES) high = larger(load(mine + i), high);
        float highest = largest(high);
        for (int64_t i = 0; i < CHUNK; i += LANES) {
            V weight = exponential(load(mine + i) - highest);
            total += weight;
            store(mine + i, weight);
        }
        states[h * stride] = highest;
        states[h * stride + 1] = sum(total);
    }
    int64_t d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES)
        weigh<HEADS, 4>(scores, values + d, width, begin, end, states + STATE + d, stride);
    for (; d < width; d += LANES)
        weigh<HEADS, 1>(scores, values + d, width, begin, end, states + STATE + d, stride);
}

// The states of a token's `heads` queries that share a key, at slots begin … end of a chunk.
void chunk_states(const float* query, int64_t heads, int64_t width, const float* keys,
                  const float* values, int64_t begin, int64_t end, float scaling, float* states) {
    for (int64_t h = 0, left; (left = heads - h) > 0;) {
        const float* q = query + h * width;
        float* out = states + h * state_size(width);
        constexpr int MOST_HEADS = LANES == 16 ? 4 : 2;  // that registers hold
        int64_t count = left < MOST_HEADS ? left : MOST_HEADS;
        static constexpr decltype(&chunk_heads<1>) table[] = {
            chunk_heads<1>, chunk_heads<2>, chunk_heads<LANES == 16 ? 3 : 2>, chunk_heads<MOST_HEADS>};
        table[count - 1](q, width, keys, values, begin, end, scaling, out);
        h += count;
    }
}

// The state after the token's own slot alone.
template <class K>
void own_state(const float* query, int64_t size, int64_t width, const typename K::T* key,
               const typename K::T* value, float scaling, float* state) {
    V total = {};
    for (int64_t d = 0; d < width; d += LANES) {
        total = fma(load(query + d), load_some<K>(key + d, size - d), total);
        store(state + STATE + d, load_some<K>(value + d, size - d));
    }
    state[0] = sum(total) * scaling;
    state[1] = 1;
}

// Adds the states of a further chunk, for all heads.
void merge(float* state, const float* more, int64_t width, int64_t heads) {
    for (; heads > 0; --heads, state += state_size(width), more += state_size(width)) {
        float high = more[0] > state[0] ? more[0] : state[0];
        V old = exponential(all(state[0] - high)), fresh = exponential(all(more[0] - high));
        state[0] = high;
        state[1] = fma(all(more[1]), fresh, state[1] * old)[0];
        for (int64_t d = STATE; d < STATE + width; d += LANES)
            store(state + d, fma(load(more + d), fresh, load(state + d) * old));
    }
}

// What the state says, rounded: `size` numbers.
template <class K>
void finish(const float* state, int64_t size, float* out) {
    float inverse = 1 / state[1];
    for (int64_t d = 0; d < size; d += LANES)
        store_some<F32>(out + d, K::round(load(state + STATE + d) * inverse), size - d);
}

}  // namespace
