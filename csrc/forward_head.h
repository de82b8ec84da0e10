// The end of a pass: the head's product, and what is wanted of the logits.
#pragma once
#include "forward.h"

namespace {

// Logits of the tokens of this block among those asked for from `next` on; where to go on.
template <class K>
int64_t Forward<K>::head(Team& team, int64_t next) {
    int64_t kept = 0, wanted = p.greedy ? p.top : 0;
    for (; next < p.kept && kept < KEPT; ++next)
        if (p.keep[next] >= first && p.keep[next] < first + count) kept_rows[kept++] = next;
    if (!kept) return next;
    bool rescores = m.rescore.kind != CL_NONE;
    int forms = form_of(m.head) | (rescores ? form_of(m.rescore) : 0);
    for (Range r = share(kept); r.begin < r.end; ++r.begin) {
        float* to = in.plain + r.begin * in.stride;
        absorb(p.keep[kept_rows[r.begin]] - first, to);
        norm(to, m.norm, m.hidden, to);
        prepare(in, r.begin, 0, m.hidden, forms);
    }
    barrier(team);
    Range panels = share(panels_of(m.vocabulary));
    product(m.head, in, kept, logits, vocabulary, panels.begin, panels.end);
    for (int64_t j = 0; j < kept; ++j)
        for (int64_t i = panels.begin * PANEL; i < panels.end * PANEL; i += LANES) {
            V v = load(logits + j * vocabulary + i);
            if (m.head.bias) v += load(m.head.bias + i);
            store(logits + j * vocabulary + i, K::round(v));
        }
    barrier(team);
    for (Range r = share(kept * slices); (p.greedy || rescores) && r.begin < r.end; ++r.begin)
        scan_slice(r.begin / slices, r.begin % slices, rescores ? most(wanted, RESCORED) : wanted);
    barrier(team);
    if (rescores) rescore(team, kept, wanted);
    for (Range r = share(kept * slices); p.logits && r.begin < r.end; ++r.begin)
        write_logits(r.begin / slices, r.begin % slices);
    for (Range r = share(kept); p.greedy && r.begin < r.end; ++r.begin) choose(r.begin, wanted);
    barrier(team);
    return next;
}

template <class K>
void Forward<K>::scan_slice(int64_t j, int64_t s, int64_t top) {
    scan(logits + j * vocabulary, s * SLICE, least(m.vocabulary, (s + 1) * SLICE), top,
         scans[j * slices + s]);
}

// The most likely tokens' logits by the exact weights, and their slices read again.
template <class K>
void Forward<K>::rescore(Team& team, int64_t kept, int64_t wanted) {
    Scan merged;
    for (Range r = share(kept * RESCORED); r.begin < r.end; ++r.begin) {
        int64_t j = r.begin / RESCORED, i = r.begin % RESCORED;
        merge_scans(scans + j * slices, slices, RESCORED, merged);
        if (i >= merged.top.filled) continue;
        int64_t token = merged.top.tokens[i];
        cl_weight one = m.rescore;
        one.data = (const char*)one.data + token / PANEL * panel_bytes(one);
        float out[PANEL];
        product(one, in.from(j), 1, out, PANEL, 0, 1);
        float value = out[token % PANEL] + (one.bias ? one.bias[token] : 0);
        logits[j * vocabulary + token] = K::round(all(value))[0];
    }
    barrier(team);
    for (Range r = share(kept); r.begin < r.end; ++r.begin) {
        merge_scans(scans + r.begin * slices, slices, RESCORED, merged);
        for (int64_t i = 0; i < merged.top.filled; ++i)
            scan_slice(r.begin, merged.top.tokens[i] / SLICE, wanted);
    }
    barrier(team);
}

template <class K>
void Forward<K>::write_logits(int64_t j, int64_t s) {
    int64_t end = least(m.vocabulary, (s + 1) * SLICE);
    T* to = (T*)p.logits + kept_rows[j] * m.vocabulary;
    for (int64_t i = s * SLICE; i < end; i += LANES)
        store_some<K>(to + i, load(logits + j * vocabulary + i), end - i);
}

template <class K>
void Forward<K>::choose(int64_t j, int64_t wanted) {
    Scan found;
    merge_scans(scans + j * slices, slices, wanted, found);
    int64_t to = kept_rows[j];
    p.greedy[to] = found.highest - found.highest == 0 ? found.token : -1;
    p.highest[to] = found.highest;
    p.log_sum[to] = found.highest + logf(found.total);
    for (int64_t i = 0; i < wanted; ++i) {
        bool some = i < found.top.filled;
        p.top_tokens[to * wanted + i] = some ? found.top.tokens[i] : -1;
        p.top_logits[to * wanted + i] = some ? found.top.logits[i] : -HUGE_VALF;
    }
}

}  // namespace
