// CUDA on the host, for tests: the part of the language that csrc/**/*.cu uses, for a C++ compiler.
//
// A block's threads are fibers that run one after another up to the next barrier or warp intrinsic, in an order
// that `order` changes: a missing barrier shows as a result that depends on it. Blocks follow each other, so
// atomics are plain, and shared memory is a static that holds what the last block left. What would hang a GPU, or is
// undefined there (lanes that meet at different intrinsics, a barrier that some threads never reach), throws.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __builtin_assume(condition)

namespace cuda_on_host {

constexpr int kWarp = 32;

enum class Wait { none, barrier, ballot, any, match, sum, shuffle };

struct Fiber {
  static constexpr size_t kStack = 1 << 16;
  std::vector<char> stack = std::vector<char>(kStack);
  jmp_buf at;
  bool started, done;
  Wait wait;       // for what the others must come, too
  uint64_t value;  // what it brings there, then what it gets
  int source;      // shuffle: the lane whose value it wants
};

struct Index { unsigned x; };

inline Index thread_index, block_index, block_size, grid_size;
inline int order = 0;  // 0: as numbered, 1: reversed, otherwise the seed of a shuffle
inline std::function<void()> kernel;
inline std::vector<Fiber> fibers;
inline Fiber* running;
inline jmp_buf scheduler;

inline std::vector<int> permutation(int n) {
  std::vector<int> numbers(n);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order == 1) std::reverse(numbers.begin(), numbers.end());
  if (order > 1) std::shuffle(numbers.begin(), numbers.end(), std::minstd_rand(order));
  return numbers;
}

inline void fiber_main() {
  kernel();
  running->done = true;
  _longjmp(scheduler, 1);
}

// Runs a fiber until it waits or ends. A context of its own is made once; after that, jumps are cheaper.
inline void resume(Fiber& fiber) {
  running = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.data();
  context.uc_stack.ss_size = fiber.stack.size();
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

// Called by a fiber: waits for the others and returns what they made of their values.
inline uint64_t meet(Wait wait, uint64_t value, int source = 0) {
  running->wait = wait;
  running->value = value;
  running->source = source;
  if (!_setjmp(running->at)) _longjmp(scheduler, 1);
  return running->value;
}

inline uint64_t answer(const Fiber* warp, int lane) {
  uint64_t result = 0;
  for (int other = 0; other < kWarp; ++other) {
    const uint64_t value = warp[other].value;
    switch (warp[lane].wait) {
      case Wait::ballot: result |= uint64_t{value != 0} << other; break;
      case Wait::match: result |= uint64_t{value == warp[lane].value} << other; break;
      case Wait::any: result |= value != 0; break;
      case Wait::sum: result = static_cast<uint32_t>(result + value); break;
      default: return warp[warp[lane].source].value;
    }
  }
  return result;
}

// Lets a warp go on whose lanes have all come to the same intrinsic. False: they are at a barrier, or done.
inline bool release(Fiber* warp) {
  const auto at_intrinsic = [](const Fiber& f) { return !f.done && f.wait != Wait::barrier; };
  if (std::none_of(warp, warp + kWarp, at_intrinsic)) return false;
  uint64_t answers[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (warp[lane].done || warp[lane].wait != warp[0].wait) {
      throw std::runtime_error("lanes of one warp meet at different intrinsics, or are gone");
    }
    answers[lane] = answer(warp, lane);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    warp[lane].value = answers[lane];
    warp[lane].wait = Wait::none;
  }
  return true;
}

inline void run_block(int threads) {
  fibers.resize(threads);
  for (Fiber& fiber : fibers) fiber.started = fiber.done = false, fiber.wait = Wait::none;
  const std::vector<int> turns = permutation(threads);
  for (;;) {
    for (const int t : turns) {
      if (fibers[t].done || fibers[t].wait != Wait::none) continue;
      thread_index.x = t;
      resume(fibers[t]);
    }
    const auto done = std::count_if(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.done; });
    if (done == threads) return;
    bool released = false;
    for (int first = 0; first < threads; first += kWarp) released |= release(&fibers[first]);
    if (released) continue;
    if (done) throw std::runtime_error("threads wait at a barrier that others never reach");
    bool any = false;
    for (const Fiber& fiber : fibers) any |= fiber.value != 0;
    for (Fiber& fiber : fibers) fiber.value = any, fiber.wait = Wait::none;
  }
}

inline void run(int blocks, int threads) {
  if (threads % kWarp) throw std::runtime_error("blocks must consist of whole warps");
  block_size.x = threads, grid_size.x = blocks;
  for (const int b : permutation(blocks)) {
    block_index.x = b;
    run_block(threads);
  }
}

template <class To, class From>
To bits_as(From from) {
  To to{};
  std::memcpy(&to, &from, std::min(sizeof(To), sizeof(From)));
  return to;
}

inline void check_full(unsigned mask) {
  if (mask != 0xffffffffu) throw std::runtime_error("only masks of all lanes are emulated");
}

template <class T>
T shuffle(unsigned mask, T value, int source) {
  check_full(mask);
  if (source < 0 || source >= kWarp) source = thread_index.x % kWarp;
  return bits_as<T>(meet(Wait::shuffle, bits_as<uint64_t>(value), source));
}

}  // namespace cuda_on_host

#define threadIdx cuda_on_host::thread_index
#define blockIdx cuda_on_host::block_index
#define blockDim cuda_on_host::block_size
#define gridDim cuda_on_host::grid_size

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };

inline void __syncthreads() { meet(cuda_on_host::Wait::barrier, 0); }
inline int __syncthreads_or(int v) { return static_cast<int>(meet(cuda_on_host::Wait::barrier, v != 0)); }
inline unsigned __ballot_sync(unsigned mask, int v) {
  cuda_on_host::check_full(mask);
  return static_cast<unsigned>(meet(cuda_on_host::Wait::ballot, v != 0));
}
inline int __any_sync(unsigned mask, int v) {
  cuda_on_host::check_full(mask);
  return static_cast<int>(meet(cuda_on_host::Wait::any, v != 0));
}
inline unsigned __match_any_sync(unsigned mask, unsigned v) {
  cuda_on_host::check_full(mask);
  return static_cast<unsigned>(meet(cuda_on_host::Wait::match, v));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned v) {
  cuda_on_host::check_full(mask);
  return static_cast<unsigned>(meet(cuda_on_host::Wait::sum, v));
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int by) {
  return cuda_on_host::shuffle(mask, v, static_cast<int>(threadIdx.x % 32) - by);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int by) {
  return cuda_on_host::shuffle(mask, v, static_cast<int>(threadIdx.x % 32) + by);
}

template <class T>
T atomicAdd(T* to, T v) { return std::exchange(*to, static_cast<T>(*to + v)); }
template <class T>
T atomicMin(T* to, T v) { return std::exchange(*to, std::min(*to, v)); }
inline unsigned atomicOr(unsigned* to, unsigned v) { return std::exchange(*to, *to | v); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline bool __isGlobal(const void*) { return true; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline unsigned __float_as_uint(float v) { return cuda_on_host::bits_as<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return cuda_on_host::bits_as<float>(v); }
inline long long __double_as_longlong(double v) { return cuda_on_host::bits_as<long long>(v); }
inline double __longlong_as_double(long long v) { return cuda_on_host::bits_as<double>(v); }
using std::fma;
using std::max;
using std::min;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaDevAttrMultiProcessorCount = 0;

inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 3;  // few, so that every block takes several turns
  return 0;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return 0;
}
