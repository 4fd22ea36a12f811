// Runs the real kernels of all_reduce.h: random sequences of calls on one workspace, every byte compared with a plain
// implementation of the contract, but for the signs of zeros; and what all ranks get, with each other, to the bit.
//
// A seed draws the machine's options, the size of the workspace, and a sequence of calls. A call draws a kernel, width,
// rows, strides, offsets, how many rows have slots, values and in how many launches it is made; it reads fresh rows or
// what an earlier call wrote, or it is an earlier call again, as a graph replays it. After each run the workspace must
// be clean.
//
// Arguments: world, kernel (the number of a variant; any), calls (at most so many), slow (rank 0 gets 1/64 of the
// time), missing (a rank that comes to the last call when all others have given up), loss (in the last call, one store
// in so many of one rank to another is lost), dump (a file: one call for each variant, for Python), first, seeds.
// REDUCE_VARIANTS has what is compiled, REDUCE_HEADER another header: a mutated one.
#include <algorithm>
#include <cmath>
#include <deque>
#include <vector>

#include "simt.h"
#ifndef REDUCE_HEADER
#define REDUCE_HEADER "all_reduce.h"
#endif
#include REDUCE_HEADER

using namespace tpfuse;
using quant::Kind;
using quant::Layout;

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Numbers, and the contract.

enum class Type : u32 { fp32, bf16, f16, e4m3, e2m1, bytes };  // the first three as Python's driver has them
template <class T>
constexpr Type kTypeOf = sizeof(T) == 4            ? Type::fp32
                         : std::is_same_v<T, bf16> ? Type::bf16
                                                   : Type::f16;
u32 size_of(Type type) { return type == Type::fp32 ? 4 : type == Type::bf16 || type == Type::f16 ? 2 : 1; }

float get(Type type, const void* p, size_t i) {
  switch (type) {
    case Type::fp32:
      return static_cast<const float*>(p)[i];
    case Type::bf16:
      return to_float(static_cast<const bf16*>(p)[i]);
    default:
      return to_float(static_cast<const f16*>(p)[i]);
  }
}
void put(Type type, void* p, size_t i, float x) {
  switch (type) {
    case Type::fp32:
      static_cast<float*>(p)[i] = x;
      return;
    case Type::bf16:
      static_cast<bf16*>(p)[i] = from_float<bf16>(x);
      return;
    default:
      static_cast<f16*>(p)[i] = from_float<f16>(x);
      return;
  }
}
float rounded(Type type, float x) {
  u32 memory;
  put(type, &memory, 0, x);
  return get(type, &memory, 0);
}

