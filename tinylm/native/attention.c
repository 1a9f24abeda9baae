/* Causal attention from projected heads on, with its gradient, a block of queries at once.

   mix:      q [B, T, H, K], k, v [B, T, G, K], the gains of q and of k [K], smear [G, K], cosines
             and sines [., T, K/2], begin [., T], never falling
             -> mixed [B, T, H, K], log_total [B, H, T]
   mix_back: these eleven, d mixed -> d q, d k, d v, d gains, d smear
   bf16_mix, bf16_mix_back: the same, the operands of products rounded to bfloat16; blocks begin at
             even keys
   Queries and keys are normalised and rotated, keys smeared, as attention.py has it; a query sees
   the keys from `begin` to its own. Weights live for one block only and are computed again on the
   way back from the logarithm of their sum (Dao 2023, 2307.08691).
   A head lies turned, that is transposed, [K, T]: a lane is a position, so that nothing is added up
   across lanes. */
#include "arithmetic.h"
#include "call.h"

#define BLOCK 32 /* queries; a multiple of two vectors */

#if defined(__clang__) || __GNUC__ >= 12
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

#define MERGE __builtin_shufflevector
#define TURN(Wide, lanes, ROWS, ORDER)                                                 \
  Wide a = ROWS(0), b = ROWS(1), c = ROWS(2), d = ROWS(3);                             \
  Wide ab = MERGE(a, b, ORDER(0, lanes, 1, lanes + 1)),                                \
       ab_end = MERGE(a, b, ORDER(2, lanes + 2, 3, lanes + 3)),                        \
       cd = MERGE(c, d, ORDER(0, lanes, 1, lanes + 1)),                                \
       cd_end = MERGE(c, d, ORDER(2, lanes + 2, 3, lanes + 3));                        \
  *(Wide *)to = MERGE(ab, cd, ORDER(0, 1, lanes, lanes + 1));                          \
  *(Wide *)(to + to_row) = MERGE(ab, cd, ORDER(2, 3, lanes + 2, lanes + 3));           \
  *(Wide *)(to + 2 * to_row) = MERGE(ab_end, cd_end, ORDER(0, 1, lanes, lanes + 1));   \
  *(Wide *)(to + 3 * to_row) = MERGE(ab_end, cd_end, ORDER(2, 3, lanes + 2, lanes + 3))
#define ROW(n) (*(Four *)(from + (n) * from_row))
#define FOUR(p, q, r, s) p, q, r, s

/* four rows and columns */
static inline void turn_four(float *to, int64_t to_row, const float *from, int64_t from_row) {
  TURN(Four, 4, ROW, FOUR);
}

#if LANES == 16
#define EIGHT 0, 1, 2, 3, 4, 5, 6, 7
#define TWO_ROWS(n) MERGE(ROW(n), ROW(n + 4), EIGHT)
#define FOUR_ROWS(n) MERGE(TWO_ROWS(n), TWO_ROWS(n + 8), EIGHT, 8, 9, 10, 11, 12, 13, 14, 15)
#define SIXTEEN(p, q, r, s) \
  p, q, r, s, p + 4, q + 4, r + 4, s + 4, p + 8, q + 8, r + 8, s + 8, p + 12, q + 12, r + 12, s + 12

/* sixteen rows, four columns: a, b, c, d above hold every fourth row */
static inline void turn_sixteen(float *to, int64_t to_row, const float *from, int64_t from_row) {
  TURN(Floats, 16, FOUR_ROWS, SIXTEEN);
}
#endif
#else
static inline void turn_four(float *to, int64_t to_row, const float *from, int64_t from_row) {
  for (int r = 0; r < 4; r++)
    for (int i = 0; i < 4; i++) to[i * to_row + r] = from[r * from_row + i];
}
#endif

