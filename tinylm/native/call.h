/* What every function that XLA calls needs: its description, its arguments, its faults. */
#ifndef TINYLM_CALL_H
#define TINYLM_CALL_H
#include <stdint.h>
#include "xla/ffi/api/c_api.h"

/* XLA asks once for the version a function is written for, and calls it from then on. */
static inline int described(XLA_FFI_CallFrame *call) {
  if (!call->extension_start || call->extension_start->type != XLA_FFI_Extension_Metadata)
    return 0;
  XLA_FFI_Metadata *told = ((XLA_FFI_Metadata_Extension *)call->extension_start)->metadata;
  told->api_version.major_version = XLA_FFI_API_MAJOR;
  told->api_version.minor_version = XLA_FFI_API_MINOR;
  told->traits = 0;
  return 1;
}

static inline XLA_FFI_Buffer *given(XLA_FFI_CallFrame *call, int n) { return call->args.args[n]; }
static inline XLA_FFI_Buffer *result(XLA_FFI_CallFrame *call, int n) { return call->rets.rets[n]; }

static inline XLA_FFI_Error *fault(XLA_FFI_CallFrame *call, const char *message) {
  XLA_FFI_Error_Create_Args told = {0};
  told.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  told.message = message;
  told.errc = XLA_FFI_Error_Code_INTERNAL;
  return call->api->XLA_FFI_Error_Create(&told);
}
#endif
