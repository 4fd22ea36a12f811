// One small kernel for each promise of the emulated machine. The first argument names the case; test_emulator.py knows
// which must pass and which must fail with which words.
#include <algorithm>
#include <map>

#include "every_primitive.h"
#include "simt.h"

using namespace tpfuse;
using simt::expect;
using simt::Machine;

namespace {

// What several seeds together must have shown.
struct Seen {
  u32 yes = 0;
  void note(bool what) { yes += what; }
};

// ---- failures that must be reported

void divergence(u64 seed) {
  Machine m(1, seed);
  m.launch(0, 1, 64, [] {
    if (thread_index() < 16) {
      barrier();
    } else {
      shuffle(1.0f, 0);
    }
  });
  m.run();
}

void mixed_meeting(u64 seed) {
  Machine m(1, seed);
  m.launch(0, 1, 32, [] { lane() < 16 ? sync_warp() : void(any(true)); });
  m.run();
}

void shuffle_from_the_dead(u64 seed) {
  Machine m(1, seed);
  m.launch(0, 1, 32, [] {
    if (lane() < 16) shuffle(1u, 20);
  });
  m.run();
}

void hang(u64 seed) {
  Machine m(2, seed);
  u32* flag = m.alloc_zeroed<u32>(0, 1, "flag");
  m.launch(0, 1, 32, [=] {
    while (load_system(flag) == 0) spin_pause();
  });
  m.run();
}

void endless(u64 seed) {
  simt::Options options;
  options.step_limit = 10000;
  Machine m(1, seed, options);
  u32* flag = m.alloc_zeroed<u32>(0, 1, "flag");
  m.launch(0, 1, 32, [=] {
    while (load_system(flag) == 0) {
    }
  });
  m.run();
}

void out_of_bounds(u64 seed) {
  Machine m(2, seed);
  u32* x = m.alloc<u32>(1, 10, "x");
  m.launch(0, 1, 32, [=] { store_system(x + 10, 1u); });
  m.run();
}

void out_of_bounds_raw(u64 seed) {
  Machine m(1, seed);
  u32* x = m.alloc<u32>(0, 10, "x");
  m.launch(0, 1, 1, [=] { x[10] = 1; });
  m.run();
}

void out_of_bounds_shared(u64 seed) {
  Machine m(1, seed);
  u32 ten = 10;
  m.launch(0, 1, 1, [=] {
    TPF_SHARED(u32[10], sums);
    u32* p = sums;
    p[ten] = 1;
  });
  m.run();
}

void misaligned(u64 seed) {
  Machine m(1, seed);
  u32* x = m.alloc<u32>(0, 10, "x");
  m.launch(0, 1, 32, [=] { load_global(reinterpret_cast<Vec8*>(x + 1)); });
  m.run();
}

// Every block of a cluster of four sends a word to all; `words` is how many a gate waits for.
void cluster_of_four(u64 seed, u32 words, bool all_wait, u32* right) {
  Machine m(1, seed);
  m.launch(0, 8, 32,
           [=] {
             TPF_SHARED(u64, gate);
             TPF_SHARED(u32[4], numbers);
             u32 part = block_index() % 4;
             cluster_open(&gate, 1, words * 4);
             if (lane() < 4) cluster_post(&numbers[part], 10 + part, &gate, lane());
             while ((all_wait || part > 0) && !cluster_arrived(&gate)) spin_pause();
             if (lane() == 0 && numbers[0] + numbers[1] + numbers[2] + numbers[3] == 46) ++*right;
           },
           {false, 4});
  m.run();
}
void a_block_leaves_its_cluster(u64 seed) {
  u32 right = 0;
  cluster_of_four(seed, 4, false, &right);
}
void too_many_words(u64 seed) {
  u32 right = 0;
  cluster_of_four(seed, 1, true, &right);
}

// ---- promises that must be kept

void cluster(u64 seed) {
  u32 right = 0;
  cluster_of_four(seed, 4, true, &right);
  expect(right == 8, "wrong words in a cluster");
}

// What a thread has loaded back, or what its block has after a barrier, is no longer on its way.
void loaded_back(u64 seed) {
  Machine m(2, seed);
  u32* x = m.alloc_zeroed<u32>(0, 64, "x");
  u32* go = m.alloc_zeroed<u32>(1, 2, "go");
  m.launch(1, 1, 32, [=] { store_system(x + lane(), 5u); });
  m.launch(1, 1, 32, [=] {
    while (load_system(go + lane() % 2) == 0) spin_pause();
    store_system(x + lane(), 6u);
    store_system(x + 32 + lane(), 6u);
  });
  m.launch(0, 1, 32, [=] {
    while (load_system(x + lane()) != 5) spin_pause();
    store_global(x + lane(), 0u);
    store_global(x + 32 + lane(), 1u);
    expect(load_system(x + lane()) == 0, "a thread does not read what it wrote");
    barrier();
    expect(load_system(x + 63 - lane()) == 1, "a thread does not read what its block wrote before a barrier");
    barrier();
    if (lane() < 2) store_system(go + lane(), 1u);
  });
  m.run();
  for (u32 i = 0; i < 64; ++i) expect(x[i] == 6, "a store came back over a later one");
}

template <class T>
void runs_everything(u64 seed) {
  constexpr u32 n = 128;
  Machine m(2, seed);
  Everything p{m.alloc_zeroed<Vec16>(0, n, "in16"), m.alloc_zeroed<Vec8>(0, n, "in8"), m.alloc_zeroed<u32>(0, n, "in4"),
               m.alloc_zeroed<u16>(0, n, "in2"),    m.alloc<Vec16>(0, n, "out16"),     m.alloc<Vec8>(0, n, "out8"),
               m.alloc<u32>(0, n, "out4"),          m.alloc<u16>(0, n, "out2"),        m.alloc<Vec16>(1, n, "packet16"),
               m.alloc<u64>(1, n, "packet8"),       m.alloc<u32>(1, n, "packet4")};
  m.launch(0, 2, 64, [=] { every_primitive<T>(p); }, {.pdl = true});
  m.run();
  for (u32 i = 0; i < n; ++i) expect(p.out16[i].w[0] == 0 && p.out2[i] == 0 && p.packet16[i].w[3] == 1, "wrong copies");
}
void every_primitive_runs(u64 seed) {
  runs_everything<bf16>(seed);
  runs_everything<f16>(seed);
}

u64 steps_of(u64 seed) {
  Machine m(1, seed);
  u32* x = m.alloc_zeroed<u32>(0, 64, "x");
  m.launch(0, 4, 64, [=] {
    store_global(x + thread_index(), block_index());
    barrier();
    load_system(x + lane());
  });
  m.run();
  u64 hash = m.steps();
  for (u32 i = 0; i < 64; ++i) hash = hash * 31 + x[i];
  return hash;
}
void deterministic(u64 seed) {
  expect(steps_of(seed) == steps_of(seed), "one seed, two runs");
  expect(steps_of(seed) != steps_of(seed + 1), "two seeds, one run");
}

void waves(u64 seed) {
  simt::Options options;
  options.resident_blocks = 3;
  options.in_index_order = seed % 2 == 0;
  Machine m(1, seed, options);
  u32 living = 0, most = 0, next = 0;
  bool in_order = true;
  m.launch(0, 20, 1, [&] {
    most = std::max(most, ++living);
    in_order &= block_index() <= next + 2;
    ++next;
    for (int i = 0; i < 10; ++i) spin_pause();
    --living;
  });
  m.run();
  expect(most <= 3 && next == 20, "not the waves that were asked for");
  expect(in_order || !options.in_index_order, "not in index order");
}

void shared_is_per_block(u64 seed) {
  Machine m(1, seed);
  u32* wrong = m.alloc_zeroed<u32>(0, 1, "wrong");
  m.launch(0, 8, 64, [=] {
    TPF_SHARED(u32, mine);
    TPF_SHARED(u32[64], all_of_us);
    if (thread_index() == 0) mine = block_index();
    all_of_us[thread_index()] = thread_index() + block_index();
    barrier();
    u32 other = 63 - thread_index();
    if (mine != block_index() || all_of_us[other] != other + block_index()) store_global(wrong, 1u);
  });
  m.run();
  expect(*wrong == 0, "blocks share their shared memory");
}

void named_barrier(u64 seed) {
  Machine m(1, seed);
  u32* sum = m.alloc_zeroed<u32>(0, 64, "sum");
  m.launch(0, 1, 96, [=] {
    if (warp_index() == 2) return;
    store_global(sum + thread_index(), thread_index());
    barrier(1, 64);
    expect(load_global(sum + 63 - thread_index()) == 63 - thread_index(), "passed the barrier alone");
  });
  m.run();
}

void the_living_meet(u64 seed) {
  Machine m(1, seed);
  m.launch(0, 1, 64, [] {
    if (lane() >= 16) return;
    expect(shuffle_xor(lane(), 15u) == 15 - lane(), "shuffle");
    expect(any(lane() == 3) && !any(lane() == 20) && all(lane() < 16) && !all(lane() < 15), "vote");
    barrier();
  });
  m.run();
}

// A deadline of five seconds, while nobody else can move, is a matter of few steps.
void time_leaps(u64 seed) {
  Machine m(2, seed);
  u32* flag = m.alloc_zeroed<u32>(0, 1, "flag");
  u64 waited = 0;
  m.launch(0, 1, 32, [=, &waited] {
    u64 start = clock_ns();
    while (!any(load_system(flag) != 0) && all(clock_ns() - start < 5'000'000'000)) spin_pause();
    waited = clock_ns() - start;
  });
  m.run();
  expect(waited >= 5'000'000'000 && m.steps() < 100000, "time did not leap");
}

// Kernels that look at their clock once in many turns give up by themselves, before the machine calls it a hang.
void a_rare_look_at_the_clock(u64 seed) {
  Machine m(2, seed);
  u32* flag = m.alloc_zeroed<u32>(0, 1, "flag");
  u64 waited = 0;
  m.launch(0, 2, 64, [=, &waited] {
    u64 start = 0;
    for (u32 turn = 1; load_system(flag) == 0; ++turn) {
      spin_pause();
      if (turn % 512 != 0) continue;
      if (start == 0) start = clock_ns();
      waited = clock_ns() - start;
      if (waited > 1'000'000'000'000) break;
    }
  });
  m.run();
  expect(waited > 1'000'000'000'000 && waited < 3'000'000'000'000, "the deadline passed unseen");
}

// ---- what must happen in some seed, and what in none

Seen overtaking;
void weak_order(u64 seed) {
  Machine m(2, seed);
  u32* x = m.alloc_zeroed<u32>(1, 3, "x");
  u32* seen = m.alloc<u32>(1, 1, "seen");
  m.launch(0, 1, 1, [=] {
    store_system(x, 1u);
    store_system(x + 1, 1u);
    for (u32 i = 1; i < 5; ++i) store_system(x + 2, i);
    expect(load_system(x + 2) == 4, "a thread reads back what it wrote to a peer");
  });
  m.launch(1, 1, 1, [=] {
    u32 last = 0;
    while (load_system(x + 1) == 0 || last != 4) {
      u32 now = load_system(x + 2);
      expect(now >= last, "stores of one thread to one address were reordered");
      last = now;
      if (load_system(x + 1) == 1 && load_system(x) == 0) store_global(seen, 1u);
      spin_pause();
    }
  });
  m.run();
  overtaking.note(*seen == 1);
}

Seen overwriting;
// A plain store to own memory may come after a peer's store that was sent later.
void late_own_stores(u64 seed) {
  Machine m(2, seed);
  u32* x = m.alloc_zeroed<u32>(0, 1, "x");
  u32* go = m.alloc_zeroed<u32>(1, 1, "go");
  m.launch(1, 1, 1, [=] {
    store_system(x, 5u);
    while (load_system(go) == 0) spin_pause();
    store_system(x, 6u);
  });
  m.launch(0, 1, 1, [=] {
    while (load_system(x) != 5) spin_pause();
    store_global(x, 0u);
    store_system(go, 1u);
  });
  m.run();
  expect(*x == 0 || *x == 6, "neither of two stores");
  overwriting.note(*x == 0);
}

Seen tearing;
// Whether a reader sees the four words, or each 8-byte half of them, change at once.
template <class Store>
bool arrives_whole(u64 seed, bool halves, Store store, u32 system_bytes = 8) {
  simt::Options options;
  options.system_bytes = system_bytes;
  Machine m(2, seed, options);
  Vec16* x = m.alloc_zeroed<Vec16>(1, 1, "x");
  bool whole = true;
  m.launch(0, 1, 1, [=] { store(x, Vec16{{1, 1, 1, 1}}); });
  m.launch(1, 1, 1, [=, &whole] {
    for (Vec16 v = load_system(x); v.w[0] + v.w[1] + v.w[2] + v.w[3] != 4; v = load_system(x)) {
      whole &= v.w[0] == v.w[1] && v.w[2] == v.w[3] && (halves || v.w[0] == v.w[2]);
      spin_pause();
    }
  });
  m.run();
  return whole;
}
// System stores of 16 bytes are two of 8, which compilers may take them for; plain ones may come apart anywhere.
void torn(u64 seed) {
  expect(arrives_whole(seed, true, [](Vec16* p, Vec16 v) { store_system(p, v); }), "half a system store was torn");
  bool system = arrives_whole(seed, false, [](Vec16* p, Vec16 v) { store_system(p, v); });
  bool plain = arrives_whole(seed, true, [](Vec16* p, Vec16 v) { store_global(p, v); });
  bool words = arrives_whole(seed, true, [](Vec16* p, Vec16 v) { store_system(p, v); }, 4);
  tearing.note(!system && !plain && !words);
}

Seen overlap;
void pdl_overlaps(u64 seed) {
  for (bool pdl : {false, true}) {
    Machine m(2, seed);
    u32* mine = m.alloc_zeroed<u32>(0, 4, "mine");
    u32* peers = m.alloc_zeroed<u32>(1, 4, "peers");
    bool early = false;
    m.launch(0, 4, 32, [=] {
      dependency_trigger();
      for (int i = 0; i < 4; ++i) sync_warp();
      if (lane() != 0) return;
      store_global(mine + block_index(), 1u);
      store_system(peers + block_index(), 1u);
    });
    m.launch(0, 4, 32,
             [=, &early] {
               early |= mine[block_index()] == 0;
               dependency_wait();
               for (u32 i = 0; i < 4; ++i) expect(mine[i] == 1 && peers[i] == 1, "the grid before was not complete");
             },
             {pdl});
    m.run();
    if (pdl) overlap.note(early);
    expect(pdl || !early, "grids overlap without PDL");
  }
}

Seen behind;
void slow_rank_falls_behind(u64 seed) {
  Machine m(2, seed);
  bool slow_done = false, quick_first = false;
  m.slow(1, 256);
  for (u32 rank = 0; rank < 2; ++rank) {
    m.launch(rank, 1, 32, [=, &slow_done, &quick_first] {
      for (int i = 0; i < 20; ++i) sync_warp();
      if (rank == 1) slow_done = true;
      if (rank == 0 && !slow_done) quick_first = true;
    });
  }
  m.run();
  behind.note(quick_first);
}

const std::map<std::string, void (*)(u64)> kCases = {
    {"divergence", divergence},
    {"mixed_meeting", mixed_meeting},
    {"shuffle_from_the_dead", shuffle_from_the_dead},
    {"hang", hang},
    {"a_block_leaves_its_cluster", a_block_leaves_its_cluster},
    {"too_many_words", too_many_words},
    {"cluster", cluster},
    {"loaded_back", loaded_back},
    {"late_own_stores", late_own_stores},
    {"endless", endless},
    {"out_of_bounds", out_of_bounds},
    {"out_of_bounds_raw", out_of_bounds_raw},
    {"out_of_bounds_shared", out_of_bounds_shared},
    {"misaligned", misaligned},
    {"every_primitive_runs", every_primitive_runs},
    {"deterministic", deterministic},
    {"waves", waves},
    {"shared_is_per_block", shared_is_per_block},
    {"named_barrier", named_barrier},
    {"the_living_meet", the_living_meet},
    {"time_leaps", time_leaps},
    {"a_rare_look_at_the_clock", a_rare_look_at_the_clock},
    {"weak_order", weak_order},
    {"torn", torn},
    {"pdl_overlaps", pdl_overlaps},
    {"slow_rank_falls_behind", slow_rank_falls_behind},
};

}  // namespace

int main(int argc, char** argv) {
  int status = simt::for_seeds(argc, argv, kCases.at(argv[1]));
  std::printf("overtaking=%u tearing=%u overlap=%u behind=%u overwriting=%u\n", overtaking.yes, tearing.yes,
              overlap.yes, behind.yes, overwriting.yes);
  return status;
}
