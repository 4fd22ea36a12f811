// Runs the real kernels of sharded_norm.h: random sequences of calls on one workspace, every byte compared with a plain
// implementation of the contract. The kernels' results are all compared with the same one, so they are equal to each
// other too.
//
// A seed draws the machine's options and a sequence of calls. A call draws a kernel, a type, one or two tensors,
// widths, strides, offsets, gamma's types, a rotation, rows and a grid; it reads fresh rows or what an earlier call
// wrote, in place or not, or it is an earlier call again, as a graph replays it. The host keeps a copy of all memory
// and does on it what the calls must do: outputs, the gaps between rows, and inputs are compared alike.
//
// Arguments: world, kind (0 by row, 1 by block; both), calls (at most so many), slow (rank 0 gets 1/64 of the time),
// missing (a rank that does not launch the last call), dump (a file: one call for each variant, for Python), first,
// seeds. NORM_WORLDS and NORM_KINDS choose what is compiled, NORM_HEADER another header: a mutated one.
#include <algorithm>
#include <cmath>
#include <vector>

#include "simt.h"
#ifndef NORM_HEADER
#define NORM_HEADER "sharded_norm.h"
#endif
#include NORM_HEADER
#ifndef NORM_WORLDS
#define NORM_WORLDS 2, 3, 4, 6, 8
#endif
#ifndef NORM_KINDS  // a mask
#define NORM_KINDS 3
#endif
#ifndef NORM_FEW  // 1: bf16 only; 2: of those, the two usual kernels; 3: two that turn rows, before and after the sums arrive
#define NORM_FEW 0
#endif

using namespace tpfuse;

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// What is compiled.

enum class Kind : u32 { row, block };
enum class Type : u32 { fp32, bf16, f16 };  // as NormArgs::gamma_type

template <class T>
constexpr Type kTypeOf = sizeof(T) == 4            ? Type::fp32
                         : std::is_same_v<T, bf16> ? Type::bf16
                                                   : Type::f16;
constexpr u32 size_of(Type type) { return type == Type::fp32 ? 4 : 2; }

struct Variant {
  Kind kind;
  Type type;
  u32 tensors, world;
  bool aligned, few;
  Turn turn;
  u32 groups[2], warps;        // by row: most groups of each tensor
  u32 vectors, rows, partner;  // by block
  void (*kernel)(NormArgs);

  u32 rows_at_once() const { return kind == Kind::row ? warps : rows; }
  u32 block_threads(const u32 (&width)[2]) const {
    u32 count = group_count(width[0]) + group_count(width[1]);
    return kWarp * (kind == Kind::row ? warps + scouts(few, turn) : (count + vectors - 1) / vectors);
  }
  bool fits(const u32 (&width)[2]) const {
    u32 count[] = {group_count(width[0]), group_count(width[1])};
    if (kind == Kind::row) return count[0] <= groups[0] && count[1] <= groups[1];
    return count[0] + count[1] <= kBlockGroups && block_threads(width) <= 1024;
  }
  std::string name() const {
    static constexpr const char *kTypes[] = {"fp32", "bf16", "f16"}, *kTurns[] = {"", " halves", " neighbours"};
    auto number = [](u32 n) { return std::to_string(n); };
    std::string out = std::string(kind == Kind::row ? "norm_by_row " : "norm_by_block ") + kTypes[u32(type)] + " x" +
                      number(tensors) + (aligned ? " aligned" : " unaligned") + kTurns[u32(turn)];
    if (few) out += " few";
    if (partner) out += " partner " + number(partner);
    if (kind == Kind::block) return out + " vectors " + number(vectors) + " rows " + number(rows);
    return out + " groups " + number(groups[0]) + "+" + number(groups[1]) + " warps " + number(warps);
  }
};

std::vector<Variant> variants;

template <class T, u32 W, u32 kGroups0, u32 kGroups1, bool kAligned, u32 kWarps, bool kFew, Turn kTurn = Turn::none>
void by_row() {
  if constexpr (NORM_KINDS & 1)
    variants.push_back({Kind::row,
                        kTypeOf<T>,
                        kGroups1 ? 2u : 1u,
                        W,
                        kAligned,
                        kFew,
                        kTurn,
                        {kGroups0, kGroups1},
                        kWarps,
                        0,
                        0,
                        0,
                        norm_by_row<T, W, kGroups0, kGroups1, kAligned, kWarps, 1, kFew, kTurn>});
}
template <class T, u32 W, u32 kTensors, u32 kVectors, u32 kRows, bool kDeep, bool kAligned, Turn kTurn = Turn::none,
          u32 kPartner = 0>
