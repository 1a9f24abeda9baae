/* Small float32 products and exponentials on full vectors, for this room's sources.

   A sum is a tile of TALL rows and two vectors in registers; arrays are filled up to full vectors
   and aligned to 64 bytes, without which every load crosses a line of the cache. */
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
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define AT(place) (*(Floats *)(place))

/* zeros */
static inline float *room_for(int64_t floats) {
  void *room;
  return posix_memalign(&room, 64, 4 * floats) ? 0 : memset(room, 0, 4 * floats);
}

static inline int64_t up_to(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

static inline __attribute__((always_inline)) void tile(
    int tall, int vectors, float *c, int64_t c_row, const float *a, int64_t down, int64_t along,
    const float *b, int64_t b_row, int64_t inner, int add) {
  Floats sum[TALL][2];
  for (int r = 0; r < tall; r++)
    for (int v = 0; v < vectors; v++)
      sum[r][v] = add ? AT(c + r * c_row + v * LANES) : (Floats){0};
  for (int64_t i = 0; i < inner; i++) {
    Floats right[2];
    for (int v = 0; v < vectors; v++) right[v] = AT(b + i * b_row + v * LANES);
    for (int r = 0; r < tall; r++)
      for (int v = 0; v < vectors; v++) sum[r][v] += a[r * down + i * along] * right[v];
  }
  for (int r = 0; r < tall; r++)
    for (int v = 0; v < vectors; v++) AT(c + r * c_row + v * LANES) = sum[r][v];
}

/* c = a b, or c += a b where `add`: a[r, i] lies at a + r down + i along, the rows of b and c
   b_row and c_row apart; columns are whole vectors. */
static inline void multiply(float *c, int64_t c_row, const float *a, int64_t down, int64_t along,
                            const float *b, int64_t b_row, int64_t rows, int64_t columns,
                            int64_t inner, int add) {
  for (int64_t n = 0; n < columns; n += 2 * LANES) {
    int two = columns - n > LANES;
    int64_t r = 0;
#define TILE(tall, vectors) \
  tile(tall, vectors, c + r * c_row + n, c_row, a + r * down, down, along, b + n, b_row, inner, add)
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

static inline Floats all(float x) { return (Floats){0} + x; }

static inline Floats pick(Ints where, Floats a, Floats b) {
  return (Floats)((where & (Ints)a) | (~where & (Ints)b));
}

/* the larger; b where either is no number */
static inline Floats larger(Floats a, Floats b) { return pick(a > b, a, b); }

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

/* e^x for x <= 0 (or a rounding above) within 2e-7 of itself, e^-87 from there on, NaN for NaN:
   2^n e^f with |f| <= ln(2) / 2, e^f by its Taylor series to f^7, n by rounding in the last bits of
   a sum. */
static inline Floats power(Floats x) {
  x = pick(x < -87.0f, all(-87.0f), x);
  Floats shifted = x * 1.44269504f + (12582912.0f + 127.0f);
  Floats n = shifted - (12582912.0f + 127.0f);
  Floats f = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = all(1.0f / 5040);
  p = p * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f * f + f + 1.0f;
  return p * (Floats)((Ints)shifted << 23);
}
#endif
