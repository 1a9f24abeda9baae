/* Causal attention and its gradient, float32, a block of queries at a time.

   mix:      q [B, T, H, K], k, v [B, T, G, K] -> mixed [B, T, H, K], log_total [B, H, T]
   mix_back: these five, d mixed -> d q, d k, d v
   Weights live for one block only and are computed again on the way back from the logarithm of
   their sum (Dao 2023, 2307.08691). */
#include "arithmetic.h"
#include "call.h"

#define BLOCK 32 /* queries; a multiple of two vectors */

typedef struct {
  int64_t B, T, H, G, K;
  int64_t rows, wide; /* T and K filled up */
} Shape;

static Shape shape_of(XLA_FFI_CallFrame *call) {
  int64_t *q = given(call, 0)->dims, *k = given(call, 1)->dims;
  return (Shape){q[0], q[1], q[2], k[2], q[3], up_to(q[1], BLOCK), up_to(q[3], LANES)};
}

/* Copy a head, whose T rows lie `step` apart, filled up with zeros. */
static void gather(float *to, const float *from, int64_t step, float scale, const Shape *s) {
  memset(to, 0, 4 * s->rows * s->wide);
  for (int64_t t = 0; t < s->T; t++)
    for (int64_t k = 0; k < s->K; k++) to[t * s->wide + k] = scale * from[t * step + k];
}

static void scatter(float *to, const float *from, int64_t step, float scale, const Shape *s) {
  for (int64_t t = 0; t < s->T; t++)
    for (int64_t k = 0; k < s->K; k++) to[t * step + k] = scale * from[t * s->wide + k];
}

static void turn(float *to, const float *from, const Shape *s) {
  for (int64_t t = 0; t < s->rows; t++)
    for (int64_t k = 0; k < s->wide; k++) to[k * s->rows + t] = from[t * s->wide + k];
}

/* where the LANES keys from n on are seen by query t */
static inline Ints seen_by(int64_t t, int64_t n) {
  Ints key;
  for (int i = 0; i < LANES; i++) key[i] = i;
  return key <= (int32_t)(t - n);
}

/* Turn the first `end` scores of query t's row into weights, 0 after t; give their sum. */
static float weigh(float *row, int64_t t, int64_t end, float *largest) {
  Floats most = all(-INFINITY), sum = {0};
  for (int64_t n = 0; n <= t; n += LANES)
    most = larger(pick(seen_by(t, n), AT(row + n), most), most);
  *largest = largest_of(most);
  for (int64_t n = 0; n < end; n += LANES) {
    AT(row + n) = n > t ? all(0) : (Floats)(seen_by(t, n) & (Ints)power(AT(row + n) - *largest));
    sum += AT(row + n);
  }
  return sum_of(sum);
}

XLA_FFI_Error *mix(XLA_FFI_CallFrame *call) {
  if (described(call)) return 0;
  Shape s = shape_of(call);
  const float *q = given(call, 0)->data, *k = given(call, 1)->data, *v = given(call, 2)->data;
  float *mixed = result(call, 0)->data, *log_total = result(call, 1)->data;
  int64_t size = s.rows * s.wide, J = s.H / s.G, q_step = s.H * s.K, k_step = s.G * s.K;
  float *room = room_for(4 * size + BLOCK * s.rows);
  if (!room) return fault(call, "no memory for attention");
  float *one = room, *turned = one + size, *value = turned + size, *out = value + size,
        *weights = out + size;
  for (int64_t b = 0; b < s.B; b++)
    for (int64_t g = 0; g < s.G; g++) {
      int64_t group = b * s.T * k_step + g * s.K;
      gather(one, k + group, k_step, 1, &s);
      turn(turned, one, &s);
      gather(value, v + group, k_step, 1, &s);
      for (int64_t h = g * J; h < (g + 1) * J; h++) {
        int64_t head = b * s.T * q_step + h * s.K;
        gather(one, q + head, q_step, 1 / sqrtf(s.K), &s);
        for (int64_t first = 0; first < s.rows; first += BLOCK) {
          int64_t end = first + BLOCK;
          float total[BLOCK], *mine = out + first * s.wide;
          multiply(weights, s.rows, one + first * s.wide, s.wide, 1, turned, s.rows, BLOCK, end,
                   s.wide, 0);
          for (int64_t r = 0; r < BLOCK; r++) {
            float largest;
            int64_t t = first + r;
            total[r] = weigh(weights + r * s.rows, t, end, &largest);
            if (t < s.T) log_total[(b * s.H + h) * s.T + t] = largest + logf(total[r]);
          }
          multiply(mine, s.wide, weights, s.rows, 1, value, s.wide, BLOCK, s.wide, end, 0);
          for (int64_t r = 0; r < BLOCK; r++)
            for (int64_t i = 0; i < s.wide; i++) mine[r * s.wide + i] /= total[r];
        }
        scatter(mixed + head, out, q_step, 1, &s);
      }
    }
  free(room);
  return 0;
}