void by_block() {
  if constexpr (NORM_KINDS & 2)
    variants.push_back({Kind::block,
                        kTypeOf<T>,
                        kTensors,
                        W,
                        kAligned,
                        false,
                        kTurn,
                        {},
                        0,
                        kVectors,
                        kRows,
                        kPartner,
                        norm_by_block<T, kTensors, W, kVectors, kRows, kDeep, kAligned, 1024, 1, kTurn, kPartner>});
}

// What every type has in every world, and one of two sets of further ones.
template <class T, u32 W, bool kOther>
void variants_of() {
  if constexpr (NORM_FEW < 3) {
    by_row<T, W, 6, 1, true, 2, false>();
    by_block<T, W, 2, 1, 4, true, true>();
  } else {
    by_row<T, W, 6, 1, true, 4, true, Turn::halves>();
    by_block<T, W, 2, 1, 1, true, true, Turn::halves>();
    by_block<T, W, 2, 1, 4, true, true, Turn::halves, 4>();
  }
  if constexpr (NORM_FEW < 2) {
    by_row<T, W, 3, 0, kOther, 3, true>();
    by_block<T, W, 1, 2, 2, true, kOther>();
  }
  if constexpr (NORM_FEW < 2 && kOther) {
    by_row<T, W, 2, 2, false, 1, true>();
    by_row<T, W, 6, 1, true, 4, true, Turn::halves>();
    by_block<T, W, 2, 8, 1, false, true>();
    by_block<T, W, 2, 1, 4, true, true, Turn::neighbours>();
    by_block<T, W, 2, 2, 1, false, false, Turn::halves>();
    by_block<T, W, 2, 1, 4, true, true, Turn::halves, 4>();
    by_block<T, W, 2, 1, 2, false, true, Turn::halves, 16>();
    by_block<T, W, 2, 2, 2, true, false, Turn::halves, 2>();
  }
  if constexpr (NORM_FEW < 2 && !kOther) {
    by_row<T, W, 9, 1, true, 4, true>();
    by_row<T, W, 4, 4, false, 2, false, Turn::neighbours>();
    by_block<T, W, 2, 2, 4, false, false>();
    by_block<T, W, 2, 1, 4, false, true, Turn::halves>();
    by_block<T, W, 2, 1, 4, true, true, Turn::halves, 8>();
    by_block<T, W, 2, 1, 4, false, true, Turn::halves, 16>();
    by_block<T, W, 2, 1, 2, true, true, Turn::halves, 4>();
    by_block<T, W, 2, 8, 1, false, true, Turn::neighbours>();
    by_block<T, W, 1, 1, 4, true, true>();
  }
}
template <u32 W>
void variants_of_world() {
  constexpr bool kOther = W % 4 != 0;
  variants_of<bf16, W, kOther>();
  if constexpr (!NORM_FEW) {
    variants_of<f16, W, !kOther>();
    variants_of<float, W, kOther == (W > 3)>();
  }
}
template <u32... kWorlds>
void make_variants() {
  (variants_of_world<kWorlds>(), ...);
}

// ---------------------------------------------------------------------------------------------------------------------
// The contract.

float get(Type type, const void* p, size_t i) {
  switch (type) {
    case Type::fp32: return static_cast<const float*>(p)[i];
    case Type::bf16: return to_float(static_cast<const bf16*>(p)[i]);
    default: return to_float(static_cast<const f16*>(p)[i]);
  }
}
void put(Type type, void* p, size_t i, float x) {
  switch (type) {
    case Type::fp32: static_cast<float*>(p)[i] = x; return;
    case Type::bf16: static_cast<bf16*>(p)[i] = from_float<bf16>(x); return;
    default: static_cast<f16*>(p)[i] = from_float<f16>(x); return;
  }
}

float fold(float* x, size_t n) {
  for (; n > 1; n /= 2) {
    for (size_t i = 0; i < n / 2; ++i) x[i] = x[i] + x[i + n / 2];
  }
  return x[0];
}

float sum_of_squares(const std::vector<float>& row) {
  size_t groups = 1;
  while (groups * 256 < row.size()) groups *= 2;
  std::vector<float> group_sums(groups);
  for (size_t g = 0; g < groups; ++g) {
    float lane_sums[32];
    for (size_t l = 0; l < 32; ++l) {
      float square[8];
      for (size_t i = 0; i < 8; ++i) {
        size_t at = (g * 32 + l) * 8 + i;
        square[i] = at < row.size() ? row[at] * row[at] : 0.0f;
      }
      lane_sums[l] = fold(square, 8);
    }
    group_sums[g] = fold(lane_sums, 32);
  }
  return fold(group_sums.data(), groups);
}

