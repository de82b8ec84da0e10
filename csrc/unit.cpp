// The entry points of one instruction set: compiled several times, with UNIT as its name.
#include "unit.h"

#include "forward_head.h"
#include "rounding.h"

namespace {

template <class K>
int64_t forward_in(const cl_model& model, const cl_pass& pass) {
    struct Job {
        const cl_model& model;
        const cl_pass& pass;
    } job{model, pass};
    auto work = [](Team& team, void* argument, int thread, int threads, char* scratch) {
        Job& job = *(Job*)argument;
        Forward<K>(job.model, job.pass, scratch, thread, threads).run(team);
    };
    size_t bytes = Forward<K>(model, pass, nullptr, 0, int(pass.threads)).bytes();
    return conflayers::run_team(int(pass.threads), bytes, work, &job) ? 0 : -1;
}

int64_t forward(const cl_model* model, const cl_pass* pass) {
    if (model->kind == CL_F32) return forward_in<F32>(*model, *pass);
    return model->kind == CL_BF16 ? forward_in<BF16>(*model, *pass) : forward_in<F16>(*model, *pass);
}

struct Linear {
    const cl_weight& w;
    const void* from;
    int64_t tokens;
    void* to;
    Inputs in;
    float* y;

    size_t take(char* scratch) {
        Arena arena{scratch};
        in = arena.inputs(tokens, w.cols);
        y = arena.take<float>(tokens * panels_of(w.rows) * PANEL);
        return arena.used;
    }

    template <class K>
    static void work(Team& team, void* argument, int thread, int threads, char* scratch) {
        Linear job = *(Linear*)argument;
        const cl_weight& w = job.w;
        job.take(scratch);
        for (Range r(job.tokens, thread, threads); r.begin < r.end; ++r.begin) {
            auto* from = (const typename K::T*)job.from + r.begin * w.cols;
            float* plain = job.in.plain + r.begin * job.in.stride;
            for (int64_t i = 0; i < w.cols; i += LANES)
                store_some<F32>(plain + i, load_some<K>(from + i, w.cols - i), w.cols - i);
            prepare(job.in, r.begin, 0, w.cols, form_of(w));
        }
        barrier(team);
        int64_t rows = panels_of(w.rows) * PANEL;
        Range r(panels_of(w.rows), thread, threads);
        product(w, job.in, job.tokens, job.y, rows, r.begin, r.end);
        for (int64_t t = 0; t < job.tokens; ++t)
            for (int64_t i = r.begin * PANEL; i < r.end * PANEL; i += LANES) {
                V v = load(job.y + t * rows + i);
                if (w.bias) v += load(w.bias + i);
                if (i < w.rows) store_some<K>((typename K::T*)job.to + t * w.rows + i, v, w.rows - i);
            }
    }
};

int64_t linear(const cl_weight* weight, int64_t kind, const void* from, int64_t tokens, void* to,
               int64_t threads) {
    Linear job{*weight, from, tokens, to, {}, nullptr};
    auto work = kind == CL_F32 ? &Linear::work<F32> : &Linear::work<F16>;
    if (kind == CL_BF16) work = &Linear::work<BF16>;
    return conflayers::run_team(int(threads), job.take(nullptr), work, &job) ? 0 : -1;
}

int64_t round(const cl_weight* weight, void* to, int64_t threads) {
    Rounding job{*weight, (char*)to};
    return conflayers::run_team(int(threads), 64, &Rounding::work, &job) ? 0 : -1;
}

struct Reading {
    const char* data;
    int64_t lines, found;

    static void work(Team&, void* argument, int thread, int threads, char*) {
        Reading& job = *(Reading*)argument;
        U sums[4] = {};
        for (Range r(job.lines, thread, threads); r.begin < r.end; ++r.begin)
            for (int i = 0; i < 256 / int(sizeof(U)); ++i)
                sums[i % 4] += load_as<U>(job.data + r.begin * 256 + i * sizeof(U));
        if (((sums[0] + sums[1]) + (sums[2] + sums[3]))[0]) job.found = 1;
    }
};

int64_t read(const void* data, int64_t bytes, int64_t threads) {
    Reading job{(const char*)data, bytes / 256, 0};
    conflayers::run_team(int(threads), 64, &Reading::work, &job);
    return job.found;
}

}  // namespace

#define NAME_OF(unit) #unit
#define NAME(unit) NAME_OF(unit)
#define SYMBOL_OF(unit) unit_##unit
#define SYMBOL(unit) SYMBOL_OF(unit)

extern const conflayers::Unit SYMBOL(UNIT);
const conflayers::Unit SYMBOL(UNIT) = {NAME(UNIT), forward, linear, round, read};
