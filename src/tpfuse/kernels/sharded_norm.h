// RMSNorm of rows whose width is split over W ranks: one tensor (rms_norm) or two at once (qk_rms_norm).
//
// The only thing that crosses the links is each row's sum of squares: one float a tensor, a row and a rank. The rest is
// one read and one write of the rows, so few rows are bound by the exchange and many rows by memory. Two kernels, bit for
// bit the same results:
//
//   norm_by_row    few rows. A warp has a whole row in registers, so nothing is shared between warps and nothing waits at
//                  a barrier; one packet a rank carries the sums of both tensors.
//   norm_by_block  many rows, and rows too wide for a warp. A block has kRows rows at a time; warp 0 sends one packet a
//                  row and rank and polls for all, while the next rows' loads are in flight.
//
// Protocol (docs/protocol.md proves it)
//   A packet carries its flag: {sum, step} in 8 naturally atomic bytes, two of them in one 16-byte store. The reader spins
//   until the step is the one it waits for. Nothing is ever cleared.
//   Steps come from a counter in device memory that only this warp (this block) uses, so replays of a CUDA graph go on
//   counting.
//   Slots lie at a stride fixed by constants, never by the grid: a call of another size must not find another block's old
//   packet with the step that it is waiting for.
//   Ring: a rank pushes step j + 1 only after it has consumed step j of every peer, and a peer's packet of step j proves
//   that the peer has consumed step j - 1; so two slots never lose a packet.
//   A block waits only for the block of the same index on other ranks, and blocks start by index: no grid has to fit the
//   GPU at once.
//   Every spin is bounded by the device clock. Who gives up writes the error record and leaves.
//
// A rotation (RoPE) is linear, and a row's factor is one number for a tensor: so a single row is multiplied by gamma and
// turned while the sums are under way, in fp32, and after the arrival only one product an element is left. norm_by_block
// turns several rows after the arrival: other blocks' exchanges hide that, and turned early their fp32 takes twice the
// registers (38.8 us against 41.0 at 16384 rows).
//
// The halves of a pair lie in two lanes, l and l ^ kPartner. With several rows a step norm_by_block does not exchange them:
// each of the two lanes takes both halves, of one half of the rows (Slots). What bounds a turned row there is the pipe that
// serves shuffles and shared memory. Of it an exchange takes, for each row and group, 8 shuffles, 4 vectors of angles and a
// vector of gamma in conflict with itself, by count 32 cycles; without, 2 vectors of angles and 1 of gamma, 12 cycles. A
// level of the fold becomes an addition in the lane. Loads and stores of a warp are runs of kPartner vectors, which have to
// be whole sectors of 32 bytes: so not for kPartner 1. 46.4 us became 42.3 at 16384 rows, and the norm alone, which got the
// same fold, 33.6 of 34.3. With 3 blocks a multiprocessor instead of 4 rotated rows take 42.7, with 5 (spilling) 52.3.
//
// Tried on 4x H200 and dropped (docs/qk-norm-performance.md has the figures):
//   a warp for each group of 256 elements, each sending its own packet: not faster at one row, and 1.5x to 2x slower from
//   1024 rows on, where the packets and polls of 7 warps a row get into each other's way;
//   sums sent one step ahead of their use (ring of 4), from registers and from shared memory by asynchronous copies: the
//   registers or the second trip cost what the hidden exchange gains;
//   chunks drawn from a ticket counter instead of a fixed stride: balances the multiprocessors (a plain copy gains 8%),
//   but its packets need a slot a row, which fall out of L2 between calls, and remote writes to memory that is not in
//   L2 cost more than the balance gains (46 us against 37 at 16384 rows);
//   one chunk a block and no loop: 38 to 71 us at 16384 rows, every block pays the exchange;
//   norm_by_row with 2 or 8 warps a block: 0.3 to 1 us slower at few rows;
//   its gamma into shared memory after the push: 0.3 to 0.5 us slower from 1024 rows on where rows are turned;
//   a prefetch of the peer's slot: 2 to 125 us slower;
//   in norm_by_block a prefetch of the second step's rows as well, or always of those of the step after the next: 0.6 and
//   1.1 us slower at 16384 rows than that of the first step alone.
//
// Order under programmatic dependent launch: gamma is a weight and is loaded before the wait; activations and the
// counters only after it. The trigger stands just before the wait: the next grid may take its place early, but it waits for
// the end of this one before it acts on anything but weights. What norm_by_row will read it asks into the L2 before the
// wait: a prefetch reads nothing, and the L2 is where a writer's stores meet it. So does norm_by_block for its first step
// where the host says so (prefetches): rows that are not in the L2 yet gain up to 10% (33.4 us to 31.8 at 16384 rows), but
// rows that are there lose up to 20%. Which angles a row needs its position says, which is read before the wait for their
// prefetch alone, and again behind it: cold 2.35 us instead of 2.64 at one row. Of few rows a warp of its own reads it:
// behind a grid that does not trigger early, who has the row must not wait for that trip (0.25 to 0.4 us at 1 to 256 rows).
//
// What one row costs is a chain of steps that all ranks wait for, so in norm_by_row all that can be done before the wait,
// or while packets are under way, is done there, and pinned: the compiler would move it to its use, behind the arrival.
// 4x H200, us a call at 1, 64 and 1024 rows of 1536 + 256, cold:
//   2.84  3.05  5.03  before
//   2.54  2.59  3.96  rows prefetched, groups not padded to powers of two, gamma without bank conflicts
//   2.59  2.64  4.03  addresses pinned, one root for both tensors, reciprocal instead of division (hot 2.12 against 2.21)
//   2.10  2.41        few rows: gamma by vectors into each warp's registers, so that no barrier waits for it
//
// Sums follow tpfuse.reference.sum_of_squares: 8 elements in a lane, 32 lanes, groups of 256; each level is folded by
// halves. Padding with zeros to a larger power of two does not change a bit, so kernels may fold more groups than there
// are. Ranks are added in rank order.
#pragma once
#include "platform.h"

namespace tpfuse {

constexpr u32 kMaxWorld = 8;
constexpr u32 kLaneElements = 8;
constexpr u32 kGroupElements = kLaneElements * kWarp;

// Host and device share these through tpfuse.backends.cuda.sharded_norm, which reads them out of this file.
constexpr u32 kRowPlaces = 4224;    // most warps of norm_by_row
constexpr u32 kRowRing = 2;
constexpr u32 kBlockBlocks = 1056;  // most blocks of norm_by_block
constexpr u32 kBlockRows = 4;       // most rows of a step
constexpr u32 kBlockRing = 2;
constexpr u32 kBlockGroups = 128;   // most groups of both tensors in norm_by_block

// Passed by value; the host packs the same bytes. The first part never changes for a launcher.
// Index 0 is q (or the only tensor), 1 is k.
struct NormArgs {
  u64 workspace[kMaxWorld];  // of every rank
  u64 error;                 // this rank's error record: {1, op, rank, peer}, {block, step, waited ns}
  u64 timeout_ns;
  u32 rank, op;

