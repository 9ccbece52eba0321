/* The library's entry for ONNX Runtime, RegisterCustomOps, and what it tells about itself. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "sign_adapter.h"

#if defined(_WIN32)
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

enum { DTYPES = 3, MOST_RUNTIMES = 8 };

/* A process may hold several copies of ONNX Runtime; each gets a domain and operators of its own, once. */
typedef struct {
  const OrtApiBase* base;
  OrtDomain* domain;
  SignAdapterOp ops[DTYPES];
} Registration;

static Registration registrations[MOST_RUNTIMES];
static atomic_flag locked = ATOMIC_FLAG_INIT;

static OrtStatus* fill(Registration* registration, const OrtApi* api, int minor) {
  OrtStatus* status = ORT_CALLABLE(api, OrtCreateDomain, ORT_CREATE_DOMAIN)("ai.lordba", &registration->domain);
  for (size_t i = 0; !status && i < DTYPES; ++i) {
    registration->ops[i] = lordba_onnxruntime_op(api, minor, (lordba_dtype)i);
    status = ORT_CALLABLE(api, OrtDomainAdd, ORT_DOMAIN_ADD)(registration->domain, &registration->ops[i].op);
  }
  return status;
}

/* The y of version 1.y.z; asking for a later API than the runtime has would make it complain. */
static int minor_version(const OrtApiBase* base) {
  int minor = 0;
  return sscanf(base->GetVersionString(), "1.%d", &minor) == 1 ? minor : 0;
}

/* The domain for this runtime, made on first use. */
static OrtStatus* find_domain(const OrtApiBase* base, const OrtApi* api, OrtDomain** domain) {
  while (atomic_flag_test_and_set(&locked)) {
  }
  OrtStatus* status = NULL;
  size_t i = 0;
  while (i < MOST_RUNTIMES && registrations[i].base != NULL && registrations[i].base != base) ++i;
  if (i == MOST_RUNTIMES) {
    status = ORT_CALLABLE(api, OrtCreateStatus, ORT_CREATE_STATUS)(ORT_FAIL, "lordba: too many copies of ONNX Runtime");
  } else {
    if (registrations[i].base == NULL) status = fill(&registrations[i], api, minor_version(base));
    if (!status) registrations[i].base = base;
    *domain = registrations[i].domain;
  }
  atomic_flag_clear(&locked);
  return status;
}

EXPORTED OrtStatus* ORT_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == NULL) {
    static atomic_flag said = ATOMIC_FLAG_INIT;
    if (!atomic_flag_test_and_set(&said)) {
      fprintf(stderr, "lordba: ONNX Runtime %s is older than 1.17: ai.lordba::SignAdapter runs as standard operators\n",
              base->GetVersionString());
    }
    return NULL;
  }
  if (lordba_onnxruntime_kernels() == NULL) {
    return ORT_CALLABLE(api, OrtCreateStatus, ORT_CREATE_STATUS)(
        ORT_INVALID_ARGUMENT, "lordba: this CPU or build has no kernels as LORDBA_ISA names; unset it");
  }
  OrtDomain* domain = NULL;
  OrtStatus* status = find_domain(base, api, &domain);
  return status ? status : ORT_CALLABLE(api, OrtAddDomain, ORT_ADD_DOMAIN)(options, domain);
}

/* For callers that load the library by itself: the number of calls of the kernel, and its instruction set. */
EXPORTED uint64_t lordba_native_calls(void) { return lordba_onnxruntime_calls(); }

EXPORTED const char* lordba_active_isa(void) {
  const lordba_kernels* kernels = lordba_onnxruntime_kernels();
  return kernels ? lordba_isa(kernels) : NULL;
}
