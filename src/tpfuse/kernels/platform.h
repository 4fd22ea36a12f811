// The few primitives that every tpfuse kernel is written with.
//
// One kernel source serves three compilers: NVRTC (NVIDIA, sm_80 and later), clang or hiprtc (AMD, gfx90a and later)
// and the host compiler, where tests/simt runs it on a CPU. Whatever differs between them lives here, one section a
// platform with the same functions in the same order; everything above is plain C++17 templates. Nothing is included:
// inline PTX, compiler builtins and bit operations are enough, so no toolkit headers are needed at run time.
//
// What kernels may rely on:
//   - Blocks and grids are one-dimensional. A warp is 32 lanes everywhere; on a 64-wide AMD wavefront the two halves
//   are
//     two warps, so reduction trees, and with them results, are the same on every platform.
//   - `load_system` and `store_system` are relaxed and seen by all GPUs; 4 and 8 bytes are one naturally atomic access,
//     16 bytes are two of 8. They order nothing else: protocols carry their flag in the packet.
//   - Plain loads and stores (`load_global`, `store_global`, the streaming ones) promise no atomicity.
//     `load_readonly` is for memory that nobody writes while the kernel runs (weights).
//   - Shuffles, votes and `sync_warp` need every living lane of the warp.
//   - `add_rn`, `mul_rn`, `div_rn`, `sqrt_rn` round once each, keep subnormals and are never contracted. Sums that must
//     be bitwise equal between platforms use them instead of operators.
//   - A conversion to 16 bits rounds to nearest even; infinities and subnormals are exact, NaN stays NaN with a payload
//     that is not promised.
//   - Every spin loop calls `spin_pause` once per turn and is bounded by `clock_ns`.
//
// On the host, peers' memory must be reached through the functions below: a plain `peer[i] = x` is delivered at once
// there and so escapes the emulated weak memory.
#pragma once

#if defined(__HIP__) || defined(__HIPCC_RTC__)
#define TPF_HIP 1
#elif defined(__CUDACC__)
#define TPF_CUDA 1
#else
#define TPF_HOST 1
#endif

namespace tpfuse {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

struct alignas(16) Vec16 {
  u32 w[4];
};
struct alignas(8) Vec8 {
  u32 w[2];
};

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

constexpr u32 kWarp = 32;

// Lets TPF_SHARED take an array type: `TPF_SHARED(float[32], sums)`.
template <class T>
using Same = T;

}  // namespace tpfuse

// ---------------------------------------------------------------------------------------------------------------------
#if defined(TPF_CUDA)

#define TPF_DEVICE __device__ __forceinline__
#define TPF_KERNEL(max_threads, min_blocks) __global__ __launch_bounds__(max_threads, min_blocks)
#define TPF_SHARED(type, name) __shared__ ::tpfuse::Same<type> name
#define TPF_GRID_CONSTANT __grid_constant__
#define TPF_UNROLL _Pragma("unroll")
#define TPF_ROLLED _Pragma("unroll 1")

