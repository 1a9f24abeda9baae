/* Causal attention from projected heads on, with its gradient, float32, a block of queries at once.

   mix:      q [B, T, H, K], k, v [B, T, G, K], the gains of q and of k [K], smear [G, K], cosines
             and sines [., T, K/2], begin [., T], never falling
             -> mixed [B, T, H, K], log_total [B, H, T]
   mix_back: these eleven, d mixed -> d q, d k, d v, d gains, d smear
   Queries and keys are normalised and rotated, keys smeared, as attention.py has it; a query sees
   the keys from `begin` to its own. Weights live for one block only and are computed again on the
   way back from the logarithm of their sum (Dao 2023, 2307.08691).
   A head lies turned, that is transposed, [K, T]: a lane is a position, so that nothing is added up
   across lanes. */
#include "arithmetic.h"
#include "call.h"

#define BLOCK 32 /* queries; a multiple of two vectors */

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

static inline void turn_four(float *to, int64_t to_row, const float *from, int64_t from_row) {
#if defined(__clang__) || __GNUC__ >= 12
  Four a = *(Four *)from, b = *(Four *)(from + from_row), c = *(Four *)(from + 2 * from_row),
       d = *(Four *)(from + 3 * from_row);
#define MERGE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
  Four ab = MERGE(a, b, 0, 4, 1, 5), ab_end = MERGE(a, b, 2, 6, 3, 7), cd = MERGE(c, d, 0, 4, 1, 5),
       cd_end = MERGE(c, d, 2, 6, 3, 7);
  *(Four *)to = MERGE(ab, cd, 0, 1, 4, 5);
  *(Four *)(to + to_row) = MERGE(ab, cd, 2, 3, 6, 7);
  *(Four *)(to + 2 * to_row) = MERGE(ab_end, cd_end, 0, 1, 4, 5);
  *(Four *)(to + 3 * to_row) = MERGE(ab_end, cd_end, 2, 3, 6, 7);
#undef MERGE
#else
  for (int r = 0; r < 4; r++)
    for (int i = 0; i < 4; i++) to[i * to_row + r] = from[r * from_row + i];
#endif
}

