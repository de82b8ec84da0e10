// The threads: they spin for the next barrier or pass, then sleep.
#include "threads.h"

#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace conflayers {
namespace {

// How long a thread spins, in microseconds. Within a pass that outlasts the slice of time that another
// process may get on a partner's processor: whoever sleeps then waits for a slice at every barrier.
const int64_t kIdleSpin = 100, kBarrierSpin = 4000;
const int kMost = 256;                   // threads
const size_t kKept = size_t(256) << 20;  // of scratch memory, between passes

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A number that threads wait for a change of.
struct Signal {
    std::atomic<uint64_t> value{0};
    std::atomic<int> asleep{0};
    std::mutex mutex;
    std::condition_variable changed;

    void set(uint64_t to) {
        value.store(to);
        if (asleep.load() == 0) return;
        std::lock_guard<std::mutex> lock(mutex);
        changed.notify_all();
    }

    // `between` is called now and then while it spins.
    template <class Between>
    void wait(uint64_t old, int64_t microseconds, Between between) {
        auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
        do {
            for (int i = 0; i < 100; ++i, pause())
                if (value.load(std::memory_order_acquire) != old) return;
            between();
        } while (std::chrono::steady_clock::now() < end);
        std::unique_lock<std::mutex> lock(mutex);
        asleep.fetch_add(1);
        changed.wait(lock, [&] { return value.load() != old; });
        asleep.fetch_sub(1);
    }
};

thread_local int own_number = 0;

#if defined(__linux__)
int processor() { return sched_getcpu(); }  // that this thread is on

int usable_processors() {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : kMost;
}

// Leaves a processor for another one that this thread may use, if there is one.
void leave(int busy) {
    cpu_set_t all, others;
    if (busy >= CPU_SETSIZE || sched_getaffinity(0, sizeof all, &all) != 0) return;
    others = all;
    CPU_CLR(busy, &others);
    if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return;
    sched_setaffinity(0, sizeof all, &all);
}
#else
int processor() { return -1; }
int usable_processors() { return kMost; }
void leave(int) {}
#endif

}  // namespace

struct Team {
    int threads = 1;
    bool crowded = false;  // more threads than processors
    std::atomic<int> arrived{0};
    Signal met;
    std::atomic<int> processors[kMost];  // that the threads were on when they last told

    // Two threads on one processor would wait for each other's slices: the later one leaves.
    void spread() {
        if (crowded) return std::this_thread::yield();
        int here = processor();
        processors[own_number].store(here, std::memory_order_relaxed);
        for (int i = 0; i < threads && here >= 0; ++i) {
            if (i == own_number || processors[i].load(std::memory_order_relaxed) != here) continue;
            if (i > own_number) {
                std::this_thread::yield();
                continue;
            }
            leave(here);
            return processors[own_number].store(processor(), std::memory_order_relaxed);
        }
    }
};

void barrier(Team& team) {
    if (team.threads == 1) return;
    uint64_t old = team.met.value.load();
    if (team.arrived.fetch_add(1) + 1 < team.threads)
        return team.met.wait(old, kBarrierSpin, [&team] { team.spread(); });
    team.arrived.store(0);
    team.met.set(old + 1);
}

namespace {

struct Pool {
    std::mutex mutex;
    Team team;
    Signal begin;
    int workers = 0;
    Work work = nullptr;
    void* argument = nullptr;
    char* scratch = nullptr;
    size_t size = 0;

    bool run(int threads, size_t bytes, Work given, void* with) {
        std::lock_guard<std::mutex> busy(mutex);
        if (bytes > size && !reserve(bytes)) return false;
        team.threads = grow(threads < kMost ? threads : kMost);
        team.crowded = team.threads > 1 && team.threads > usable_processors();
        team.processors[0].store(processor());
        work = given;
        argument = with;
        own_number = 0;
        // The number of threads is part of the signal: who isn't needed reads nothing else.
        begin.set(((begin.value.load() >> 16) + 1) << 16 | uint64_t(team.threads));
        work(team, argument, 0, team.threads, scratch);
        barrier(team);
        if (size > kKept) reserve(0);
        return true;
    }

    // Threads at hand, at most as many as asked for.
    int grow(int threads) {
        for (; workers + 1 < threads; ++workers) {
            try {
                std::thread(&Pool::serve, this, workers + 1, begin.value.load()).detach();
            } catch (const std::system_error&) {
                break;
            }
        }
        return threads < workers + 1 ? threads : workers + 1;
    }

    void serve(int number, uint64_t seen) {
        own_number = number;
        for (;;) {
            begin.wait(seen, kIdleSpin, [] {});
            seen = begin.value.load();
            if (number >= int(seen & 0xffff)) continue;
            team.spread();
            work(team, argument, number, team.threads, scratch);
            barrier(team);
        }
    }

    bool reserve(size_t bytes) {
        free(scratch);
        scratch = bytes ? static_cast<char*>(aligned_alloc(64, (bytes + 63) / 64 * 64)) : nullptr;
        size = scratch ? bytes : 0;
        return size == bytes;
    }
};

std::atomic<Pool*> pool{nullptr};
std::atomic<pid_t> owner{0};
std::mutex making;

}  // namespace

bool run_team(int threads, size_t bytes, Work work, void* argument) {
    // A forked child has none of its parent's threads: it gets a pool of its own.
    if (owner.load() != getpid()) {
        std::lock_guard<std::mutex> lock(making);
        if (owner.load() != getpid()) {
            pool.store(new (std::nothrow) Pool);
            owner.store(getpid());
        }
    }
    return pool.load() && pool.load()->run(threads, bytes, work, argument);
}

}  // namespace conflayers