  u64 x[2];      // rows, T
  u64 y[2];      // rows, T; may be x
  u64 gamma[2];  // fp32, bf16 or fp16 as gamma_type says
  i64 x_stride[2], y_stride[2];  // elements
  u32 rows;
  u32 width[2];       // this rank's
  u32 gamma_type[2];  // 0 fp32, 1 bf16, 2 fp16
  float eps[2];
  float reciprocal[2];  // 1 / (width * W)
  float bias;           // added to gamma
  u32 head_dim, rotary_dim;     // of the rotation, if there is one; head_dim is a power of two
  u32 known_positions;          // rows of the tables
  u32 prefetches;               // norm_by_block asks for rows ahead
  u64 cosines, sines;           // fp32 [known_positions, rotary_dim / 2]
  u64 positions;                // i64 [rows]
};

// Where things lie in a rank's workspace.
struct NormSlots {
  static constexpr u64 row_counters = 0;
  static constexpr u64 block_counters = row_counters + u64(kRowPlaces) * 4;
  static constexpr u64 row_slots = (block_counters + u64(kBlockBlocks) * 4 + 127) / 128 * 128;
  static constexpr u64 block_slots = row_slots + u64(kRowPlaces) * kRowRing * kMaxWorld * 16;
  static constexpr u64 bytes = block_slots + u64(kBlockBlocks) * kBlockRing * kMaxWorld * kBlockRows * 16;
};

// Eight elements of a row, as they lie in memory.
template <class T>
struct Lane {
  Vec16 v[sizeof(T) / 2];
};

template <class T>
TPF_DEVICE void widen(const Lane<T>& lane, float (&x)[8]) {
  unpack8<T>(lane.v[0], x);
}
TPF_DEVICE void widen(const Lane<float>& lane, float (&x)[8]) {
  TPF_UNROLL
  for (int i = 0; i < 8; ++i) x[i] = float_of(lane.v[i / 4].w[i % 4]);
}
template <class T>
TPF_DEVICE Lane<T> narrow(const float (&x)[8]) {
  Lane<T> lane;
  if constexpr (sizeof(T) == 2) {
    lane.v[0] = pack8<T>(x);
  } else {
    TPF_UNROLL
    for (int i = 0; i < 8; ++i) lane.v[i / 4].w[i % 4] = bits_of(x[i]);
  }
  return lane;
}

template <class T>
struct Bits;  // the integer that a single element is loaded as
template <>
struct Bits<bf16> {
  using type = u16;
};
template <>
struct Bits<f16> {
  using type = u16;
};
template <>
struct Bits<float> {
  using type = u32;
};

// Elements [at, at + 8) of a row of `width`; zeros beyond its end. kAligned: rows and width are whole 16-byte vectors.
template <class T, bool kAligned>
TPF_DEVICE Lane<T> load_lane(const T* row, u32 at, u32 width) {
  Lane<T> lane = {};
  if constexpr (kAligned) {
    if (at < width) {
      TPF_UNROLL
      for (u32 i = 0; i < sizeof(T) / 2; ++i) lane.v[i] = load_global(reinterpret_cast<const Vec16*>(row + at) + i);
    }
  } else {
    using Word = typename Bits<T>::type;
    TPF_UNROLL
    for (u32 i = 0; i < 8; ++i) {
      u32 bits = at + i < width ? load_global(reinterpret_cast<const Word*>(row + at) + i) : Word(0);
      lane.v[i * sizeof(T) / 16].w[i * sizeof(T) / 4 % 4] |= bits << (sizeof(T) == 2 ? i % 2 * 16 : 0);
    }
  }
  return lane;
}

template <class T, bool kAligned>
TPF_DEVICE void store_lane(T* row, u32 at, u32 width, const Lane<T>& lane) {
  if constexpr (kAligned) {
    if (at < width) {
      TPF_UNROLL
      for (u32 i = 0; i < sizeof(T) / 2; ++i) store_global(reinterpret_cast<Vec16*>(row + at) + i, lane.v[i]);
    }
  } else {
    using Word = typename Bits<T>::type;
    TPF_UNROLL
    for (u32 i = 0; i < 8; ++i) {
      u32 bits = lane.v[i * sizeof(T) / 16].w[i * sizeof(T) / 4 % 4] >> (sizeof(T) == 2 ? i % 2 * 16 : 0);
      if (at + i < width) store_global(reinterpret_cast<Word*>(row + at) + i, Word(bits));
    }
  }
}

// Eight elements of gamma as they lie in memory: fp32 in both vectors, 16-bit types in the first. gamma is a weight: nobody
// writes it while the kernel runs, so it is loaded before the wait for earlier grids, and looked at as late as possible.
struct GammaWords {
  Vec16 v[2];
};
template <bool kAligned>
TPF_DEVICE GammaWords load_gamma(const NormArgs& a, u32 t, u32 at) {
  GammaWords words = {};
  bool wide = a.gamma_type[t] == 0;
  u64 from = a.gamma[t] + u64(at) * (wide ? 4 : 2);
  if constexpr (kAligned) {
    if (at < a.width[t]) words.v[0] = load_readonly(reinterpret_cast<const Vec16*>(from));
    if (at < a.width[t] && wide) words.v[1] = load_readonly(reinterpret_cast<const Vec16*>(from) + 1);
  } else {
    TPF_UNROLL
    for (u32 i = 0; i < 8; ++i) {
      if (at + i >= a.width[t]) continue;
      if (wide) words.v[i / 4].w[i % 4] = load_readonly(reinterpret_cast<const u32*>(from) + i);
      else words.v[0].w[i / 2] |= u32(load_readonly(reinterpret_cast<const u16*>(from) + i)) << i % 2 * 16;
    }
  }
  return words;
}
// gamma + bias in fp32.
TPF_DEVICE void widen_gamma(const NormArgs& a, u32 t, const GammaWords& words, float (&g)[8]) {
  switch (a.gamma_type[t]) {
    case 0: widen(Lane<float>{{words.v[0], words.v[1]}}, g); break;
    case 1: unpack8<bf16>(words.v[0], g); break;
    default: unpack8<f16>(words.v[0], g); break;
  }
  TPF_UNROLL
  for (u32 i = 0; i < 8; ++i) g[i] = add_rn(g[i], a.bias);
}

TPF_DEVICE float square_sum(const float (&x)[8]) {
  float square[8];
  TPF_UNROLL
  for (int i = 0; i < 8; ++i) square[i] = mul_rn(x[i], x[i]);
  TPF_UNROLL
  for (int half = 4; half > 0; half /= 2) {
    TPF_UNROLL
    for (int i = 0; i < half; ++i) square[i] = add_rn(square[i], square[i + half]);
  }
  return square[0];
}
template <class T>
TPF_DEVICE float lane_square(const Lane<T>& lane) {
  float x[8];
  widen(lane, x);
  return square_sum(x);
}

TPF_DEVICE float inverse_rms(float total, float reciprocal, float eps) {
  return reciprocal_rn(sqrt_rn(add_rn(mul_rn(total, reciprocal), eps)));
}

// How a row is turned before its factor (tpfuse.rope). Groups begin with a head, since head_dim divides 256, so a lane's
// elements have the same place in their head, and the same angles, in all groups of a row.
enum class Turn { none, halves, neighbours };

template <Turn kTurn, bool kShared>
class Rotation {
 public:
  // Vectors that a lane needs of each table, and pairs of a row at most.
  static constexpr u32 kVectors = kTurn == Turn::halves ? 2 : kTurn == Turn::neighbours ? 1 : 0;
  static constexpr u32 kPairs = kTurn == Turn::none ? 4 : kGroupElements / 2;