/* to[i, r] = from[r, i], in fours, which is three times as fast as one by one */
static void turn(float *to, int64_t to_row, const float *from, int64_t from_row, int64_t rows,
                 int64_t columns) {
  for (int64_t r = 0; r < rows; r += 4)
    for (int64_t i = 0; i < columns; i += 4)
      if (rows - r >= 4 && columns - i >= 4)
        turn_four(to + i * to_row + r, to_row, from + r * from_row + i, from_row);
      else
        for (int64_t m = r; m < rows && m < r + 4; m++)
          for (int64_t n = i; n < columns && n < i + 4; n++)
            to[n * to_row + m] = from[m * from_row + n];
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

/* Turn scores [keys from low to end, BLOCK], queries from `first` on, into weights, 0 where a key
   is not seen, and give the sums of these and the logarithms of the sums of e^score. */
static void weigh(float *scores, int64_t first, int64_t low, int64_t end, float *total,
                  float *log_total, const Place *p) {
  for (int64_t half = 0; half < BLOCK; half += LANES) {
    Floats most = all(-INFINITY), sum = {0};
    for (int64_t n = low; n < end; n++) {
      Floats score = AT(scores + (n - low) * BLOCK + half);
      most = larger(pick(seen_by(first + half, n, p), score, most), most);
    }
    for (int64_t n = low; n < end; n++) {
      float *at = scores + (n - low) * BLOCK + half;
      AT(at) = (Floats)(seen_by(first + half, n, p) & (Ints)power(AT(at) - most));
      sum += AT(at);
    }
    AT(total + half) = sum;
    for (int i = 0; i < LANES; i++) log_total[half + i] = most[i] + logf(sum[i]);
  }
}

XLA_FFI_Error *mix(XLA_FFI_CallFrame *call) {
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
      for (int64_t h = g * J; h < (g + 1) * J; h++) {
        int64_t head = b * s.T * q_step + h * s.K;
        gather(raw, q + head, q_step, s.K, &s);
        put_in_place(query, raw, q_gain, 1 / sqrtf(s.K), &p, &s);
        for (int64_t first = 0; first < s.T; first += BLOCK) {
          int64_t end = first + BLOCK, low = p.begin[first];
          float total[BLOCK] __attribute__((aligned(64))), logs[BLOCK];
          multiply(weights, BLOCK, key + low, 1, s.row, query + first, s.row, end - low, BLOCK,
                   s.K, 0);
          weigh(weights, first, low, end, total, logs, &p);
          multiply(out + first, s.row, value + low, s.row, 1, weights, BLOCK, s.K, BLOCK,
                   end - low, 0);
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

/* Turn scores into weights w, as `weigh` does, and dy v into d scores = w (dy v - shift). */
static void weigh_back(float *scores, float *d_scores, int64_t first, int64_t low, int64_t end,
                       const float *log_total, const float *shift, const Place *p) {
  for (int64_t n = low; n < end; n++)
    for (int64_t half = 0; half < BLOCK; half += LANES) {
      int64_t at = (n - low) * BLOCK + half, t = first + half;
      Floats w = (Floats)(seen_by(t, n, p) & (Ints)power(AT(scores + at) - AT(log_total + t)));
      AT(scores + at) = w;
      AT(d_scores + at) = w * (AT(d_scores + at) - AT(shift + t));
    }
}

XLA_FFI_Error *mix_back(XLA_FFI_CallFrame *call) {
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
  float *room = room_for(7 * size + 2 * rows + 2 * BLOCK * s.row + 2 * block + 2 * s.row +
                         2 * s.K * LANES + place_size(&s)),
        scale = 1 / sqrtf(s.K);
  if (!room) return fault(call, "no memory for attention's gradient");
  float *raw = room, *query = raw + size, *one = query + size, *key = one + size,
        *value = key + size, *d_out = value + size, *d = d_out + size, *d_key = d + size,
        *d_value = d_key + rows, *w = d_value + rows, *dw = w + BLOCK * s.row,
        *query_rows = dw + BLOCK * s.row, *out_rows = query_rows + block,
        *logs = out_rows + block, *shift = logs + s.row, *q_sums = shift + s.row,
        *k_sums = q_sums + s.K * LANES;
  Place p = place_in(k_sums + s.K * LANES, &s);
  memset(d_smear, 0, 4 * s.G * s.K);
  for (int64_t b = 0; b < s.B; b++) {
    place_at(&p, call, b, &s);
    for (int64_t g = 0; g < s.G; g++) {
      int64_t group = b * s.T * k_step + g * s.K;
      gather(raw, k + group, k_step, s.K, &s);
      put_in_place(one, raw, k_gain, 1, &p, &s);
      smear_keys(key, one, smear + g * s.K, &p, &s);
      gather(value, v + group, k_step, s.K, &s);
      memset(d_key, 0, 4 * 2 * rows);
      for (int64_t h = g * J; h < (g + 1) * J; h++) {
        int64_t head = b * s.T * q_step + h * s.K;
        gather(raw, q + head, q_step, s.K, &s);
        put_in_place(query, raw, q_gain, scale, &p, &s);
        gather(d_out, dy + head, q_step, s.K, &s);
        for (int64_t t = 0; t < s.T; t++) {
          logs[t] = log_total[(b * s.H + h) * s.T + t];
          shift[t] = dot(dy + head + t * q_step, mixed + head + t * q_step, s.K);
        }
        for (int64_t first = 0; first < s.T; first += BLOCK) {
          int64_t end = first + BLOCK, low = p.begin[first], keys = end - low;
          multiply(w, BLOCK, key + low, 1, s.row, query + first, s.row, keys, BLOCK, s.K, 0);
          multiply(dw, BLOCK, value + low, 1, s.row, d_out + first, s.row, keys, BLOCK, s.K, 0);
          weigh_back(w, dw, first, low, end, logs, shift, &p);
          multiply(d + first, s.row, key + low, s.row, 1, dw, BLOCK, s.K, BLOCK, keys, 0);
          turn(query_rows, s.wide, query + first, s.row, s.K, BLOCK);
          turn(out_rows, s.wide, d_out + first, s.row, s.K, BLOCK);
          multiply(d_key + low * s.wide, s.wide, dw, BLOCK, 1, query_rows, s.wide, keys, s.wide,
                   BLOCK, 1);
          multiply(d_value + low * s.wide, s.wide, w, BLOCK, 1, out_rows, s.wide, keys, s.wide,
                   BLOCK, 1);
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
