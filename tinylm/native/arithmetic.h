/* Small products and exponentials on full vectors, for this room's sources.

   A sum is a tile of TALL rows and two vectors in registers; arrays are filled up to full vectors
   and aligned to 64 bytes, without which every load crosses a line of the cache.
   Operands are float32 or, where `bf16`, pairs of bfloat16 in the place of one float: two numbers
   that follow each other along the axis that is summed. Sums are float32. */
#ifndef TINYLM_ARITHMETIC_H
#define TINYLM_ARITHMETIC_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#define TALL 8
#elif defined(__AVX__)
#define LANES 8
#define TALL 4
#else
#define LANES 4
#define TALL 4
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Bits __attribute__((may_alias));
typedef uint16_t Word __attribute__((may_alias));
#define AT(place) (*(Floats *)(place))

/* zeros */
static inline float *room_for(int64_t floats) {
  void *room;
  return posix_memalign(&room, 64, 4 * floats) ? 0 : memset(room, 0, 4 * floats);
}

static inline int64_t up_to(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

static inline Floats all(float x) { return (Floats){0} + x; }

static inline Floats pick(Ints where, Floats a, Floats b) {
  return (Floats)((where & (Ints)a) | (~where & (Ints)b));
}

#ifdef __AVX512BF16__
/* the sum and both products of each lane's pairs */
static inline Floats add_pairs(Floats sum, Ints a, Floats b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

/* of a in the lower half of each lane, of b in the upper */
static inline Floats pairs_of(Floats a, Floats b) {
  Ints both = (Ints)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  int16_t order[2 * LANES] __attribute__((aligned(64)));
  for (int i = 0; i < LANES; i++) order[2 * i] = i, order[2 * i + 1] = i + LANES;
  return (Floats)_mm512_permutexvar_epi16(*(__m512i *)order, (__m512i)both);
}
#else
static inline Floats add_pairs(Floats sum, Ints a, Floats b) {
  Ints first = a << 16, second = a & ~0xffff, right = (Ints)b;
  return sum + (Floats)first * (Floats)(right << 16) + (Floats)second * (Floats)(right & ~0xffff);
}

/* to the nearest, ties to even */
static inline Ints rounded(Floats x) {
  Ints bits = (Ints)x, up = bits + 0x7fff + (bits >> 16 & 1);
  return (Ints)pick(x == x, (Floats)up, x) & ~0xffff;
}

static inline Floats pairs_of(Floats a, Floats b) {
  return (Floats)((rounded(a) >> 16 & 0xffff) | rounded(b));
}
#endif

/* pairs of an even `count` of rows, whole vectors of columns; may write over its source */
static inline void pair_rows(float *to, const float *from, int64_t row, int64_t count,
                             int64_t columns) {
  for (int64_t r = 0; r < count; r += 2)
    for (int64_t i = 0; i < columns; i += LANES)
      AT(to + r / 2 * row + i) = pairs_of(AT(from + r * row + i), AT(from + (r + 1) * row + i));
}

/* pairs along a row of `count` floats, a multiple of two vectors; may write over its source */
static inline void pair_along(float *to, const float *from, int64_t count) {
  for (int64_t i = 0; i < count; i += 2 * LANES) {
    Floats a = AT(from + i), b = AT(from + i + LANES);
#ifdef __AVX512BF16__
    AT(to + i / 2) = (Floats)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
    Ints low = rounded(a), high = rounded(b);
    Word *at = (Word *)(to + i / 2);
    for (int n = 0; n < LANES; n++) at[n] = low[n] >> 16, at[n + LANES] = high[n] >> 16;
#endif
  }
}

static inline __attribute__((always_inline)) void tile(
    int bf16, int tall, int vectors, float *c, int64_t c_row, const float *a, int64_t down,
    int64_t along, const float *b, int64_t b_row, int64_t inner, int add) {
  Floats sum[TALL][2];
  for (int r = 0; r < tall; r++)
    for (int v = 0; v < vectors; v++)
      sum[r][v] = add ? AT(c + r * c_row + v * LANES) : (Floats){0};
  for (int64_t i = 0; i < inner; i++) {
    Floats right[2];
    for (int v = 0; v < vectors; v++) right[v] = AT(b + i * b_row + v * LANES);
    for (int r = 0; r < tall; r++)
      for (int v = 0; v < vectors; v++) {
        const float *left = a + r * down + i * along;
        if (bf16) sum[r][v] = add_pairs(sum[r][v], (Ints){0} + *(Bits *)left, right[v]);
        else sum[r][v] += *left * right[v];
      }
  }
  for (int r = 0; r < tall; r++)
    for (int v = 0; v < vectors; v++) AT(c + r * c_row + v * LANES) = sum[r][v];
}

/* c = a b, or c += a b where `add`: a[r, i] lies at a + r down + i along, the rows of b and c
   b_row and c_row apart; columns are whole vectors; `inner` floats, or pairs, are summed. */
static inline __attribute__((always_inline)) void multiply(
    int bf16, float *c, int64_t c_row, const float *a, int64_t down, int64_t along, const float *b,
    int64_t b_row, int64_t rows, int64_t columns, int64_t inner, int add) {
  for (int64_t n = 0; n < columns; n += 2 * LANES) {
    int two = columns - n > LANES;
    int64_t r = 0;
#define TILE(tall, vectors)                                                                 \
  tile(bf16, tall, vectors, c + r * c_row + n, c_row, a + r * down, down, along, b + n, b_row, \
       inner, add)
#define TILES(tall)                     \
  for (; r + tall <= rows; r += tall) { \
    if (two)                            \
      TILE(tall, 2);                    \
    else                                \
      TILE(tall, 1);                    \
  }
    TILES(TALL)
    TILES(2)
    TILES(1)
#undef TILES
#undef TILE
  }
}

/* the larger; b where either is no number */
static inline Floats larger(Floats a, Floats b) {
#ifdef __AVX512F__
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return pick(a > b, a, b);
#endif
}

static inline float sum_of(Floats x) {
  float part[LANES];
  AT(part) = x;
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) part[i] += part[i + half];
  return part[0];
}

static inline float dot(const float *a, const float *b, int64_t size) {
  Floats sum = {0};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) sum += AT(a + i) * AT(b + i);
  float rest = sum_of(sum);
  for (; i < size; i++) rest += a[i] * b[i];
  return rest;
}

/* of rows of W numbers, by the sums of their squares */
static inline Floats inverse_rms(Floats squares, int64_t W) {
  for (int i = 0; i < LANES; i++) squares[i] = 1 / sqrtf(squares[i] / W + 1e-6f);
  return squares;
}

/* e^x for x <= 0 (or a rounding above) within 3e-7 of itself, e^-87 from there on, NaN for NaN:
   2^n e^f with |f| <= ln(2) / 2, e^f by the polynomial of degree 5 and e^0 = 1 that errs least,
   n by rounding in the last bits of a sum. */
static inline Floats power(Floats x) {
  x = larger(all(-87.0f), x);
  Floats shifted = x * 1.44269504f + (12582912.0f + 127.0f);
  Floats f = x - (shifted - (12582912.0f + 127.0f)) * 0.693147181f;
  Floats p = all(8.29027211e-3f);
  p = p * f + 4.18981596e-2f;
  p = p * f + 0.166676381f;
  p = p * f + 0.499991478f;
  p = p * f + 0.999999706f;
  p = p * f + 1.0f;
  return p * (Floats)((Ints)shifted << 23);
}
#endif
