// All-reduce of [T, H] partial sums, with the residual add, the RMSNorm and the quantisation that follow it.
//
// Two kernels, bit for bit the same results, because partial sums are added in rank order on whoever adds them and the sum
// is rounded to T before anything else happens to it:
//
//   one_shot   few rows. Everybody sends its row to everybody, adds, norms. One flight over the links, W - 1 rows of bytes.
//   two_shot   more rows. Row t belongs to rank t % W: the others send it their partial rows, it adds and sends the result
//              back. Two flights, 2 (W - 1) / W rows of bytes. What comes back is
//                sums    everybody norms every row; the residual stream is whole on every rank
//                norms   the owner has normed already ("norm before gather"), because there is no residual, or because
//                        each rank keeps only its own rows of it; the row may come back quantised, in half the bytes.
//
// A row is spread over kParts blocks (a cluster: they exchange sums of squares through shared memory) and their warps. A
// multiprocessor stores some 32 bytes a cycle, so at few rows one block for a row of H 6144 spends 0.5 us storing; parts
// also shorten the poll.
//
// Protocol: the data is its own flag (docs/protocol.md proves it)
//   Slots hold kMark in every 32-bit word. A sender never sends kMark; a reader spins until no word of its vector is
//   kMark, then puts kMark back. So tearing is no concern below 4 bytes, nothing else crosses the links, and slots are
//   clean whenever no call runs.
//   kMark is 0x80000000. As fp32 it is -0; as two 16-bit floats +0 and -0; senders turn it into 0, so only the sign
//   of a zero can change, whatever the type. Scales travel as words of their own, which kMark never is. Words of E4M3
//   travel inverted but for the highest bit: kMark would then be four NaN 0xff, and the encoder knows only 0x7f.
//   A call uses one half of the workspace, the next call the other one, by a counter in device memory, so replays of CUDA
//   graphs go on alternating and T, H, types and ops mix freely. Why two halves are enough: a rank that pushes in call
//   n + 2 has finished call n + 1, so it has got something that depends on every rank's push in call n + 1 (two_shot: the
//   owner adds only when all are there); so every rank's call n had ended, clean slots included.
//   The counter: every block adds to it at its end, 2^16 a call in all. A block that starts late finds less than 2^16
//   more than one that started early, so the bits above are the same for all.
//   Many rows share slots: row t has those of row t - ring, which lies far more rows back than a GPU has blocks. Word that
//   they are free passes from row to row by half a ring: a block waits, on its own GPU, for the end of row t - ring / 2
//   there, which had the result of that row's owner, who had waited for the end of row t - ring, clean slots included.
//   That the marks are back is known because a load of the same address has brought one: a fence, which waits for
//   everything that is under way to peers as well, made 8192 rows 30% slower. Flags are lowered by the one who waits for
//   them, and raised only if somebody will: none is up between calls.
//   Blocks start by index and wait only for blocks of the same row and of earlier ones: no grid has to fit the GPU at once.
//   Every spin is bounded by the device clock. Who gives up writes the error record, goes through the rest of the kernel
//   so that no barrier waits for it, and does not send its part of the row, so whoever needs the row gives up as well.
//   Where the norm is sent, other warps of that row may send their parts with a wrong factor; the row stays incomplete.
//
// Order under programmatic dependent launch: the trigger comes first, since the next grid waits for the end of this one
// before it reads anything; gamma is a weight and is loaded before the wait, everything else after it. Few rows are asked
// into the L2 before it: a prefetch reads nothing, and the L2 is where a writer's stores meet it.
//
// Measured on 4x H200, bf16 (docs/all-reduce-performance.md):
//   16-byte stores reach 344 to 348 GB/s at 8192 rows with one block a row; only pushing reaches 348. Bulk copies from
//   shared memory are not faster in this kernel (343), and slower below (shared memory, proxy fence and barrier before
//   the push): dropped.
//   A cluster barrier for the sums of squares costs 0.5 to 1 us: its release waits for all earlier stores, the pushes to
//   peers included. Stores that count at a barrier object in the receiver's shared memory order nothing else: 0.2 us.
//   One lane that polls before all load: 0.5 us less in one_shot with one block a row (polls of 12 warps get into each
//   other's way), 0.25 us more where two_shot waits for one source: used in the former and for quantised rows only. With
//   a row in six blocks it still gains 0.45 us with the norm, and costs 0.12 without.
//   Rows prefetched, and marks put back while sums of squares are under way: 0.3 us less at one row (3.12 to 2.83 cold,
//   2.88 to 2.77 hot), 0.35 at 32. A cluster that opens with a relaxed arrival: 0.03 to 0.07 less.
//   Peers' and cluster's addresses worked out before the wait: 0.03 us less in one_shot, as much more in two_shot.
//   Residual loaded before or after the push, 8-byte or wider reads of the sums of squares: all within 0.1 us or slower.
#pragma once
#include "quant.h"
#include "sharded_norm.h"

