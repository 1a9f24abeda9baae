/* A norm and a gate with their gradients, float32, row by row.

   norm:      x [..., W], gain [W] -> x gain / rms(x)
   norm_back: these, d y -> d x, d gain
   gate:      g, u of one shape -> u g sigmoid(g)
   gate_back: these, d y -> d g, d u */
#include "arithmetic.h"
#include "call.h"

static int64_t rows_of(const XLA_FFI_Buffer *x) {
  int64_t rows = 1;
  for (int64_t n = 0; n < x->rank - 1; n++) rows *= x->dims[n];
  return rows;
}

XLA_FFI_Error *norm(XLA_FFI_CallFrame *call) {
  if (described(call)) return 0;
  const float *x = given(call, 0)->data, *gain = given(call, 1)->data;
  float *restrict y = result(call, 0)->data;
  int64_t W = given(call, 1)->dims[0], rows = rows_of(given(call, 0));
  for (int64_t r = 0; r < rows; r++, x += W, y += W) {
    float inverse = inverse_rms(all(dot(x, x, W)), W)[0];
    for (int64_t i = 0; i < W; i++) y[i] = x[i] * inverse * gain[i];
  }
  return 0;
}

XLA_FFI_Error *norm_back(XLA_FFI_CallFrame *call) {
  if (described(call)) return 0;
  const float *x = given(call, 0)->data, *gain = given(call, 1)->data, *dy = given(call, 2)->data;
  float *restrict dx = result(call, 0)->data, *restrict d_gain = result(call, 1)->data;
  int64_t W = given(call, 1)->dims[0], rows = rows_of(given(call, 0));
  memset(d_gain, 0, 4 * W);
  for (int64_t r = 0; r < rows; r++, x += W, dy += W, dx += W) {
    float inverse = inverse_rms(all(dot(x, x, W)), W)[0];
    for (int64_t i = 0; i < W; i++) {
      d_gain[i] += dy[i] * x[i] * inverse;
      dx[i] = dy[i] * gain[i] * inverse;
    }
    float share = dot(dx, x, W) * inverse * inverse / W;
    for (int64_t i = 0; i < W; i++) dx[i] -= share * x[i];
  }
  return 0;
}

static inline Floats sigmoid(Floats x) {
  Floats e = power(pick(x > 0, -x, x));
  return pick(x > 0, all(1), e) / (1 + e);
}

/* LANES floats, filled up with zeros where there are fewer */
static inline Floats some(const float *from, int64_t here) {
  Floats x = {0};
  if (here >= LANES) return AT(from);
  memcpy(&x, from, 4 * here);
  return x;
}

static inline void keep(float *to, Floats x, int64_t here) {
  if (here >= LANES) AT(to) = x;
  else memcpy(to, &x, 4 * here);
}

XLA_FFI_Error *gate(XLA_FFI_CallFrame *call) {
  if (described(call)) return 0;
  XLA_FFI_Buffer *shape = given(call, 0);
  const float *g = shape->data, *u = given(call, 1)->data;
  float *y = result(call, 0)->data;
  int64_t size = rows_of(shape) * shape->dims[shape->rank - 1];
  for (int64_t i = 0; i < size; i += LANES) {
    Floats x = some(g + i, size - i);
    keep(y + i, some(u + i, size - i) * x * sigmoid(x), size - i);
  }
  return 0;
}

XLA_FFI_Error *gate_back(XLA_FFI_CallFrame *call) {
  if (described(call)) return 0;
  XLA_FFI_Buffer *shape = given(call, 0);
  const float *g = shape->data, *u = given(call, 1)->data, *dy = given(call, 2)->data;
  float *dg = result(call, 0)->data, *du = result(call, 1)->data;
  int64_t size = rows_of(shape) * shape->dims[shape->rank - 1];
  for (int64_t i = 0; i < size; i += LANES) {
    Floats x = some(g + i, size - i), d = some(dy + i, size - i), s = sigmoid(x);
    keep(dg + i, d * some(u + i, size - i) * s * (1 + x * (1 - s)), size - i);
    keep(du + i, d * x * s, size - i);
  }
  return 0;
}