namespace tpfuse {

TPF_DEVICE u32 thread_index() { return threadIdx.x; }
TPF_DEVICE u32 block_index() { return blockIdx.x; }
TPF_DEVICE u32 grid_size() { return gridDim.x; }
TPF_DEVICE u32 block_size() { return blockDim.x; }

TPF_DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
TPF_DEVICE float float_of(u32 x) { return __uint_as_float(x); }

// Plain accesses stay C++ so that the compiler may schedule them; the assumption turns generic accesses into global
// ones also where the pointer was itself loaded from memory.
template <class Word, class T>
TPF_DEVICE T load_as(const T* p) {
  __builtin_assume(__isGlobal(p));
  Word word = *reinterpret_cast<const Word*>(p);
  return *reinterpret_cast<T*>(&word);
}
template <class Word, class T>
TPF_DEVICE void store_as(T* p, const T& x) {
  __builtin_assume(__isGlobal(p));
  *reinterpret_cast<Word*>(p) = *reinterpret_cast<const Word*>(&x);
}
TPF_DEVICE Vec16 load_global(const Vec16* p) { return load_as<uint4>(p); }
TPF_DEVICE Vec8 load_global(const Vec8* p) { return load_as<uint2>(p); }
TPF_DEVICE u32 load_global(const u32* p) { return load_as<u32>(p); }
TPF_DEVICE u16 load_global(const u16* p) { return load_as<u16>(p); }
TPF_DEVICE void store_global(Vec16* p, const Vec16& x) { store_as<uint4>(p, x); }
TPF_DEVICE void store_global(Vec8* p, const Vec8& x) { store_as<uint2>(p, x); }
TPF_DEVICE void store_global(u32* p, u32 x) { store_as<u32>(p, x); }
TPF_DEVICE void store_global(u16* p, u16 x) { store_as<u16>(p, x); }
TPF_DEVICE void store_global(u8* p, u8 x) { store_as<u8>(p, x); }

// One family of loads and stores by PTX opcode. `qualifier` is empty for read-only loads, which the compiler may
// move and merge, and `volatile` with a memory clobber for all others.
#define TPF_PTX_LOAD(name, opcode, qualifier, ...)                                                    \
  TPF_DEVICE Vec16 name(const Vec16* p) {                                                             \
    Vec16 x;                                                                                          \
    asm qualifier(opcode ".v4.u32 {%0, %1, %2, %3}, [%4];"                                            \
                  : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3])                            \
                  : "l"(p)__VA_ARGS__);                                                               \
    return x;                                                                                         \
  }                                                                                                   \
  TPF_DEVICE Vec8 name(const Vec8* p) {                                                               \
    Vec8 x;                                                                                           \
    asm qualifier(opcode ".v2.u32 {%0, %1}, [%2];" : "=r"(x.w[0]), "=r"(x.w[1]) : "l"(p)__VA_ARGS__); \
    return x;                                                                                         \
  }                                                                                                   \
  TPF_DEVICE u32 name(const u32* p) {                                                                 \
    u32 x;                                                                                            \
    asm qualifier(opcode ".u32 %0, [%1];" : "=r"(x) : "l"(p)__VA_ARGS__);                             \
    return x;                                                                                         \
  }                                                                                                   \
  TPF_DEVICE u16 name(const u16* p) {                                                                 \
    u16 x;                                                                                            \
    asm qualifier(opcode ".u16 %0, [%1];" : "=h"(x) : "l"(p)__VA_ARGS__);                             \
    return x;                                                                                         \
  }
TPF_PTX_LOAD(load_streaming, "ld.global.L1::no_allocate", volatile, : "memory")
TPF_PTX_LOAD(load_readonly, "ld.global.nc", )
#undef TPF_PTX_LOAD

TPF_DEVICE void store_streaming(Vec16* p, const Vec16& x) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.w[0]), "r"(x.w[1]), "r"(x.w[2]),
               "r"(x.w[3])
               : "memory");
}
TPF_DEVICE void store_streaming(Vec8* p, const Vec8& x) {
  asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(x.w[0]), "r"(x.w[1]) : "memory");
}
TPF_DEVICE void store_streaming(u32* p, u32 x) {
  asm volatile("st.global.cs.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
TPF_DEVICE void store_streaming(u16* p, u16 x) {
  asm volatile("st.global.cs.u16 [%0], %1;" ::"l"(p), "h"(x) : "memory");
}

TPF_DEVICE u32 load_system(const u32* p) {
  u32 x;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
TPF_DEVICE u64 load_system(const u64* p) {
  u64 x;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
  return x;
}
// Of a 16-byte access only the two 8-byte halves are promised to be atomic. ptxas takes apart loads of which it needs
// only some words: `ld.relaxed.sys.v4.u32` in 13.4, and in 13.0 also this .b128, which PTX calls one scalar. So a packet
// carries a flag in each half, in the same 8 bytes as what the flag stands for.
TPF_DEVICE Vec16 load_system(const Vec16* p) {
  u64 low, high;
  asm volatile("{ .reg .b128 t; ld.relaxed.sys.global.b128 t, [%2]; mov.b128 {%0, %1}, t; }"
               : "=l"(low), "=l"(high)
               : "l"(p)
               : "memory");
  return Vec16{{u32(low), u32(low >> 32), u32(high), u32(high >> 32)}};
}
TPF_DEVICE void store_system(u32* p, u32 x) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
TPF_DEVICE void store_system(u64* p, u64 x) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}
TPF_DEVICE void store_system(Vec16* p, const Vec16& x) {
  u64 low = u64(x.w[1]) << 32 | x.w[0], high = u64(x.w[3]) << 32 | x.w[2];
  asm volatile("{ .reg .b128 t; mov.b128 t, {%1, %2}; st.relaxed.sys.global.b128 [%0], t; }" ::"l"(p), "l"(low),
               "l"(high)
               : "memory");
}

// Adds to a counter of the own GPU's memory and returns what it was. Relaxed.
TPF_DEVICE u32 add_global(u32* p, u32 x) {
  u32 old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(x) : "memory");
  return old;
}

TPF_DEVICE u32 shuffle_xor(u32 x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, int(mask)); }
TPF_DEVICE u32 shuffle(u32 x, u32 lane) { return __shfl_sync(0xffffffffu, x, int(lane)); }
TPF_DEVICE bool any(bool x) { return __any_sync(0xffffffffu, x); }
TPF_DEVICE bool all(bool x) { return __all_sync(0xffffffffu, x); }
TPF_DEVICE void sync_warp() { __syncwarp(); }