namespace tpfuse {

constexpr u32 kMark = 0x80000000u;
constexpr u32 kReduceHeader = 128 << 10;  // bytes before the halves: the call counter, and from kReduceFlags on the flags
constexpr u32 kReduceFlags = 4096;
constexpr u32 kReduceGroups = 64;    // of 256 elements, in the widest row
constexpr u32 kPrefetchedRows = 64;  // with 128, 0.3 us slower
constexpr u32 kCallShift = 16;       // a call adds 2^16 to the counter
// Who waits for its own GPU waits longer: whom that one waits for is the rank to name, and no block of a cluster may end
// before the words that others send it.
constexpr u32 kLocalPatience = 4;

// Passed by value; the host packs the same bytes. The first part never changes for a launcher.
struct ReduceArgs {
  u64 workspace[kMaxWorld];  // of every rank
  u64 own;                   // this rank's
  u64 error;
  u64 timeout_ns;
  u32 rank, op;
  u32 half;  // bytes of a half of the workspace; all offsets in it are 32 bits
  u32 padding;

  u64 x;             // T [rows, width], or [rows, kTerms, width]
  u64 y;             // T: the sum or the norm; 0 where only the quantised norm is wanted
  u64 residual;      // rows, or this rank's rows with the norm before the gather
  u64 residual_out;  // like residual, contiguous
  u64 gamma;
  u64 quant, scale;  // see quant.h
  u64 given;         // fp32, one
  i64 x_stride, term_stride, y_stride, residual_stride;  // elements; from one term of a row to the next
  u32 rows, width;
  u32 groups;               // of 256 elements, in a row
  u32 stride;               // bytes from one row's slot to the next
  u32 ring;                 // rows that have slots in a half; a multiple of 2 W
  u32 first_row, all_rows;  // this launch's place in the whole call: scales are laid out for all rows
  u32 pitch;                // of scales
  float eps, reciprocal, bias;
};

struct Nothing {};  // in place of a residual
template <>
struct Lane<Nothing> {};

template <class A, class B>
constexpr bool SameType = false;
template <class A>
constexpr bool SameType<A, A> = true;

enum class Path { sum, norm, early };  // plain all-reduce; norm on every rank; norm before the gather

// All that is known when a kernel is compiled. T: of x, sums and norms; R: of the residual; G: of gamma. kKeep: y is wanted.
// kTerms: what a rank brings of a row is the sum of so many, the outputs of a token's experts.
template <class T_, class R_, class G_, u32 kWorld_, Path kPath_, quant::Kind kKind_, quant::Layout kLayout_, bool kKeep_,
          u32 kParts_, u32 kVectors_, bool kAligned_, u32 kThreads_, u32 kResident_, u32 kTerms_>
struct Form {
  using T = T_;
  using R = R_;
  using G = G_;
  static constexpr u32 kWorld = kWorld_, kParts = kParts_, kVectors = kVectors_;
  static constexpr u32 kThreads = kThreads_, kResident = kResident_, kWarps = kThreads / kWarp;
  static constexpr u32 kTerms = kTerms_;
  static constexpr Path kPath = kPath_;
  static constexpr quant::Kind kKind = kKind_;
  static constexpr quant::Layout kLayout = kLayout_;
  static constexpr bool kAligned = kAligned_, kKeep = kKeep_;
  static constexpr bool kQuantised = kKind != quant::Kind::none;
  static constexpr bool kResidual = !SameType<R, Nothing>;
  // Rows come back quantised; where the norm is wanted, too, it is what comes back, and every rank quantises it.
  static constexpr bool kQuantisedRows = kPath == Path::early && kQuantised && !kKeep;
  // Bytes that a lane's 8 elements travel back in.
  static constexpr u32 kResultBytes = kQuantisedRows ? sizeof(quant::Packed<kKind>) : 8 * sizeof(T);
  static_assert(kParts == 1 || kVectors == 1, "a part has one vector a thread");
};

// ---- vectors that travel

TPF_DEVICE u32 without_mark(u32 w) { return w == kMark ? 0 : w; }
template <class T>
TPF_DEVICE Lane<T> without_mark(Lane<T> x) {
  TPF_UNROLL
  for (u32 i = 0; i < sizeof(T) / 2; ++i) {
    TPF_UNROLL
    for (u32 w = 0; w < 4; ++w) x.v[i].w[w] = without_mark(x.v[i].w[w]);
  }
  return x;
}
template <class T>
TPF_DEVICE bool complete(const Lane<T>& x) {
  bool yes = true;
  TPF_UNROLL
  for (u32 i = 0; i < sizeof(T) / 2; ++i) {
    TPF_UNROLL
    for (u32 w = 0; w < 4; ++w) yes = yes && x.v[i].w[w] != kMark;
  }
  return yes;
}
template <class T>
TPF_DEVICE void push(u64 slot, const Lane<T>& x) {
  TPF_UNROLL
  for (u32 i = 0; i < sizeof(T) / 2; ++i) store_system(reinterpret_cast<Vec16*>(slot) + i, x.v[i]);
}
template <class T>
TPF_DEVICE void peek(u64 slot, Lane<T>& x) {
  TPF_UNROLL
  for (u32 i = 0; i < sizeof(T) / 2; ++i) x.v[i] = load_system(reinterpret_cast<const Vec16*>(slot) + i);
}
template <class T>
TPF_DEVICE void put_marks_back(u64 slot, const Lane<T>&) {
  TPF_UNROLL
  for (u32 i = 0; i < sizeof(T) / 2; ++i)
    store_global(reinterpret_cast<Vec16*>(slot) + i, Vec16{{kMark, kMark, kMark, kMark}});
}

// E4M3 and E2M1. `travelling` is its own inverse for E4M3, and changes the sign of a zero at most for E2M1.
TPF_DEVICE Vec8 travelling(const Vec8& x) { return Vec8{{x.w[0] ^ ~kMark, x.w[1] ^ ~kMark}}; }
TPF_DEVICE quant::Fp4x8 travelling(const quant::Fp4x8& x) { return quant::Fp4x8{without_mark(x.w)}; }
TPF_DEVICE bool complete(const Vec8& x) { return x.w[0] != kMark && x.w[1] != kMark; }
TPF_DEVICE bool complete(const quant::Fp4x8& x) { return x.w != kMark; }
TPF_DEVICE void push(u64 slot, const Vec8& x) { store_system(reinterpret_cast<u64*>(slot), u64(x.w[1]) << 32 | x.w[0]); }
TPF_DEVICE void push(u64 slot, const quant::Fp4x8& x) { store_system(reinterpret_cast<u32*>(slot), x.w); }
TPF_DEVICE void peek(u64 slot, Vec8& x) {
  u64 both = load_system(reinterpret_cast<const u64*>(slot));
  x = Vec8{{u32(both), u32(both >> 32)}};
}
TPF_DEVICE void peek(u64 slot, quant::Fp4x8& x) { x.w = load_system(reinterpret_cast<const u32*>(slot)); }
TPF_DEVICE void put_marks_back(u64 slot, const Vec8&) { store_global(reinterpret_cast<Vec8*>(slot), Vec8{{kMark, kMark}}); }
TPF_DEVICE void put_marks_back(u64 slot, const quant::Fp4x8&) { store_global(reinterpret_cast<u32*>(slot), kMark); }

// A scale: a byte, or an fp32 that is not negative, so it is never kMark.
struct Word {
  u32 w;
};
TPF_DEVICE bool complete(const Word& x) { return x.w != kMark; }
TPF_DEVICE void push(u64 slot, const Word& x) { store_system(reinterpret_cast<u32*>(slot), x.w); }
TPF_DEVICE void peek(u64 slot, Word& x) { x.w = load_system(reinterpret_cast<const u32*>(slot)); }
TPF_DEVICE void put_marks_back(u64 slot, const Word&) { store_global(reinterpret_cast<u32*>(slot), kMark); }

// ---- memory of a row

template <class G, bool kAligned>
TPF_DEVICE Lane<G> load_weight(u64 weight, u32 at, u32 width) {
  Lane<G> lane = {};
  using Bit = typename Bits<G>::type;
  if constexpr (kAligned) {
    TPF_UNROLL
    for (u32 i = 0; i < sizeof(G) / 2; ++i)
      if (at < width) lane.v[i] = load_readonly(reinterpret_cast<const Vec16*>(weight + u64(at) * sizeof(G)) + i);
  } else {
    TPF_UNROLL
    for (u32 i = 0; i < 8; ++i) {
      u32 bits = at + i < width ? load_readonly(reinterpret_cast<const Bit*>(weight) + at + i) : Bit(0);
      lane.v[i * sizeof(G) / 16].w[i * sizeof(G) / 4 % 4] |= bits << (sizeof(G) == 2 ? i % 2 * 16 : 0);
    }
  }
  return lane;
}

// ---------------------------------------------------------------------------------------------------------------------
// A thread's share of one row: kVectors lanes of 8 elements.
template <class F>
class RowShare {
 public:
  using T = typename F::T;
  using Lanes = Lane<T>[F::kVectors];
  using Packed = quant::Packed<F::kKind>;
  static constexpr u32 W = F::kWorld;

