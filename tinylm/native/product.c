/* Row-major float32 products c = a b, a b' or a' b by oneDNN.

   The library is handed over as two pointers, so nothing is linked. */
#include "call.h"

typedef int (*Sgemm)(char, char, int64_t, int64_t, int64_t, float, const float *, int64_t,
                     const float *, int64_t, float, float *, int64_t);
static Sgemm sgemm;
static void (*set_threads)(int);

void hand_over(void *product, void *threads) {
  sgemm = (Sgemm)product;
  set_threads = (void (*)(int))threads;
}

static XLA_FFI_Error *multiply_by(XLA_FFI_CallFrame *call, int turn_a, int turn_b) {
  if (described(call)) return 0;
  static __thread int alone; /* each of XLA's threads multiplies with itself only */
  if (!alone) {
    set_threads(1);
    alone = 1;
  }
  XLA_FFI_Buffer *a = given(call, 0), *b = given(call, 1), *c = result(call, 0);
  int64_t rows = c->dims[0], columns = c->dims[1], inner = a->dims[turn_a ? 0 : 1];
  if (sgemm(turn_a ? 'T' : 'N', turn_b ? 'T' : 'N', rows, columns, inner, 1, a->data, a->dims[1],
            b->data, b->dims[1], 0, c->data, columns))
    return fault(call, "oneDNN could not multiply");
  return 0;
}

XLA_FFI_Error *plain(XLA_FFI_CallFrame *call) { return multiply_by(call, 0, 0); }
XLA_FFI_Error *right_turned(XLA_FFI_CallFrame *call) { return multiply_by(call, 0, 1); }
XLA_FFI_Error *left_turned(XLA_FFI_CallFrame *call) { return multiply_by(call, 1, 0); }

const char *compiler = __VERSION__;