/* to[i, r] = from[r, i] */
static void turn(float *to, int64_t to_row, const float *from, int64_t from_row, int64_t rows,
                 int64_t columns) {
  int64_t r = 0, fours = columns & -4;
#define TURN_ALL(some, turn_some)          \
  for (; r + some <= rows; r += some)      \
    for (int64_t i = 0; i < fours; i += 4) \
  turn_some(to + i * to_row + r, to_row, from + r * from_row + i, from_row)
#if defined(TURN) && LANES == 16
  TURN_ALL(16, turn_sixteen);
#endif
  TURN_ALL(4, turn_four);
  for (int64_t n = 0; n < rows; n++)
    for (int64_t i = n < r ? fours : 0; i < columns; i++)
      to[i * to_row + n] = from[n * from_row + i];
}

typedef struct {
  int64_t B, T, H, G, K;
  int64_t row;  /* floats from one channel of a turned head to the next: T filled up to blocks, and
                   a vector more, since rows a power of two apart share the same lines of a cache */
  int64_t wide; /* K filled up, where heads are not turned */
} Shape;

/* What an element of the batch is placed by: the rotation's angles, turned too, [K/2, row], and per
   position where its sequence begins and whether a token comes before it (all bits, or none). */
typedef struct {
  float *cosine, *sine;
  int32_t *begin, *follows;
} Place;

static Shape shape_of(XLA_FFI_CallFrame *call) {
  int64_t *q = given(call, 0)->dims, *k = given(call, 1)->dims;
  return (Shape){q[0], q[1], q[2], k[2], q[3], up_to(q[1], BLOCK) + LANES, up_to(q[3], LANES)};
}

static inline int64_t blocks_end(const Shape *s) { return s->row - LANES; }

/* Turn T rows of some channels, which lie `step` apart. */
static void gather(float *to, const float *from, int64_t step, int64_t channels, const Shape *s) {
  turn(to, s->row, from, step, s->T, channels);
}

static void scatter(float *to, const float *from, int64_t step, const Shape *s) {
  turn(to, step, from, s->row, s->K, s->T);
}

static int64_t place_size(const Shape *s) { return s->K * s->row + 2 * s->row; }

static Place place_in(float *room, const Shape *s) {
  float *sine = room + s->K / 2 * s->row, *begin = sine + s->K / 2 * s->row;
  return (Place){room, sine, (int32_t *)begin, (int32_t *)(begin + s->row)};
}

/* Go to element b of the batch. */
static void place_at(Place *p, XLA_FFI_CallFrame *call, int64_t b, const Shape *s) {
  XLA_FFI_Buffer *cosines = given(call, 6), *sines = given(call, 7), *begins = given(call, 8);
  if (!b || cosines->dims[0] > 1) {
    int64_t at = b * s->T * (s->K / 2);
    gather(p->cosine, (float *)cosines->data + at, s->K / 2, s->K / 2, s);
    gather(p->sine, (float *)sines->data + at, s->K / 2, s->K / 2, s);
  }
  const int32_t *begin = (int32_t *)begins->data + (begins->dims[0] > 1 ? b * s->T : 0);
  for (int64_t t = 0; t < s->row; t++) {
    p->begin[t] = begin[t < s->T ? t : s->T - 1];
    p->follows[t] = -(t < s->T && p->begin[t] < t);
  }
}

/* Normalise and rotate a head, and multiply it by `scale`. */
static void put_in_place(float *to, const float *raw, const float *gain, float scale,
                         const Place *p, const Shape *s) {
  for (int64_t t = 0; t < blocks_end(s); t += LANES) {
    Floats squares = {0};
    for (int64_t k = 0; k < s->K; k++)
      squares += AT(raw + k * s->row + t) * AT(raw + k * s->row + t);
    Floats inverse = scale * inverse_rms(squares, s->K);
    for (int64_t k = 0; k < s->K / 2; k++) {
      int64_t at = k * s->row + t, other = at + s->K / 2 * s->row;
      Floats one = AT(raw + at) * inverse * gain[k],
             two = AT(raw + other) * inverse * gain[k + s->K / 2];
      AT(to + at) = one * AT(p->cosine + at) - two * AT(p->sine + at);
      AT(to + other) = two * AT(p->cosine + at) + one * AT(p->sine + at);
    }
  }
}

