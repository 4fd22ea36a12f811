// A kernel that quantises rows of floats with quant.h, one block a row: what test_quant.py runs in the emulated GPU
// and compiles for every target, and what tests/gpu/test_encoders.py runs on real ones.
#pragma once
#include "quant.h"

namespace tpfuse {

struct QuantRows {
  const float* x;      // [rows, width], width a multiple of 8
  const float* given;  // one float, where the format needs it
  u8* quant;
  u8* scales;
  u32 rows, width, pitch;
};

template <quant::Kind k, quant::Layout layout>
TPF_KERNEL(1024, 1)
void quantise_rows(const TPF_GRID_CONSTANT QuantRows p) {
  TPF_SHARED(u32[32], of_warps);
  quant::Given given = quant::given_of<k>(quant::kNeedsGiven<k> ? float_of(load_global((const u32*)p.given)) : 0.0f);
  u32 row = block_index(), element = thread_index() * quant::kLaneElements;
  float x[8] = {};
  if (element < p.width) {
    const Vec16* from = reinterpret_cast<const Vec16*>(p.x + u64(row) * p.width + element);
    for (u32 half = 0; half < 2; ++half) {
      Vec16 v = load_global(from + half);
      for (u32 i = 0; i < 4; ++i) x[4 * half + i] = float_of(v.w[i]);
    }
  }
  u32 amax = quant::lane_amax(x);
  if (quant::kNeedsRowMax<k>) {
    for (u32 mask = 16; mask > 0; mask /= 2) amax = quant::larger(amax, shuffle_xor(amax, mask));
    if (lane() == 0) of_warps[warp_index()] = amax;
    barrier();
    for (u32 w = 0; w < block_size() / kWarp; ++w) amax = quant::larger(amax, of_warps[w]);
  }
  quant::Scale scale = quant::scale_of<k>(quant::group_amax<k>(amax), given);
  auto bytes = quant::encode<k>(x, scale);
  if (element < p.width) {
    u64 vector = (u64(row) * p.width + element) / quant::kLaneElements;
    if constexpr (quant::kIsFp4<k>) {
      store_global(reinterpret_cast<u32*>(p.quant) + vector, bytes.w);
    } else {
      store_global(reinterpret_cast<Vec8*>(p.quant) + vector, bytes);
    }
  }
  if constexpr (quant::kGroup<k> != 0) {
    u32 group = element / quant::kGroup<k>;
    u32 groups = layout == quant::Layout::swizzled ? 4 * p.pitch : p.width / quant::kGroup<k>;
    if (quant::leads_group<k>() && group < groups) {
      u64 index = quant::scale_index<layout>(row, group, p.pitch);
      if constexpr (quant::kScaleBytes<k> == 1) store_global(p.scales + index, u8(scale.stored));
      if constexpr (quant::kScaleBytes<k> == 4) store_global(reinterpret_cast<u32*>(p.scales) + index, scale.stored);
    }
  } else if (quant::kScaleBytes<k> == 4 && thread_index() == 0) {
    store_global(reinterpret_cast<u32*>(p.scales) + row, scale.stored);
  }
  if (layout == quant::Layout::swizzled && row == 0) {
    quant::zero_padding_rows(p.scales, p.rows, p.pitch, thread_index(), block_size());
  }
}

}  // namespace tpfuse
