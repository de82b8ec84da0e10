// The C functions: they choose the unit.
#include <sys/mman.h>

#include "unit.h"

using conflayers::Unit;

#if defined(__x86_64__)
extern const Unit unit_avx2, unit_avx512, unit_avx512_vnni, unit_avx512_bf16;
static const Unit* const units[] = {&unit_avx512_bf16, &unit_avx512_vnni, &unit_avx512, &unit_avx2};

static bool runs(int64_t unit) {
    __builtin_cpu_init();
    bool all = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
    if (unit < 3)
        all = all && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (unit < 2) all = all && __builtin_cpu_supports("avx512vnni");
    return unit > 0 ? all : all && __builtin_cpu_supports("avx512bf16");
}
#else
extern const Unit unit_neon;
static const Unit* const units[] = {&unit_neon};

static bool runs(int64_t) { return true; }
#endif

static const int64_t count = sizeof units / sizeof *units;

int64_t cl_version(void) { return 3; }

const char* cl_unit_name(int64_t unit) { return unit >= 0 && unit < count ? units[unit]->name : nullptr; }

int64_t cl_unit_runs(int64_t unit) { return unit >= 0 && unit < count && runs(unit); }

int64_t cl_forward(int64_t unit, const cl_model* model, const cl_pass* pass) {
    return units[unit]->forward(model, pass);
}

int64_t cl_linear(int64_t unit, const cl_weight* weight, int64_t kind, const void* in, int64_t tokens,
                  void* out, int64_t threads) {
    return units[unit]->linear(weight, kind, in, tokens, out, threads);
}

int64_t cl_round(int64_t unit, const cl_weight* weight, void* out, int64_t threads) {
    return units[unit]->round(weight, out, threads);
}

int64_t cl_read(int64_t unit, const void* data, int64_t bytes, int64_t threads) {
    return units[unit]->read(data, bytes, threads);
}

void cl_advise(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    int64_t page = 1 << 21, end = ((int64_t)data + bytes) / page * page;
    int64_t begin = ((int64_t)data + page - 1) / page * page;
    if (begin < end) madvise((void*)begin, size_t(end - begin), MADV_HUGEPAGE);
#endif
}