// One head, turned by the angles of its row.
void turn(Turn how, float* head, u32 rotary_dim, const float* cosines, const float* sines) {
  for (u32 i = 0; i < rotary_dim / 2; ++i) {
    u32 first = how == Turn::halves ? i : 2 * i, second = how == Turn::halves ? i + rotary_dim / 2 : 2 * i + 1;
    float x1 = head[first], x2 = head[second];
    head[first] = x1 * cosines[i] - x2 * sines[i];
    head[second] = x2 * cosines[i] + x1 * sines[i];
  }
}

// The factor of a row, of which rows[r] is rank r's part.
float inverse_rms(const std::vector<std::vector<float>>& rows, float eps) {
  float total = sum_of_squares(rows[0]);
  for (size_t r = 1; r < rows.size(); ++r) total = total + sum_of_squares(rows[r]);
  float reciprocal = float(1.0 / double(rows.size() * rows[0].size()));
  return 1.0f / std::sqrt(total * reciprocal + eps);
}
void scale(std::vector<std::vector<float>>& rows, float factor) {
  for (std::vector<float>& row : rows) {
    for (float& x : row) x *= factor;
  }
}
void weigh(std::vector<std::vector<float>>& rows, const std::vector<std::vector<float>>& gammas, float bias) {
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t i = 0; i < rows[r].size(); ++i) rows[r][i] *= gammas[r][i] + bias;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory, and what must be in it.

struct Array {
  std::string name;
  Type type;
  size_t count;
  std::vector<void*> memory;                // of every rank
  std::vector<std::vector<char>> expected;  // the same

  Array(simt::Machine& machine, u32 world, std::string called, Type t, size_t n)
      : name(std::move(called)), type(t), count(n) {
    for (u32 rank = 0; rank < world; ++rank) {
      memory.push_back(size_of(type) == 4 ? static_cast<void*>(machine.alloc<u32>(rank, n, name.c_str()))
                                          : static_cast<void*>(machine.alloc<u16>(rank, n, name.c_str())));
      expected.emplace_back(n * size_of(type));
    }
  }
  void give() {
    for (size_t rank = 0; rank < memory.size(); ++rank)
      std::memcpy(memory[rank], expected[rank].data(), expected[rank].size());
  }
  void check(const std::string& history) const {
    for (size_t rank = 0; rank < memory.size(); ++rank) {
      const char* found = static_cast<const char*>(memory[rank]);
      if (std::memcmp(found, expected[rank].data(), expected[rank].size()) == 0) continue;
      for (size_t i = 0; i < count; ++i) {
        size_t at = i * size_of(type);
        if (std::memcmp(found + at, &expected[rank][at], size_of(type)) == 0) continue;
        float ours = get(type, found, i), right = get(type, expected[rank].data(), i);
        if (std::isnan(ours) && std::isnan(right)) continue;  // a payload is not promised
        char text[200];
        std::snprintf(text, sizeof text, "wrong value in '%s' of rank %zu, element %zu: %.9g, must be %.9g\n",
                      name.c_str(), rank, i, double(ours), double(right));
        throw simt::Failure(text + history);
      }
    }
  }
};

// A tensor of a call: rows of an array.
struct View {
  size_t array, offset, stride;
  u64 address(const std::vector<Array>& arrays, u32 rank) const {
    const Array& a = arrays[array];
    return reinterpret_cast<u64>(a.memory[rank]) + offset * size_of(a.type);
  }
};

struct Call {
  const Variant* variant;
  u32 rows, grid, threads;
  u32 width[2];
  View x[2], y[2], gamma[2];
  u32 head_dim, rotary_dim;
  size_t cosines, sines, positions;  // arrays; the last holds 64-bit integers
  float eps[2], bias;
  bool pdl;

  std::string text() const {
    char out[400];
    std::snprintf(out, sizeof out,
                  "  %s: %u rows of %u+%u, heads %u of %u, grid %u x %u, x in %zu+%zu stride %zu, y in %zu+%zu stride "
                  "%zu, pdl %d\n",
                  variant->name().c_str(), rows, width[0], width[1], rotary_dim, head_dim, grid, threads, x[0].array,
                  x[0].offset, x[0].stride, y[0].array, y[0].offset, y[0].stride, pdl);
    return out;
  }
};