TPF_DEVICE void barrier() { __syncthreads(); }
// Named barrier: `id` 1 to 15, `threads` a multiple of 32; exactly that many threads must arrive.
TPF_DEVICE void barrier(u32 id, u32 threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A cluster: neighbouring blocks that run at the same time and reach each other's shared memory (sm_90 and later).
// `gates` are counters of words that are to come into this block's shared memory; every thread of every block calls
// `cluster_open` before any word is sent, and `bytes` is what each of `count` gates waits for. Nothing else is ordered
// by these, which is why they are fast: a barrier of the cluster would first wait for all stores, those to peers included.
#if __CUDA_ARCH__ >= 900
TPF_DEVICE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
TPF_DEVICE void cluster_open(u64* gates, u32 count, u32 bytes) {
  if (thread_index() == 0) {
    for (u32 i = 0; i < count; ++i) {
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(gates + i)) : "memory");
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(gates + i)), "r"(bytes)
                   : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// Into the same variable of the cluster's block `to`, counted there.
TPF_DEVICE void cluster_post(u32* variable, u32 word, u64* gate, u32 to) {
  asm volatile(
      "{ .reg .b32 there, its_gate; mapa.shared::cluster.u32 there, %0, %3; mapa.shared::cluster.u32 its_gate, %2, %3; "
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [its_gate]; }" ::"r"(
          shared_address(variable)),
      "r"(word), "r"(shared_address(gate)), "r"(to)
      : "memory");
}
// Whether all words have come; waits a moment for them.
TPF_DEVICE bool cluster_arrived(u64* gate) {
  u32 done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(shared_address(gate))
               : "memory");
  return done != 0;
}
#endif

// Programmatic dependent launch exists from sm_90 on; below, grids are serial and both are nothing.
TPF_DEVICE void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
TPF_DEVICE void dependency_trigger() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

constexpr bool kPrefetches = true;
// Asks for the line at p to come into the L2, where it stays coherent with whoever still writes it: nothing is read.
TPF_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// x is computed by here. The compiler moves arithmetic to where its result is used, and that may be in the chain of steps
// that all ranks wait for.
TPF_DEVICE void pin(u64& x) { asm volatile("" : "+l"(x)); }
TPF_DEVICE void pin(float& x) { asm volatile("" : "+f"(x)); }

TPF_DEVICE u64 clock_ns() {
  u64 ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns)::"memory");
  return ns;
}
// The poll itself takes a trip to L2: a pause would only add latency.
TPF_DEVICE void spin_pause() {}

// An explicit .rn in PTX is never contracted and, without .ftz, keeps subnormals under any compiler flag.
TPF_DEVICE float add_rn(float a, float b) {
  float x;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
}
TPF_DEVICE float mul_rn(float a, float b) {
  float x;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
}
TPF_DEVICE float div_rn(float a, float b) {
  float x;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
}
TPF_DEVICE float reciprocal_rn(float a) {
  float x;
  asm("rcp.rn.f32 %0, %1;" : "=f"(x) : "f"(a));
  return x;
}
TPF_DEVICE float sqrt_rn(float a) {
  float x;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(x) : "f"(a));
  return x;
}

