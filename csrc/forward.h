// One pass of a model by a team of threads: each has a `Forward` of its own, over shared memory.
#pragma once
#include "attention.h"
#include "head.h"
#include "products.h"
#include "threads.h"

namespace {

using conflayers::Range;
using conflayers::Team;

constexpr int64_t TOKENS = 256;                      // of a pass at a time: bounds its memory
constexpr int64_t KEPT = 64;                         // tokens whose logits are computed at a time
constexpr int64_t TOGETHER = 16;                     // tokens that read a chunk of the cache together
constexpr int64_t ELEMENTS = 512;                    // of the MLP, at a time; a multiple of GROUP
constexpr int64_t MOST_STATES = int64_t(16) << 20;   // floats

INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class K>
class Forward {
    typedef typename K::T T;

  public:
    Forward(const cl_model& model, const cl_pass& pass, char* scratch, int number, int all)
        : m(model), p(pass), thread(number), threads(all), arena{scratch} {
        int64_t tokens = least(p.tokens, TOKENS), kept = least(p.kept, KEPT), longest = 0;
        width = (m.head_dim + PANEL - 1) / PANEL * PANEL;
        group = m.heads / m.kv_heads;
        state = state_size(width) * group;
        all_heads = m.heads + 2 * m.kv_heads;
        rows = panels_of(most(most(2 * m.intermediate, all_heads * m.head_dim), m.hidden)) * PANEL;
        x_stride = padded(m.hidden);
        slices = (m.vocabulary + SLICE - 1) / SLICE;
        vocabulary = panels_of(m.vocabulary) * PANEL;
        for (int64_t t = 0; t < p.tokens; ++t) longest = most(longest, p.positions[t]);
        chunks = (longest + CHUNK - 1) / CHUNK;
        int64_t each = tokens * m.kv_heads * chunks * state, items = (tokens + TOGETHER - 1) / TOGETHER;
        split = threads > 1 && items * m.kv_heads < 4 * threads && each <= MOST_STATES;
        in = arena.inputs(tokens, most(most(m.hidden, m.intermediate), m.heads * m.head_dim));
        x = arena.take<float>(tokens * x_stride);
        y = arena.take<float>(tokens * rows);
        query = arena.take<float>(tokens * m.heads * width);
        // Of each thread: a chunk's keys and values, states under way, one more.
        int64_t own_size = 2 * CHUNK * width + (TOGETHER + 1) * state;
        keys = arena.take<float>(threads * own_size) + thread * own_size;
        states = arena.take<float>(split ? each : 0);
        logits = arena.take<float>(kept * vocabulary);
        scans = arena.take<Scan>(kept * slices);
    }

    size_t bytes() const { return arena.used; }

    void run(Team& team) {
        for (first = 0; first < p.tokens; first += TOKENS) {
            count = least(TOKENS, p.tokens - first);
            find_groups();
            residual_bias = residual_norm = nullptr;
            embedded = pending = false;
            for (index = 0; index < m.depth; ++index) {
                layer = m.layers + index;
                if (p.runs[2 * index]) attention(team);
                if (p.runs[2 * index + 1]) mlp(team);
            }
            for (Range r = share(count); !embedded && r.begin < r.end; ++r.begin)
                begin(first + r.begin, x + r.begin * x_stride);
            barrier(team);
            for (int64_t next = 0; next < p.kept;) next = head(team, next);
        }
    }

  private:
    Range share(int64_t items) const { return Range(items, thread, threads); }

    void attention(Team& team) {
        enter(layer->norms[CL_BEFORE_ATTENTION], form_of(layer->qkv), 2 * index);
        barrier(team);
        multiply(layer->qkv);
        barrier(team);
        place_heads();
        barrier(team);
        attend(team);
        barrier(team);
        multiply(layer->output);
        barrier(team);
        residual_bias = layer->output.bias;
        residual_norm = layer->norms[CL_AFTER_ATTENTION];
    }

    void mlp(Team& team) {
        enter(layer->norms[CL_BEFORE_MLP], form_of(layer->gate_up), 2 * index + 1);
        barrier(team);
        multiply(layer->gate_up);
        barrier(team);
        activate();
        barrier(team);
        multiply(layer->down);
        barrier(team);
        residual_bias = layer->down.bias;
        residual_norm = layer->norms[CL_AFTER_MLP];
    }

    void multiply(const cl_weight& weight) {
        Range r = share(panels_of(weight.rows));
        product(weight, in, count, y, rows, r.begin, r.end);
    }