struct Setup {
  u32 world, kind, calls, missing;
  bool slow;
};

constexpr u32 kAny = ~0u;
constexpr u32 kOp = 3;
constexpr u64 kTimeoutNs = 1'000'000'000;  // no call takes so long without a bug

// Rows of what a fold, an inverse or a rounding may trip over.
enum class Style { ordinary, zero, tiny, small, huge, one_inf, one_nan, uneven, count };

class Sequence {
 public:
  Sequence(const Setup& setup, u64 seed)
      : setup_(setup), random_(seed ^ 0x5eed), machine_(setup.world, seed, options(seed)) {
    pdl_ = random_.below(3);
    // Steps near their wrap, in a workspace of old packets.
    first_step_ = random_.one_in(4) ? ~0u - random_.below(3) : 0;
    for (u32 rank = 0; rank < setup.world; ++rank) {
      char* space = machine_.alloc_zeroed<char>(rank, NormSlots::bytes, "workspace");
      if (first_step_ != 0) {
        std::memset(space, 0x5a, NormSlots::bytes);
        u32* words = reinterpret_cast<u32*>(space);
        auto set = [&](u64 at, u64 count) { std::fill_n(words + at / 4, count, first_step_); };
        set(NormSlots::block_counters, kBlockBlocks);
        set(NormSlots::row_counters, kRowPlaces);
      }
      workspace_.push_back(reinterpret_cast<u64>(space));
      errors_.push_back(machine_.alloc_zeroed<Vec16>(rank, 2, "error record"));
    }
    for (u32 kind = 0; kind < 2; ++kind) next_step_[kind].assign(kRowPlaces, first_step_ + 1);
    if (setup.slow || random_.one_in(4)) machine_.slow(setup.slow ? 0 : random_.below(setup.world), 64);
  }

  void many() {
    u32 count = 2 + random_.below(setup_.calls - 1);
    for (u32 i = 0; i < count; ++i) {
      draw();
      launch(calls_.back(), kAny);
      for (u32 replays = random_.one_in(4) ? 1 + random_.below(3) : 0; replays > 0; --replays) {
        Call again = calls_[random_.below(u32(calls_.size()))];
        calls_.push_back(again);
        launch(again, kAny);
      }
      if (random_.one_in(4)) finish();
    }
    finish();
  }

  // The last call comes without one rank: the others leave with its name, and have written nothing.
  void missing() {
    for (u32 i = random_.below(3); i > 0; --i) {
      draw();
      launch(calls_.back(), kAny);
    }
    finish();
    draw();
    Call& call = calls_.back();
    launch(call, setup_.missing);
    machine_.run();
    for (Array& array : arrays_) array.check(history());
    u32 per_block = call.variant->kind == Kind::row ? call.variant->warps : 1;
    for (u32 rank = 0; rank < setup_.world; ++rank) {
      if (rank == setup_.missing) continue;
      const Vec16 *e = errors_[rank], &who = e[0], &where = e[1];
      u64 waited = where.w[2] | u64(where.w[3]) << 32;
      bool step_known = false;
      for (u32 i = 0; i < per_block; ++i) {
        u32 place = where.w[0] * per_block + i;
        if (where.w[0] < call.grid) step_known |= next_step_[u32(call.variant->kind)][place] == where.w[1];
      }
      bool right = who.w[0] == 1 && who.w[1] == kOp && who.w[2] == rank && who.w[3] == setup_.missing && step_known &&
                   waited > kTimeoutNs && waited < 100 * kTimeoutNs;
      char text[200];
      std::snprintf(text, sizeof text, "wrong error record of rank %u: {%u, %u, %u, %u}, {%u, %u, %llu}\n", rank,
                    who.w[0], who.w[1], who.w[2], who.w[3], where.w[0], where.w[1], waited);
      simt::expect(right, text + history());
    }
  }

