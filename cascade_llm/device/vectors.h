/* Vectors as long as a register of the level: LANES numbers of 32 bits, or as many bytes.
 *
 * Arithmetic on them is the compiler's own; what it has no operator for, a file does by the level's intrinsics, which come
 * with this.
 */
#ifndef CASCADE_VECTORS_H
#define CASCADE_VECTORS_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define AVX512 1
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

/* Of vectors, that a program has. */
#if defined(AVX512) || defined(__aarch64__)
enum { REGISTERS = 32 };
#else
enum { REGISTERS = 16 };
#endif

#define INLINE static inline __attribute__((always_inline))
/* Before a loop of a constant number of turns, at most 16: no loop is left of it. */
#define UNROLLED _Pragma("GCC unroll 16")

/* In memory they lie as their numbers do, at any such place and of any type. */
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t pairs __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef uint8_t bytes __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

/* LANES numbers of 16 bits and of 8. */
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int16_t shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t small __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t smallest __attribute__((vector_size(LANES), aligned(1), may_alias));

INLINE floats broadcast(float x) { return x - (floats){}; }
INLINE ints broadcast_int(int32_t x) { return x - (ints){}; }

/* LANES numbers of bfloat16 in memory. */
INLINE floats load_bfloat16(const uint16_t *x) {
    return (floats)(__builtin_convertvector(*(const halves *)x, words) << 16);
}

#endif