  // What the warps of a row tell each other in shared memory, a word for each group: sums of squares, then magnitudes.
  struct Board {
    u64 gate[2];
    u32 words[2][kReduceGroups];
  };

  // What needs no earlier grid.
  TPF_DEVICE RowShare(const ReduceArgs& args, Board& shared)
      : a(args),
        board(shared),
        row(block_index() / F::kParts),
        part(block_index() % F::kParts),
        slot(row < args.ring ? row : row % args.ring) {
    if (F::kParts > 1 && a.rows <= kPrefetchedRows) prefetch_rows();
    if constexpr (F::kPath != Path::sum && F::kParts > 1) {
      load_gamma();
      cluster_open(board.gate, quant::kNeedsRowMax<F::kKind> ? 2 : 1, a.groups * 4);
    }
  }

  // After the wait for earlier grids: which half this call uses.
  TPF_DEVICE void begin() {
    area = kReduceHeader + (load_global(reinterpret_cast<const u32*>(a.own)) >> kCallShift & 1) * a.half;
    if constexpr (F::kParts > 1) load_given();
  }

  // Where rows have slots in turns: until those of this row are free on every rank.
  TPF_DEVICE void await_slots() const {
    if (row < a.ring / 2) return;
    if (thread_index() == 0) {
      Patience patience;
      while (load_system(flag()) != word_of(row - a.ring / 2)) {
        if (patience.over(kLocalPatience * a.timeout_ns)) {
          report(a, a.rank, row, patience.waited_ns());
          break;
        }
      }
      store_system(flag(), 0u);
    }
    barrier();
  }
  // Word to the row that waits for the slots of this one.
  TPF_DEVICE void free_slots() const {
    if (row + a.ring / 2 >= a.rows) return;
    confirm_marks();
    barrier();
    if (thread_index() == 0) store_system(flag(), word_of(row));
  }