  // The row's place in the tables, in vectors: 32 bits count those of 64 GiB, more than which the host does not give. The
  // tables wait for this, so it is loaded as early as the row.
  TPF_DEVICE static u32 begin_of(const NormArgs& a, u32 row) {
    if constexpr (kTurn == Turn::none) return 0;
    if (row >= a.rows) return 0;
    return load_global(reinterpret_cast<const Vec8*>(a.positions) + row).w[0] * (a.rotary_dim / 8);
  }
  // Asks for the row's angles to come into the L2, before the wait for earlier grids, by one of `lanes`. One of these grids
  // may yet write the position. Then others are asked for, which nobody looks at; so the position may be any number here.
  TPF_DEVICE static void prefetch_angles(const NormArgs& a, u32 row, u32 lane, u32 lanes) {
    if constexpr (kTurn == Turn::none || !kPrefetches) return;
    if (row >= a.rows) return;
    u64 position = load_system(reinterpret_cast<const u64*>(a.positions) + row);
    if (position >= a.known_positions) return;
    u32 bytes = a.rotary_dim * 2, sectors = (bytes + 31) / 32;  // of a table's row
    for (u32 i = lane; i < 2 * sectors; i += lanes) {
      u64 table = i < sectors ? a.cosines : a.sines;
      prefetch(reinterpret_cast<const void*>(table + position * bytes + i % sectors * 32));
    }
  }
  TPF_DEVICE static Vec16 vector_of(u64 table, u32 begin, u32 vector) {
    return load_global(reinterpret_cast<const Vec16*>(table) + (begin + vector));
  }

  // This lane's angles of a row that begins there, into registers.
  TPF_DEVICE void load(const NormArgs& a, u32 begin) {
    static_assert(!kShared || kTurn == Turn::none);
    if constexpr (kTurn != Turn::none && !kShared) {
      u32 first = aim(a.head_dim, a.rotary_dim);
      TPF_UNROLL
      for (u32 v = 0; v < kVectors && turns_; ++v) {
        cosines_[v] = vector_of(a.cosines, begin, first + v);
        sines_[v] = vector_of(a.sines, begin, first + v);
        if (kTurn == Turn::halves && !upper_) sines_[v] = negative(sines_[v]);
      }
    }
  }
  // The row's angles lie in shared memory. The compiler would keep these addresses in registers over the whole loop, and
  // spill; it can't where it does not know that head_dim is still the same.
  TPF_DEVICE void look_at(const NormArgs& a, const Vec16* cosines, const Vec16* sines, const Vec16* negative_sines) {
    if constexpr (kTurn != Turn::none && kShared) {
      u32 first = aim(shuffle(a.head_dim, 0), a.rotary_dim);
      cosines_ = cosines + first;
      sines_ = (kTurn == Turn::halves && !upper_ ? negative_sines : sines) + first;
    }
  }
  TPF_DEVICE static Vec16 negative(const Vec16& x) {
    return Vec16{{x.w[0] ^ 1u << 31, x.w[1] ^ 1u << 31, x.w[2] ^ 1u << 31, x.w[3] ^ 1u << 31}};
  }

  // All lanes of the warp must come.
  TPF_DEVICE void turn(float (&x)[8]) const {
    TPF_UNROLL
    for (u32 v = 0; v < kVectors; ++v) {
      Vec16 c = turns_ ? cosines_[v] : Vec16{}, s = turns_ ? sines_[v] : Vec16{};
      TPF_UNROLL
      for (u32 n = 0; n < 4; ++n) {
        float cosine = float_of(c.w[n]), sine = float_of(s.w[n]);
        if constexpr (kTurn == Turn::halves) {
          u32 i = 4 * v + n;
          float side = mul_rn(shuffle(x[i], partner_), sine);
          x[i] = turns_ ? add_rn(mul_rn(x[i], cosine), side) : x[i];
        } else {
          float first = x[2 * n], second = x[2 * n + 1];
          x[2 * n] = turns_ ? add_rn(mul_rn(first, cosine), mul_rn(second, -sine)) : first;
          x[2 * n + 1] = turns_ ? add_rn(mul_rn(second, cosine), mul_rn(first, sine)) : second;
        }
      }
    }
  }

 private:
  // The first vector of a row's tables that this lane needs.
  TPF_DEVICE u32 aim(u32 head_dim, u32 rotary_dim) {
    u32 place = lane() * kLaneElements & (head_dim - 1), half = rotary_dim / 2;
    turns_ = place < rotary_dim;
    if constexpr (kTurn == Turn::neighbours) return place / 8;
    upper_ = place >= half;
    partner_ = upper_ ? lane() - half / kLaneElements : lane() + half / kLaneElements;
    return (upper_ ? place - half : place) / 4;
  }

  template <bool shared, u32 count>
  struct Angles {
    using type = Vec16[count > 0 ? count : 1];
  };
  template <u32 count>
  struct Angles<true, count> {
    using type = const Vec16*;
  };
  typename Angles<kShared, kVectors>::type cosines_ = {}, sines_ = {};
  u32 partner_ = 0;
  bool upper_ = false, turns_ = false;
};

// What a lane keeps of eight elements until their row's factor is known. A rotation is linear, so it is done before:
// what is left to do with the factor is one product an element. kFew: rows, so there are registers to have all ready.
template <class T, Turn kTurn, bool kFew = false>
struct Kept {
  static constexpr bool kHasGamma = true;
  float x[8];

  TPF_DEVICE void weigh(const Lane<T>& lane, const float* gamma) {
    widen(lane, x);
    TPF_UNROLL
    for (int i = 0; i < 8; ++i) x[i] = mul_rn(x[i], gamma[i]);
  }
  template <bool kShared>
  TPF_DEVICE void keep(const Lane<T>& lane, const float* gamma, const Rotation<kTurn, kShared>& rotation) {
    weigh(lane, gamma);
    rotation.turn(x);
  }
  TPF_DEVICE Lane<T> normed(float inverse, const float*) const {
    float y[8];
    TPF_UNROLL
    for (int i = 0; i < 8; ++i) y[i] = mul_rn(x[i], inverse);
    return narrow<T>(y);
  }
};
template <class T>
struct Kept<T, Turn::none, false> {
  static constexpr bool kHasGamma = false;
  Lane<T> lane;

  template <class Rotation>
  TPF_DEVICE void keep(const Lane<T>& own, const float*, const Rotation&) {
    lane = own;
  }
  TPF_DEVICE Lane<T> normed(float inverse, const float* gamma) const {
    float x[8];
    widen(lane, x);
    TPF_UNROLL
    for (int i = 0; i < 8; ++i) x[i] = mul_rn(mul_rn(x[i], inverse), gamma[i]);
    return narrow<T>(x);
  }
};
template <class T>
struct Kept<T, Turn::none, true> {
  static constexpr bool kHasGamma = true;
  float x[8], gamma[8];