  // One call of a variant; inputs and outputs go to a file that Python reads.
  void dump(const Variant& variant, std::FILE* file) {
    draw(&variant);
    const Call& call = calls_.back();
    auto word = [&](auto x) {
      static_assert(sizeof(x) == 4);
      std::fwrite(&x, 4, 1, file);
    };
    auto rows = [&](const View& view, u32 width, u32 count) {
      u32 size = size_of(arrays_[view.array].type);
      for (u32 rank = 0; rank < setup_.world; ++rank) {
        for (u32 row = 0; row < count; ++row)
          std::fwrite(reinterpret_cast<const char*>(view.address(arrays_, rank)) + row * view.stride * size, size,
                      width, file);
      }
    };
    word(setup_.world);
    word(variant.type);
    word(variant.tensors);
    word(call.rows);
    word(call.bias);
    word(variant.turn);
    word(call.head_dim);
    word(call.rotary_dim);
    if (variant.turn != Turn::none) {
      word(u32(arrays_[call.cosines].count));
      for (size_t array : {call.cosines, call.sines}) rows({array, 0, 0}, u32(arrays_[array].count), 1);
      for (const auto& positions : arrays_[call.positions].expected)  // their grid comes with the launch
        std::fwrite(positions.data(), 1, positions.size(), file);
    }
    for (u32 t = 0; t < variant.tensors; ++t) {
      word(call.width[t]);
      word(arrays_[call.gamma[t].array].type);
      word(call.eps[t]);
      rows(call.x[t], call.width[t], call.rows);
      rows(call.gamma[t], call.width[t], 1);
    }
    launch(call, kAny);
    finish();
    for (u32 t = 0; t < variant.tensors; ++t) rows(call.y[t], call.width[t], call.rows);
  }

 private:
  static simt::Options options(u64 seed) {
    simt::Random random(seed ^ 0x0b71);
    simt::Options options;
    if (random.one_in(3)) {  // a grid that does not fit the GPU at once
      options.in_index_order = true;
      options.resident_blocks = 1 + random.below(3);
    }
    return options;
  }

  std::string history() const {
    std::string out =
        "world " + std::to_string(setup_.world) + ", first step " + std::to_string(first_step_) + ", calls:\n";
    for (const Call& call : calls_) out += call.text();
    return out;
  }

  void finish() {
    machine_.run();
    for (u32 rank = 0; rank < setup_.world; ++rank)
      simt::expect(errors_[rank][0].w[0] == 0, "timed out: rank " + std::to_string(rank) + " waited for rank " +
                                                   std::to_string(errors_[rank][0].w[3]) + "\n" + history());
    for (Array& array : arrays_) array.check(history());
  }

  float ordinary() { return (float(random_.below(1 << 24)) / float(1 << 23) - 1.0f) * 3.0f; }

  float element(Style style, Type type, u32 rank) {
    float x = ordinary();
    switch (style) {
      case Style::zero: return x < 0 ? -0.0f : 0.0f;
      case Style::tiny: return x * (type == Type::f16 ? 1e-6f : 1e-39f);
      case Style::small: return x * 1e-3f;
      case Style::huge: return x * (type == Type::f16 ? 2e4f : 1e38f);
      case Style::uneven: return x * std::ldexp(1.0f, int(rank * 3));
      default: return x;
    }
  }

  size_t new_array(const char* name, Type type, size_t count) {
    arrays_.emplace_back(machine_, setup_.world, name + std::to_string(arrays_.size()), type, count);
    return arrays_.size() - 1;
  }

  // Rows of the call's tensors in one array, as q and k lie in qkv: each with a gap behind it, or none.
  void new_rows(const char* name, const Call& call, View (&views)[2]) {
    const Variant& v = *call.variant;
    u32 unit = v.aligned ? 16 / size_of(v.type) : 1;
    size_t offset = random_.one_in(2) ? unit * random_.below(3) : 0, stride = offset;
    for (u32 t = 0; t < v.tensors; ++t) {
      views[t].offset = stride;
      stride += call.width[t] + (random_.one_in(2) ? unit * random_.below(4) : 0);
    }
    // The last row ends where its last element does, so that no kernel reads further.
    const View& last = views[v.tensors - 1];
    size_t count = (call.rows - 1) * stride + last.offset + call.width[v.tensors - 1];
    size_t array = new_array(name, v.type, count);
    for (u32 t = 0; t < v.tensors; ++t) {
      views[t].array = array;
      views[t].stride = stride;
    }
    Array& a = arrays_[array];
    for (u32 rank = 0; rank < setup_.world; ++rank) {
      for (size_t i = 0; i < count; ++i) put(v.type, a.expected[rank].data(), i, 1000.0f + float(random_.below(512)));
    }
  }

