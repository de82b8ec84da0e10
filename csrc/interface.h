// The C interface: what Python describes of weights, models and passes. Sizes are in elements.
#pragma once
#include <stdint.h>

#define CL_API extern "C" __attribute__((visibility("default")))

enum cl_kind { CL_NONE = 0, CL_F32 = 1, CL_BF16 = 2, CL_F16 = 3, CL_INT4 = 4, CL_INT8 = 5 };
enum cl_activation { CL_SILU = 0, CL_GELU_TANH = 1, CL_GELU = 2 };
enum cl_norm { CL_BEFORE_ATTENTION, CL_QUERY, CL_KEY, CL_AFTER_ATTENTION, CL_BEFORE_MLP, CL_AFTER_MLP };

// A weight [rows, cols] in panels of 16 rows (the last one padded with zeros):
//   float32, float16   [rows/16][cols][16]
//   bfloat16           [rows/16][cols/2][16][2]
//   int4               [rows/16][cols/32]{float16 scale[16], least[16]; bytes [4][16][4]}, byte j of
//                      a row holding code j (low half) and code j + 16: value = scale code + least
//   int8               [rows/16][cols/32]{float16 scale[16]; int8 [8][16][4]}: value = scale code
// or, for an embedding, [rows, cols] as PyTorch has it (plain).
struct cl_weight {
    const void* data;
    const float* bias;  // [rows padded to 16]; null: none
    int64_t rows, cols, kind, plain;
};

struct cl_layer {
    cl_weight qkv, output, gate_up, down;
    const float* norms[6];  // by cl_norm; null: none
    double scaling;
    int64_t window;  // 0: sees everything
};

struct cl_model {
    int64_t kind;  // of activations, logits and cache: a float kind
    int64_t hidden, intermediate, heads, kv_heads, head_dim, rotary_dim, vocabulary, depth;
    int64_t activation;
    int64_t norm_per_head;   // query and key norms go over each head, not over all together
    int64_t norm_rounds_last;  // norms round after the weight, not before it
    double epsilon;
    const cl_layer* layers;
    const float* norm;
    cl_weight embedding, head;
    cl_weight rescore;  // the most likely tokens by `head` get logits by this; kind none: they don't
};

struct cl_pass {
    int64_t tokens;
    const int64_t *ids, *positions, *slots, *sequences;  // [tokens]
    const int64_t* rotary_rows;   // [tokens]: of the next two
    const float *cosine, *sine;   // [any, rotary_dim]
    void *const *keys, *const *values;                   // by layer
    int64_t sequence_stride, head_stride, slot_stride;
    const uint8_t* runs;  // [depth, 2]: attention, MLP
    const void* entry;    // [tokens, hidden] in the model's kind, in place of embeddings; null: none
    void* const* states;  // [depth, 2]: where to write what each that runs begins with, likewise
                          // [tokens, hidden] or null; null: nothing is written
    int64_t kept;
    const int64_t* keep;  // [kept]: the tokens whose logits are asked for
    void* logits;         // [kept, vocabulary] in the model's kind; null: not written
    int64_t top;          // of the most likely tokens, at most 32
    int64_t* greedy;      // [kept]; -1: not finite. Null: nothing is chosen
    float *highest, *log_sum;  // [kept]: the highest logit; the logarithm of the sum of exponentials
    int64_t* top_tokens;       // [kept, top]
    float* top_logits;
    int64_t threads;
};

// Instruction sets of this library, best first; null behind the last. Whether it runs here.
CL_API const char* cl_unit_name(int64_t unit);
CL_API int64_t cl_unit_runs(int64_t unit);
// 0, or -1 without memory.
CL_API int64_t cl_forward(int64_t unit, const cl_model* model, const cl_pass* pass);
// [tokens, cols] -> [tokens, rows], both of `kind`.
CL_API int64_t cl_linear(int64_t unit, const cl_weight* weight, int64_t kind, const void* in, int64_t tokens,
                  void* out, int64_t threads);
// The weight in four bits, in panels: [rows/16][cols/32] groups of int4. Cols are a multiple of 32.
CL_API int64_t cl_round(int64_t unit, const cl_weight* weight, void* out, int64_t threads);
// Reads memory once, as a product does; for measuring.
CL_API int64_t cl_read(int64_t unit, const void* data, int64_t bytes, int64_t threads);
// Asks for large pages, where there are any.
CL_API void cl_advise(void* data, int64_t bytes);
CL_API int64_t cl_version(void);