  // This block's part of what a call adds to the counter, once all its warps have read it.
  TPF_DEVICE void end() const {
    barrier();
    if (thread_index() == 0)
      add_global(reinterpret_cast<u32*>(a.own), block_index() == 0 ? (1u << kCallShift) - (grid_size() - 1) : 1);
  }

  TPF_DEVICE bool owned() const { return owner() == a.rank; }

  TPF_DEVICE void load_x(Lanes& x) const {
    TPF_UNROLL
    for (u32 v = 0; v < F::kVectors; ++v) x[v] = without_mark(F::kTerms == 1 ? load_term(0, v) : sum_of_terms(v));
  }
  TPF_DEVICE void load_residual() {
    if constexpr (F::kResidual) {
      using R = typename F::R;
      const R* from = reinterpret_cast<const R*>(a.residual) + residual_row() * a.residual_stride;
      TPF_UNROLL
      for (u32 v = 0; v < F::kVectors; ++v) residual[v] = load_lane<R, F::kAligned>(from, at(v), a.width);
    }
  }

  // Few rows are here before earlier grids end. With them, that these come into the L2 costs nothing.
  TPF_DEVICE void prefetch_rows() const {
    if (!here(0)) return;
    TPF_UNROLL
    for (u32 i = 0; i < F::kTerms; ++i) prefetch(term(i) + at(0));
    if constexpr (F::kResidual) {
      using R = typename F::R;
      if (F::kPath != Path::early || owned())
        prefetch(reinterpret_cast<const R*>(a.residual) + residual_row() * a.residual_stride + at(0));
    }
    if (thread_index() == 0) prefetch(reinterpret_cast<const void*>(a.own));
  }

  // Partial rows: slot `index * W + source` of a rank; index is the row where all get it, else the owner's count of rows.
  TPF_DEVICE u32 index_for_all() const { return slot; }
  TPF_DEVICE u32 index_for_owner() const { return slot / W; }
  TPF_DEVICE u32 owner() const { return row % W; }
  TPF_DEVICE void send_partial(u32 to, u32 index, const Lanes& x) const {
    u64 there = workspace_of<W>(a, to) + partial(index) + a.rank * a.stride;
    TPF_UNROLL
    for (u32 v = 0; v < F::kVectors; ++v)
      if (here(v)) push(there + offset(v, 8 * sizeof(T)), x[v]);
  }

  // x becomes the rounded sum over all ranks; x is this rank's part before. False: somebody did not come.
  // kLight: one lane a source polls until the warp's last word is there, and only then all lanes look.
  template <bool kLight>
  TPF_DEVICE bool add_partials(u32 index, Lanes& x) const {
    bool good = true;
    TPF_UNROLL
    for (u32 v = 0; v < F::kVectors; ++v) {
      u32 slots = partial(index);
      if constexpr (kLight) {
        bool looks = lane() < W && lane() != a.rank && group(v) < a.groups;
        bool came = !looks || await_last_word(slots + lane() * a.stride, v, 8 * sizeof(T), lane());
        good = !any(!came) && good;  // the whole warp votes, also lanes that gave up on the vector before
      }
      Lane<T> all[W];
      TPF_UNROLL
      for (u32 r = 0; r < W; ++r) all[r] = x[v];
      slots += offset(v, 8 * sizeof(T));
      Patience patience;
      bool waits = good && here(v);
      while (waits) {
        TPF_UNROLL
        for (u32 r = 0; r < W; ++r)
          if (r != a.rank) peek(a.own + (slots + r * a.stride), all[r]);
        waits = false;
        TPF_UNROLL
        for (u32 r = 0; r < W; ++r) waits = waits || !complete(all[r]);
        if (waits && patience.over(a.timeout_ns)) {
          u32 missing = 0;
          TPF_UNROLL
          for (u32 r = 0; r < W; ++r) missing = complete(all[r]) ? missing : r;
          report(a, missing, row, patience.waited_ns());
          good = waits = false;
        }
      }
      float sum[8];
      widen(all[0], sum);
      TPF_UNROLL
      for (u32 r = 1; r < W; ++r) {
        float next[8];
        widen(all[r], next);
        TPF_UNROLL
        for (u32 i = 0; i < 8; ++i) sum[i] = add_rn(sum[i], next[i]);
      }
      x[v] = narrow<T>(sum);
    }
    return good;
  }