TPF_DEVICE float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
TPF_DEVICE bf16 round_to(bf16, float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
TPF_DEVICE f16 round_to(f16, float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
TPF_DEVICE u32 pack2(bf16, float low, float high) {
  u32 x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
TPF_DEVICE u32 pack2(f16, float low, float high) {
  u32 x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

}  // namespace tpfuse

// ---------------------------------------------------------------------------------------------------------------------
#elif defined(TPF_HIP)

// Rate of the constant clock in kHz. The launcher passes hipDeviceAttributeWallClockRate (100 MHz on gfx942); without
// it a deadline is off by the ratio, never unbounded.
#ifndef TPF_WALL_CLOCK_KHZ
#define TPF_WALL_CLOCK_KHZ 100000
#endif

// CUDA counts resident blocks, AMD waves per execution unit (4 a compute unit, at most 8 waves each).
#define TPF_WAVES(max_threads, min_blocks) ((((max_threads) + 63) / 64 * (min_blocks) + 3) / 4)
#define TPF_DEVICE __attribute__((device, always_inline)) inline
#define TPF_KERNEL(max_threads, min_blocks)                \
  __attribute__((                                          \
      global, amdgpu_flat_work_group_size(1, max_threads), \
      amdgpu_waves_per_eu(TPF_WAVES(max_threads, min_blocks) > 8 ? 8 : TPF_WAVES(max_threads, min_blocks))))
#define TPF_SHARED(type, name) static __attribute__((shared)) ::tpfuse::Same<type> name
#define TPF_GRID_CONSTANT
#define TPF_UNROLL _Pragma("unroll")
#define TPF_ROLLED _Pragma("unroll 1")

namespace tpfuse {

TPF_DEVICE u32 thread_index() { return __builtin_amdgcn_workitem_id_x(); }
TPF_DEVICE u32 block_index() { return __builtin_amdgcn_workgroup_id_x(); }
TPF_DEVICE u32 block_size() { return __builtin_amdgcn_workgroup_size_x(); }
TPF_DEVICE u32 grid_size() { return __builtin_amdgcn_grid_size_x() / block_size(); }

TPF_DEVICE u32 bits_of(float x) { return __builtin_bit_cast(u32, x); }
TPF_DEVICE float float_of(u32 x) { return __builtin_bit_cast(float, x); }

namespace detail {
template <class T>
struct Native {
  using type = T;
};
template <>
struct Native<Vec16> {
  using type = u32 __attribute__((ext_vector_type(4)));
};
template <>
struct Native<Vec8> {
  using type = u32 __attribute__((ext_vector_type(2)));
};
template <class T>
using native = typename Native<T>::type;
// Naming the address space turns flat accesses into global ones.
template <class T>
TPF_DEVICE auto global(const T* p) {
  return (const __attribute__((address_space(1))) native<T>*)p;
}
template <class T>
TPF_DEVICE auto global(T* p) {
  return (__attribute__((address_space(1))) native<T>*)p;
}
template <class T>
TPF_DEVICE T load(const T* p) {
  return __builtin_bit_cast(T, *global(p));
}
template <class T>
TPF_DEVICE void store(T* p, const T& x) {
  *global(p) = __builtin_bit_cast(native<T>, x);
}
template <class T>
TPF_DEVICE T load_nontemporal(const T* p) {
  return __builtin_bit_cast(T, __builtin_nontemporal_load(global(p)));
}
template <class T>
TPF_DEVICE void store_nontemporal(T* p, const T& x) {
  __builtin_nontemporal_store(__builtin_bit_cast(native<T>, x), global(p));
}
}  // namespace detail

TPF_DEVICE Vec16 load_global(const Vec16* p) { return detail::load(p); }
TPF_DEVICE Vec8 load_global(const Vec8* p) { return detail::load(p); }
TPF_DEVICE u32 load_global(const u32* p) { return detail::load(p); }
TPF_DEVICE u16 load_global(const u16* p) { return detail::load(p); }
TPF_DEVICE void store_global(Vec16* p, const Vec16& x) { detail::store(p, x); }
TPF_DEVICE void store_global(Vec8* p, const Vec8& x) { detail::store(p, x); }
TPF_DEVICE void store_global(u32* p, u32 x) { detail::store(p, x); }
TPF_DEVICE void store_global(u16* p, u16 x) { detail::store(p, x); }
TPF_DEVICE void store_global(u8* p, u8 x) { detail::store(p, x); }

TPF_DEVICE Vec16 load_streaming(const Vec16* p) { return detail::load_nontemporal(p); }
TPF_DEVICE Vec8 load_streaming(const Vec8* p) { return detail::load_nontemporal(p); }
TPF_DEVICE u32 load_streaming(const u32* p) { return detail::load_nontemporal(p); }
TPF_DEVICE u16 load_streaming(const u16* p) { return detail::load_nontemporal(p); }
TPF_DEVICE Vec16 load_readonly(const Vec16* p) { return detail::load(p); }
TPF_DEVICE Vec8 load_readonly(const Vec8* p) { return detail::load(p); }
TPF_DEVICE u32 load_readonly(const u32* p) { return detail::load(p); }
TPF_DEVICE u16 load_readonly(const u16* p) { return detail::load(p); }
TPF_DEVICE void store_streaming(Vec16* p, const Vec16& x) { detail::store_nontemporal(p, x); }
TPF_DEVICE void store_streaming(Vec8* p, const Vec8& x) { detail::store_nontemporal(p, x); }
TPF_DEVICE void store_streaming(u32* p, u32 x) { detail::store_nontemporal(p, x); }
TPF_DEVICE void store_streaming(u16* p, u16 x) { detail::store_nontemporal(p, x); }

// The bits that make an access coherent with other GPUs: renamed on gfx940 and later.
#if defined(__gfx90a__)
#define TPF_SYSTEM_BITS "glc slc"
#else
#define TPF_SYSTEM_BITS "sc0 sc1"
#endif
TPF_DEVICE u32 load_system(const u32* p) {
  return __hip_atomic_load(detail::global(p), __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}
TPF_DEVICE u64 load_system(const u64* p) {
  return __hip_atomic_load(detail::global(p), __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}
TPF_DEVICE void store_system(u32* p, u32 x) {
  __hip_atomic_store(detail::global(p), x, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}
TPF_DEVICE void store_system(u64* p, u64 x) {
  __hip_atomic_store(detail::global(p), x, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}
// The compiler does not count loads in inline assembly, so the load waits for itself; a 16-byte store needs one idle
// slot before its data registers are written again.
TPF_DEVICE Vec16 load_system(const Vec16* p) {
  detail::native<Vec16> x;
  asm volatile("global_load_dwordx4 %0, %1, off " TPF_SYSTEM_BITS "\n\ts_waitcnt vmcnt(0)"
               : "=v"(x)
               : "v"(p)
               : "memory");
  return __builtin_bit_cast(Vec16, x);
}
TPF_DEVICE void store_system(Vec16* p, const Vec16& x) {
  asm volatile("global_store_dwordx4 %0, %1, off " TPF_SYSTEM_BITS "\n\ts_nop 0" ::"v"(p),
               "v"(__builtin_bit_cast(detail::native<Vec16>, x))
               : "memory");
}

TPF_DEVICE u32 add_global(u32* p, u32 x) {
  return __hip_atomic_fetch_add(detail::global(p), x, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

namespace detail {
// Bytes of the first lane of this thread's half of the wavefront, as bpermute addresses lanes.
TPF_DEVICE u32 half_base() { return (thread_index() & 32) * 4; }
TPF_DEVICE u32 half_ballot(bool x) { return u32(__builtin_amdgcn_ballot_w64(x) >> (thread_index() & 32)); }
}  // namespace detail
TPF_DEVICE u32 shuffle(u32 x, u32 lane) {
  return __builtin_amdgcn_ds_bpermute(detail::half_base() + (lane & 31) * 4, x);
}
TPF_DEVICE u32 shuffle_xor(u32 x, u32 mask) { return shuffle(x, (thread_index() ^ mask) & 31); }
TPF_DEVICE bool any(bool x) { return detail::half_ballot(x) != 0; }
TPF_DEVICE bool all(bool x) { return detail::half_ballot(!x) == 0; }
TPF_DEVICE void sync_warp() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

TPF_DEVICE void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
// These GPUs have no named barriers, and a whole-block barrier in their place would hang a block of which only a part
// arrives: a kernel that names one does not compile, and its author gives AMD another path.
template <class T = void>
TPF_DEVICE void barrier(u32, u32) {
  static_assert(sizeof(T*) == 0, "no named barriers on this GPU");
}

// Nor clusters: a row is one block's.
template <class T = void>
TPF_DEVICE void cluster_open(u64*, u32, u32) {
  static_assert(sizeof(T*) == 0, "no clusters on this GPU: kernels with kParts > 1 are not for it");
}
template <class T = void>
TPF_DEVICE void cluster_post(u32*, u32, u64*, u32) {
  static_assert(sizeof(T*) == 0, "no clusters on this GPU: kernels with kParts > 1 are not for it");
}
template <class T = void>
TPF_DEVICE bool cluster_arrived(u64*) {
  static_assert(sizeof(T*) == 0, "no clusters on this GPU: kernels with kParts > 1 are not for it");
  return false;
}

TPF_DEVICE void dependency_wait() {}
TPF_DEVICE void dependency_trigger() {}
constexpr bool kPrefetches = false;  // of use only before a dependency_wait
TPF_DEVICE void prefetch(const void*) {}
TPF_DEVICE void pin(u64&) {}
TPF_DEVICE void pin(float&) {}

TPF_DEVICE u64 clock_ns() {
  static_assert(1000000 % TPF_WALL_CLOCK_KHZ == 0, "a tick of the wall clock must be whole nanoseconds");
  return __builtin_amdgcn_s_memrealtime() * (1000000 / TPF_WALL_CLOCK_KHZ);
}
// About 64 cycles: leaves the memory pipe to the waves that work.
TPF_DEVICE void spin_pause() { __builtin_amdgcn_s_sleep(1); }

TPF_DEVICE float add_rn(float a, float b) {
#pragma clang fp contract(off)
  return a + b;
}
TPF_DEVICE float mul_rn(float a, float b) {
#pragma clang fp contract(off)
  return a * b;
}
TPF_DEVICE float div_rn(float a, float b) { return a / b; }
TPF_DEVICE float reciprocal_rn(float a) { return 1.0f / a; }
TPF_DEVICE float sqrt_rn(float a) { return __builtin_sqrtf(a); }

TPF_DEVICE float to_float(f16 x) { return float(__builtin_bit_cast(_Float16, x.bits)); }
TPF_DEVICE f16 round_to(f16, float x) { return f16{__builtin_bit_cast(u16, _Float16(x))}; }

}  // namespace tpfuse

// ---------------------------------------------------------------------------------------------------------------------
#else

#define TPF_DEVICE inline
#define TPF_KERNEL(max_threads, min_blocks) inline
// Keyed by the type of the lambda: one for each declaration and template instance, as a static variable would be.
#define TPF_SHARED(type, name) auto& name = ::tpfuse::host::shared<::tpfuse::Same<type>>([] {})
#define TPF_GRID_CONSTANT
#define TPF_UNROLL
#define TPF_ROLLED

namespace tpfuse {

// The emulator's side, defined in tests/simt/simt.cpp.
namespace host {
// Where in the kernel a primitive was called: as a default argument it is evaluated at the call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};
enum class Scope { plain, system };
enum class Meeting { shuffle, vote, sync };

u32 thread_index();
u32 block_index();
u32 grid_size();
u32 block_size();
void load(void* to, const void* from, u32 bytes, Scope, Site);
void store(void* to, const void* from, u32 bytes, Scope, Site);
u32 add(u32* p, u32 x, Site);
u32 meet(Meeting, u32 value, u32 source_lane, Site);
void barrier(Site);
void barrier(u32 id, u32 threads, Site);
void dependency_wait(Site);
void dependency_trigger();
u64 clock_ns();
void spin_pause(Site);
void cluster_open(u64* gates, u32 count, u32 bytes, Site);
void cluster_post(u32* variable, u32 word, u64* gate, u32 to, Site);
bool cluster_arrived(const u64* gate, Site);
void* shared(const void* key, u64 bytes);

template <class T, class Declaration>
T& shared(Declaration) {
  static const char key = 0;
  return *static_cast<T*>(shared(&key, sizeof(T)));
}
template <class T>
T load(const T* p, Scope scope, Site site) {
  T x;
  load(&x, p, sizeof(T), scope, site);
  return x;
}
template <class T>
void store(T* p, const T& x, Scope scope, Site site) {
  store(p, &x, sizeof(T), scope, site);
}
}  // namespace host

#define TPF_SITE host::Site site = host::Site::here()

inline u32 thread_index() { return host::thread_index(); }
inline u32 block_index() { return host::block_index(); }
inline u32 grid_size() { return host::grid_size(); }
inline u32 block_size() { return host::block_size(); }

inline u32 bits_of(float x) { return __builtin_bit_cast(u32, x); }
inline float float_of(u32 x) { return __builtin_bit_cast(float, x); }

inline Vec16 load_global(const Vec16* p, TPF_SITE) { return host::load(p, host::Scope::plain, site); }
inline Vec8 load_global(const Vec8* p, TPF_SITE) { return host::load(p, host::Scope::plain, site); }
inline u32 load_global(const u32* p, TPF_SITE) { return host::load(p, host::Scope::plain, site); }
inline u16 load_global(const u16* p, TPF_SITE) { return host::load(p, host::Scope::plain, site); }
inline void store_global(Vec16* p, const Vec16& x, TPF_SITE) { host::store(p, x, host::Scope::plain, site); }
inline void store_global(Vec8* p, const Vec8& x, TPF_SITE) { host::store(p, x, host::Scope::plain, site); }
inline void store_global(u32* p, u32 x, TPF_SITE) { host::store(p, x, host::Scope::plain, site); }
inline void store_global(u16* p, u16 x, TPF_SITE) { host::store(p, x, host::Scope::plain, site); }
inline void store_global(u8* p, u8 x, TPF_SITE) { host::store(p, x, host::Scope::plain, site); }

template <class T>
T load_streaming(const T* p, TPF_SITE) {
  return load_global(p, site);
}
template <class T>
T load_readonly(const T* p, TPF_SITE) {
  return load_global(p, site);
}
inline void store_streaming(Vec16* p, const Vec16& x, TPF_SITE) { store_global(p, x, site); }
inline void store_streaming(Vec8* p, const Vec8& x, TPF_SITE) { store_global(p, x, site); }
inline void store_streaming(u32* p, u32 x, TPF_SITE) { store_global(p, x, site); }
inline void store_streaming(u16* p, u16 x, TPF_SITE) { store_global(p, x, site); }

inline u32 load_system(const u32* p, TPF_SITE) { return host::load(p, host::Scope::system, site); }
inline u64 load_system(const u64* p, TPF_SITE) { return host::load(p, host::Scope::system, site); }
inline Vec16 load_system(const Vec16* p, TPF_SITE) { return host::load(p, host::Scope::system, site); }
inline void store_system(u32* p, u32 x, TPF_SITE) { host::store(p, x, host::Scope::system, site); }
inline void store_system(u64* p, u64 x, TPF_SITE) { host::store(p, x, host::Scope::system, site); }
inline void store_system(Vec16* p, const Vec16& x, TPF_SITE) { host::store(p, x, host::Scope::system, site); }

inline u32 add_global(u32* p, u32 x, TPF_SITE) { return host::add(p, x, site); }

inline u32 shuffle(u32 x, u32 lane, TPF_SITE) { return host::meet(host::Meeting::shuffle, x, lane % kWarp, site); }
inline u32 shuffle_xor(u32 x, u32 mask, TPF_SITE) { return shuffle(x, (thread_index() ^ mask) % kWarp, site); }
inline bool any(bool x, TPF_SITE) { return host::meet(host::Meeting::vote, x, 0, site) != 0; }
inline bool all(bool x, TPF_SITE) { return host::meet(host::Meeting::vote, !x, 0, site) == 0; }
inline void sync_warp(TPF_SITE) { host::meet(host::Meeting::sync, 0, 0, site); }

inline void barrier(TPF_SITE) { host::barrier(site); }
inline void barrier(u32 id, u32 threads, TPF_SITE) { host::barrier(id, threads, site); }

inline void cluster_open(u64* gates, u32 count, u32 bytes, TPF_SITE) { host::cluster_open(gates, count, bytes, site); }
inline void cluster_post(u32* variable, u32 word, u64* gate, u32 to, TPF_SITE) {
  host::cluster_post(variable, word, gate, to, site);
}
inline bool cluster_arrived(const u64* gate, TPF_SITE) { return host::cluster_arrived(gate, site); }

inline void dependency_wait(TPF_SITE) { host::dependency_wait(site); }
inline void dependency_trigger() { host::dependency_trigger(); }
constexpr bool kPrefetches = true;
// Only looks whether the address is the kernel's to read.
inline void prefetch(const void* p) { *static_cast<const volatile u8*>(p); }
inline void pin(u64&) {}
inline void pin(float&) {}

inline u64 clock_ns() { return host::clock_ns(); }
inline void spin_pause(TPF_SITE) { host::spin_pause(site); }

// Exact only without contraction: tests/simt/build.py compiles with -ffp-contract=off.
inline float add_rn(float a, float b) { return a + b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float div_rn(float a, float b) { return a / b; }
inline float reciprocal_rn(float a) { return 1.0f / a; }
inline float sqrt_rn(float a) { return __builtin_sqrtf(a); }

inline float to_float(f16 x) {
  u32 sign = u32(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ff;
  if (exponent == 0) {
    float magnitude = float(mantissa) * 0x1p-24f;  // subnormals and zero are multiples of the smallest one
    return float_of(sign | bits_of(magnitude));
  }
  u32 wide = exponent == 31 ? 255 : exponent + 112;
  return float_of(sign | wide << 23 | mantissa << 13);
}
inline f16 round_to(f16, float x) {
  u32 sign = bits_of(x) >> 16 & 0x8000, magnitude = bits_of(x) & 0x7fffffff;
  u32 half;
  if (magnitude > 0x7f800000) {
    half = 0x7fff;
  } else if (magnitude >= 0x477ff000) {  // 65520 and more round to infinity
    half = 0x7c00;
  } else if (magnitude >= 0x38800000) {  // normal: drop 13 bits, to nearest even, a carry moves the exponent
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  } else {  // subnormal: adding 0.5 aligns the last kept bit with the last bit of the float, and the adder rounds
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  }
  return f16{u16(sign | half)};
}

}  // namespace tpfuse

#endif
// ---------------------------------------------------------------------------------------------------------------------
// The same for all platforms.

namespace tpfuse {

TPF_DEVICE u32 lane() { return thread_index() % kWarp; }
TPF_DEVICE u32 warp_index() { return thread_index() / kWarp; }

#if defined(TPF_HOST)
inline float shuffle(float x, u32 lane, TPF_SITE) { return float_of(shuffle(bits_of(x), lane, site)); }
inline float shuffle_xor(float x, u32 mask, TPF_SITE) { return float_of(shuffle_xor(bits_of(x), mask, site)); }
#undef TPF_SITE
#else
TPF_DEVICE float shuffle(float x, u32 lane) { return float_of(shuffle(bits_of(x), lane)); }
TPF_DEVICE float shuffle_xor(float x, u32 mask) { return float_of(shuffle_xor(bits_of(x), mask)); }
#endif

TPF_DEVICE float to_float(float x) { return x; }
TPF_DEVICE float to_float(bf16 x) { return float_of(u32(x.bits) << 16); }

#if !defined(TPF_CUDA)
TPF_DEVICE bf16 round_to(bf16, float x) {
  u32 bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16{0x7fff};
  return bf16{u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <class T>
TPF_DEVICE u32 pack2(T type, float low, float high) {
  return round_to(type, low).bits | u32(round_to(type, high).bits) << 16;
}
#endif
TPF_DEVICE float round_to(float, float x) { return x; }

// Rounds to nearest even.
template <class T>
TPF_DEVICE T from_float(float x) {
  return round_to(T{}, x);
}

// Eight 16-bit numbers, T = bf16 or f16, the first in the low half of w[0].
template <class T>
TPF_DEVICE void unpack8(const Vec16& v, float (&x)[8]) {
  TPF_UNROLL
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = to_float(T{u16(v.w[i])});
    x[2 * i + 1] = to_float(T{u16(v.w[i] >> 16)});
  }
}
template <class T>
TPF_DEVICE Vec16 pack8(const float (&x)[8]) {
  Vec16 v;
  TPF_UNROLL
  for (int i = 0; i < 4; ++i) v.w[i] = pack2(T{}, x[2 * i], x[2 * i + 1]);
  return v;
}

}  // namespace tpfuse