    // The residual stream of token t before the first sub-layer that runs.
    void begin(int64_t t, float* out) const {
        if (!p.entry) return embed(p.ids[t], out);
        const T* from = (const T*)p.entry + t * m.hidden;
        for (int64_t i = 0; i < x_stride; i += LANES) store(out + i, load_some<K>(from + i, m.hidden - i));
    }

    void embed(int64_t token, float* out) const {
        const cl_weight& e = m.embedding;
        const T* row = (const T*)e.data + token * e.cols;
        const char* panel = (const char*)e.data + token / PANEL * panel_bytes(e);
        for (int64_t i = 0; i < e.cols && !e.plain; ++i) out[i] = weight_at(e, panel, token % PANEL, i);
        for (int64_t i = 0; i < x_stride; i += LANES) {
            V v = e.plain ? load_some<K>(row + i, e.cols - i) : load_some<F32>(out + i, e.cols - i);
            store(out + i, K::round(v));
        }
    }

    // `size` numbers normed and rounded; there need be no whole vectors of them, but of weights.
    void norm(const float* from, const float* weight, int64_t size, float* to) const {
        V squares[2] = {};
        for (int64_t i = 0; i < size; i += LANES) {
            V v = load_some<F32>(from + i, size - i);
            squares[i / LANES % 2] = fma(v, v, squares[i / LANES % 2]);
        }
        float scale = 1 / sqrtf(sum(squares[0] + squares[1]) / float(size) + float(m.epsilon));
        for (int64_t i = 0; i < size; i += LANES) {
            V v = load_some<F32>(from + i, size - i) * scale;
            if (!m.norm_rounds_last) v = K::round(v);
            store_some<F32>(to + i, K::round(load(weight + i) * v), size - i);
        }
    }

    // The residual stream of token t with the last product's sums added, into `to`.
    void absorb(int64_t t, float* to) {
        float *from = x + t * x_stride, *sums = y + t * rows;
        for (int64_t i = 0; pending && i < m.hidden; i += LANES) {
            V v = load(sums + i);
            store(sums + i, K::round(residual_bias ? v + load(residual_bias + i) : v));
        }
        if (pending && residual_norm) norm(sums, residual_norm, m.hidden, sums);
        for (int64_t i = 0; i < m.hidden; i += LANES) {
            V v = load_some<F32>(from + i, m.hidden - i);
            store_some<F32>(to + i, pending ? K::round(v + load(sums + i)) : v, m.hidden - i);
        }
    }

    // The residual stream brought up to date, and the inputs of the next product.
    void enter(const float* weight, int form, int64_t sub_layer) {
        T* kept = p.states ? (T*)p.states[sub_layer] : nullptr;
        for (Range r = share(count); r.begin < r.end; ++r.begin) {
            float *mine = x + r.begin * x_stride, *to = in.plain + r.begin * in.stride;
            if (embedded) absorb(r.begin, mine);
            else begin(first + r.begin, mine);
            for (int64_t i = 0; kept && i < m.hidden; i += LANES)
                store_some<K>(kept + (first + r.begin) * m.hidden + i, load(mine + i), m.hidden - i);
            if (weight) norm(mine, weight, m.hidden, to);
            else memcpy(to, mine, size_t(m.hidden) * 4);
            prepare(in, r.begin, 0, m.hidden, form);
        }
        embedded = pending = true;
    }

    T* slot(void* const* memory, int64_t t, int64_t kv, int64_t at) const {
        return (T*)memory[index] + p.sequences[first + t] * p.sequence_stride + kv * p.head_stride +
               at * p.slot_stride;
    }

    // Biases, norms and rotation of queries and keys; keys and values are written to the cache.
    void place_heads() {
        int64_t d = m.head_dim;
        const float *query_norm = layer->norms[CL_QUERY], *key_norm = layer->norms[CL_KEY];
        bool whole = query_norm && !m.norm_per_head;  // such a norm needs all heads
        int64_t parts = whole ? 1 : all_heads, heads = all_heads / parts;
        for (Range r = share(count * parts); r.begin < r.end; ++r.begin) {
            int64_t t = r.begin / parts, h = r.begin % parts;
            float* at = y + t * rows + h * d;
            for (int64_t i = 0; i < heads * d; i += LANES) {
                V v = load_some<F32>(at + i, heads * d - i);
                if (layer->qkv.bias) v += load_some<F32>(layer->qkv.bias + h * d + i, heads * d - i);
                store_some<F32>(at + i, K::round(v), heads * d - i);
            }
            if (whole) {
                norm(at, query_norm, m.heads * d, at);
                norm(at + m.heads * d, key_norm, m.kv_heads * d, at + m.heads * d);
            }
            for (int64_t i = h; i < h + heads; ++i, at += d) {
                const float* weight = i < m.heads ? query_norm : key_norm;
                bool is_value = i >= m.heads + m.kv_heads;
                if (m.norm_per_head && weight && !is_value) norm(at, weight, d, at);
                if (!is_value) rotate(at, first + t);
                place_head(at, t, i);
            }
        }
    }