  template <class Rotation>
  TPF_DEVICE void keep(const Lane<T>& own, const float* g, const Rotation&) {
    widen(own, x);
    TPF_UNROLL
    for (int i = 0; i < 8; ++i) {
      gamma[i] = g[i];
      pin(x[i]);
      pin(gamma[i]);
    }
  }
  TPF_DEVICE Lane<T> normed(float inverse, const float*) const {
    float y[8];
    TPF_UNROLL
    for (int i = 0; i < 8; ++i) y[i] = mul_rn(mul_rn(x[i], inverse), gamma[i]);
    return narrow<T>(y);
  }
};

TPF_DEVICE u32 group_count(u32 width) { return (width + kGroupElements - 1) / kGroupElements; }

// Peer `r`'s workspace. A chain of selects over compile-time indices: indexing the array by r would copy it to local
// memory, which costs 0.3 us a call.
template <u32 W, class Args>
TPF_DEVICE u64 workspace_of(const Args& a, u32 r) {
  u64 base = a.workspace[0];
  TPF_UNROLL
  for (u32 i = 1; i < W; ++i) base = r == i ? a.workspace[i] : base;
  return base;
}

// Bounds a spin. The clock is read once in 64 turns: it costs more than a poll.
class Patience {
 public:
  TPF_DEVICE bool over(u64 timeout_ns) {
    spin_pause();
    if (++turns_ % 64 != 0) return false;
    u64 now = clock_ns();
    if (start_ == 0) start_ = now;
    return now - start_ > timeout_ns;
  }
  TPF_DEVICE u64 waited_ns() const { return start_ == 0 ? 0 : clock_ns() - start_; }