  // Marks into the slots that add_partials has read: later than that, so that nobody waits for it.
  TPF_DEVICE void clear_partials(u32 index) const {
    TPF_UNROLL
    for (u32 v = 0; v < F::kVectors; ++v) {
      u64 slots = a.own + (partial(index) + offset(v, 8 * sizeof(T)));
      TPF_UNROLL
      for (u32 r = 0; r < W; ++r)
        if (r != a.rank && here(v)) put_marks_back(slots + r * a.stride, Lane<T>{});
    }
  }

  // The owner's row, on its way back to the others: sums or norms.
  TPF_DEVICE void send_result(u32 v, const Lane<T>& x) const { send_back(offset(v, 8 * sizeof(T)), here(v), x); }
  TPF_DEVICE void receive_result(Lanes& x) const {
    TPF_UNROLL
    for (u32 v = 0; v < F::kVectors; ++v) {
      x[v] = {};
      await(result() + offset(v, 8 * sizeof(T)), here(v), x[v]);
    }
  }

  TPF_DEVICE void store_y(const Lanes& x) const {
    TPF_UNROLL
    for (u32 v = 0; v < F::kVectors; ++v)
      if constexpr (F::kKeep)
        store_lane<T, F::kAligned>(reinterpret_cast<T*>(a.y) + row * a.y_stride, at(v), a.width, x[v]);
  }

  // x becomes the norm of the sums x, and is stored with all that goes with it. A row that is gathered after its norm is
  // sent from here, if the sums are good. `meanwhile` is done while the warps' sums are under way.
  template <class Meanwhile>
  TPF_DEVICE void norm(Lanes& x, bool good, Meanwhile meanwhile) {
    float r[F::kVectors][8];
    TPF_UNROLL
    for (u32 v = 0; v < F::kVectors; ++v) {
      widen(x[v], r[v]);
      if constexpr (F::kResidual) {
        float stream[8];
        widen(residual[v], stream);
        TPF_UNROLL
        for (u32 i = 0; i < 8; ++i) r[v][i] = add_rn(r[v][i], stream[i]);
      }
      float sum = square_sum(r[v]);
      TPF_UNROLL
      for (u32 mask = kWarp / 2; mask > 0; mask /= 2) sum = add_rn(sum, shuffle_xor(sum, mask));
      tell(0, v, bits_of(sum));
    }
    meanwhile();
    if constexpr (F::kResidual) {
      using R = typename F::R;
      R* to = reinterpret_cast<R*>(a.residual_out) + residual_row() * a.width;
      TPF_UNROLL
      for (u32 v = 0; v < F::kVectors; ++v) store_lane<R, F::kAligned>(to, at(v), a.width, narrow<R>(r[v]));
    }
    // Whole rows are many, and registers short while they wait for peers.
    if constexpr (F::kParts == 1) load_gamma();
    if constexpr (F::kParts == 1) load_given();
    meet(0);
    float inverse = inverse_rms(total_of_squares(), a.reciprocal, a.eps);
    TPF_UNROLL
    for (u32 v = 0; v < F::kVectors; ++v) {
      float y[8];
      widen(gamma[v], y);
      TPF_UNROLL
      for (u32 i = 0; i < 8; ++i) y[i] = mul_rn(mul_rn(r[v][i], inverse), add_rn(y[i], a.bias));
      x[v] = narrow<T>(y);
      if constexpr (F::kPath == Path::early && !F::kQuantisedRows) {
        x[v] = without_mark(x[v]);
        if (good) send_result(v, x[v]);
      }
    }
    store_y(x);
    quantise(x, good);
  }

  // The quantised norm x, stored; and sent where rows travel quantised.
  TPF_DEVICE void quantise(const Lanes& x, bool good) const {
    if constexpr (F::kQuantised && (F::kPath != Path::sum)) {
      u32 most = 0;
      if constexpr (quant::kNeedsRowMax<F::kKind>) {
        TPF_UNROLL
        for (u32 v = 0; v < F::kVectors; ++v) {
          float y[8];
          inside(v, x[v], y);
          u32 amax = quant::lane_amax(y);
          TPF_UNROLL
          for (u32 mask = kWarp / 2; mask > 0; mask /= 2) amax = quant::larger(amax, shuffle_xor(amax, mask));
          tell(1, v, amax);
        }
        meet(1);
        most = largest_magnitude();
      }
      TPF_UNROLL
      for (u32 v = 0; v < F::kVectors; ++v) {
        float y[8];
        inside(v, x[v], y);
        if constexpr (!quant::kNeedsRowMax<F::kKind>) most = quant::group_amax<F::kKind>(quant::lane_amax(y));
        quant::Scale scale = quant::scale_of<F::kKind>(most, given);
        Packed bytes = quant::encode<F::kKind>(y, scale);
        if constexpr (F::kQuantisedRows) {
          bytes = travelling(bytes);
          if (good) {
            send_back(offset(v, F::kResultBytes), here(v), bytes);
            send_back(scale_offset(v), has_scale(v), Word{scale.stored});
          }
          bytes = travelling(bytes);
        }
        store_bytes(v, bytes);
        store_scale(v, scale.stored);
      }
    }
  }

