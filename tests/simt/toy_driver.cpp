// Runs the toy exchange: several calls of random size on all ranks, every output checked.
// Arguments: bug, world, pdl, slow (1: rank 1 gets 1/64 of the time), missing (a rank that never launches), first,
// seeds.
#include "simt.h"
#include "toy_exchange.h"

using namespace tpfuse;
using namespace tpfuse::toy;

namespace {

struct Setup {
  u32 world, missing;
  Bug bug;
  bool pdl, slow;
};

void (*const kKernels[])(Params) = {toy_exchange<Bug::none>,
                                    toy_exchange<Bug::short_ring>,
                                    toy_exchange<Bug::grid_stride>,
                                    toy_exchange<Bug::no_dependency_wait>,
                                    toy_exchange<Bug::no_packet_wait>,
                                    toy_exchange<Bug::torn_packet>,
                                    toy_exchange<Bug::slot_out_of_bounds>,
                                    toy_exchange<Bug::no_barrier>};

constexpr u64 kDeadlineNs = 1'000'000'000;
constexpr u32 kCalls = 5;

u32 element(u32 call, u32 rank, u32 row, u32 column) { return (call * 7 + rank * 5 + row * 3 + column) % 11; }

class Exchange {
 public:
  Exchange(const Setup& setup, u64 seed) : setup_(setup), random_(seed ^ 0x5eed), machine_(setup.world, seed) {
    for (u32 rank = 0; rank < setup.world; ++rank) {
      params_[rank].steps = machine_.alloc_zeroed<u32>(rank, kMaxBlocks, "steps");
      params_[rank].errors = machine_.alloc_zeroed<Error>(rank, kMaxBlocks, "errors");
      params_[rank].rank = rank;
      params_[rank].world = setup.world;
      params_[rank].deadline_ns = kDeadlineNs;
      u64* slots = machine_.alloc_zeroed<u64>(rank, kSlots, "slots");
      for (Params& p : params_) p.slots[rank] = slots;
    }
    if (setup.slow) machine_.slow(1, 64);
  }

  void calls() {
    for (u32 call = 0; call < kCalls; ++call) {
      launch(call);
      if (random_.one_in(4)) machine_.run();
    }
    machine_.run();
    for (u32 call = 0; call < kCalls; ++call) check_call(call);
  }

  void check_missing() {
    launch(0);
    machine_.run();
    for (u32 rank = 0; rank < setup_.world; ++rank) {
      if (rank == setup_.missing) continue;
      for (u32 block = 0; block < grid_[0]; ++block) {
        const Error& e = params_[rank].errors[block];
        bool right = e.op == kOp && e.rank == rank && e.peer == setup_.missing && e.block == block && e.step == 1 &&
                     e.waited_us >= kDeadlineNs / 1000;
        simt::expect(right, "no or a wrong error record for the missing rank");
      }
    }
  }

 private:
  void launch(u32 call) {
    rows_[call] = 1 + random_.below(12);
    grid_[call] = 1 + random_.below(rows_[call] < 4 ? rows_[call] : 4);
    for (u32 rank = 0; rank < setup_.world; ++rank) {
      Params& p = params_[rank];
      float* in = machine_.alloc<float>(rank, rows_[call] * kThreads, "in");
      for (u32 i = 0; i < rows_[call] * kThreads; ++i) in[i] = float(element(call, rank, i / kThreads, i % kThreads));
      out_[call][rank] = machine_.alloc<float>(rank, rows_[call], "out");
      p.in = reinterpret_cast<u32*>(in);
      p.out = reinterpret_cast<u32*>(out_[call][rank]);
      p.rows = rows_[call];
      if (rank == setup_.missing) continue;
      auto kernel = kKernels[u32(setup_.bug)];
      machine_.launch(rank, grid_[call], kThreads, [=, copy = p] { kernel(copy); }, {setup_.pdl});
    }
  }

  void check_call(u32 call) {
    for (u32 rank = 0; rank < setup_.world; ++rank) {
      for (u32 block = 0; block < kMaxBlocks; ++block) simt::expect(params_[rank].errors[block].op == 0, "timed out");
      for (u32 row = 0; row < rows_[call]; ++row) {
        float expected = 0;
        for (u32 i = 0; i < setup_.world * kThreads; ++i)
          expected += float(element(call, i / kThreads, row, i % kThreads));
        simt::expect(out_[call][rank][row] == expected, "wrong sum of row " + std::to_string(row) + " in call " +
                                                            std::to_string(call) + " on rank " + std::to_string(rank));
      }
    }
  }

  Setup setup_;
  simt::Random random_;
  simt::Machine machine_;
  Params params_[kMaxWorld] = {};
  u32 rows_[kCalls] = {}, grid_[kCalls] = {};
  float* out_[kCalls][kMaxWorld] = {};
};

}  // namespace

int main(int argc, char** argv) {
  auto option = [&](const char* name, u64 otherwise) { return u32(simt::argument(argc, argv, name, otherwise)); };
  Setup setup{option("world", 2), option("missing", ~0u), Bug(option("bug", 0)), option("pdl", 0) != 0,
              option("slow", 0) != 0};
  return simt::for_seeds(argc, argv, [&](u64 seed) {
    Exchange exchange(setup, seed);
    setup.missing < setup.world ? exchange.check_missing() : exchange.calls();
  });
}
