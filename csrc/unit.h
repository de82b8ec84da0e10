// What is compiled once for each instruction set.
#pragma once
#include "interface.h"

namespace conflayers {

struct Unit {
    const char* name;
    int64_t (*forward)(const cl_model*, const cl_pass*);
    int64_t (*linear)(const cl_weight*, int64_t kind, const void*, int64_t, void*, int64_t threads);
    int64_t (*round)(const cl_weight*, void* out, int64_t threads);
    int64_t (*read)(const void*, int64_t bytes, int64_t threads);
};

}  // namespace conflayers
