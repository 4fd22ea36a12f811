// A kernel that calls every primitive of platform.h once, so that one compilation of it per target shows that the
// header is complete there; test_platform.py reads its PTX and its AMD assembly. It computes nothing of use.
#pragma once
#include "platform.h"

namespace tpfuse {

struct Everything {
  const Vec16* in16;
  const Vec8* in8;
  const u32* in4;
  const u16* in2;
  Vec16* out16;
  Vec8* out8;
  u32* out4;
  u16* out2;
  Vec16* packet16;
  u64* packet8;
  u32* packet4;
};

TPF_DEVICE void copy_plain(const Everything& p, u32 i) {
  store_global(p.out16 + i, load_global(p.in16 + i));
  store_global(p.out8 + i, load_global(p.in8 + i));
  store_global(p.out4 + i, load_global(p.in4 + i));
  store_global(p.out2 + i, load_global(p.in2 + i));
}

TPF_DEVICE void copy_streaming(const Everything& p, u32 i) {
  store_streaming(p.out16 + i, load_streaming(p.in16 + i));
  store_streaming(p.out8 + i, load_streaming(p.in8 + i));
  store_streaming(p.out4 + i, load_streaming(p.in4 + i));
  store_streaming(p.out2 + i, load_streaming(p.in2 + i));
}

TPF_DEVICE u32 read_only(const Everything& p, u32 i) {
  return load_readonly(p.in16 + i).w[3] + load_readonly(p.in8 + i).w[1] + load_readonly(p.in4 + i) +
         load_readonly(p.in2 + i);
}

TPF_DEVICE void exchange(const Everything& p, u32 i) {
  store_system(p.packet16 + i, Vec16{{i, i, i, 1}});
  store_system(p.packet8 + i, u64(i) << 32 | 1);
  store_system(p.packet4 + i, 1u);
  u64 start = clock_ns();
  while (load_system(p.packet16 + i).w[3] != 1 || u32(load_system(p.packet8 + i)) != 1 ||
         load_system(p.packet4 + i) != 1) {
    if (clock_ns() - start > 1000000) break;
    spin_pause();
  }
}

template <class T>
TPF_DEVICE Vec16 convert(const Vec16& v) {
  float x[8];
  unpack8<T>(v, x);
  for (int i = 0; i < 8; ++i) x[i] = sqrt_rn(div_rn(add_rn(x[i], mul_rn(x[i], 3.0f)), 7.0f));
  x[0] = to_float(from_float<T>(to_float(from_float<float>(x[0]))));
  return pack8<T>(x);
}

TPF_DEVICE float warp_sum(float x) {
  TPF_UNROLL
  for (u32 mask = 16; mask > 0; mask /= 2) x = add_rn(x, shuffle_xor(x, mask));
  return x;
}

template <class T>
TPF_KERNEL(256, 2)
void every_primitive(const TPF_GRID_CONSTANT Everything p) {
  TPF_SHARED(float[32], sums);
  u32 i = block_index() * block_size() + thread_index();
  u32 weight = read_only(p, i);
  dependency_wait();
  dependency_trigger();
  copy_plain(p, i);
  copy_streaming(p, i);
  exchange(p, i);
  float sum = warp_sum(float(weight));
  if (lane() == 0) sums[warp_index()] = sum;
  barrier();
#if !defined(TPF_HIP)
  barrier(1, block_size());
#endif
  u32 chosen = shuffle_xor(shuffle(weight, 3), 1);
  sync_warp();
  if (any(chosen == 7) && all(weight != 9)) sum = shuffle(sum, grid_size() % kWarp);
  store_global(p.out16 + i, convert<T>(load_global(p.in16 + i)));
  store_global(p.out4 + i, bits_of(add_rn(sum, sums[0])));
}

}  // namespace tpfuse