  // Of a norm that came from its owner.
  TPF_DEVICE void quantise_late(const Lanes& x) {
    if constexpr (F::kParts == 1) load_given();
    quantise(x, false);
  }

  // A row that its owner has quantised.
  TPF_DEVICE void receive_quantised() const {
    if constexpr (F::kQuantisedRows) {
      TPF_UNROLL
      for (u32 v = 0; v < F::kVectors; ++v) {
        bool came = lane() != 0 || group(v) >= a.groups || await_last_word(result(), v, F::kResultBytes, owner());
        bool good = !any(!came);
        Packed bytes = {};
        Word stored = {};
        await(result() + offset(v, F::kResultBytes), good && here(v), bytes);
        store_bytes(v, travelling(bytes));
        await(result() + scale_offset(v), good && has_scale(v), stored);
        store_scale(v, stored.w);
      }
    }
  }

  const ReduceArgs& a;
  Board& board;
  u32 row, part;

 private:
  u32 slot, area = 0;
  Lane<typename F::G> gamma[F::kVectors];
  Lane<typename F::R> residual[F::kVectors];
  quant::Given given = {};

  TPF_DEVICE void load_gamma() {
    TPF_UNROLL
    for (u32 v = 0; v < F::kVectors; ++v) gamma[v] = load_weight<typename F::G, F::kAligned>(a.gamma, at(v), a.width);
  }
  TPF_DEVICE const T* term(u32 i) const {
    return reinterpret_cast<const T*>(a.x) + row * a.x_stride + i * a.term_stride;
  }
  TPF_DEVICE Lane<T> load_term(u32 i, u32 v) const { return load_lane<T, F::kAligned>(term(i), at(v), a.width); }
  // Rounded. Where a row is spread over few threads, some terms are under way at a time, in a loop: all of them, and their
  // addresses, would cost it its registers. The sum begins with -0, which changes no term.
  TPF_DEVICE Lane<T> sum_of_terms(u32 v) const {
    constexpr u32 kAtOnce = F::kParts > 1 && F::kAligned ? 16 / sizeof(T) : 1;
    float sum[8];
    TPF_UNROLL
    for (u32 e = 0; e < 8; ++e) sum[e] = -0.0f;
    TPF_ROLLED
    for (u32 first = 0; first < F::kTerms; first += kAtOnce) {
      Lane<T> some[kAtOnce] = {};
      TPF_UNROLL
      for (u32 i = 0; i < kAtOnce; ++i) {
        if (first + i < F::kTerms) some[i] = load_term(first + i, v);
      }
      TPF_UNROLL
      for (u32 i = 0; i < kAtOnce; ++i) {
        if (first + i >= F::kTerms) continue;
        float next[8];
        widen(some[i], next);
        TPF_UNROLL
        for (u32 e = 0; e < 8; ++e) sum[e] = add_rn(sum[e], next[e]);
      }
    }
    return narrow<T>(sum);
  }
  // The user's scale may be the result of an earlier grid.
  TPF_DEVICE void load_given() {
    if constexpr (quant::kNeedsGiven<F::kKind>)
      given = quant::given_of<F::kKind>(float_of(load_global(reinterpret_cast<const u32*>(a.given))));
  }
  TPF_DEVICE u32 group(u32 v) const { return (part * F::kVectors + v) * F::kWarps + warp_index(); }
  TPF_DEVICE u32 at(u32 v) const { return group(v) * kGroupElements + lane() * kLaneElements; }
  TPF_DEVICE bool here(u32 v) const { return at(v) < a.width; }
  // With the norm before the gather, a rank's residual stream has its own rows only.
  TPF_DEVICE i64 residual_row() const { return F::kPath == Path::early ? row / W : row; }

  // Offsets in every rank's workspace.
  TPF_DEVICE u32 partial(u32 index) const { return area + index * W * a.stride; }
  TPF_DEVICE u32 result() const { return area + (a.ring + slot) * a.stride; }
  // A row leaves word to the one half a ring further on.
  TPF_DEVICE u32* flag() const {
    return reinterpret_cast<u32*>(a.own + kReduceFlags) + row % (a.ring / 2) * F::kParts + part;
  }
  // Says who left it: rows half a ring apart share a flag, and both may be waiting.
  TPF_DEVICE static u32 word_of(u32 row) { return row + 1; }
  // In a row, of a lane whose 8 elements take `bytes`.
  TPF_DEVICE u32 offset(u32 v, u32 bytes) const { return at(v) / kLaneElements * bytes; }
  // Scales travel as words behind the bytes.
  TPF_DEVICE u32 scale_offset(u32 v) const {
    return ((a.width + 7) / 8 * F::kResultBytes + 15) / 16 * 16 + scale_number(v) * 4;
  }

