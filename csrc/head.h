// What is read of the logits: the highest, the sum of exponentials, the most likely tokens.
#pragma once
#include "vector.h"

namespace {

constexpr int MOST = 32;        // tokens that may be asked for
constexpr int RESCORED = 16;    // tokens whose logits are computed again
constexpr int64_t SLICE = 1024;  // logits of a slice

// The most likely tokens so far, the first of equals first.
struct Top {
    int64_t size, filled;
    int64_t tokens[MOST];
    float logits[MOST];

    void reset(int64_t most) {
        size = most;
        filled = 0;
    }
    INLINE float least() const { return filled < size ? -HUGE_VALF : logits[size - 1]; }
    void add(int64_t token, float logit) {
        if (filled == size && !(logit > logits[size - 1])) return;
        int64_t i = filled < size ? filled++ : size - 1;
        for (; i > 0 && logit > logits[i - 1]; --i) {
            tokens[i] = tokens[i - 1];
            logits[i] = logits[i - 1];
        }
        tokens[i] = token;
        logits[i] = logit;
    }
};

// Of one slice, or of all of them in order.
struct Scan {
    float highest, total;  // NaN where a logit is; sum of exponentials less the highest
    int64_t token;
    Top top;
};

// Logits begin … end of a row; behind `end`, up to a whole vector, they may be overwritten.
void scan(float* logits, int64_t begin, int64_t end, int64_t most, Scan& out) {
    for (int64_t i = end; i % LANES; ++i) logits[i] = -HUGE_VALF;
    V high = all(-HUGE_VALF), bad = {}, total = {};
    for (int64_t i = begin; i < end; i += LANES) {
        V v = load(logits + i);
        high = larger(v, high);
        bad += v - v == V{} ? V{} : v != v ? all(1.0f) : V{};
    }
    float highest = largest(high);
    out.highest = sum(bad) > 0 ? nanf("") : highest;
    out.token = begin;
    for (int64_t i = begin; i < end; ++i)
        if (logits[i] == highest) {
            out.token = i;
            break;
        }
    if (highest > -HUGE_VALF)
        for (int64_t i = begin; i < end; i += LANES) total += exponential(load(logits + i) - highest);
    out.total = sum(total);
    out.top.reset(most);
    if (!most) return;
    for (int64_t i = begin; i < end; i += LANES) {
        if (out.top.filled == most && !(largest(load(logits + i)) > out.top.least())) continue;
        for (int64_t j = i; j < end && j < i + LANES; ++j) out.top.add(j, logits[j]);
    }
}

void merge_scans(const Scan* slices, int64_t count, int64_t most, Scan& out) {
    out = slices[0];
    for (int64_t i = 1; i < count; ++i) {
        const Scan& next = slices[i];
        if (next.highest != next.highest) out.highest = next.highest;
        if (next.highest > out.highest) {
            out.highest = next.highest;
            out.token = next.token;
        }
    }
    out.total = 0;
    out.top.reset(most);
    for (int64_t i = 0; i < count; ++i) {
        const Scan& next = slices[i];
        if (next.total != 0)
            out.total += next.total * exponential(all(next.highest - out.highest))[0];
        for (int64_t j = 0; j < next.top.filled && j < most; ++j)
            out.top.add(next.top.tokens[j], next.top.logits[j]);
    }
}

}  // namespace