/* Make of a head's gradient in place that of the `raw` one; its gain's is added to d_gain, which is
   [K, LANES]. */
static void put_back(float *d, const float *raw, const float *gain, float *d_gain, float scale,
                     const Place *p, const Shape *s) {
  for (int64_t t = 0; t < blocks_end(s); t += LANES) {
    Floats squares = {0}, meet = {0};
    for (int64_t k = 0; k < s->K; k++)
      squares += AT(raw + k * s->row + t) * AT(raw + k * s->row + t);
    Floats inverse = inverse_rms(squares, s->K), by = scale * inverse;
    for (int64_t k = 0; k < s->K / 2; k++) {
      int64_t half = s->K / 2, at = k * s->row + t, other = at + half * s->row;
      Floats one = by * (AT(d + at) * AT(p->cosine + at) + AT(d + other) * AT(p->sine + at)),
             two = by * (AT(d + other) * AT(p->cosine + at) - AT(d + at) * AT(p->sine + at));
      AT(d_gain + k * LANES) += one * AT(raw + at);
      AT(d_gain + (k + half) * LANES) += two * AT(raw + other);
      AT(d + at) = one * gain[k];
      AT(d + other) = two * gain[k + half];
      meet += AT(d + at) * AT(raw + at) + AT(d + other) * AT(raw + other);
    }
    Floats share = meet * inverse * inverse / (float)s->K;
    for (int64_t k = 0; k < s->K; k++) AT(d + k * s->row + t) -= share * AT(raw + k * s->row + t);
  }
}

/* Add to each key its share of the key before it, where there is one. */
static void smear_keys(float *to, const float *key, const float *share, const Place *p,
                       const Shape *s) {
  for (int64_t k = 0; k < s->K; k++, to += s->row, key += s->row) {
    for (int64_t t = 0; t < s->T; t += LANES) { /* masked at 0: what lies before */
      Floats before = (Floats)(*(Ints *)(p->follows + t) & (Ints)AT(key + t - 1));
      AT(to + t) = AT(key + t) + share[k] * before;
    }
  }
}

static void smear_back(float *d, const float *key, const float *share, float *d_share,
                       const Place *p, const Shape *s) {
  for (int64_t k = 0; k < s->K; k++, d += s->row, key += s->row) {
    Floats sum = {0};
    for (int64_t t = 0; t < s->T; t += LANES) { /* t + 1 may reach into the vector more */
      Ints follows = *(Ints *)(p->follows + t + 1);
      Floats next = (Floats)(follows & (Ints)AT(d + t + 1));
      sum += next * AT(key + t);
      AT(d + t) += share[k] * next;
    }
    d_share[k] += sum_of(sum);
  }
}

/* which of LANES queries, from t on, see key n */
static inline Ints seen_by(int64_t t, int64_t n, const Place *p) {
  Ints query;
  for (int i = 0; i < LANES; i++) query[i] = (int32_t)t + i;
  return (query >= (int32_t)n) & (*(Ints *)(p->begin + t) <= (int32_t)n);
}

/* whether a query of the block from `first` on may not see key n */
static inline int masks(int64_t n, int64_t first, const Place *p) {
  return n < p->begin[first + BLOCK - 1] || n >= first;
}

/* Turn scores [keys from low to end, BLOCK], queries from `first` on, into weights, 0 where a key
   is not seen, and give the sums of these and the logarithms of the sums of e^score. */