    void place_head(const float* at, int64_t t, int64_t h) {
        int64_t d = m.head_dim, kv = (h - m.heads) % m.kv_heads, own = p.slots[first + t];
        float* to = query + (t * m.heads + h) * width;
        if (h < m.heads) {
            for (int64_t i = 0; i < width; i += LANES) store(to + i, load_some<F32>(at + i, d - i));
            return;
        }
        T* cached = slot(h < m.heads + m.kv_heads ? p.keys : p.values, t, kv, own);
        for (int64_t i = 0; i < d; i += LANES)
            store_some<K>(cached + i, load_some<F32>(at + i, d - i), d - i);
    }

    void rotate(float* at, int64_t token) const {
        int64_t half = m.rotary_dim / 2, row = p.rotary_rows[token] * m.rotary_dim;
        const float *cosine = p.cosine + row, *sine = p.sine + row;
        for (int64_t i = 0; i < half; i += LANES) {
            auto some = [&](const float* from) { return load_some<F32>(from + i, half - i); };
            V low = some(at), high = some(at + half);
            V new_low = K::round(low * some(cosine)) - K::round(high * some(sine));
            V new_high = K::round(high * some(cosine + half)) + K::round(low * some(sine + half));
            store_some<F32>(at + i, K::round(new_low), half - i);
            store_some<F32>(at + half + i, K::round(new_high), half - i);
        }
    }

    // Up to TOGETHER tokens of one sequence share the widened keys and values: where they start.
    void find_groups() {
        groups = 0;
        for (int64_t t = 0; t < count; ++t) {
            bool same = t && p.sequences[first + t] == p.sequences[first + t - 1];
            if (!same || t - starts[groups - 1] == TOGETHER) starts[groups++] = t;
        }
        starts[groups] = count;
    }

    // The slots of chunk c that a token sees besides its own.
    Range seen(int64_t t, int64_t c) const {
        int64_t position = p.positions[first + t];
        int64_t from = layer->window ? most(0, position - layer->window + 1) : 0;
        return Range(most(from, c * CHUNK), least(position, (c + 1) * CHUNK));
    }

    // Tokens begin … end at chunk c of head kv: their states, in `out`, or added to `sums`.
    void attend_chunk(int64_t begin, int64_t end, int64_t kv, int64_t c, float* out, float* sums) {
        Range all(INT64_MAX, 0);
        for (int64_t t = begin; t < end; ++t) {
            Range one = seen(t, c);
            if (one.begin < one.end) all = Range(least(all.begin, one.begin), most(all.end, one.end));
        }
        if (all.begin >= all.end) return;
        const T *key = slot(p.keys, begin, kv, 0), *value = slot(p.values, begin, kv, 0);
        // Behind the last chunk of a head comes the first one of the next.
        bool last = all.end - c * CHUNK < CHUNK || c + 1 == chunks;
        const T* next = key + (last ? p.head_stride - all.begin * p.slot_stride : CHUNK * p.slot_stride);
        if (last && kv + 1 == m.kv_heads) next = key;
        float* values = keys + CHUNK * width;
        widen<K>(key, value, p.slot_stride, all, c * CHUNK, m.head_dim, width, keys);
        widen<K>(value, next, p.slot_stride, all, c * CHUNK, m.head_dim, width, values);
        for (int64_t t = begin; t < end; ++t) {
            Range r = seen(t, c);
            if (r.begin >= r.end) continue;
            float* to = sums ? out : out + t * m.kv_heads * chunks * state;
            chunk_states(query + (t * m.heads + kv * group) * width, group, width, keys, values,
                         r.begin - c * CHUNK, r.end - c * CHUNK, float(layer->scaling), to);
            if (sums) merge(sums + (t - begin) * state, to, width, group);
        }
    }