  TPF_DEVICE u32 scale_number(u32 v) const {
    constexpr u32 kGroup = quant::kGroup<F::kKind>;
    return kGroup == 0 ? 0 : at(v) / (kGroup == 0 ? 1 : kGroup);
  }
  // Whether this lane has a scale of the row, not of padding.
  TPF_DEVICE bool has_scale(u32 v) const {
    if constexpr (quant::kScaleBytes<F::kKind> == 0) return false;
    if constexpr (quant::kNeedsRowMax<F::kKind>) return at(v) == 0;
    return quant::leads_group<F::kKind>() && here(v);
  }

  // ---- waiting

  // x out of a slot, and marks into it.
  template <class V>
  TPF_DEVICE bool await(u32 place, bool wanted, V& x) const {
    Patience patience;
    bool waits = wanted;
    while (waits) {
      peek(a.own + place, x);
      waits = !complete(x);
      if (waits && patience.over(a.timeout_ns)) {
        report(a, owner(), row, patience.waited_ns());
        return false;
      }
    }
    if (wanted) put_marks_back(a.own + place, x);
    return true;
  }
  // The marks that were put back have come to where peers' stores arrive: a load of the same address brings them.
  TPF_DEVICE void confirm_marks() const {
    TPF_UNROLL
    for (u32 v = 0; v < F::kVectors; ++v) {
      if (owned()) {
        TPF_UNROLL
        for (u32 r = 0; r < W; ++r)
          if (r != a.rank)
            confirm<Lane<T>>(partial(index_for_owner()) + r * a.stride + offset(v, 8 * sizeof(T)), here(v));
      } else if constexpr (F::kQuantisedRows) {
        confirm<Packed>(result() + offset(v, F::kResultBytes), here(v));
        confirm<Word>(result() + scale_offset(v), has_scale(v));
      } else {
        confirm<Lane<T>>(result() + offset(v, 8 * sizeof(T)), here(v));
      }
    }
  }
  template <class V>
  TPF_DEVICE void confirm(u32 place, bool wanted) const {
    V x;
    if (!wanted) return;
    peek(a.own + place, x);
    if (complete(x)) report(a, a.rank, row, 0);
  }
  // Until the last word of this warp's group of a row is there; lanes take `bytes` each.
  TPF_DEVICE bool await_last_word(u32 row_slot, u32 v, u32 bytes, u32 peer) const {
    u32 end = (group(v) + 1) * kGroupElements, lanes = ((end < a.width ? end : a.width) + 7) / kLaneElements;
    const u32* last = reinterpret_cast<const u32*>(a.own + (row_slot + lanes * bytes)) - 1;
    Patience patience;
    while (load_system(last) == kMark) {
      if (patience.over(a.timeout_ns)) {
        report(a, peer, row, patience.waited_ns());
        return false;
      }
    }
    return true;
  }
  template <class V>
  TPF_DEVICE void send_back(u32 place, bool wanted, const V& x) const {
    TPF_UNROLL
    for (u32 r = 0; r < W; ++r)
      if (r != a.rank && wanted) push(a.workspace[r] + (result() + place), x);
  }

  // ---- between the warps of a row

  TPF_DEVICE void tell(u32 topic, u32 v, u32 word) const {
    if (group(v) >= a.groups) return;
    if constexpr (F::kParts == 1) {
      if (lane() == 0) board.words[topic][group(v)] = word;
    } else {
      if (lane() < F::kParts) cluster_post(&board.words[topic][group(v)], word, &board.gate[topic], lane());
    }
  }
  TPF_DEVICE void meet(u32 topic) const {
    if constexpr (F::kParts == 1) {
      barrier();
    } else {
      Patience patience;
      while (!cluster_arrived(&board.gate[topic])) {
        if (patience.over(kLocalPatience * a.timeout_ns)) {
          report(a, a.rank, row, patience.waited_ns());
          return;
        }
      }
    }
  }
  TPF_DEVICE u32 told(u32 topic, u32 group) const { return group < a.groups ? board.words[topic][group] : 0; }
  // The fold of the groups' sums; wider rows than 32 groups are folded once before.
  TPF_DEVICE float total_of_squares() const {
    float sum = float_of(told(0, lane()));
    if (a.groups > kWarp) sum = add_rn(sum, float_of(told(0, lane() + kWarp)));
    TPF_UNROLL
    for (u32 mask = kWarp / 2; mask > 0; mask /= 2) sum = add_rn(sum, shuffle_xor(sum, mask));
    return sum;
  }
  TPF_DEVICE u32 largest_magnitude() const {
    u32 most = quant::larger(told(1, lane()), told(1, lane() + kWarp));
    TPF_UNROLL
    for (u32 mask = kWarp / 2; mask > 0; mask /= 2) most = quant::larger(most, shuffle_xor(most, mask));
    return most;
  }

  // ---- the quantised row

