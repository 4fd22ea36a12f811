// Quantised outputs: from the rounded norm, widened to fp32, to bytes and scales.
//
// The contract is src/tpfuse/quant.py; this computes its bits with fp32 operations that round once each, and integers.
// A lane has 8 neighbouring elements of a row, a warp 256, lane l elements 8 l to 8 l + 7; elements past the end of the
// row are zero. So a group of 128 elements is 16 lanes, one of 32 is 4, one of 16 is 2, none crosses a warp, and the
// groups that pad swizzled scales get scale 0, which is what they must hold.
//
// How a kernel encodes a row:
//
//   quant::Given given = quant::given_of<k>(tensor ? load_global(tensor) : 0);   // once a thread
//   ...x[8] holds the rounded norm, widened; every lane of the warp is here...
//   u32 amax = quant::group_amax<k>(quant::lane_amax(x));     // per token: the maximum of lane_amax over the block
//   quant::Scale scale = quant::scale_of<k>(amax, given);     // what is stored, and what elements are multiplied by
//   quant::Packed<k> bytes = quant::encode<k>(x, scale);      // 8 bytes of FP8, 4 of FP4
//   if (quant::leads_group<k>()) ...store scale.stored at quant::scale_index<layout>(row, group, pitch)...
//
// Magnitudes are compared as integers: fp32 without its sign orders like its bits, infinity is above all numbers and
// NaN above infinity, so one NaN makes the maximum NaN, as the contract wants, at the price of a max.
//
// Tried and left: the hardware's conversion to E2M1 (sm_100a, sm_120a). Nobody here can run it; the software takes about
// a dozen instructions an element. Conversion to E4M3 has an instruction from sm_89 on, and is used there.
#pragma once
#include "platform.h"