    void attend(Team& team) {
        bool aligned = group * m.head_dim % GROUP == 0;
        int forms = form_of(layer->output);
        float *sums = keys + 2 * CHUNK * width, *one = sums + TOGETHER * state;
        // An item is a chunk of one head for some tokens, or, where there are many, all its chunks.
        for (Range r = share(groups * m.kv_heads * (split ? chunks : 1)); r.begin < r.end; ++r.begin) {
            int64_t head = split ? r.begin / chunks : r.begin, kv = head % m.kv_heads;
            int64_t begin = starts[head / m.kv_heads], end = starts[head / m.kv_heads + 1];
            if (split) {
                int64_t c = r.begin % chunks;
                attend_chunk(begin, end, kv, c, states + (kv * chunks + c) * state, nullptr);
                continue;
            }
            for (int64_t t = begin; t < end; ++t) start(t, kv, sums + (t - begin) * state);
            for (int64_t c = 0; c < chunks; ++c) attend_chunk(begin, end, kv, c, one, sums);
            for (int64_t t = begin; t < end; ++t)
                put(t, kv, sums + (t - begin) * state, aligned ? forms : 0);
        }
        if (split) barrier(team);
        for (Range r = share(count * m.kv_heads); split && r.begin < r.end; ++r.begin) {
            int64_t t = r.begin / m.kv_heads, kv = r.begin % m.kv_heads;
            start(t, kv, sums);
            for (int64_t c = 0; c < chunks; ++c) {
                Range slots = seen(t, c);
                const float* more = states + (r.begin * chunks + c) * state;
                if (slots.begin < slots.end) merge(sums, more, width, group);
            }
            put(t, kv, sums, aligned ? forms : 0);
        }
        if (!aligned) barrier(team);
        for (Range r = share(count); !aligned && r.begin < r.end; ++r.begin)
            prepare(in, r.begin, 0, m.heads * m.head_dim, forms);
    }

    void start(int64_t t, int64_t kv, float* to) {
        int64_t own = p.slots[first + t];
        const T *key = slot(p.keys, t, kv, own), *value = slot(p.values, t, kv, own);
        for (int64_t h = 0; h < group; ++h, to += state_size(width))
            own_state<K>(query + (t * m.heads + kv * group + h) * width, m.head_dim, width, key, value,
                         float(layer->scaling), to);
    }

    void put(int64_t t, int64_t kv, const float* from, int forms) {
        int64_t begin = kv * group * m.head_dim, end = begin + group * m.head_dim;
        for (int64_t i = begin; i < end; i += m.head_dim, from += state_size(width))
            finish<K>(from, m.head_dim, in.plain + t * in.stride + i);
        if (forms) prepare(in, t, begin, end, forms);
    }

    INLINE V activation(V v) const {
        if (m.activation == CL_SILU) return v / (exponential(-v) + 1.0f);
        if (m.activation == CL_GELU_TANH) {
            V inner = (v + v * v * v * 0.044715f) * 0.7978845608f;
            return v / (exponential(inner * -2.0f) + 1.0f);
        }
        for (int i = 0; i < LANES; ++i) v[i] = v[i] * 0.5f * (1 + erff(v[i] * 0.70710678f));
        return v;
    }

    void activate() {
        int64_t size = m.intermediate, parts = (size + ELEMENTS - 1) / ELEMENTS;
        const float* bias = layer->gate_up.bias;
        for (Range r = share(count * parts); r.begin < r.end; ++r.begin) {
            int64_t t = r.begin / parts, begin = r.begin % parts * ELEMENTS;
            int64_t end = least(size, begin + ELEMENTS);
            for (int64_t i = begin; i < end; i += LANES) {
                auto some = [&](const float* from) { return load_some<F32>(from + i, end - i); };
                V gate = some(y + t * rows), up = some(y + t * rows + size);
                if (bias) gate += some(bias), up += some(bias + size);
                V active = K::round(activation(K::round(gate)));
                store_some<F32>(in.plain + t * in.stride + i, K::round(active * K::round(up)), end - i);
            }
            prepare(in, t, begin, end, form_of(layer->down));
        }
    }

    // In forward_head.h.
    int64_t head(Team& team, int64_t next);
    void scan_slice(int64_t j, int64_t s, int64_t top);
    void rescore(Team& team, int64_t kept, int64_t wanted);
    void write_logits(int64_t j, int64_t s);
    void choose(int64_t j, int64_t wanted);

    const cl_model& m;
    const cl_pass& p;
    int thread, threads;
    Arena arena;
    Inputs in;
    float *x, *y, *query, *keys, *states, *logits;
    Scan* scans;
    int64_t width, group, state, all_heads, rows, x_stride, slices, vocabulary, chunks;
    bool split;
    // Where the pass is: tokens, layer, and what the residual stream still lacks.
    int64_t first, count, index, groups, starts[TOKENS + 1], kept_rows[KEPT];
    const cl_layer* layer;
    const float *residual_bias, *residual_norm;
    bool embedded, pending;
};

}  // namespace