  // Zeros past the end of the row, where the norm has none because gamma or bias are not zero there.
  TPF_DEVICE void inside(u32 v, const Lane<T>& x, float (&y)[8]) const {
    widen(x, y);
    TPF_UNROLL
    for (u32 i = 0; i < 8; ++i) y[i] = at(v) + i < a.width ? y[i] : 0.0f;
  }
  TPF_DEVICE void store_bytes(u32 v, const Packed& bytes) const {
    u64 to = a.quant + (u64(row) * a.width + at(v)) * sizeof(Packed) / kLaneElements;
    if constexpr (quant::kIsFp4<F::kKind>) {
      if (here(v)) store_global(reinterpret_cast<u32*>(to), bytes.w);
    } else if constexpr (F::kAligned) {
      if (here(v)) store_global(reinterpret_cast<Vec8*>(to), bytes);
    } else {
      TPF_UNROLL
      for (u32 i = 0; i < 8; ++i)
        if (at(v) + i < a.width) store_global(reinterpret_cast<u8*>(to) + i, u8(bytes.w[i / 4] >> (i % 4 * 8)));
    }
  }
  TPF_DEVICE void store_scale(u32 v, u32 stored) const {
    if constexpr (quant::kScaleBytes<F::kKind> != 0) {
      constexpr bool kSwizzled = F::kLayout == quant::Layout::swizzled;
      bool wanted = has_scale(v) ||
                    (kSwizzled && quant::leads_group<F::kKind>() && !here(v) && scale_number(v) < 4 * a.pitch);
      u64 index = quant::scale_index<F::kLayout>(a.first_row + row, scale_number(v), a.pitch);
      if (wanted && quant::kScaleBytes<F::kKind> == 4) store_global(reinterpret_cast<u32*>(a.scale) + index, stored);
      if (wanted && quant::kScaleBytes<F::kKind> == 1) store_global(reinterpret_cast<u8*>(a.scale) + index, u8(stored));
      if (kSwizzled && part == 0 && a.first_row + row + 1 == a.all_rows)
        quant::zero_padding_rows(reinterpret_cast<u8*>(a.scale), a.all_rows, a.pitch, thread_index(), F::kThreads);
    }
  }
};

// Grid: rows * kParts. Not with the norm before the gather: there is none.
template <class F>
TPF_KERNEL(F::kThreads, F::kResident)
void reduce_one_shot(const TPF_GRID_CONSTANT ReduceArgs a) {
  using Share = RowShare<F>;
  using Board = typename Share::Board;
  TPF_SHARED(Board, board);
  Share share(a, board);
  dependency_trigger();
  dependency_wait();
  share.begin();
  typename Share::Lanes x;
  share.load_x(x);
  share.load_residual();
  TPF_UNROLL
  for (u32 r = 0; r < F::kWorld; ++r)
    if (r != a.rank) share.send_partial(r, share.index_for_all(), x);
  bool good = share.template add_partials<F::kParts == 1 || F::kPath != Path::sum>(share.index_for_all(), x);
  auto clear = [&] { share.clear_partials(share.index_for_all()); };
  if constexpr (F::kPath == Path::sum) {
    share.store_y(x);
    clear();
  } else {
    share.norm(x, good, clear);
  }
  share.end();
}

// Grid: rows * kParts.
template <class F>
TPF_KERNEL(F::kThreads, F::kResident)
void reduce_two_shot(const TPF_GRID_CONSTANT ReduceArgs a) {
  using Share = RowShare<F>;
  using Board = typename Share::Board;
  TPF_SHARED(Board, board);
  Share share(a, board);
  dependency_trigger();
  dependency_wait();
  share.begin();
  typename Share::Lanes x;
  share.load_x(x);
  share.await_slots();
  if (!share.owned()) share.send_partial(share.owner(), share.index_for_owner(), x);
  bool good = true;
  auto clear = [&] { share.clear_partials(share.index_for_owner()); };
  if (share.owned()) {
    // The owner holds the rows of all ranks while it waits: whole rows leave it no registers for the residual.
    if (F::kParts > 1) share.load_residual();
    good = share.template add_partials<false>(share.index_for_owner(), x);
    TPF_UNROLL
    for (u32 v = 0; v < F::kVectors; ++v) {
      x[v] = without_mark(x[v]);
      if (F::kPath != Path::early && good) share.send_result(v, x[v]);
    }
    if (F::kPath != Path::early) clear();
    if (F::kParts == 1) share.load_residual();
  } else {
    if (F::kPath == Path::norm) share.load_residual();
    if (F::kQuantisedRows) {
      share.receive_quantised();
    } else {
      share.receive_result(x);
    }
  }
  if (F::kPath == Path::norm || (F::kPath == Path::early && share.owned())) {
    share.norm(x, good, [&] {
      if (F::kPath == Path::early) clear();
    });
  } else if (!F::kQuantisedRows) {
    share.store_y(x);
    share.quantise_late(x);
  }
  share.free_slots();
  share.end();
}

}  // namespace tpfuse