static void weigh(float *scores, int64_t first, int64_t low, int64_t end, float *total,
                  float *log_total, const Place *p) {
  for (int64_t half = 0; half < BLOCK; half += LANES) {
    Floats most = all(-INFINITY), sum = {0};
    for (int64_t n = low; n < end; n++) {
      Floats score = AT(scores + (n - low) * BLOCK + half);
      if (masks(n, first, p)) score = pick(seen_by(first + half, n, p), score, most);
      most = larger(score, most);
    }
    for (int64_t n = low; n < end; n++) {
      float *at = scores + (n - low) * BLOCK + half;
      Floats w = power(AT(at) - most);
      if (masks(n, first, p)) w = (Floats)(seen_by(first + half, n, p) & (Ints)w);
      AT(at) = w;
      sum += w;
    }
    AT(total + half) = sum;
    for (int i = 0; i < LANES; i++) log_total[half + i] = most[i] + logf(sum[i]);
  }
}

static inline __attribute__((always_inline)) XLA_FFI_Error *mix_in(int bf16,
                                                                   XLA_FFI_CallFrame *call) {
  if (described(call)) return 0;
  Shape s = shape_of(call);
  const float *q = given(call, 0)->data, *k = given(call, 1)->data, *v = given(call, 2)->data,
              *q_gain = given(call, 3)->data, *k_gain = given(call, 4)->data,
              *smear = given(call, 5)->data;
  float *mixed = result(call, 0)->data, *log_total = result(call, 1)->data;
  int64_t size = s.K * s.row, J = s.H / s.G, q_step = s.H * s.K, k_step = s.G * s.K;
  float *room = room_for(6 * size + BLOCK * s.row + place_size(&s));
  if (!room) return fault(call, "no memory for attention");
  float *raw = room, *query = raw + size, *one = query + size, *key = one + size,
        *value = key + size, *out = value + size, *weights = out + size;
  Place p = place_in(weights + BLOCK * s.row, &s);
  for (int64_t b = 0; b < s.B; b++) {
    place_at(&p, call, b, &s);
    for (int64_t g = 0; g < s.G; g++) {
      int64_t group = b * s.T * k_step + g * s.K;
      gather(raw, k + group, k_step, s.K, &s);
      put_in_place(one, raw, k_gain, 1, &p, &s);
      smear_keys(key, one, smear + g * s.K, &p, &s);
      gather(value, v + group, k_step, s.K, &s);
      if (bf16) {
        pair_rows(key, key, s.row, s.K, s.row);
        for (int64_t i = 0; i < s.K; i++)
          pair_along(value + i * s.row, value + i * s.row, blocks_end(&s));
      }
      for (int64_t h = g * J; h < (g + 1) * J; h++) {
        int64_t head = b * s.T * q_step + h * s.K;
        gather(raw, q + head, q_step, s.K, &s);
        put_in_place(query, raw, q_gain, 1 / sqrtf(s.K), &p, &s);
        if (bf16) pair_rows(query, query, s.row, s.K, s.row);
        for (int64_t first = 0; first < s.T; first += BLOCK) {
          int64_t end = first + BLOCK, low = p.begin[first] & -(1 + bf16);
          float total[BLOCK] __attribute__((aligned(64))), logs[BLOCK];
          multiply(bf16, weights, BLOCK, key + low, 1, s.row, query + first, s.row, end - low,
                   BLOCK, s.K >> bf16, 0);
          weigh(weights, first, low, end, total, logs, &p);
          if (bf16) pair_rows(weights, weights, BLOCK, end - low, BLOCK);
          multiply(bf16, out + first, s.row, value + (low >> bf16), s.row, 1, weights, BLOCK, s.K,
                   BLOCK, (end - low) >> bf16, 0);
          for (int64_t i = 0; i < s.K; i++)
            for (int64_t t = 0; t < BLOCK; t++) out[i * s.row + first + t] /= total[t];
          for (int64_t t = first; t < end && t < s.T; t++)
            log_total[(b * s.H + h) * s.T + t] = logs[t - first];
        }
        scatter(mixed + head, out, q_step, &s);
      }
    }
  }
  free(room);
  return 0;
}

