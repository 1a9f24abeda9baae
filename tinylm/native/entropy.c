/* The cross-entropy of a tied or untied head with its gradient, no logits kept.

   entropy: x [B, T, D], table [V, D], targets [B, T], weights [B, T], z [] -> nll, log_total [B, T]
   and d x, d table of sum(weights (nll + z log_total^2)).
   bf16_entropy: the same, the operands of products rounded to bfloat16.
   Two vectors of positions at a time, whose logits [V, positions] stay in the cache; each position
   is a lane, so nothing is added up across lanes. */
#include "arithmetic.h"
#include "call.h"

#define ROWS (2 * LANES)
#define SOME 128 /* rows of the table whose gradients are made while their logits are at hand */

static inline __attribute__((always_inline)) XLA_FFI_Error *entropy_in(int bf16,
                                                                       XLA_FFI_CallFrame *call) {
  if (described(call)) return 0;
  XLA_FFI_Buffer *xs = given(call, 0), *tables = given(call, 1);
  const float *x = xs->data, *table = tables->data, *weights = given(call, 3)->data;
  const int32_t *targets = given(call, 2)->data;
  float z = *(float *)given(call, 4)->data, *nll = result(call, 0)->data,
        *log_total = result(call, 1)->data, *dx = result(call, 2)->data,
        *d_table = result(call, 3)->data;
  int64_t N = xs->dims[0] * xs->dims[1], D = xs->dims[2], V = tables->dims[0];
  int64_t wide = up_to(D, LANES);
  int64_t even = up_to(V, 2), far = up_to(D, 2 * LANES); /* the table's rows and columns in pairs */
  float *room = room_for(V * ROWS + ROWS + 2 * wide * ROWS + ROWS * wide + V * wide +
                         (bf16 ? even * far + 2 * far + SOME * ROWS / 2 : 0));
  if (!room) return fault(call, "no memory for the cross-entropy");
  float *logits = room, *turned = logits + V * ROWS + ROWS, *d_turned = turned + wide * ROWS,
        *rows = d_turned + wide * ROWS, *sums = rows + ROWS * wide;
  /* pairs along the table's rows, [even, far / 2], and of its rows, [even / 2, far], where what an
     odd last row is paired with meets the zeros behind the logits; pairs of some logits */
  float *along = sums + V * wide, *across = along + even * far / 2,
        *two = across + even * far / 2, *part_along = two + 2 * far;
  int64_t inner = bf16 ? up_to(D, 2) / 2 : D, row = bf16 ? far / 2 : D, down = bf16 ? far : D;
  for (int64_t v = 0; bf16 && v < V; v += 2) {
    memcpy(two, table + v * D, 4 * D);
    if (v + 1 < V) memcpy(two + far, table + (v + 1) * D, 4 * D);
    pair_along(along + v * row, two, 2 * far);
    pair_rows(across + v * row, two, far, 2, far);
  }
  for (int64_t first = 0; first < N; first += ROWS) {
    int64_t here = N - first < ROWS ? N - first : ROWS;
    float share[ROWS] __attribute__((aligned(64))) = {0};
    memset(turned, 0, 4 * D * ROWS);
    memset(rows, 0, 4 * ROWS * wide);
    for (int64_t r = 0; r < here; r++)
      for (int64_t d = 0; d < D; d++)
        turned[d * ROWS + r] = rows[r * wide + d] = x[(first + r) * D + d];
    if (bf16) {
      pair_rows(turned, turned, ROWS, up_to(D, 2), ROWS);
      pair_rows(rows, rows, wide, ROWS, wide);
    }
    multiply(bf16, logits, ROWS, bf16 ? along : table, row, 1, turned, ROWS, V, ROWS, inner, 0);
    for (int64_t half = 0; half < ROWS; half += LANES) {
      Floats most = AT(logits + half), total = {0};
      for (int64_t v = 1; v < V; v++) most = larger(AT(logits + v * ROWS + half), most);
      for (int64_t r = half; r < half + LANES && r < here; r++) { /* a token out of range: NaN */
        int32_t target = targets[first + r];
        nll[first + r] = target < 0 || target >= V ? NAN : -logits[target * ROWS + r];
      }
      for (int64_t v = 0; v < V; v++) {
        Floats *weight = &AT(logits + v * ROWS + half);
        *weight = power(*weight - most);
        total += *weight;
      }
      for (int64_t r = half; r < half + LANES && r < here; r++) {
        float log_of = most[r - half] + logf(total[r - half]);
        log_total[first + r] = log_of;
        nll[first + r] += log_of;
        share[r] = weights[first + r] * (1 + 2 * z * log_of) / total[r - half];
      }
    }
    for (int64_t v = 0; v < V; v += SOME) {
      int64_t some = V - v < SOME ? V - v : SOME;
      float *part = logits + v * ROWS;
      for (int64_t i = 0; i < some; i++)
        for (int64_t half = 0; half < ROWS; half += LANES)
          AT(part + i * ROWS + half) *= AT(share + half);
      for (int64_t r = 0; r < here; r++) {
        int64_t at = targets[first + r] - v;
        if (at >= 0 && at < some) part[at * ROWS + r] -= weights[first + r];
      }
      if (bf16) {
        pair_along(part_along, part, some * ROWS);
        pair_rows(part, part, ROWS, up_to(some, 2), ROWS);
      }
      multiply(bf16, d_turned, ROWS, bf16 ? across + v * row : table + v * D, 1, down, part,
               ROWS, D, ROWS, bf16 ? up_to(some, 2) / 2 : some, v > 0);
      multiply(bf16, sums + v * wide, wide, bf16 ? part_along : part, ROWS >> bf16, 1, rows, wide,
               some, wide, ROWS >> bf16, 1);
    }
    for (int64_t r = 0; r < here; r++)
      for (int64_t d = 0; d < D; d++) dx[(first + r) * D + d] = d_turned[d * ROWS + r];
  }
  for (int64_t v = 0; v < V; v++) memcpy(d_table + v * D, sums + v * wide, 4 * D);
  free(room);
  return 0;
}

XLA_FFI_Error *entropy(XLA_FFI_CallFrame *call) { return entropy_in(0, call); }
XLA_FFI_Error *bf16_entropy(XLA_FFI_CallFrame *call) { return entropy_in(1, call); }