namespace tpfuse::quant {

// As Format.kind and Format.layout name them.
enum class Kind { none, fp8_static, fp8_per_token, fp8_per_group, mxfp8, nvfp4 };
enum class Layout { row_major, column_major, swizzled };

constexpr u32 kLaneElements = 8;
constexpr float kE4m3Max = 448.0f;

// Elements that one scale covers; 0: the whole row, or the tensor.
template <Kind k>
constexpr u32 kGroup = k == Kind::fp8_per_group ? 128 : k == Kind::mxfp8 ? 32 : k == Kind::nvfp4 ? 16 : 0;
template <Kind k>
constexpr bool kIsFp4 = k == Kind::nvfp4;
// The scale of the whole row must be known: the caller takes the maximum of lane_amax over the block.
template <Kind k>
constexpr bool kNeedsRowMax = k == Kind::fp8_per_token;
// The user's tensor of one float.
template <Kind k>
constexpr bool kNeedsGiven = k == Kind::fp8_static || k == Kind::nvfp4;
// Bytes of a stored scale; 0: none is stored.
template <Kind k>
constexpr u32 kScaleBytes = k == Kind::none || k == Kind::fp8_static ? 0
                            : k == Kind::mxfp8 || k == Kind::nvfp4   ? 1
                                                                      : 4;

// The bytes of a lane's 8 elements, the first in the lowest bits.
struct Fp4x8 {
  u32 w;
};
template <bool fp4>
struct PackedOf {
  using type = Vec8;
};
template <>
struct PackedOf<true> {
  using type = Fp4x8;
};
template <Kind k>
using Packed = typename PackedOf<kIsFp4<k>>::type;

// ---- conversions

// To the nearest number of a small format, ties to even, as its code without the sign; `most` is its largest number,
// NaN counts as that. kMantissa bits of mantissa, and 2^(kLowest - 127) is the smallest normal number.
//
// The number 2^(23 - kMantissa) times as large as a power of two 2^k has its last bit where numbers from 2^k to 2^(k+1)
// have theirs in the small format: adding it makes the adder round there. Below the smallest normal number the last
// bit stays where it is.
template <u32 kMantissa, u32 kLowest>
TPF_DEVICE u32 small_float(float magnitude, float most) {
  float x = magnitude < most ? magnitude : most;
  u32 power = bits_of(x) & 0x7f800000;
  if (power < kLowest << 23) power = kLowest << 23;
  u32 aligned = power + ((23 - kMantissa) << 23);
  u32 steps = bits_of(add_rn(x, float_of(aligned))) - aligned;
  return steps + ((power - (kLowest << 23)) >> (23 - kMantissa));
}

TPF_DEVICE float magnitude(float x) { return float_of(bits_of(x) & 0x7fffffff); }

// One element; NaN is 0x7f.
TPF_DEVICE u32 to_e4m3(float x) {
  u32 code = small_float<3, 121>(magnitude(x), kE4m3Max) | (bits_of(x) >> 24 & 0x80);
  return (bits_of(x) & 0x7fffffff) > 0x7f800000 ? 0x7f : code;
}
// One element, in 4 bits; NaN is 7, the code of 6.
TPF_DEVICE u32 to_e2m1(float x) {
  u32 sign = (bits_of(x) & 0x7fffffff) > 0x7f800000 ? 0 : bits_of(x) >> 28 & 8;
  return small_float<1, 127>(magnitude(x), 6.0f) | sign;
}

// E4M3 without a sign, as stored scales are, to fp32. Exact.
TPF_DEVICE float from_e4m3(u32 code) {
  if (code == 0x7f) return float_of(0x7fffffff);
  if (code < 8) return mul_rn(float(code), 0x1p-9f);
  return float_of((code << 20) + (120u << 23));
}

TPF_DEVICE u32 pack_e4m3(float a, float b, float c, float d) {
#if defined(TPF_CUDA) && __CUDA_ARCH__ >= 890
  u32 code;
  asm("{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, %2, %1; cvt.rn.satfinite.e4m3x2.f32 high, %4, %3; "
      "mov.b32 %0, {low, high}; }"
      : "=r"(code)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return code;
#else
  return to_e4m3(a) | to_e4m3(b) << 8 | to_e4m3(c) << 16 | to_e4m3(d) << 24;
#endif
}

TPF_DEVICE void pack(const float (&x)[8], Vec8& bytes) {
  bytes.w[0] = pack_e4m3(x[0], x[1], x[2], x[3]);
  bytes.w[1] = pack_e4m3(x[4], x[5], x[6], x[7]);
}
TPF_DEVICE void pack(const float (&x)[8], Fp4x8& bytes) {
  bytes.w = 0;
  TPF_UNROLL
  for (u32 i = 0; i < 8; ++i) bytes.w |= to_e2m1(x[i]) << (4 * i);
}

// ---- scales

TPF_DEVICE u32 larger(u32 a, u32 b) { return a > b ? a : b; }

// The largest magnitude of the lane's elements, as the bits of an fp32; NaN if there is one.
TPF_DEVICE u32 lane_amax(const float (&x)[8]) {
  u32 most = 0;
  TPF_UNROLL
  for (u32 i = 0; i < 8; ++i) most = larger(most, bits_of(x[i]) & 0x7fffffff);
  return most;
}

// That of the group that the lane is in. Every lane of the warp must come.
template <Kind k>
TPF_DEVICE u32 group_amax(u32 most) {
  TPF_UNROLL
  for (u32 mask = kGroup<k> / kLaneElements / 2; mask > 0; mask /= 2) most = larger(most, shuffle_xor(most, mask));
  return most;
}

// Whether this lane is the first of its group: the one that stores the scale.
template <Kind k>
TPF_DEVICE bool leads_group() {
  return kGroup<k> != 0 && lane() % (kGroup<k> / kLaneElements + (kGroup<k> == 0)) == 0;
}

struct Scale {
  float inverse;  // what elements are multiplied by
  u32 stored;     // the bits of an fp32, or a byte
};

// What a thread keeps of the user's tensor `given`.
struct Given {
  float scale, inverse;
};
template <Kind k>
TPF_DEVICE Given given_of(float scale) {
  return Given{scale, kNeedsGiven<k> ? div_rn(1.0f, scale) : 0.0f};
}

// amax: of what one scale covers, as bits; fp8_static ignores it.
template <Kind k>
TPF_DEVICE Scale scale_of(u32 amax, const Given& given) {
  Scale s{given.inverse, bits_of(given.scale)};
  if constexpr (k == Kind::fp8_per_token || k == Kind::fp8_per_group) {
    constexpr float kFloor = k == Kind::fp8_per_token ? 1.0f / (kE4m3Max * 512.0f) : 1e-10f / kE4m3Max;
    float scale = div_rn(float_of(amax), kE4m3Max);
    if (scale < kFloor) scale = kFloor;
    s = Scale{div_rn(1.0f, scale), bits_of(scale)};
  } else if constexpr (k == Kind::mxfp8) {
    i32 exponent = i32(amax >> 23) - 8 + ((amax & 0x7fffff) > 0x600000 ? 1 : 0);
    exponent = exponent < 0 ? 0 : exponent;
    bool nan = amax > 0x7f800000;
    s = Scale{float_of(nan ? 0x7fffffff : u32(254 - exponent) << 23), nan ? 255 : u32(exponent)};
  } else if constexpr (k == Kind::nvfp4) {
    u32 code = to_e4m3(mul_rn(given.scale, mul_rn(float_of(amax), 1.0f / 6.0f)));
    float inverse = code == 0 ? 0.0f : div_rn(1.0f, mul_rn(from_e4m3(code), given.inverse));
    s = Scale{inverse, code};
  }
  return s;
}

template <Kind k>
TPF_DEVICE Packed<k> encode(const float (&x)[8], const Scale& scale) {
  float scaled[8];
  TPF_UNROLL
  for (u32 i = 0; i < 8; ++i) scaled[i] = mul_rn(x[i], scale.inverse);
  Packed<k> bytes;
  pack(scaled, bytes);
  return bytes;
}

// ---- where a scale lies

// In scales. pitch is Format.pitch: scales of a row; floats from one column to the next; tiles side by side.
template <Layout layout>
TPF_DEVICE u64 scale_index(u32 row, u32 group, u32 pitch) {
  if constexpr (layout == Layout::row_major) return u64(row) * pitch + group;
  if constexpr (layout == Layout::column_major) return u64(group) * pitch + row;
  u64 tile = u64(row / 128) * pitch + group / 4;
  return tile * 512 + row % 32 * 16 + row / 32 % 4 * 4 + group % 4;
}

// Swizzled scales are padded to tiles of 128 rows x 4 groups with zeros, or GEMMs read NaN there. Groups: lanes past the
// end of the row get scale 0, so store it for every group below 4 * pitch. Rows: `threads` threads, this one the
// `index`-th, write them here, 4 scales at a time.
TPF_DEVICE void zero_padding_rows(u8* scales, u32 rows, u32 pitch, u32 index, u32 threads) {
  u32 padding = (128 - rows % 128) % 128 * pitch;
  for (u32 i = index; i < padding; i += threads) {
    u32 row = rows + i / pitch, tile = i % pitch;
    store_global(reinterpret_cast<u32*>(scales + scale_index<Layout::swizzled>(row, 4 * tile, pitch)), 0u);
  }
}

}  // namespace tpfuse::quant