  void fill_rows(const Call& call, const View (&views)[2]) {
    const Variant& v = *call.variant;
    Array& a = arrays_[views[0].array];
    for (u32 t = 0; t < v.tensors; ++t) {
      for (u32 row = 0; row < call.rows; ++row) {
        Style style = random_.one_in(5) ? Style(random_.below(u32(Style::count))) : Style::ordinary;
        u32 odd_rank = random_.below(setup_.world), odd_column = random_.below(call.width[t]);
        for (u32 rank = 0; rank < setup_.world; ++rank) {
          for (u32 i = 0; i < call.width[t]; ++i) {
            float x = element(style, v.type, rank);
            if (rank == odd_rank && i == odd_column) {
              if (style == Style::one_inf) x = -INFINITY;
              if (style == Style::one_nan) x = NAN;
            }
            put(v.type, a.expected[rank].data(), views[t].offset + row * views[t].stride + i, x);
          }
        }
      }
    }
  }

  // A head is a power of two of at most 256 elements, and a lane's 8 turn together.
  void draw_heads(Call& call) {
    Turn how = call.variant->turn;
    if (how == Turn::none) return;
    u32 unit = how == Turn::halves ? 16 : 8;
    u32 known = 16 * call.variant->partner;  // what the kernel turns, if it is made for that
    call.head_dim = std::min(256u, std::max(unit, known) << random_.below(6));
    if (known) call.rotary_dim = known;
    else call.rotary_dim = random_.one_in(2) ? call.head_dim : unit * (1 + random_.below(call.head_dim / unit));
  }

  void draw_widths(Call& call) {
    static constexpr u32 kOne[][2] = {{256, 0}, {1536, 0}, {24, 0},   {768, 0},  {41, 0},
                                      {300, 0}, {1, 0},    {2048, 0}, {2312, 0}, {8200, 0}};
    static constexpr u32 kTwo[][2] = {{1536, 256}, {256, 64},  {72, 40},   {41, 7},     {24, 24},
                                      {8, 1024},   {520, 136}, {264, 264}, {2304, 256}, {8456, 520}};
    const Variant& v = *call.variant;
    for (;;) {
      const u32(&known)[2] = v.tensors == 2 ? kTwo[random_.below(10)] : kOne[random_.below(10)];
      u32 unit = std::max(v.aligned ? 8u : 1u, call.head_dim);
      bool any = random_.one_in(3);
      for (u32 t = 0; t < v.tensors; ++t)
        call.width[t] = any || known[t] % unit != 0 ? unit * (1 + random_.below(600 / unit)) : known[t];
      // The emulation of wide rows takes long.
      if (v.fits(call.width) && (call.width[0] * setup_.world <= 8192 || random_.one_in(8))) return;
    }
  }

  void new_rotation(Call& call) {
    u32 half = call.rotary_dim / 2, count = 1 + random_.below(9);
    call.cosines = new_array("cosines", Type::fp32, count * half);
    call.sines = new_array("sines", Type::fp32, count * half);
    call.positions = new_array("positions", Type::fp32, call.rows * 2);
    for (u32 i = 0; i < count * half; ++i) {
      float c = ordinary(), s = ordinary();
      for (u32 rank = 0; rank < setup_.world; ++rank) {
        put(Type::fp32, arrays_[call.cosines].expected[rank].data(), i, c);
        put(Type::fp32, arrays_[call.sines].expected[rank].data(), i, s);
      }
    }
    for (u32 row = 0; row < call.rows; ++row) {
      u64 position = random_.below(count);
      for (auto& bytes : arrays_[call.positions].expected) std::memcpy(&bytes[row * 8], &position, 8);
    }
    for (size_t array : {call.cosines, call.sines}) arrays_[array].give();
    // What was there before the grid that writes the positions.
    for (void* memory : arrays_[call.positions].memory)
      for (u32 row = 0; row < call.rows; ++row) static_cast<u64*>(memory)[row] = u64(1) << 40;
  }

  // The grid before a rotation: it writes the positions.
  void write_positions(const Call& call, u32 rank) {
    const Array& positions = arrays_[call.positions];
    Vec8* to = static_cast<Vec8*>(positions.memory[rank]);
    const char* from = positions.expected[rank].data();
    auto kernel = [to, from, rows = call.rows] {
      dependency_trigger();
      dependency_wait();
      for (u32 row = lane(); row < rows; row += kWarp) {
        Vec8 position;
        std::memcpy(&position, from + row * 8, 8);
        store_global(to + row, position);
      }
    };
    machine_.launch(rank, 1, kWarp, kernel, {call.pdl});
  }

