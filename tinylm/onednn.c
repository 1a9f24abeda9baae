/* Row-major float32 products c = a b, a b' or a' b by oneDNN, as XLA's CPU calls foreign functions.

   Compiled by tinylm/onednn.py for the headers of the installed jaxlib; the library is handed over
   as two pointers, so nothing is linked. */
#include <stdint.h>
#include "xla/ffi/api/c_api.h"

typedef int (*Sgemm)(char, char, int64_t, int64_t, int64_t, float, const float *, int64_t,
                     const float *, int64_t, float, float *, int64_t);
static Sgemm sgemm;
static void (*set_threads)(int);

void hand_over(void *product, void *threads) {
  sgemm = (Sgemm)product;
  set_threads = (void (*)(int))threads;
}

static XLA_FFI_Error *multiply(XLA_FFI_CallFrame *call, int turn_a, int turn_b) {
  if (call->extension_start && call->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata *told = ((XLA_FFI_Metadata_Extension *)call->extension_start)->metadata;
    told->api_version.major_version = XLA_FFI_API_MAJOR;
    told->api_version.minor_version = XLA_FFI_API_MINOR;
    told->traits = 0;
    return 0;
  }
  static __thread int alone; /* each of XLA's threads multiplies with itself only */
  if (!alone) {
    set_threads(1);
    alone = 1;
  }
  XLA_FFI_Buffer *a = call->args.args[0], *b = call->args.args[1], *c = call->rets.rets[0];
  int64_t rows = c->dims[0], columns = c->dims[1], inner = a->dims[turn_a ? 0 : 1];
  if (!sgemm(turn_a ? 'T' : 'N', turn_b ? 'T' : 'N', rows, columns, inner, 1, a->data, a->dims[1],
             b->data, b->dims[1], 0, c->data, columns))
    return 0;
  XLA_FFI_Error_Create_Args fault = {0};
  fault.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  fault.message = "oneDNN could not multiply";
  fault.errc = XLA_FFI_Error_Code_INTERNAL;
  return call->api->XLA_FFI_Error_Create(&fault);
}

XLA_FFI_Error *plain(XLA_FFI_CallFrame *call) { return multiply(call, 0, 0); }
XLA_FFI_Error *right_turned(XLA_FFI_CallFrame *call) { return multiply(call, 0, 1); }
XLA_FFI_Error *left_turned(XLA_FFI_CallFrame *call) { return multiply(call, 1, 0); }