 private:
  u32 turns_ = 0;
  u64 start_ = 0;
};

// A packet: {sum, step, sum of the second tensor, step}. Each half has its own flag, so the protocol needs only 8 bytes
// at a time to be atomic. One flag for all 16 is not enough: where a kernel of one tensor looked at {sum, -, step, -},
// ptxas 13.0 made two 4-byte loads out of the 16-byte one, and a reader met a new flag beside an old sum (one row in some
// 10,000 on 4x H200; ptxas 13.4 does not do it).
TPF_DEVICE Vec16 packet_of(float first, float second, u32 step) {
  return Vec16{{bits_of(first), step, bits_of(second), step}};
}
template <bool kBoth>
TPF_DEVICE bool arrived(const Vec16& packet, u32 step) {
  return packet.w[1] == step && (!kBoth || packet.w[3] == step);
}

// The first to give up leaves the record, its marker last; which of several it is does not matter.
template <class Args>
TPF_DEVICE void report(const Args& a, u32 peer, u32 step, u64 waited_ns) {
  Vec16* record = reinterpret_cast<Vec16*>(a.error);
  if (load_system(record).w[0] != 0) return;
  store_system(record + 1, Vec16{{block_index(), step, u32(waited_ns), u32(waited_ns >> 32)}});
  store_system(record, Vec16{{1, a.op, a.rank, peer}});
}

// The levels of a fold over lanes from kMask down, of kEach values of each of kRows rows. While several rows are left, the
// two halves of the lanes exchange so that each goes on with half of the rows. A level at which a lane has both values
// (kPartner) needs no shuffle.
template <u32 kMask, u32 kRows, u32 kEach, u32 kPartner, u32 kCount>
TPF_DEVICE float fold_levels(float (&x)[kCount]) {
  if constexpr (kMask == 0) {
    return x[0];
  } else if constexpr (kMask == kPartner) {
    TPF_UNROLL
    for (u32 r = 0; r < kRows; ++r) x[r] = add_rn(x[2 * r], x[2 * r + 1]);
    return fold_levels<kMask / 2, kRows, 1, kPartner>(x);
  } else if constexpr (kRows > 1) {
    constexpr u32 kHalf = kRows / 2 * kEach;
    bool upper = lane() & kMask;
    TPF_UNROLL
    for (u32 i = 0; i < kHalf; ++i) {
      float keep = upper ? x[i + kHalf] : x[i], give = upper ? x[i] : x[i + kHalf];
      x[i] = add_rn(keep, shuffle_xor(give, kMask));
    }
    return fold_levels<kMask / 2, kRows / 2, kEach, kPartner>(x);
  } else {
    TPF_UNROLL
    for (u32 i = 0; i < kEach; ++i) x[i] = add_rn(x[i], shuffle_xor(x[i], kMask));
    return fold_levels<kMask / 2, 1, kEach, kPartner>(x);
  }
}
// Sums kRows values over the 32 lanes, each by the fold of one value, in fewer shuffles. Lane l ends with row
// l / (32 / kRows).
template <u32 kRows>
TPF_DEVICE float fold_lanes(const float (&sums)[kRows]) {
  float x[kRows];
  TPF_UNROLL
  for (u32 r = 0; r < kRows; ++r) x[r] = sums[r];
  return fold_levels<kWarp / 2, kRows, 1, 0>(x);
}

// ---------------------------------------------------------------------------------------------------------------------
// Few rows: a warp has a whole row.

// A place's ring: kRowRing slots for each source rank.
TPF_DEVICE u64 row_slots(u64 workspace, u32 place, u32 source) {
  return workspace + NormSlots::row_slots + (u64(place) * kRowRing * kMaxWorld + source) * 16;
}
TPF_DEVICE u32 row_slot(u32 step) { return step % kRowRing * kMaxWorld * 16; }

// Sums each of kCount values (a power of two) over the 32 lanes and then the results over each other, both by halves; every
// lane gets the total.
template <u32 kCount>
TPF_DEVICE float fold_all(const float (&x)[kCount]) {
  float sum = fold_lanes<kCount>(x);
  TPF_UNROLL
  for (u32 m = kWarp / 2; m > kWarp / 2 / kCount; m /= 2) sum = add_rn(sum, shuffle_xor(sum, m));
  return sum;
}

// Asks for a row to come into the L2, one lane for each of its sectors.
template <class T, u32 kGroups>
TPF_DEVICE void prefetch_row(u64 row, u32 width) {
  constexpr u32 kSector = 32 / sizeof(T);
  TPF_UNROLL
  for (u32 first = 0; first < kGroups * kGroupElements; first += kWarp * kSector) {
    u32 at = first + lane() * kSector;
    if (at < width) prefetch(reinterpret_cast<const T*>(row) + at);
  }
}

TPF_DEVICE constexpr u32 padded(u32 groups) { return groups <= 1 ? 1 : 2 * padded((groups + 1) / 2); }

// Block: kWarps warps, a row each. kGroups0, kGroups1: groups of the tensors; 0 for no second one. Grid: all rows, at most
// kRowPlaces. kFew: so few rows that a warp keeps its own gamma in registers, and no barrier waits for it; and, where rows
// are turned, that one more warp looks ahead for the angles of all. It reads positions, and whoever has a row must not wait
// for that.
TPF_DEVICE constexpr u32 scouts(bool few, Turn turn) { return few && turn != Turn::none ? 1 : 0; }
template <class T, u32 W, u32 kGroups0, u32 kGroups1, bool kAligned, u32 kWarps, u32 kResident, bool kFew,
          Turn kTurn = Turn::none>
TPF_KERNEL((kWarps + scouts(kFew, kTurn)) * 32, kResident)
void norm_by_row(const TPF_GRID_CONSTANT NormArgs a) {
  constexpr u32 kGroups = kGroups0 + kGroups1, kTensors = kGroups1 > 0 ? 2 : 1;
  auto tensor = [](u32 g) { return g >= kGroups0 ? 1u : 0u; };
  auto at = [](u32 g) { return (g >= kGroups0 ? g - kGroups0 : g) * kGroupElements + lane() * kLaneElements; };

  if (scouts(kFew, kTurn) && warp_index() == kWarps) {
    constexpr u32 kLanes = kWarp / kWarps;
    Rotation<kTurn, false>::prefetch_angles(a, block_index() * kWarps + lane() / kLanes, lane() % kLanes, kLanes);
    return;
  }
  // All that does not depend on earlier grids comes before the wait: it costs nothing there.
  u32 row = block_index() * kWarps + warp_index();
  bool exists = row < a.rows;
  u64 x[2], y[2];
  TPF_UNROLL
  for (u32 t = 0; t < kTensors; ++t) {
    x[t] = a.x[t] + row * a.x_stride[t] * i64(sizeof(T));
    y[t] = a.y[t] + row * a.y_stride[t] * i64(sizeof(T));
    pin(x[t]);
    pin(y[t]);
  }
  GammaWords words[kFew ? kGroups : 1];
  using Gammas = Vec16[kFew ? 1 : kGroups][2][kWarp];  // a lane's 32 bytes in two places, or they would share its banks
  TPF_SHARED(Gammas, gammas);
  TPF_UNROLL
  for (u32 g = 0; kFew && g < kGroups; ++g) words[g] = load_gamma<kAligned>(a, tensor(g), at(g));
  for (u32 g = warp_index(); !kFew && g < kGroups; g += kWarps) {
    float gamma[8];
    widen_gamma(a, tensor(g), load_gamma<kAligned>(a, tensor(g), at(g)), gamma);
    Lane<float> wide = narrow<float>(gamma);
    gammas[g][0][lane()] = wide.v[0];
    gammas[g][1][lane()] = wide.v[1];
  }
  auto gamma_of = [&](u32 g, float (&gamma)[8]) {
    if constexpr (kFew) widen_gamma(a, tensor(g), words[g], gamma);
    else widen(Lane<float>{{gammas[g][0][lane()], gammas[g][1][lane()]}}, gamma);
  };
  // Lanes [0, W) send to one rank each. A lane below kTensors * W awaits one rank's sum of one tensor, half a packet.
  u32 to = lane() < W ? lane() : 0, half = lane() < kTensors * W ? lane() : 0, from = half % W;
  u64 own_space = workspace_of<W>(a, a.rank);
  u64 outbox = row_slots(workspace_of<W>(a, to), row, a.rank), inbox = row_slots(own_space, row, from) + half / W * 8;
  u64 counter = own_space + NormSlots::row_counters + u64(row) * 4;
  pin(outbox);
  pin(inbox);
  pin(counter);
  if (exists) {
    prefetch_row<T, kGroups0>(x[0], a.width[0]);
    if (kTensors == 2) prefetch_row<T, kGroups1>(x[1], a.width[1]);
    prefetch(reinterpret_cast<const void*>(counter));
    TPF_UNROLL
    for (u32 i = 0; i < kRowRing; ++i) prefetch(reinterpret_cast<const void*>(inbox + row_slot(i)));
    if (!scouts(kFew, kTurn)) Rotation<kTurn, false>::prefetch_angles(a, row, lane(), kWarp);
  }
  if (!kFew) barrier();

  dependency_trigger();
  dependency_wait();
  if (!exists) return;
  u32 step = load_global(reinterpret_cast<const u32*>(counter)) + 1;
  u32 angles = Rotation<kTurn, false>::begin_of(a, row);
  Lane<T> own[kGroups];
  TPF_UNROLL
  for (u32 g = 0; g < kGroups; ++g)
    own[g] = load_lane<T, kAligned>(reinterpret_cast<const T*>(x[tensor(g)]), at(g), a.width[tensor(g)]);
  float q[padded(kGroups0)] = {}, k[padded(kGroups1)] = {};
  TPF_UNROLL
  for (u32 g = 0; g < kGroups0; ++g) q[g] = lane_square(own[g]);
  TPF_UNROLL
  for (u32 g = 0; g < kGroups1; ++g) k[g] = lane_square(own[kGroups0 + g]);
  Vec16 sums = packet_of(fold_all(q), kTensors == 2 ? fold_all(k) : 0.0f, step);
  if (lane() < W) store_system(reinterpret_cast<Vec16*>(outbox + row_slot(step)), sums);

  // While the packets are under way.
  Rotation<kTurn, false> rotation;
  rotation.load(a, angles);
  Kept<T, kTurn, kFew> kept[kGroups];
  if (kTurn != Turn::none) sync_warp();  // or the compiler makes a second copy of all shuffles, for a divergent warp
  TPF_UNROLL
  for (u32 g = 0; g < kGroups; ++g) {
    float gamma[8];
    gamma_of(g, gamma);
    kept[g].keep(own[g], gamma, rotation);
  }

  u64 packet = 0;
  bool waits = lane() < kTensors * W;
  Patience patience;
  while (waits) {
    packet = load_system(reinterpret_cast<const u64*>(inbox + row_slot(step)));
    waits = u32(packet >> 32) != step;
    if (waits && patience.over(a.timeout_ns)) {
      report(a, from, step, patience.waited_ns());
      break;
    }
  }
  if (any(waits)) return;
  // Even lanes go on with q, odd ones with k: one root for both.
  u32 t = kTensors == 2 ? lane() % 2 : 0;
  float sum = float_of(u32(packet)), total = shuffle(sum, t * W);
  TPF_UNROLL
  for (u32 r = 1; r < W; ++r) total = add_rn(total, shuffle(sum, t * W + r));
  float factor = inverse_rms(total, t == 0 ? a.reciprocal[0] : a.reciprocal[1], t == 0 ? a.eps[0] : a.eps[1]);
  float inverse[2] = {shuffle(factor, 0), shuffle(factor, 1)};
  TPF_UNROLL
  for (u32 g = 0; g < kGroups; ++g) {
    float gamma[8] = {};
    if constexpr (!Kept<T, kTurn, kFew>::kHasGamma) gamma_of(g, gamma);
    store_lane<T, kAligned>(reinterpret_cast<T*>(y[tensor(g)]), at(g), a.width[tensor(g)],
                            kept[g].normed(inverse[tensor(g)], gamma));
  }
  if (lane() == 0) store_global(reinterpret_cast<u32*>(counter), step);
}

// ---------------------------------------------------------------------------------------------------------------------
// Many rows.

template <u32 W>
TPF_DEVICE u64 block_slot(u64 workspace, u32 step, u32 source, u32 row) {
  u64 index = (u64(block_index()) * kBlockRing + step % kBlockRing) * kMaxWorld + source;
  return workspace + NormSlots::block_slots + (index * kBlockRows + row) * 16;
}

// A recursion: NVRTC does not unroll the loop everywhere, and puts x into local memory.
template <u32 kHalf, u32 kCount>
TPF_DEVICE float fold_halves(float (&x)[kCount]) {
  TPF_UNROLL
  for (u32 i = 0; i < kHalf; ++i) x[i] = add_rn(x[i], x[i + kHalf]);
  if constexpr (kHalf > 1) return fold_halves<kHalf / 2>(x);
  return x[0];
}

// The fold of `count` groups' sums, at most kMost, by `kLanes` neighbouring lanes, of which this is number `s`.
template <u32 kLanes, u32 kMost>
TPF_DEVICE float fold_groups(const float* sums, u32 count, u32 s) {
  constexpr u32 kEach = padded((kMost + kLanes - 1) / kLanes);
  float x = s < count ? sums[s] : 0.0f;
  if (kEach > 1 && count > kLanes) {
    float part[kEach];
    TPF_UNROLL
    for (u32 i = 0; i < kEach; ++i) part[i] = s + i * kLanes < count ? sums[s + i * kLanes] : 0.0f;
    x = fold_halves<kEach / 2>(part);
  }
  TPF_UNROLL
  for (u32 mask = kLanes / 2; mask > 0; mask /= 2) x = add_rn(x, shuffle_xor(x, mask));
  return x;
}

// Which vectors of a step's rows a lane has of each group: slots 0 to kRows - 1. Its own vector of all rows; or, where lanes
// l and l ^ kPartner have the two halves of the pairs that a rotation turns, both vectors of one half of the rows.
template <u32 kRows, u32 kPartner>
struct Slots {
  static constexpr u32 kEach = kPartner > 0 ? 2 : 1;  // of a row
  static constexpr u32 kOwn = kRows / kEach;          // rows