  void draw(const Variant* given = nullptr) {
    Call call = {};
    while (!given) {
      const Variant& v = variants[random_.below(u32(variants.size()))];
      if (v.world == setup_.world && (setup_.kind == kAny || v.kind == Kind(setup_.kind))) given = &v;
    }
    const Variant& v = *(call.variant = given);
    // What an earlier call has written, as the next layer reads it; in two calls of three where that is possible.
    const Call* before = nullptr;
    if (!calls_.empty() && !random_.one_in(3)) {
      const Call& c = calls_[random_.below(u32(calls_.size()))];
      u32 bits = 0;
      for (u32 t = 0; t < v.tensors; ++t)
        bits |= c.width[t] % 8 | (c.y[t].offset * size_of(v.type) | c.y[t].stride * size_of(v.type)) % 16;
      bool turns = c.variant->turn == v.turn && (v.partner == 0 || c.rotary_dim == 16 * v.partner);
      bool fits = c.variant->type == v.type && c.variant->tensors == v.tensors && turns &&
                  (!v.aligned || bits == 0) && v.fits(c.width);
      if (fits) before = &c;
    }
    if (before) {
      std::copy_n(before->width, 2, call.width);
      call.head_dim = before->head_dim;
      call.rotary_dim = before->rotary_dim;
    } else {
      draw_heads(call);
      draw_widths(call);
    }
    call.threads = v.block_threads(call.width);
    // Blocks of all ranks cost the emulation about as much as blocks of one.
    u32 most = std::max(2u, std::min(6u, 2500 / (call.threads * setup_.world)));
    call.grid = 1 + random_.below(most);
    u32 at_once = call.grid * v.rows_at_once();
    call.rows = random_.one_in(4) ? 1 : 1 + random_.below(v.kind == Kind::row ? at_once : at_once * 3 + 2);
    if (before) {
      call.rows = std::min(call.rows, before->rows);
      std::copy_n(before->y, 2, call.x);
    } else {
      new_rows("x", call, call.x);
      fill_rows(call, call.x);
      arrays_[call.x[0].array].give();
    }
    if (random_.one_in(2)) {
      std::copy_n(call.x, 2, call.y);
    } else {
      new_rows("y", call, call.y);
      arrays_[call.y[0].array].give();
    }
    if (v.turn != Turn::none) new_rotation(call);
    static constexpr float kEps[] = {1e-6f, 1e-5f, 0.0f, 0.5f};
    call.bias = random_.one_in(2) ? 1.0f : 0.0f;
    for (u32 t = 0; t < v.tensors; ++t) {
      call.eps[t] = kEps[random_.below(4)];
      Type type = random_.one_in(2) ? v.type : Type(random_.below(3));
      size_t offset = random_.one_in(4) ? (v.aligned ? 16 / size_of(type) : 1) : 0;
      call.gamma[t] = {new_array("gamma", type, call.width[t] + offset), offset, 0};
      Array& gamma = arrays_.back();
      for (u32 rank = 0; rank < setup_.world; ++rank) {
        for (size_t i = 0; i < gamma.count; ++i) put(type, gamma.expected[rank].data(), i, ordinary());
      }
      gamma.give();
    }
    call.pdl = pdl_ == 0 ? false : pdl_ == 1 ? true : random_.one_in(2);
    calls_.push_back(call);
  }

  void launch(const Call& call, u32 missing) {
    const Variant& v = *call.variant;
    for (u32 rank = 0; rank < setup_.world; ++rank) {
      if (v.turn != Turn::none) write_positions(call, rank);
      if (rank == missing) continue;
      NormArgs a = {};
      for (u32 r = 0; r < setup_.world; ++r) a.workspace[r] = workspace_[r];
      a.error = reinterpret_cast<u64>(errors_[rank]);
      a.timeout_ns = kTimeoutNs;
      a.rank = rank;
      a.op = kOp;
      a.rows = call.rows;
      a.bias = call.bias;
      a.prefetches = call.rows % 2;
      if (v.turn != Turn::none) {
        auto address = [&](size_t array) { return reinterpret_cast<u64>(arrays_[array].memory[rank]); };
        a.head_dim = call.head_dim;
        a.rotary_dim = call.rotary_dim;
        a.known_positions = u32(arrays_[call.cosines].count / (call.rotary_dim / 2));
        a.cosines = address(call.cosines);
        a.sines = address(call.sines);
        a.positions = address(call.positions);
      }
      for (u32 t = 0; t < v.tensors; ++t) {
        a.x[t] = call.x[t].address(arrays_, rank);
        a.y[t] = call.y[t].address(arrays_, rank);
        a.gamma[t] = call.gamma[t].address(arrays_, rank);
        a.x_stride[t] = i64(call.x[t].stride);
        a.y_stride[t] = i64(call.y[t].stride);
        a.width[t] = call.width[t];
        a.gamma_type[t] = u32(arrays_[call.gamma[t].array].type);
        a.eps[t] = call.eps[t];
        a.reciprocal[t] = float(1.0 / double(setup_.world * call.width[t]));
      }
      machine_.launch(rank, call.grid, call.threads, [a, kernel = v.kernel] { kernel(a); }, {call.pdl});
    }
    if (missing != kAny) return;
    expect_results(call);
    u32 places = call.grid * (v.kind == Kind::row ? v.warps : 1), rows_each = v.kind == Kind::block ? v.rows : 1;
    for (u32 chunk = 0; chunk * rows_each < call.rows; ++chunk) ++next_step_[u32(v.kind)][chunk % places];
  }

