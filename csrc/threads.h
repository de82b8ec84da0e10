// A team of threads that runs one function and meets at barriers.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace conflayers {

struct Team;

// Waits for the whole team.
void barrier(Team& team);

// Runs `work` in each of at most `threads` threads, the caller's one of them, with `bytes` of scratch
// memory. One team runs at a time. False: there is no memory.
using Work = void (*)(Team& team, void* argument, int thread, int threads, char* scratch);
bool run_team(int threads, size_t bytes, Work work, void* argument);

struct Range {
    int64_t begin, end;
    Range(int64_t from, int64_t to) : begin(from), end(to) {}
    // What thread `thread` of `threads` does of `items`.
    Range(int64_t items, int thread, int threads)
        : begin(items * thread / threads), end(items * (thread + 1) / threads) {}
};

}  // namespace conflayers