  TPF_DEVICE static u32 row(u32 slot) { return (lane() & kPartner ? kOwn : 0) + slot / kEach; }
  // A slot's vector is `beyond(slot)` vectors beyond the lane's first one. Rows end with a head, so with both or before both.
  TPF_DEVICE static u32 place() { return lane() & ~kPartner; }
  TPF_DEVICE static constexpr u32 beyond(u32 slot) { return slot % kEach * kPartner; }

  // The rows' sums over all lanes, each by the fold of one row; a lane ends with that of summed_row().
  TPF_DEVICE static float fold(float (&sums)[kRows]) { return fold_levels<kWarp / 2, kOwn, kEach, kPartner>(sums); }
  TPF_DEVICE static u32 summed_row() { return (lane() & kHigh ? kRows / 2 : 0) + (lane() & kLow ? 1 : 0); }
  TPF_DEVICE static bool is_first_of_its_sum() { return (lane() & ~(kHigh | kLow)) == 0; }

 private:
  // Bits of a lane's number that say which rows it has, or goes on with in the fold.
  static_assert(kRows <= 4);
  static constexpr u32 kHalf = kPartner > 0 ? kPartner : kWarp / 2;
  static constexpr u32 kHigh = kRows > 1 ? kHalf : 0;
  static constexpr u32 kLow = kRows < 4 ? 0 : kHalf == kWarp / 2 ? kWarp / 4 : kWarp / 2;
};

// One block's work on a step of kRows rows. kVectors: groups that one warp holds of a row.
template <class T, u32 kTensors, u32 W, u32 kVectors, u32 kRows, bool kAligned, u32 kWarps, Turn kTurn, u32 kPartner>
struct BlockStep {
  static constexpr u32 kLanes = kWarp / kRows;  // lanes of warp 0 that look after one row
  static_assert(kLanes >= W, "a row needs a lane for every rank");
  static_assert(kPartner == 0 || (kTurn == Turn::halves && kRows % 2 == 0));
  using Mine = Slots<kRows, kPartner>;
  static constexpr u32 kGroups = kWarps * kVectors < kBlockGroups ? kWarps * kVectors : kBlockGroups;  // at most
  struct Sums {
    float of[kRows][kBlockGroups];
  };
  struct Inverses {
    float of[kRows][kTensors];
  };
  using Angles = Rotation<kTurn, true>;
  // Of the rotation, of each row. Lower halves of heads turn with negative sines. Where lanes have pairs, slots s and s + 1
  // turn by two vectors of each table: cosines[s] are the first ones and cosines[s + 1] the second ones, lane beside lane,
  // so that no two share banks.
  static constexpr u32 kAngleVectors = kPartner > 0 ? 2 * kPartner : Angles::kPairs / 4;
  struct Tables {
    u32 begins[kRows];
    Vec16 cosines[kRows][kAngleVectors];
    Vec16 sines[kRows][kAngleVectors];
    Vec16 negative_sines[kPartner > 0 ? 1 : kRows][kAngleVectors];
  };
  using Rows = Lane<T>[kRows][kVectors];
  using Keeps = Kept<T, kTurn>[kRows][kVectors];

  const NormArgs& a;
  u32 groups0, groups1;

  TPF_DEVICE BlockStep(const NormArgs& args)
      : a(args), groups0(group_count(args.width[0])), groups1(kTensors == 2 ? group_count(args.width[1]) : 0) {}

  // Where a warp holds many groups, the compiler would keep the addresses of all of them in registers over the whole
  // loop, and spill. It can't where it does not know that the warp's number is still the same.
  static constexpr bool kForgets = kVectors > 2;
  u32 warp = warp_index();
  TPF_DEVICE void forget_addresses() {
    if constexpr (kForgets) warp = shuffle(warp, 0);
  }

  TPF_DEVICE u32 group(u32 v) const { return (kForgets ? warp : warp_index()) + v * (block_size() / kWarp); }
  TPF_DEVICE u32 tensor(u32 v) const { return kTensors == 2 && group(v) >= groups0 ? 1 : 0; }
  TPF_DEVICE u32 at(u32 v, u32 place) const {
    return (tensor(v) == 0 ? group(v) : group(v) - groups0) * kGroupElements + place * kLaneElements;
  }
  TPF_DEVICE u32 first_row(u32 chunk) const { return chunk * kRows; }

  TPF_DEVICE void load(u32 chunk, Rows& rows) const {
    TPF_UNROLL
    for (u32 v = 0; v < kVectors; ++v) {
      bool k = tensor(v) == 1;
      const T* x = reinterpret_cast<const T*>(k ? a.x[1] : a.x[0]);
      i64 stride = k ? a.x_stride[1] : a.x_stride[0];
      u32 width = k ? a.width[1] : a.width[0];
      TPF_UNROLL
      for (u32 s = 0; s < kRows; ++s) {
        u32 row = first_row(chunk) + Mine::row(s);
        // A row past the end has no width: nothing is loaded.
        rows[s][v] = load_lane<T, kAligned>(x + row * stride + Mine::beyond(s) * kLaneElements, at(v, Mine::place()),
                                            row < a.rows ? width : 0);
      }
    }
  }