  void turn_rows(const Call& call, u32 row, std::vector<std::vector<float>>& rows) {
    u64 position;
    std::memcpy(&position, &arrays_[call.positions].expected[0][row * 8], 8);
    auto angles = [&](size_t array) {
      return reinterpret_cast<const float*>(arrays_[array].expected[0].data()) + position * call.rotary_dim / 2;
    };
    for (std::vector<float>& values : rows) {
      for (size_t head = 0; head < values.size(); head += call.head_dim)
        turn(call.variant->turn, &values[head], call.rotary_dim, angles(call.cosines), angles(call.sines));
    }
  }

  void expect_results(const Call& call) {
    const Variant& v = *call.variant;
    for (u32 t = 0; t < v.tensors; ++t) {
      const Array& gamma = arrays_[call.gamma[t].array];
      Array &from = arrays_[call.x[t].array], &to = arrays_[call.y[t].array];
      std::vector<std::vector<float>> gammas, rows(setup_.world);
      auto values = [&](const Array& a, u32 rank, size_t at) {
        std::vector<float> out(call.width[t]);
        for (u32 i = 0; i < call.width[t]; ++i) out[i] = get(a.type, a.expected[rank].data(), at + i);
        return out;
      };
      for (u32 rank = 0; rank < setup_.world; ++rank) gammas.push_back(values(gamma, rank, call.gamma[t].offset));
      for (u32 row = 0; row < call.rows; ++row) {
        for (u32 rank = 0; rank < setup_.world; ++rank)
          rows[rank] = values(from, rank, call.x[t].offset + row * call.x[t].stride);
        float inverse = inverse_rms(rows, call.eps[t]);
        if (v.turn == Turn::none) scale(rows, inverse);
        weigh(rows, gammas, call.bias);
        if (v.turn != Turn::none) {
          turn_rows(call, row, rows);
          scale(rows, inverse);
        }
        for (u32 rank = 0; rank < setup_.world; ++rank) {
          for (u32 i = 0; i < call.width[t]; ++i)
            put(to.type, to.expected[rank].data(), call.y[t].offset + row * call.y[t].stride + i, rows[rank][i]);
        }
      }
    }
  }

  Setup setup_;
  simt::Random random_;
  simt::Machine machine_;
  u32 pdl_;  // never, always, now and then
  u32 first_step_;
  std::vector<u64> workspace_;
  std::vector<Vec16*> errors_;
  std::vector<Array> arrays_;
  std::vector<Call> calls_;
  std::vector<u32> next_step_[2];  // of each place, by kind
};

}  // namespace

int main(int argc, char** argv) {
  make_variants<NORM_WORLDS>();
  auto option = [&](const char* name, u64 otherwise) { return u32(simt::argument(argc, argv, name, otherwise)); };
  Setup setup{option("world", 2), option("kind", kAny), option("calls", 4), option("missing", kAny),
              option("slow", 0) != 0};
  for (int i = 1; i < argc; ++i) {
    std::string text = argv[i];
    if (text.rfind("dump=", 0) != 0) continue;
    std::FILE* file = std::fopen(text.c_str() + 5, "wb");
    if (!file) return 2;
    int status = simt::for_seeds(argc, argv, [&](u64 seed) {
      for (const Variant& variant : variants) {
        if (variant.world == setup.world) Sequence(setup, seed).dump(variant, file);
      }
    });
    return std::fclose(file) ? 2 : status;
  }
  return simt::for_seeds(argc, argv, [&](u64 seed) {
    Sequence sequence(setup, seed);
    setup.missing < setup.world ? sequence.missing() : sequence.many();
  });
}