/* Turn scores into the weights w that `weigh` gave them, and dy v into d scores = w (dy v - shift). */
static void weigh_back(float *scores, float *d_scores, int64_t first, int64_t low, int64_t end,
                       const float *log_total, const float *shift, const Place *p) {
  for (int64_t n = low; n < end; n++)
    for (int64_t half = 0; half < BLOCK; half += LANES) {
      int64_t at = (n - low) * BLOCK + half, t = first + half;
      Floats w = power(AT(scores + at) - AT(log_total + t));
      if (masks(n, first, p)) w = (Floats)(seen_by(t, n, p) & (Ints)w);
      AT(scores + at) = w;
      AT(d_scores + at) = w * (AT(d_scores + at) - AT(shift + t));
    }
}

static inline __attribute__((always_inline)) XLA_FFI_Error *mix_back_in(int bf16,
                                                                        XLA_FFI_CallFrame *call) {
  if (described(call)) return 0;
  Shape s = shape_of(call);
  const float *q = given(call, 0)->data, *k = given(call, 1)->data, *v = given(call, 2)->data,
              *q_gain = given(call, 3)->data, *k_gain = given(call, 4)->data,
              *smear = given(call, 5)->data, *mixed = given(call, 9)->data,
              *log_total = given(call, 10)->data, *dy = given(call, 11)->data;
  float *dq = result(call, 0)->data, *dk = result(call, 1)->data, *dv = result(call, 2)->data,
        *dq_gain = result(call, 3)->data, *dk_gain = result(call, 4)->data,
        *d_smear = result(call, 5)->data;
  int64_t size = s.K * s.row, J = s.H / s.G, q_step = s.H * s.K, k_step = s.G * s.K;
  int64_t rows = s.row * s.wide, block = BLOCK * s.wide;
  float *room = room_for((bf16 ? 10 : 7) * size + 2 * rows + (2 + bf16) * BLOCK * s.row +
                         2 * block + 2 * s.row + 2 * s.K * LANES + place_size(&s)),
        scale = 1 / sqrtf(s.K);
  if (!room) return fault(call, "no memory for attention's gradient");
  float *raw = room, *query = raw + size, *one = query + size, *key = one + size,
        *value = key + size, *d_out = value + size, *d = d_out + size, *d_key = d + size,
        *d_value = d_key + rows, *w = d_value + rows, *dw = w + BLOCK * s.row,
        *query_rows = dw + BLOCK * s.row, *out_rows = query_rows + block,
        *logs = out_rows + block, *shift = logs + s.row, *q_sums = shift + s.row,
        *k_sums = q_sums + s.K * LANES;
  Place p = place_in(k_sums + s.K * LANES, &s);
  float *more = k_sums + s.K * LANES + place_size(&s), *key_along = bf16 ? more : key,
        *query_pairs = bf16 ? more + size : query, *out_pairs = bf16 ? more + 2 * size : d_out,
        *dw_pairs = bf16 ? more + 3 * size : dw;
  memset(d_smear, 0, 4 * s.G * s.K);
  for (int64_t b = 0; b < s.B; b++) {
    place_at(&p, call, b, &s);
    for (int64_t g = 0; g < s.G; g++) {
      int64_t group = b * s.T * k_step + g * s.K;
      gather(raw, k + group, k_step, s.K, &s);
      put_in_place(one, raw, k_gain, 1, &p, &s);
      smear_keys(key, one, smear + g * s.K, &p, &s);
      gather(value, v + group, k_step, s.K, &s);
      if (bf16) {
        for (int64_t i = 0; i < s.K; i++)
          pair_along(key_along + i * s.row, key + i * s.row, blocks_end(&s));
        pair_rows(key, key, s.row, s.K, s.row);
        pair_rows(value, value, s.row, s.K, s.row);
      }
      memset(d_key, 0, 4 * 2 * rows);
      for (int64_t h = g * J; h < (g + 1) * J; h++) {
        int64_t head = b * s.T * q_step + h * s.K;
        gather(raw, q + head, q_step, s.K, &s);
        put_in_place(query, raw, q_gain, scale, &p, &s);
        gather(d_out, dy + head, q_step, s.K, &s);
        if (bf16) {
          pair_rows(query_pairs, query, s.row, s.K, s.row);
          pair_rows(out_pairs, d_out, s.row, s.K, s.row);
        }
        for (int64_t t = 0; t < s.T; t++) {
          logs[t] = log_total[(b * s.H + h) * s.T + t];
          shift[t] = dot(dy + head + t * q_step, mixed + head + t * q_step, s.K);
        }
        for (int64_t first = 0; first < s.T; first += BLOCK) {
          int64_t end = first + BLOCK, low = p.begin[first] & -(1 + bf16), keys = end - low;
          multiply(bf16, w, BLOCK, key + low, 1, s.row, query_pairs + first, s.row, keys, BLOCK,
                   s.K >> bf16, 0);
          multiply(bf16, dw, BLOCK, value + low, 1, s.row, out_pairs + first, s.row, keys, BLOCK,
                   s.K >> bf16, 0);
          weigh_back(w, dw, first, low, end, logs, shift, &p);
          turn(query_rows, s.wide, query + first, s.row, s.K, BLOCK);
          for (int64_t t = 0; t < BLOCK; t++)
            if (first + t < s.T)
              memcpy(out_rows + t * s.wide, dy + head + (first + t) * q_step, 4 * s.K);
            else
              memset(out_rows + t * s.wide, 0, 4 * s.K);
          if (bf16) {
            pair_rows(dw_pairs, dw, BLOCK, keys, BLOCK);
            for (int64_t n = 0; n < keys; n++) {
              pair_along(w + n * BLOCK, w + n * BLOCK, BLOCK);
              pair_along(dw + n * BLOCK, dw + n * BLOCK, BLOCK);
            }
            pair_rows(query_rows, query_rows, s.wide, BLOCK, s.wide);
            pair_rows(out_rows, out_rows, s.wide, BLOCK, s.wide);
          }
          multiply(bf16, d + first, s.row, key_along + (low >> bf16), s.row, 1, dw_pairs, BLOCK,
                   s.K, BLOCK, keys >> bf16, 0);
          multiply(bf16, d_key + low * s.wide, s.wide, dw, BLOCK, 1, query_rows, s.wide, keys,
                   s.wide, BLOCK >> bf16, 1);
          multiply(bf16, d_value + low * s.wide, s.wide, w, BLOCK, 1, out_rows, s.wide, keys,
                   s.wide, BLOCK >> bf16, 1);
        }
        put_back(d, raw, q_gain, q_sums, scale, &p, &s);
        scatter(dq + head, d, q_step, &s);
      }
      gather(d, d_key, s.wide, s.K, &s);
      smear_back(d, one, smear + g * s.K, d_smear + g * s.K, &p, &s);
      gather(raw, k + group, k_step, s.K, &s);
      put_back(d, raw, k_gain, k_sums, 1, &p, &s);
      scatter(dk + group, d, k_step, &s);
      for (int64_t t = 0; t < s.T; t++)
        memcpy(dv + group + t * k_step, d_value + t * s.wide, 4 * s.K);
    }
  }
  for (int64_t i = 0; i < s.K; i++) {
    dq_gain[i] = sum_of(AT(q_sums + i * LANES));
    dk_gain[i] = sum_of(AT(k_sums + i * LANES));
  }
  free(room);
  return 0;
}

XLA_FFI_Error *mix(XLA_FFI_CallFrame *call) { return mix_in(0, call); }
XLA_FFI_Error *mix_back(XLA_FFI_CallFrame *call) { return mix_back_in(0, call); }
XLA_FFI_Error *bf16_mix(XLA_FFI_CallFrame *call) { return mix_in(1, call); }
XLA_FFI_Error *bf16_mix_back(XLA_FFI_CallFrame *call) { return mix_back_in(1, call); }