  // Asks for a step's rows to come into the L2, one lane for each of their sectors.
  TPF_DEVICE void prefetch_rows(u32 chunk) const {
    constexpr u32 kSector = 32 / sizeof(T) / kLaneElements;  // lanes
    TPF_UNROLL
    for (u32 v = 0; v < kVectors; ++v) {
      bool k = tensor(v) == 1;
      const T* x = reinterpret_cast<const T*>(k ? a.x[1] : a.x[0]) + at(v, lane());
      i64 stride = k ? a.x_stride[1] : a.x_stride[0];
      bool asks = lane() % kSector == 0 && at(v, lane()) < (k ? a.width[1] : a.width[0]);
      TPF_UNROLL
      for (u32 r = 0; r < kRows; ++r) {
        u32 row = first_row(chunk) + r;
        if (asks && row < a.rows) prefetch(x + row * stride);
      }
    }
  }

  TPF_DEVICE void load_gamma(u32 v, u32 place, float (&gamma)[8]) const {
    widen_gamma(a, tensor(v), tpfuse::load_gamma<kAligned>(a, tensor(v), at(v, place)), gamma);
  }

  // Each warp leaves its groups' sums in shared memory.
  TPF_DEVICE void reduce(const Rows& rows, Sums& sums) const {
    TPF_UNROLL
    for (u32 v = 0; v < kVectors; ++v) {
      float square[kRows];
      TPF_UNROLL
      for (u32 s = 0; s < kRows; ++s) square[s] = lane_square(rows[s][v]);
      float sum = Mine::fold(square);
      if (Mine::is_first_of_its_sum() && group(v) < groups0 + groups1) sums.of[Mine::summed_row()][group(v)] = sum;
    }
  }

  // Warp 0: the packet of each row to each rank, the own one included.
  TPF_DEVICE void send(u32 chunk, u32 step, const Sums& sums) const {
    u32 r = lane() / kLanes, peer = lane() % kLanes;
    float q = fold_groups<kLanes, kGroups>(sums.of[r], groups0, peer);
    float k = kTensors == 2 ? fold_groups<kLanes, kGroups>(sums.of[r] + groups0, groups1, peer) : 0.0f;
    if (peer < W && first_row(chunk) + r < a.rows)
      store_system(reinterpret_cast<Vec16*>(block_slot<W>(workspace_of<W>(a, peer), step, a.rank, r)),
                   packet_of(q, k, step));
  }

  // Warp 0: all ranks' packets of this chunk, turned into each row's factors. False: somebody did not come.
  TPF_DEVICE bool receive(u32 chunk, u32 step, Inverses& inverses) const {
    u32 r = lane() / kLanes, peer = lane() % kLanes;
    bool waits = peer < W && first_row(chunk) + r < a.rows;
    const Vec16* slot = reinterpret_cast<const Vec16*>(
        block_slot<W>(workspace_of<W>(a, a.rank), step, waits ? peer : 0, waits ? r : 0));
    Vec16 packet = {};
    Patience patience;
    while (waits) {
      packet = load_system(slot);
      waits = !arrived<kTensors == 2>(packet, step);
      if (waits && patience.over(a.timeout_ns)) {
        report(a, peer, step, patience.waited_ns());
        break;
      }
    }
    if (any(waits)) return false;
    u32 t = kTensors == 2 ? peer % 2 : 0;  // even lanes go on with q, odd ones with k
    u32 first = r * kLanes;
    float q = shuffle(float_of(packet.w[0]), first), k = shuffle(float_of(packet.w[2]), first);
    TPF_UNROLL
    for (u32 rank = 1; rank < W; ++rank) {
      q = add_rn(q, shuffle(float_of(packet.w[0]), first + rank));
      k = add_rn(k, shuffle(float_of(packet.w[2]), first + rank));
    }
    if (peer < kTensors)
      inverses.of[r][t] = inverse_rms(t == 0 ? q : k, t == 0 ? a.reciprocal[0] : a.reciprocal[1],
                                      t == 0 ? a.eps[0] : a.eps[1]);
    return true;
  }

  // The last warps look after the tables: the first one is busy with packets.
  TPF_DEVICE u32 last() const { return block_size() - 1 - thread_index(); }
  // Where one row's angles begin. Loaded a step before the tables, or these would wait for two trips.
  TPF_DEVICE u32 begin_of(u32 chunk) const {
    return last() < kRows ? Angles::begin_of(a, first_row(chunk) + last()) : 0;
  }
  TPF_DEVICE void leave_begin(u32 begin, Tables& tables) const {
    if (kTurn != Turn::none && last() < kRows) tables.begins[last()] = begin;
  }
  // The rows' tables into shared memory, while sums are under way. Lanes that have pairs have the first half of the rows if
  // their bit kPartner is clear, so row r's angles lie with these lanes or beside them.
  TPF_DEVICE void load_tables(Tables& tables) const {
    if constexpr (kTurn == Turn::none) return;
    for (u32 i = last(); i < kRows * (kPartner > 0 ? 2 * kPartner : a.rotary_dim / 8); i += block_size()) {
      u32 r = i % kRows, vector = i / kRows;
      Vec16 cosines = Angles::vector_of(a.cosines, tables.begins[r], vector);
      Vec16 sines = Angles::vector_of(a.sines, tables.begins[r], vector);
      if constexpr (kPartner > 0) {
        u32 s = r % Mine::kOwn * 2 + vector % 2, place = r / Mine::kOwn * kPartner + vector / 2;
        tables.cosines[s][place] = cosines;
        tables.sines[s][place] = sines;
      } else {
        tables.cosines[r][vector] = cosines;
        tables.sines[r][vector] = sines;
        if (kTurn == Turn::halves) tables.negative_sines[r][vector] = Angles::negative(sines);
      }
    }
  }

  // Turns the pairs that lie in slots s and s + 1.
  TPF_DEVICE void turn_pairs(u32 s, const Tables& tables, float (&lower)[8], float (&upper)[8]) const {
    bool turns = (lane() * kLaneElements & (a.head_dim - 1)) < 2 * kPartner * kLaneElements;
    if (!turns) return;
    u32 place = lane() % (2 * kPartner);
    TPF_UNROLL
    for (u32 half = 0; half < 2; ++half) {
      Vec16 c = tables.cosines[s + half][place], n = tables.sines[s + half][place];
      TPF_UNROLL
      for (u32 i = 0; i < 4; ++i) {
        float cosine = float_of(c.w[i]), sine = float_of(n.w[i]), &l = lower[4 * half + i], &u = upper[4 * half + i];
        float turned = add_rn(mul_rn(l, cosine), mul_rn(u, -sine));
        u = add_rn(mul_rn(u, cosine), mul_rn(l, sine));
        l = turned;
      }
    }
  }

  // Of group v; gamma(v, s) is that of slot s.
  template <class Gamma>
  TPF_DEVICE void keep(u32 v, const Rows& rows, const Tables& tables, const Gamma& gamma, Keeps& kept) const {
    const auto &first = gamma(v, 0), &second = gamma(v, Mine::kEach - 1);
    TPF_UNROLL
    for (u32 s = 0; s < kRows; s += Mine::kEach) {
      if constexpr (kPartner > 0) {
        kept[s][v].weigh(rows[s][v], first.x);
        kept[s + 1][v].weigh(rows[s + 1][v], second.x);
        turn_pairs(s, tables, kept[s][v].x, kept[s + 1][v].x);
      } else {
        Angles rotation;
        rotation.look_at(a, tables.cosines[s], tables.sines[s], tables.negative_sines[s]);
        kept[s][v].keep(rows[s][v], first.x, rotation);
      }
    }
  }

