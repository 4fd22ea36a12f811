// The smallest kernel with everything that a communication kernel has, to test the emulation with: a packet of
// {value, step} in one 8-byte store, a ring of slots, a step counter per block in device memory, a pipeline one row
// deep, a deadline. `Bug` plants one mistake at compile time; test_emulator.py shows that each of them is found.
//
// It sums each row's 64 numbers over all ranks. All numbers are small integers, so every order of addition is exact.
#pragma once
#include "platform.h"

namespace tpfuse::toy {

enum class Bug {
  none,
  short_ring,          // a slot is overwritten before the peer has read it
  grid_stride,         // slots move when the grid changes: another block's old packet passes for the awaited one
  no_dependency_wait,  // the counter is read while the grid before still uses it
  no_packet_wait,
  torn_packet,  // value and step in two stores
  slot_out_of_bounds,
  no_barrier,  // a warp overwrites shared memory that another has not read
};

constexpr u32 kMaxWorld = 8, kMaxBlocks = 8, kThreads = 64;
constexpr u32 kAhead = 1;              // rows pushed before the first is consumed
constexpr u32 kRing = 2 * kAhead + 2;  // DESIGN.md, section 5
constexpr u32 kSlots = kRing * kMaxBlocks * kMaxWorld;
constexpr u32 kOp = 7;

struct Error {
  u32 op, rank, peer, block, step;
  u32 waited_us;
};

struct Params {
  u64* slots[kMaxWorld];  // of every rank
  u32* steps;             // own: steps done, by block
  Error* errors;          // own, by block
  const u32* in;          // [rows, kThreads] floats
  u32* out;               // [rows] floats
  u32 rows, world, rank;
  u64 deadline_ns;
};

template <Bug kBug>
TPF_DEVICE u32 slot_index(u32 step, u32 source) {
  constexpr u32 ring = kBug == Bug::short_ring ? kRing - 1 : kBug == Bug::slot_out_of_bounds ? kRing + 1 : kRing;
  u32 stride = kBug == Bug::grid_stride ? grid_size() : kMaxBlocks;
  return (step % ring * stride + block_index()) * kMaxWorld + source;
}

template <Bug kBug>
TPF_DEVICE void send(u64* slot, float value, u32 step) {
  if (kBug == Bug::torn_packet) {
    store_system(reinterpret_cast<u32*>(slot), bits_of(value));
    store_system(reinterpret_cast<u32*>(slot) + 1, step);
  } else {
    store_system(slot, u64(step) << 32 | bits_of(value));
  }
}

// Every thread adds up its column of the row, the first warp sends the sum to all ranks, its own included.
template <Bug kBug>
TPF_DEVICE void push(const Params& p, float (&halves)[2], u32 row, u32 step) {
  float x = float_of(load_global(p.in + row * kThreads + thread_index()));
  TPF_UNROLL
  for (u32 mask = 16; mask > 0; mask /= 2) x = add_rn(x, shuffle_xor(x, mask));
  if (lane() == 0) halves[warp_index()] = x;
  barrier();
  if (thread_index() < p.world)
    send<kBug>(p.slots[lane()] + slot_index<kBug>(step, p.rank), add_rn(halves[0], halves[1]), step);
  if (kBug != Bug::no_barrier) barrier();
}

// The packet of `peer`, or a record of its absence.
template <Bug kBug>
TPF_DEVICE bool receive(const Params& p, u32 peer, u32 step, float& value) {
  const u64* slot = p.slots[p.rank] + slot_index<kBug>(step, peer);
  u64 start = clock_ns(), packet = load_system(slot);
  while (u32(packet >> 32) != step && kBug != Bug::no_packet_wait) {
    u64 waited = clock_ns() - start;
    if (waited > p.deadline_ns) {
      p.errors[block_index()] = Error{kOp, p.rank, peer, block_index(), step, u32(waited / 1000)};
      return false;
    }
    spin_pause();
    packet = load_system(slot);
  }
  value = float_of(u32(packet));
  return true;
}

// By the first warp: lane r waits for rank r, all add in rank order.
template <Bug kBug>
TPF_DEVICE bool consume(const Params& p, u32 row, u32 step) {
  float value = 0;
  bool arrived = lane() >= p.world || receive<kBug>(p, lane(), step, value);
  if (!all(arrived)) return false;
  float sum = 0;
  for (u32 r = 0; r < p.world; ++r) sum = add_rn(sum, shuffle(value, r));
  if (lane() == 0) store_global(p.out + row, bits_of(sum));
  return true;
}

template <Bug kBug>
TPF_KERNEL(kThreads, 1)
void toy_exchange(const TPF_GRID_CONSTANT Params p) {
  TPF_SHARED(float[2], halves);
  TPF_SHARED(u32, failed);
  if (kBug != Bug::no_dependency_wait) dependency_wait();
  dependency_trigger();
  u32 first = load_global(p.steps + block_index()) + 1;
  u32 rows = (p.rows - block_index() + grid_size() - 1) / grid_size();
  if (thread_index() == 0) failed = 0;
  barrier();
  for (u32 i = 0; i < rows + kAhead; ++i) {
    if (i < rows) push<kBug>(p, halves, block_index() + i * grid_size(), first + i);
    if (i < kAhead) continue;
    u32 done = i - kAhead;
    if (warp_index() == 0 && !consume<kBug>(p, block_index() + done * grid_size(), first + done)) failed = 1;
    if (kBug != Bug::no_barrier) barrier();
    if (failed) return;
  }
  if (thread_index() == 0) store_global(p.steps + block_index(), first + rows - 1);
}

}  // namespace tpfuse::toy
