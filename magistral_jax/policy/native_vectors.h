// Vectors of 16 floats for `native_attention.cc`, in the vector types of GCC and Clang: compilers cut them into what the
// processor has.

#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

// Into the caller, where sizes are constants.
#define INLINE inline __attribute__((always_inline))

constexpr int64_t kLanes = 16;

template <typename Element>
using Vector [[gnu::vector_size(kLanes * sizeof(Element))]] = Element;
using Lanes = Vector<float>;

template <typename To, typename From>
INLINE To Read(const From* from) {
  To to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

INLINE float Widen(float x) { return x; }
INLINE float Widen(uint16_t bfloat16) { return std::bit_cast<float>(uint32_t{bfloat16} << 16); }

INLINE Lanes Load(const float* from) { return Read<Lanes>(from); }
INLINE Lanes Load(const uint16_t* bfloat16) {
  return std::bit_cast<Lanes>(__builtin_convertvector(Read<Vector<uint16_t>>(bfloat16), Vector<uint32_t>) << 16);
}
INLINE void Store(Lanes lanes, float* to) { std::memcpy(to, &lanes, sizeof(lanes)); }

INLINE Lanes Max(Lanes a, Lanes b) { return a < b ? b : a; }

INLINE float Highest(Lanes lanes) {
  float parts[kLanes];
  Store(lanes, parts);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) parts[i] = parts[i] < parts[i + half] ? parts[i + half] : parts[i];
  return parts[0];
}

INLINE float Sum(Lanes lanes) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// 2^x for x <= 0, to 1e-7 of itself: a Taylor polynomial on [-0.5, 0.5], and the integer part as an exponent.
INLINE Lanes Exp2(Lanes x) {
  x = x < -126.0f ? Lanes{} - 126.0f : x;  // NaN stays NaN
  const Vector<int32_t> whole = __builtin_convertvector(x - 0.5f, Vector<int32_t>);
  const Lanes rest = x - __builtin_convertvector(whole, Lanes);
  Lanes y = Lanes{} + 1.540353039e-4f;
  for (float coefficient : {1.333355815e-3f, 9.618129108e-3f, 5.550410866e-2f, 2.402265070e-1f, 6.931471806e-1f, 1.0f})
    y = y * rest + coefficient;
  return y * std::bit_cast<Lanes>((whole + 127) << 23);
}
