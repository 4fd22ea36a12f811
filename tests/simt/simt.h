// A machine of several emulated GPUs that runs the real kernel sources on a CPU.
//
// Communication kernels fail by timing: one packet late, one block ahead, two words swapped. Hardware shows such an
// interleaving once a month; this machine draws a new one from every seed, and draws the same one again from the same
// seed. What it models, and why:
//
//   - Each GPU thread is a fiber. A seeded scheduler picks who runs next at every primitive of platform.h; within a
//     seed, ranks and blocks run at very different speeds and change places, so that one of them gets far ahead.
//   - Shuffles, votes and barriers are meeting points of all living threads. A block of which every thread waits while
//     none can be released fails at once, with a list of which lanes wait where.
//   - Blocks of a rank start in random order, as many at a time as `resident_blocks` allows.
//   - Memory between ranks is weak: a store to a peer waits in a pool and is delivered after a random delay, in any
//     order. Only stores of one thread to the same bytes keep their order. System-scope stores arrive in pieces of 8
//     bytes, plain ones in pieces of 4. Memory of the own rank is written at once, but for plain stores to what peers
//     write to as well: these are late, too, and overwrite what came meanwhile. A thread that loads what it stored, or
//     what its block stored before a barrier, brings it about.
//   - Blocks of a cluster start together. Words to each other's shared memory arrive late and in any order; one that
//     finds its block gone, or its gate closed, is a failure.
//   - Launches of a rank run in stream order. With `pdl`, blocks may start as soon as every block of the grid before
//     has triggered or ended, and `dependency_wait` holds them until that grid is complete and its stores delivered.
//   - `clock_ns` is virtual: it advances with every step, and leaps while all threads only spin and nothing is on its
//     way, so deadlines of seconds are reached in milliseconds, and only when nobody can move. After an hour of leaps,
//     of a second at most, it is a hang.
//   - Every access through platform.h must lie inside one allocation and be aligned; allocations are fenced on
//     both sides (poisoned under AddressSanitizer, canaries otherwise) and filled with 0xff (NaN, an impossible index).
//
// A driver is a main() that builds machines, launches kernels as plain calls, and checks memory:
//
//   simt::Machine m(world, seed);
//   float* x = m.alloc<float>(rank, n, "x");
//   m.launch(rank, grid, block, [=] { kernel<4>(x, n); }, {.pdl = true});
//   m.run();  // throws simt::Failure
//
// Plain accesses to a peer's memory (`peer[i] = x`) are not seen by the machine: kernels use platform.h for them. Two
// things are not modelled: memory within one rank is never weak, and a spin loop without `spin_pause` gets no leaps.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

#include "platform.h"

namespace tpfuse::simt {

struct Options {
  u32 resident_blocks = 1024;  // of one rank at a time, over all grids
  // Blocks start by index instead of in random order: for kernels that wait for the same block of a peer in a grid
  // larger than `resident_blocks`, which hardware dispatches by index too.
  bool in_index_order = false;
  u64 step_limit = 50'000'000;
  u64 ns_per_step = 10;
  // What system-scope stores of more bytes arrive in. 4: loads come apart too, for protocols that need no more.
  u32 system_bytes = 8;
};

struct Launch {
  bool pdl = false;
  u32 cluster = 1;  // blocks that start together and reach each other's shared memory
};

// What the machine found wrong, and where each thread stood.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Machine {
 public:
  Machine(u32 world, u64 seed, Options options = {});
  ~Machine();
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  // Memory of one rank, freed with the machine. Between runs the host reads and writes it directly.
  template <class T>
  T* alloc(u32 rank, size_t count, const char* name) {
    return static_cast<T*>(alloc_bytes(rank, count * sizeof(T), name));
  }
  template <class T>
  T* alloc_zeroed(u32 rank, size_t count, const char* name) {
    T* p = alloc<T>(rank, count, name);
    std::memset(static_cast<void*>(p), 0, count * sizeof(T));
    return p;
  }

  // Gives a rank that much less of the machine's time.
  void slow(u32 rank, u32 factor);
  // From now on one store in so many between two ranks never arrives; 0: all do.
  void lose(u32 from, u32 to, u32 one_in);
  // Appends to the rank's stream; nothing runs before `run`. A rank that never comes is one that is not launched.
  void launch(u32 rank, u32 grid, u32 block, std::function<void()> kernel, Launch how = {});
  // Runs until every launched grid is complete.
  void run();

  u64 steps() const;
  u64 clock_ns() const;

  struct Impl;

 private:
  void* alloc_bytes(u32 rank, size_t bytes, const char* name);
  std::unique_ptr<Impl> impl_;
};

// splitmix64: a few instructions, any seed is a good one.
class Random {
 public:
  explicit Random(u64 seed) : state_(seed) {}
  u64 next() {
    u64 x = state_ += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
  }
  u32 below(u32 bound) { return u32((next() >> 32) * bound >> 32); }
  bool one_in(u32 n) { return below(n) == 0; }

 private:
  u64 state_;
};

// The value of `name=value` among a driver's arguments.
inline u64 argument(int argc, char** argv, const std::string& name, u64 otherwise) {
  for (int i = 1; i < argc; ++i) {
    std::string text = argv[i];
    if (text.rfind(name + "=", 0) == 0) return std::strtoull(text.c_str() + name.size() + 1, nullptr, 0);
  }
  return otherwise;
}

// Runs `check(seed)` for the seeds `first=` to `first + seeds=`; prints the first failure and returns the exit status.
template <class Check>
int for_seeds(int argc, char** argv, Check check) {
  u64 first = argument(argc, argv, "first", 0), count = argument(argc, argv, "seeds", 20);
  for (u64 seed = first; seed < first + count; ++seed) {
    try {
      check(seed);
    } catch (const Failure& failure) {
      std::printf("FAILED seed=%llu after %llu seeds\n%s\n", seed, seed - first + 1, failure.what());
      return 1;
    }
  }
  std::printf("passed %llu seeds\n", count);
  return 0;
}

inline void expect(bool holds, const std::string& message) {
  if (!holds) throw Failure(message);
}

}  // namespace tpfuse::simt