  template <class Gamma>
  TPF_DEVICE void store(u32 chunk, u32 v, const Keeps& kept, const Inverses& inverses, const Gamma& gamma) const {
    bool k = tensor(v) == 1;
    T* y = reinterpret_cast<T*>(k ? a.y[1] : a.y[0]);
    i64 stride = k ? a.y_stride[1] : a.y_stride[0];
    u32 width = k ? a.width[1] : a.width[0];
    TPF_UNROLL
    for (u32 s = 0; s < kRows; ++s) {
      u32 row = first_row(chunk) + Mine::row(s);
      Lane<T> lane = kept[s][v].normed(inverses.of[Mine::row(s)][k ? 1 : 0], gamma(v, s).x);
      store_lane<T, kAligned>(y + row * stride + Mine::beyond(s) * kLaneElements, at(v, Mine::place()),
                              row < a.rows ? width : 0, lane);
    }
  }
};

// Block: 32 threads for every kVectors groups of both tensors. Grid: at most kBlockBlocks.
// kDeep: the next rows are loaded while this chunk's sums are exchanged, and gamma stays in registers, or in shared
// memory where rows are turned. Wide rows have no registers for either, and on some architectures several rows have none.
// kPartner: 0, or of Turn::halves rotary_dim / 16, where that is 2, 4, 8 or 16 and kRows is even. Peers can't tell any of
// this.
template <class T, u32 kTensors, u32 W, u32 kVectors, u32 kRows, bool kDeep, bool kAligned, u32 kThreads, u32 kResident,
          Turn kTurn = Turn::none, u32 kPartner = 0>
TPF_KERNEL(kThreads, kResident)
void norm_by_block(const TPF_GRID_CONSTANT NormArgs a) {
  using Step = BlockStep<T, kTensors, W, kVectors, kRows, kAligned, kThreads / kWarp, kTurn, kPartner>;
  using Mine = typename Step::Mine;
  // Whether a row is turned while its sums are exchanged, or else when it is stored.
  constexpr bool kEarly = kTurn != Turn::none && kRows == 1 && kVectors <= 2;
  constexpr u32 kTables = kEarly ? 2 : 1;  // of the steps that take turns with them
  using Tables = typename Step::Tables[kTables];
  constexpr bool kSharesGamma = kDeep && kTurn != Turn::none;
  // A lane's 32 bytes in two places, or they would share its banks.
  using Gammas = Vec16[kSharesGamma ? kVectors : 1][2][kSharesGamma ? kThreads : 1];
  TPF_SHARED(typename Step::Sums, sums);
  TPF_SHARED(typename Step::Inverses, inverses);
  TPF_SHARED(Tables, tables);
  TPF_SHARED(Gammas, shared_gamma);
  TPF_SHARED(u32, failed);
  Step work(a);
  struct Gamma {
    float x[8];
  };
  Gamma own_gamma[kVectors][Mine::kEach];
  auto load_gamma = [&](u32 v) {
    if constexpr (kSharesGamma) {
      float gamma[8];
      work.load_gamma(v, lane(), gamma);
      Lane<float> wide = narrow<float>(gamma);
      shared_gamma[v][0][thread_index()] = wide.v[0];
      shared_gamma[v][1][thread_index()] = wide.v[1];
    } else {
      TPF_UNROLL
      for (u32 s = 0; s < Mine::kEach; ++s) work.load_gamma(v, Mine::place() + Mine::beyond(s), own_gamma[v][s].x);
    }
  };
  auto gamma_of = [&](u32 v, u32 s) -> decltype(auto) {
    if constexpr (kSharesGamma) {
      u32 thread = warp_index() * kWarp + Mine::place() + Mine::beyond(s);
      Gamma gamma;
      widen(Lane<float>{{shared_gamma[v][0][thread], shared_gamma[v][1][thread]}}, gamma.x);
      return gamma;
    } else {
      return (own_gamma[v][s % Mine::kEach]);
    }
  };
  TPF_UNROLL
  for (u32 v = 0; kDeep && v < kVectors; ++v) load_gamma(v);
  if (thread_index() == 0) failed = 0;
  u32* counter = reinterpret_cast<u32*>(workspace_of<W>(a, a.rank) + NormSlots::block_counters) + block_index();
  if (kDeep && a.prefetches) {  // elsewhere NVRTC has no registers left for the addresses
    prefetch(counter);
    work.prefetch_rows(block_index());
    if (kRows == 1 && warp_index() == 0) Step::Angles::prefetch_angles(a, block_index(), lane(), kWarp);
  }

  dependency_trigger();
  dependency_wait();
  u32 step = kEarly || warp_index() == 0 ? load_global(counter) : 0;
  u32 chunks = (a.rows + kRows - 1) / kRows;
  typename Step::Rows rows, loading;
  typename Step::Keeps kept;
  if (kDeep) work.load(block_index(), rows);
  u32 begin = work.begin_of(block_index()), next = kEarly ? work.begin_of(block_index() + grid_size()) : 0;
  work.leave_begin(begin, tables[(step + 1) % kTables]);
  if (kEarly) work.leave_begin(next, tables[step % kTables]);
  for (u32 chunk = block_index(); chunk < chunks; chunk += grid_size()) {
    ++step;
    work.forget_addresses();
    if (!kDeep) work.load(chunk, rows);
    work.reduce(rows, sums);
    if (kDeep) work.load(chunk + grid_size(), loading);  // nothing where there is no such chunk
    barrier();
    if (warp_index() == 0) {
      work.send(chunk, step, sums);
      if (!kEarly && !work.receive(chunk, step, inverses)) failed = 1;
    }
    if (kEarly && chunk == block_index()) {  // the first ones: later ones are loaded a step ahead
      work.load_tables(tables[step % kTables]);
      barrier();
    }
    TPF_UNROLL
    for (u32 v = 0; kEarly && v < kVectors; ++v) {
      if (!kDeep) load_gamma(v);
      work.keep(v, rows, tables[step % kTables], gamma_of, kept);
    }
    begin = work.begin_of(chunk + kTables * grid_size());
    work.load_tables(tables[(step + kTables - 1) % kTables]);
    if (kEarly && warp_index() == 0 && !work.receive(chunk, step, inverses)) failed = 1;
    barrier();
    if (failed) return;
    work.leave_begin(begin, tables[step % kTables]);
    TPF_UNROLL
    for (u32 v = 0; v < kVectors; ++v) {
      work.forget_addresses();
      if (!kDeep && !kEarly) load_gamma(v);
      if (!kEarly) work.keep(v, rows, tables[0], gamma_of, kept);
      work.store(chunk, v, kept, inverses, gamma_of);
    }
    TPF_UNROLL
    for (u32 r = 0; kDeep && r < kRows; ++r) {
      TPF_UNROLL
      for (u32 v = 0; v < kVectors; ++v) rows[r][v] = loading[r][v];
    }
  }
  if (thread_index() == 0) store_global(counter, step);
}

}  // namespace tpfuse