// The same bits, but for the sign of a zero and the payload of a NaN.
bool same(Type type, const u8* a, const u8* b) {
  if (type == Type::bytes) return *a == *b;
  if (type == Type::e4m3) return *a == *b || ((*a | *b) & 0x7f) == 0;
  if (type == Type::e2m1) {
    auto nibble = [](u32 x, u32 y) { return x == y || ((x | y) & 7) == 0; };
    return nibble(*a & 15, *b & 15) && nibble(*a >> 4, *b >> 4);
  }
  float x = get(type, a, 0), y = get(type, b, 0);
  return (std::isnan(x) && std::isnan(y)) || x == y;
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

// A row's bytes, and its scales as they are stored.
template <Kind k>
void quantise(const std::vector<float>& y, float given, std::vector<u8>& codes, std::vector<u32>& scales) {
  size_t group = quant::kGroup<k> != 0 ? quant::kGroup<k> : y.size();
  for (size_t at = 0; at < y.size(); at += group) {
    u32 most = 0;
    for (size_t i = at; i < at + group; ++i) most = std::max(most, bits_of(y[i]) & 0x7fffffff);
    quant::Scale scale = quant::scale_of<k>(most, quant::given_of<k>(given));
    if (quant::kScaleBytes<k> != 0) scales.push_back(scale.stored);
    for (size_t i = at; i < at + group; ++i) {
      float scaled = y[i] * scale.inverse;
      if (!quant::kIsFp4<k>) {
        codes.push_back(u8(quant::to_e4m3(scaled)));
      } else if (i % 2 == 0) {
        codes.push_back(u8(quant::to_e2m1(scaled)));
      } else {
        codes.back() = u8(codes.back() | quant::to_e2m1(scaled) << 4);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What is compiled.

struct Variant {
  std::string name;
  bool one_shot, residual, keep, aligned;
  Type type, residual_type, gamma_type;
  Path path;
  Kind kind;
  Layout layout;
  u32 world, parts, vectors, threads, group, packed, scale_bytes, terms;
  void (*kernel)(ReduceArgs);
  void (*quantise)(const std::vector<float>&, float, std::vector<u8>&, std::vector<u32>&);

  bool quantised() const { return kind != Kind::none; }
  u32 least_width() const { return (parts - 1) * (threads / kWarp) * 256 + 1; }
  u32 most_width() const { return parts * vectors * threads * 8; }
  u32 unit() const { return std::max({aligned ? 8u : 1u, group, packed}); }
};
std::vector<Variant> variants;

template <bool kOneShot, class F>
void add(const char* name) {
  Variant v{name,
            kOneShot,
            F::kResidual,
            F::kKeep,
            F::kAligned,
            kTypeOf<typename F::T>,
            Type::fp32,
            kTypeOf<typename F::G>,
            F::kPath,
            F::kKind,
            F::kLayout,
            F::kWorld,
            F::kParts,
            F::kVectors,
            F::kThreads,
            quant::kGroup<F::kKind>,
            quant::kIsFp4<F::kKind> ? 2u : 1u,
            quant::kScaleBytes<F::kKind>,
            F::kTerms,
            nullptr,
            quantise<F::kKind>};
  if constexpr (F::kResidual) v.residual_type = kTypeOf<typename F::R>;
  if constexpr (kOneShot) {
    v.kernel = reduce_one_shot<F>;
  } else {
    v.kernel = reduce_two_shot<F>;
  }
  variants.push_back(v);
}

// one or two, then the template arguments of Form, the last one first, and but for the one before it
#define ONE(terms, ...) add<true, Form<__VA_ARGS__, 1, terms>>("one " #terms " " #__VA_ARGS__);
#define TWO(terms, ...) add<false, Form<__VA_ARGS__, 1, terms>>("two " #terms " " #__VA_ARGS__);
void make_variants() { REDUCE_VARIANTS }

// ---------------------------------------------------------------------------------------------------------------------
// Memory, and what must be in it.

struct Array {
  std::string name;
  Type type;
  bool equal;  // on all ranks
  std::vector<u8*> memory;
  std::vector<std::vector<u8>> expected;

  void check(const std::string& history, u32 rank) const {
    u32 size = size_of(type);
    for (size_t at = 0; at < expected[rank].size(); at += size) {
      if (same(type, memory[rank] + at, &expected[rank][at])) continue;
      char text[200];
      u32 found = 0, right = 0;
      std::memcpy(&found, memory[rank] + at, size);
      std::memcpy(&right, &expected[rank][at], size);
      std::snprintf(text, sizeof text, "wrong value in '%s' of rank %u, element %zu: 0x%x, must be 0x%x\n",
                    name.c_str(), rank, at / size, found, right);
      throw simt::Failure(text + history);
    }
  }
  void check(const std::string& history) const {
    for (u32 rank = 0; rank < memory.size(); ++rank) check(history, rank);
    for (u32 rank = 1; equal && rank < memory.size(); ++rank)
      simt::expect(std::memcmp(memory[0], memory[rank], expected[0].size()) == 0,
                   "wrong value in '" + name + "': not the same bits on all ranks\n" + history);
  }
};

constexpr size_t kNone = ~size_t(0);

// Rows of an array.
struct View {
  size_t array = kNone, offset = 0, stride = 0;
};

struct Call {
  const Variant* variant;
  u32 rows, width, ring, pitch;
  u32 first_rows;  // of two launches, or all of one
  bool term_major;  // how x lies: all rows of the first term first, or all terms of the first row
  View x, y, residual, residual_out, gamma;
  size_t quant = kNone, scale = kNone, given = kNone;
  float eps, bias;
  bool pdl;
  // Of x: the place of a row's term, in strides, and how many there are.
  u32 line(u32 row, u32 term) const { return term_major ? term * rows + row : row * variant->terms + term; }
  u32 lines() const { return rows * variant->terms; }
  std::string text() const {
    char out[400];
    std::snprintf(out, sizeof out, "  %s: %u rows (%u first) of %u, ring %u, x in %zu, residual in %zu, pdl %d\n",
                  variant->name.c_str(), rows, first_rows, width, ring, x.array, residual.array, pdl);
    return out;
  }
};

struct Setup {
  u32 world, kernel, calls, missing, loss;
  bool slow;
};

constexpr u32 kAny = ~0u;
constexpr u32 kOp = 4;
// No call takes so long without a bug. Kernels look at their clock once in 64 turns, which may be seconds apart.
constexpr u64 kTimeoutNs = 200'000'000'000;

// Rows of what a sum, an inverse, a rounding, a scale or the mark may trip over. cancels: words of a sum become the
// mark.
enum class Style { ordinary, zero, marks, cancels, tiny, small, huge, one_inf, one_nan, uneven, count };

class Sequence {
 public:
  Sequence(const Setup& setup, u64 seed)
      : setup_(setup), random_(seed ^ 0x5eed), machine_(setup.world, seed, options(seed, &all_fit_)) {
    pdl_ = random_.below(3);
    static constexpr u32 kStrides[] = {1 << 10, 4 << 10, 20 << 10};
    half_ = 4 * setup.world * kStrides[random_.below(3)] + 128 * random_.below(4);
    counter_ = random_.one_in(2) ? 0 : 0u - (random_.below(6) << kCallShift);
    for (u32 rank = 0; rank < setup.world; ++rank) {
      u32* space = machine_.alloc_zeroed<u32>(rank, (kReduceHeader + 2 * half_) / 4, "workspace");
      space[0] = counter_;
      std::fill_n(space + kReduceHeader / 4, half_ / 2, kMark);
      workspace_.push_back(space);
      errors_.push_back(machine_.alloc_zeroed<Vec16>(rank, 2, "error record"));
    }
    if (setup.slow || random_.one_in(4)) machine_.slow(setup.slow ? 0 : random_.below(setup.world), 64);
  }

  void many() {
    u32 count = 2 + random_.below(setup_.calls - 1);
    for (u32 i = 0; i < count; ++i) {
      draw();
      launch(calls_.back());
      for (u32 replays = random_.one_in(4) ? 1 + random_.below(3) : 0; replays > 0; --replays) {
        calls_.push_back(calls_[random_.below(u32(calls_.size()))]);
        launch(calls_.back());
      }
      if (random_.one_in(4)) finish();
    }
    finish();
  }

  // The last call comes without one rank, or loses stores. Then each rank has right results or has said whom it missed;
  // also the one that came too late.
  void broken() {
    for (u32 i = random_.below(2); i > 0; --i) {
      draw();
      launch(calls_.back());
    }
    finish();
    draw();
    const Call& call = calls_.back();
    u32 missing = setup_.missing;
    if (missing == kAny) {
      u32 from = random_.below(setup_.world), to = (from + 1 + random_.below(setup_.world - 1)) % setup_.world;
      machine_.lose(from, to, setup_.loss);
    }
    for (u32 rank = 0; rank < setup_.world; ++rank)
      if (rank != missing) launch(call, rank);
    machine_.run();
    for (u32 rank = 0; rank < setup_.world; ++rank)
      if (missing != kAny && rank != missing) check_record(call, rank);
    if (missing != kAny) {
      launch(call, missing);
      machine_.run();
    }
    expect_results(call);
    for (u32 rank = 0; rank < setup_.world; ++rank) {
      if (errors_[rank][0].w[0] != 0) {
        check_record(call, rank);
      } else {
        for (const Array& array : arrays_)
          array.check("rank " + std::to_string(rank) + " reported nothing\n" + history(), rank);
      }
    }
  }

  // One call of a variant; inputs and outputs go to a file that Python reads.
  void dump(const Variant& variant, std::FILE* file) {
    draw(&variant);
    const Call& call = calls_.back();
    launch(call);
    finish();
    auto word = [&](auto x) {
      static_assert(sizeof(x) == 4);
      std::fwrite(&x, 4, 1, file);
    };
    auto rows = [&](const View& view, u32 rank, u32 count) {
      if (view.array == kNone) return;
      const Array& a = arrays_[view.array];
      u32 size = size_of(a.type);
      for (u32 row = 0; row < count; ++row)
        std::fwrite(a.memory[rank] + (view.offset + row * view.stride) * size, size, call.width, file);
    };
    auto whole = [&](size_t array, u32 rank) {
      if (array != kNone) std::fwrite(arrays_[array].memory[rank], 1, arrays_[array].expected[rank].size(), file);
    };
    const Variant& v = variant;
    for (u32 x : {u32(v.path), u32(v.kind), u32(v.layout), u32(v.keep), u32(v.type),
                  v.residual ? u32(v.residual_type) : kAny, u32(v.gamma_type), call.rows, call.width, call.pitch})
      word(x);
    word(call.scale == kNone ? 0 : u32(arrays_[call.scale].expected[0].size()));
    word(v.terms);
    word(u32(call.term_major));
    word(call.eps);
    word(call.bias);
    word(call.given == kNone ? 0.0f : *reinterpret_cast<float*>(arrays_[call.given].memory[0]));
    for (u32 rank = 0; rank < setup_.world; ++rank) {
      rows(call.x, rank, call.lines());
      rows(call.gamma, rank, 1);
      rows(call.residual, rank, residual_rows(v, rank, call.rows));
      rows(call.y, rank, call.rows);
      rows(call.residual_out, rank, residual_rows(v, rank, call.rows));
      whole(call.quant, rank);
      whole(call.scale, rank);
    }
  }

 private:
  static simt::Options options(u64 seed, bool* all_fit) {
    simt::Random random(seed ^ 0x0b71);
    simt::Options options;
    options.system_bytes = random.one_in(4) ? 8 : 4;
    *all_fit = !random.one_in(3);
    if (!*all_fit) {  // a grid that does not fit the GPU at once
      options.in_index_order = true;
      options.resident_blocks = 1 + random.below(6);
    }
    return options;
  }

  std::string history() const {
    std::string out = "world " + std::to_string(setup_.world) + ", half " + std::to_string(half_) + ", calls:\n";
    for (const Call& call : calls_) out += call.text();
    return out;
  }

  void finish() {
    machine_.run();
    for (u32 rank = 0; rank < setup_.world; ++rank)
      simt::expect(errors_[rank][0].w[0] == 0, "timed out: rank " + std::to_string(rank) + " waited for rank " +
                                                   std::to_string(errors_[rank][0].w[3]) + "\n" + history());
    for (const Array& array : arrays_) array.check(history());
    for (u32 rank = 0; rank < setup_.world; ++rank) {
      const u32* space = workspace_[rank];
      simt::expect(space[0] == counter_, "wrong counter of rank " + std::to_string(rank) + "\n" + history());
      for (u32 i = 1; i < (kReduceHeader + 2 * half_) / 4; ++i) {
        if (space[i] == (i < kReduceHeader / 4 ? 0 : kMark)) continue;
        throw simt::Failure("not clean: byte " + std::to_string(4 * i) + " of rank " + std::to_string(rank) +
                            "'s workspace\n" + history());
      }
    }
  }

  void check_record(const Call& call, u32 rank) const {
    const Vec16 *e = errors_[rank], &who = e[0], &where = e[1];
    u64 waited = where.w[2] | u64(where.w[3]) << 32;
    u32 block = where.w[0], row = where.w[1], peer = who.w[3];
    bool right = who.w[0] == 1 && who.w[1] == kOp && who.w[2] == rank && peer < setup_.world && peer != rank &&
                 row < call.rows && block / call.variant->parts == row && waited > kTimeoutNs &&
                 waited < 2 * kTimeoutNs;
    // Of a row that everybody has come to, only the missing rank can be missed.
    if (setup_.missing < setup_.world && rank != setup_.missing && call.variant->one_shot && all_fit_)
      right = right && peer == setup_.missing;
    char text[200];
    std::snprintf(text, sizeof text, "wrong error record of rank %u: {%u, %u, %u, %u}, {%u, %u, %llu}\n", rank,
                  who.w[0], who.w[1], who.w[2], peer, block, row, waited);
    simt::expect(right, text + history());
  }

  // ---- drawing

  float ordinary() { return (float(random_.below(1 << 24)) / float(1 << 23) - 1.0f) * 3.0f; }

  float element(Style style, Type type, u32 rank, u32 i) {
    float x = ordinary();
    switch (style) {
      case Style::zero:
        return x < 0 ? -0.0f : 0.0f;
      case Style::marks:
        return type == Type::fp32 || i % 2 == 1 ? -0.0f : 0.0f;
      case Style::cancels:
        return i % 2 == 1 ? -0.0f : rank + 1 < setup_.world ? 1.0f : 1.0f - float(setup_.world);
      case Style::tiny:
        return x * (type == Type::f16 ? 1e-6f : 1e-39f);
      case Style::small:
        return x * 1e-3f;
      case Style::huge:
        return x * (type == Type::f16 ? 2e4f : 1e38f);
      case Style::uneven:
        return x * std::ldexp(1.0f, int(rank * 3));
      default:
        return x;
    }
  }

  // `counts`: elements of each rank; memory is 0xff, and must stay so where nothing else is expected.
  size_t new_array(const char* name, Type type, std::vector<size_t> counts, bool equal = false) {
    arrays_.push_back({name + std::to_string(arrays_.size()), type, equal, {}, {}});
    Array& a = arrays_.back();
    for (u32 rank = 0; rank < setup_.world; ++rank) {
      size_t count = std::max<size_t>(counts[rank % counts.size()], 1);
      a.memory.push_back(size_of(type) == 4   ? reinterpret_cast<u8*>(machine_.alloc<u32>(rank, count, a.name.c_str()))
                         : size_of(type) == 2 ? reinterpret_cast<u8*>(machine_.alloc<u16>(rank, count, a.name.c_str()))
                                              : machine_.alloc<u8>(rank, count, a.name.c_str()));
      a.expected.emplace_back(count * size_of(type), u8(0xff));
    }
    return arrays_.size() - 1;
  }
  void give(size_t array) {
    Array& a = arrays_[array];
    for (u32 rank = 0; rank < setup_.world; ++rank)
      std::memcpy(a.memory[rank], a.expected[rank].data(), a.expected[rank].size());
  }
  u32 residual_rows(const Variant& v, u32 rank, u32 rows) const {
    return v.path == Path::early ? (rows + setup_.world - 1 - rank) / setup_.world : rows;
  }

  // Rows with a gap behind each, or none; the last ends where its last element does, so that no kernel reads further.
  View new_rows(const char* name, const Call& call, Type type, bool sharded, bool contiguous, bool equal) {
    const Variant& v = *call.variant;
    u32 unit = v.aligned ? 8 : 1;
    View view;
    view.offset = !contiguous && random_.one_in(2) ? unit * random_.below(3) : 0;
    view.stride = call.width + (!contiguous && random_.one_in(2) ? unit * random_.below(4) : 0);
    std::vector<size_t> counts;
    for (u32 rank = 0; rank < setup_.world; ++rank) {
      u32 rows = sharded ? residual_rows(v, rank, call.rows) : call.rows;
      counts.push_back(rows == 0 ? 0 : view.offset + (rows - 1) * view.stride + call.width);
    }
    view.array = new_array(name, type, counts, equal);
    return view;
  }

  void fill(const Call& call, const View& view, bool residual) {
    const Variant& v = *call.variant;
    Array& a = arrays_[view.array];
    for (u32 row = 0; row < call.rows; ++row) {
      Style style = random_.one_in(3) ? Style(random_.below(u32(Style::count))) : Style::ordinary;
      u32 odd_rank = random_.below(setup_.world), odd_column = random_.below(call.width);
      for (u32 rank = 0; rank < setup_.world; ++rank) {
        for (u32 i = 0; i < call.width; ++i) {
          float x = residual && rank > 0 ? 0.0f : element(style, a.type, rank, i);
          if (i == odd_column && rank == odd_rank && style == Style::one_inf) x = -INFINITY;
          if (i == odd_column && rank == odd_rank && style == Style::one_nan) x = NAN;
          if (!residual) put(a.type, a.expected[rank].data(), view.offset + row * view.stride + i, x);
          if (!residual || rank > 0) continue;
          for (u32 r = 0; r < setup_.world; ++r) {  // the same for all, or its owner's
            if (v.path == Path::early && row % setup_.world != r) continue;
            u32 at = v.path == Path::early ? row / setup_.world : row;
            put(a.type, a.expected[r].data(), view.offset + at * view.stride + i, x);
          }
        }
      }
    }
    give(view.array);
  }

  u32 stride_of(const Call& call) const {
    return std::max(32u, (call.width + 7) / 8 * 8 * size_of(call.variant->type));
  }

  bool draw_shape(Call& call) {
    const Variant& v = *call.variant;
    u32 unit = v.unit(), W = setup_.world;
    u32 most = v.most_width() > 8192 ? v.most_width() : std::min(v.most_width(), v.least_width() + 700);
    if (v.most_width() > 8192)
      call.width = 8200 + 8 * random_.below((most - 8200) / 8);
    else
      call.width = v.least_width() + random_.below(most - v.least_width());
    call.width = call.width / unit * unit;
    if (v.most_width() <= 8192 && random_.one_in(4)) call.width = v.most_width() / unit * unit;
    if (call.width < v.least_width()) return false;
    u32 rings = half_ / (2 * stride_of(call)) / (2 * W);
    if (rings == 0) return false;
    call.ring = 2 * W * (random_.one_in(8) ? rings : 1 + random_.below(std::min(rings, 2u)));
    u32 row_threads = v.parts * v.threads * W,
        affordable = std::max(1u, (random_.one_in(8) ? 4096 : 1024) / row_threads);
    if (v.one_shot) affordable = std::min({affordable, call.ring, half_ / (W * stride_of(call))});
    u32 wanted = random_.one_in(4) ? 1 + random_.below(W + 1) : 1 + random_.below(4 * call.ring);
    if (affordable == 0) return false;
    call.rows = std::min(wanted, affordable);
    return true;
  }

  void draw(const Variant* given = nullptr) {
    Call call = {};
    for (;;) {
      call.variant = given ? given : &variants[random_.below(u32(variants.size()))];
      bool fits =
          call.variant->world == setup_.world && (setup_.kernel == kAny || call.variant == &variants[setup_.kernel]);
      if (fits && draw_shape(call)) break;
      if (given && random_.one_in(1000)) half_too_small();
    }
    const Variant& v = *call.variant;
    // What an earlier call has written, as the next layer reads it.
    if (!calls_.empty() && random_.one_in(2)) {
      const Call& before = calls_[random_.below(u32(calls_.size()))];
      const Variant& b = *before.variant;
      bool whole = !v.aligned || (b.aligned && before.width % 8 == 0);
      if (before.width == call.width || (v.least_width() <= before.width && before.width <= v.most_width() &&
                                         before.width % v.unit() == 0 && before.width <= call.width)) {
        if (before.y.array != kNone && b.type == v.type && whole && v.terms == 1) call.x = before.y;
        if (before.residual_out.array != kNone && v.residual && b.residual_type == v.residual_type && whole &&
            (b.path == Path::early) == (v.path == Path::early) && before.rows >= call.rows)
          call.residual = before.residual_out;
        if (call.x.array != kNone || call.residual.array != kNone) {
          call.width = before.width;
          if (call.x.array != kNone) call.rows = std::min(call.rows, before.rows);
        }
      }
    }
    if (call.x.array == kNone) {
      Call lines = call;
      lines.rows = call.lines();
      call.x = new_rows("x", lines, v.type, false, false, false);
      fill(lines, call.x, false);
      call.term_major = v.terms > 1 && random_.one_in(3);
    }
    if (v.keep) call.y = new_rows("y", call, v.type, false, false, true);
    if (v.path != Path::sum) draw_norm(call);
    call.first_rows = random_.one_in(4) ? std::min(call.rows, setup_.world * (1 + random_.below(4))) : call.rows;
    call.pdl = pdl_ == 0 ? false : pdl_ == 1 ? true : random_.one_in(2);
    calls_.push_back(call);
  }
  [[noreturn]] void half_too_small() const { throw TooSmall(); }

  void draw_norm(Call& call) {
    const Variant& v = *call.variant;
    static constexpr float kEps[] = {1e-6f, 1e-5f, 0.0f, 0.5f};
    call.eps = kEps[random_.below(4)];
    call.bias = random_.one_in(2) ? 1.0f : 0.0f;
    call.gamma.offset = v.aligned ? 0 : random_.below(3);
    call.gamma.array = new_array("gamma", v.gamma_type, {call.gamma.offset + call.width}, true);
    Array& gamma = arrays_.back();
    for (size_t i = 0; i < call.gamma.offset + call.width; ++i) {
      float x = random_.one_in(16) ? -0.0f : ordinary();
      for (auto& bytes : gamma.expected) put(v.gamma_type, bytes.data(), i, x);
    }
    give(call.gamma.array);
    bool sharded = v.path == Path::early;
    if (v.residual) {
      if (call.residual.array == kNone) {
        call.residual = new_rows("residual", call, v.residual_type, sharded, false, false);
        fill(call, call.residual, true);
      }
      call.residual_out = new_rows("residual_out", call, v.residual_type, sharded, true, !sharded);
    }
    if (!v.quantised()) return;
    u32 groups = v.group == 0 ? 1 : call.width / v.group, tiles = (groups + 3) / 4;
    call.quant =
        new_array("quant", v.packed == 2 ? Type::e2m1 : Type::e4m3, {call.rows * (call.width / v.packed)}, true);
    call.pitch = groups;
    if (v.layout == Layout::swizzled) call.pitch = tiles;
    if (v.layout == Layout::column_major) call.pitch = random_.one_in(2) ? call.rows : (call.rows + 3) / 4 * 4;
    if (v.scale_bytes != 0) {
      size_t count = v.layout == Layout::swizzled       ? (call.rows + 127) / 128 * 128 * tiles * 4
                     : v.layout == Layout::column_major ? groups * call.pitch
                                                        : call.rows * groups;
      call.scale = new_array("scale", v.scale_bytes == 4 ? Type::fp32 : Type::bytes, {count}, true);
    }
    if (v.kind == Kind::fp8_static || v.kind == Kind::nvfp4) {
      call.given = new_array("given", Type::fp32, {1}, true);
      float x = v.kind == Kind::nvfp4 ? 100.0f * (1.0f + std::fabs(ordinary())) : 0.01f + std::fabs(ordinary());
      for (auto& bytes : arrays_.back().expected) put(Type::fp32, bytes.data(), 0, x);
      give(call.given);
    }
  }

  // ---- launching

  void launch(const Call& call) {
    for (u32 rank = 0; rank < setup_.world; ++rank) launch(call, rank);
    counter_ += (call.first_rows < call.rows ? 2u : 1u) << kCallShift;
    expect_results(call);
  }

  u64 address(const View& view, u32 rank, u32 row) const {
    if (view.array == kNone) return 0;
    const Array& a = arrays_[view.array];
    return reinterpret_cast<u64>(a.memory[rank] + (view.offset + row * view.stride) * size_of(a.type));
  }
  u64 address(size_t array, u32 rank) const {
    return array == kNone ? 0 : reinterpret_cast<u64>(arrays_[array].memory[rank]);
  }

  void launch(const Call& call, u32 rank) {
    const Variant& v = *call.variant;
    for (u32 first = 0, rows = call.first_rows; first < call.rows; first += rows, rows = call.rows - first) {
      u32 own = v.path == Path::early ? first / setup_.world : first;
      ReduceArgs a = {};
      for (u32 r = 0; r < setup_.world; ++r) a.workspace[r] = reinterpret_cast<u64>(workspace_[r]);
      a.own = a.workspace[rank];
      a.error = reinterpret_cast<u64>(errors_[rank]);
      a.timeout_ns = kTimeoutNs;
      a.rank = rank;
      a.op = kOp;
      a.half = half_;
      a.x = address(call.x, rank, call.line(first, 0));
      a.y = address(call.y, rank, first);
      a.residual = address(call.residual, rank, own);
      a.residual_out = address(call.residual_out, rank, own);
      a.gamma = address(call.gamma, rank, 0);
      a.quant = address(call.quant, rank);
      if (a.quant != 0) a.quant += first * (call.width / v.packed);
      a.scale = address(call.scale, rank);
      a.given = address(call.given, rank);
      a.x_stride = i64(call.x.stride) * (call.line(1, 0) - call.line(0, 0));
      a.term_stride = i64(call.x.stride) * (call.line(0, 1) - call.line(0, 0));
      a.y_stride = i64(call.y.stride);
      a.residual_stride = i64(call.residual.stride);
      a.rows = rows;
      a.width = call.width;
      a.groups = (call.width + 255) / 256;
      a.stride = stride_of(call);
      a.ring = call.ring;
      a.first_row = first;
      a.all_rows = call.rows;
      a.pitch = call.pitch;
      a.eps = call.eps;
      a.reciprocal = float(1.0 / double(call.width));
      a.bias = call.bias;
      machine_.launch(rank, rows * v.parts, v.threads, [a, kernel = v.kernel] { kernel(a); }, {call.pdl, v.parts});
    }
  }

  // ---- what must come out

  std::vector<float> row_of(const View& view, u32 rank, u32 row, u32 width) const {
    const Array& a = arrays_[view.array];
    std::vector<float> out(width);
    for (u32 i = 0; i < width; ++i) out[i] = get(a.type, a.expected[rank].data(), view.offset + row * view.stride + i);
    return out;
  }
  // What a rank brings of a row: x, or the rounded sum of its terms.
  std::vector<float> partial_of(const Call& call, u32 rank, u32 row) const {
    std::vector<float> sum = row_of(call.x, rank, call.line(row, 0), call.width);
    for (u32 term = 1; term < call.variant->terms; ++term) {
      std::vector<float> next = row_of(call.x, rank, call.line(row, term), call.width);
      for (u32 i = 0; i < call.width; ++i) sum[i] = sum[i] + next[i];
    }
    for (float& x : sum) x = rounded(call.variant->type, x);
    return sum;
  }
  void expect_row(const View& view, u32 rank, u32 row, const std::vector<float>& values) {
    Array& a = arrays_[view.array];
    for (u32 i = 0; i < values.size(); ++i)
      put(a.type, a.expected[rank].data(), view.offset + row * view.stride + i, values[i]);
  }

  void expect_results(const Call& call) {
    const Variant& v = *call.variant;
    u32 W = setup_.world;
    if (v.layout == Layout::swizzled && call.scale != kNone)
      for (auto& bytes : arrays_[call.scale].expected) std::fill(bytes.begin(), bytes.end(), u8(0));
    for (u32 row = 0; row < call.rows; ++row) {
      std::vector<float> y = partial_of(call, 0, row);
      for (u32 rank = 1; rank < W; ++rank) {
        std::vector<float> next = partial_of(call, rank, row);
        for (u32 i = 0; i < call.width; ++i) y[i] = y[i] + next[i];
      }
      for (float& x : y) x = rounded(v.type, x);
      if (v.path != Path::sum) expect_norm(call, row, y);
      for (u32 rank = 0; rank < W && v.keep; ++rank) expect_row(call.y, rank, row, y);
      if (v.quantised()) expect_quantised(call, row, y);
    }
  }

  void expect_norm(const Call& call, u32 row, std::vector<float>& y) {
    const Variant& v = *call.variant;
    u32 owner = row % setup_.world, own = v.path == Path::early ? row / setup_.world : row;
    if (v.residual) {
      std::vector<float> residual = row_of(call.residual, owner, own, call.width);
      for (u32 i = 0; i < call.width; ++i) y[i] = y[i] + residual[i];
      for (u32 rank = 0; rank < setup_.world; ++rank)
        if (v.path != Path::early || rank == owner) expect_row(call.residual_out, rank, own, y);
    }
    float mean = sum_of_squares(y) * float(1.0 / double(call.width));
    float inverse = 1.0f / std::sqrt(mean + call.eps);
    std::vector<float> gamma = row_of(call.gamma, 0, 0, call.width);
    for (u32 i = 0; i < call.width; ++i) y[i] = rounded(v.type, (y[i] * inverse) * (gamma[i] + call.bias));
  }

  void expect_quantised(const Call& call, u32 row, const std::vector<float>& y) {
    const Variant& v = *call.variant;
    float given = call.given == kNone ? 0.0f : get(Type::fp32, arrays_[call.given].expected[0].data(), 0);
    std::vector<u8> codes;
    std::vector<u32> scales;
    v.quantise(y, given, codes, scales);
    for (u32 rank = 0; rank < setup_.world; ++rank) {
      std::copy(codes.begin(), codes.end(), arrays_[call.quant].expected[rank].begin() + row * codes.size());
      for (u32 g = 0; g < scales.size(); ++g) {
        size_t at = row * call.pitch + g;
        if (v.layout == Layout::column_major) at = g * call.pitch + row;
        if (v.layout == Layout::swizzled)
          at = (row / 128 * call.pitch + g / 4) * 512 + row % 32 * 16 + row % 128 / 32 * 4 + g % 4;
        std::memcpy(&arrays_[call.scale].expected[rank][at * v.scale_bytes], &scales[g], v.scale_bytes);
      }
    }
  }

 public:
  struct TooSmall {};  // the workspace of this seed has no place for a variant's rows

 private:
  Setup setup_;
  simt::Random random_;
  bool all_fit_;
  simt::Machine machine_;
  u32 pdl_;  // never, always, now and then
  u32 half_, counter_;
  std::vector<u32*> workspace_;
  std::vector<Vec16*> errors_;
  std::deque<Array> arrays_;
  std::vector<Call> calls_;
};

}  // namespace

int main(int argc, char** argv) {
  make_variants();
  auto option = [&](const char* name, u64 otherwise) { return u32(simt::argument(argc, argv, name, otherwise)); };
  Setup setup{option("world", 2),      option("kernel", kAny), option("calls", 5),
              option("missing", kAny), option("loss", 0),      option("slow", 0) != 0};
  for (int i = 1; i < argc; ++i) {
    std::string text = argv[i];
    if (text.rfind("dump=", 0) != 0) continue;
    std::FILE* file = std::fopen(text.c_str() + 5, "wb");
    if (!file) return 2;
    int status = simt::for_seeds(argc, argv, [&](u64 seed) {
      for (const Variant& variant : variants) {
        try {
          if (variant.world == setup.world) Sequence(setup, seed).dump(variant, file);
        } catch (const Sequence::TooSmall&) {
        }
      }
    });
    return std::fclose(file) ? 2 : status;
  }
  return simt::for_seeds(argc, argv, [&](u64 seed) {
    Sequence sequence(setup, seed);
    setup.missing < setup.world || setup.loss != 0 ? sequence.broken() : sequence.many();
  });
}