/* Turn a row of scores into weights w and one of dy v into d scores = w (dy v - shift). */
static void weigh_back(float *row, float *d_row, int64_t t, int64_t end, float log_total,
                       float shift) {
  for (int64_t n = 0; n < end; n += LANES) {
    if (n > t) {
      AT(row + n) = AT(d_row + n) = all(0);
      continue;
    }
    Floats w = (Floats)(seen_by(t, n) & (Ints)power(AT(row + n) - log_total));
    AT(row + n) = w;
    AT(d_row + n) = w * (AT(d_row + n) - shift);
  }
}

XLA_FFI_Error *mix_back(XLA_FFI_CallFrame *call) {
  if (described(call)) return 0;
  Shape s = shape_of(call);
  const float *q = given(call, 0)->data, *k = given(call, 1)->data, *v = given(call, 2)->data,
              *mixed = given(call, 3)->data, *log_total = given(call, 4)->data,
              *dy = given(call, 5)->data;
  float *dq = result(call, 0)->data, *dk = result(call, 1)->data, *dv = result(call, 2)->data;
  int64_t size = s.rows * s.wide, J = s.H / s.G, q_step = s.H * s.K, k_step = s.G * s.K;
  float *room = room_for(9 * size + 2 * BLOCK * s.rows), scale = 1 / sqrtf(s.K);
  if (!room) return fault(call, "no memory for attention's gradient");
  float *query = room, *key = query + size, *turned = key + size, *turned_value = turned + size,
        *d_out = turned_value + size, *out = d_out + size, *d_query = out + size,
        *d_key = d_query + size, *d_value = d_key + size, *w = d_value + size,
        *dw = w + BLOCK * s.rows;
  for (int64_t b = 0; b < s.B; b++)
    for (int64_t g = 0; g < s.G; g++) {
      int64_t group = b * s.T * k_step + g * s.K;
      gather(key, v + group, k_step, 1, &s);
      turn(turned_value, key, &s);
      gather(key, k + group, k_step, 1, &s);
      turn(turned, key, &s);
      memset(d_key, 0, 8 * size);
      for (int64_t h = g * J; h < (g + 1) * J; h++) {
        int64_t head = b * s.T * q_step + h * s.K;
        gather(query, q + head, q_step, scale, &s);
        gather(d_out, dy + head, q_step, 1, &s);
        gather(out, mixed + head, q_step, 1, &s);
        for (int64_t first = 0; first < s.rows; first += BLOCK) {
          int64_t end = first + BLOCK, at = first * s.wide;
          multiply(w, s.rows, query + at, s.wide, 1, turned, s.rows, BLOCK, end, s.wide, 0);
          multiply(dw, s.rows, d_out + at, s.wide, 1, turned_value, s.rows, BLOCK, end, s.wide, 0);
          for (int64_t r = 0; r < BLOCK; r++) {
            int64_t t = first + r;
            Floats shift = {0};
            for (int64_t i = t * s.wide; i < (t + 1) * s.wide; i += LANES)
              shift += AT(d_out + i) * AT(out + i);
            weigh_back(w + r * s.rows, dw + r * s.rows, t, end,
                       t < s.T ? log_total[(b * s.H + h) * s.T + t] : 0, sum_of(shift));
          }
          multiply(d_query + at, s.wide, dw, s.rows, 1, key, s.wide, BLOCK, s.wide, end, 0);
          multiply(d_key, s.wide, dw, 1, s.rows, query + at, s.wide, end, s.wide, BLOCK, 1);
          multiply(d_value, s.wide, w, 1, s.rows, d_out + at, s.wide, end, s.wide, BLOCK, 1);
        }
        scatter(dq + head, d_query, q_step, scale, &s);
      }
      scatter(dk + group, d_key, k_step, 1, &s);
      scatter(dv + group, d_value, k_step, 1, &s);
    }
  free(room);
  return 0;
}
