// lordba_trainer.h over Trainer: exceptions become return codes.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>

#include "trainer.h"

struct lordba_trainer {
  lordba::Trainer trainer;
};

namespace {

template <typename Work>
int guarded(lordba_trainer* t, const Work& work) {
  try {
    work(t->trainer);
    return 0;
  } catch (const std::exception& fault) {
    t->trainer.error = fault.what();
    return -1;
  }
}

}  // namespace

#define LORDBA_API extern "C" __attribute__((visibility("default")))

LORDBA_API lordba_trainer* lordba_trainer_open(const char* program, const lordba_optimizer* optimizer, uint64_t seed,
                                               char* error, size_t error_size) {
  try {
    return new lordba_trainer{lordba::Trainer(program, *optimizer, seed)};
  } catch (const std::exception& fault) {
    std::snprintf(error, error_size, "%s", fault.what());
    return nullptr;
  }
}

LORDBA_API void lordba_trainer_close(lordba_trainer* t) { delete t; }
LORDBA_API const char* lordba_trainer_error(const lordba_trainer* t) { return t->trainer.error.c_str(); }
LORDBA_API uint32_t lordba_trainer_longest(const lordba_trainer* t) { return t->trainer.longest; }
LORDBA_API uint64_t lordba_trainer_size(const lordba_trainer* t) { return t->trainer.latents.size(); }
LORDBA_API float* lordba_trainer_latents(lordba_trainer* t) { return t->trainer.latents.data(); }
LORDBA_API uint64_t lordba_trainer_steps(const lordba_trainer* t) { return t->trainer.steps; }
LORDBA_API uint64_t lordba_trainer_planned_bytes(const lordba_trainer* t) { return t->trainer.planned_bytes; }

LORDBA_API uint32_t lordba_trainer_modules(const lordba_trainer* t) {
  return static_cast<uint32_t>(t->trainer.modules.size());
}

LORDBA_API int lordba_trainer_module_at(lordba_trainer* t, uint32_t index, lordba_trainer_module* module) {
  return guarded(t, [&](lordba::Trainer& trainer) { *module = trainer.modules.at(index); });
}

LORDBA_API int lordba_trainer_add(lordba_trainer* t, const int64_t* tokens, const int64_t* targets, size_t count,
                                  float weight, double* loss) {
  return guarded(t, [&](lordba::Trainer& trainer) { *loss = trainer.add(tokens, targets, count, weight); });
}

LORDBA_API int lordba_trainer_gradients(lordba_trainer* t, float* gradients) {
  return guarded(t, [&](lordba::Trainer& trainer) { trainer.gather(gradients); });
}

LORDBA_API int lordba_trainer_update(lordba_trainer* t, float rate, float largest_norm) {
  return guarded(t, [&](lordba::Trainer& trainer) { trainer.update(rate, largest_norm); });
}

LORDBA_API int lordba_trainer_save(lordba_trainer* t, const char* file, const char* note, size_t note_bytes) {
  return guarded(t, [&](lordba::Trainer& trainer) { trainer.save(file, {note, note_bytes}); });
}

LORDBA_API int lordba_trainer_load(lordba_trainer* t, const char* file, char* note, size_t note_size,
                                   size_t* note_bytes) {
  return guarded(t, [&](lordba::Trainer& trainer) {
    const std::string found = trainer.load(file);
    *note_bytes = found.size();
    std::copy_n(found.data(), std::min(found.size(), note_size), note);
  });
}

LORDBA_API int lordba_trainer_write_adapter(lordba_trainer* t, lordba_scale_code code, const char* template_file,
                                            const char* file) {
  return guarded(t, [&](lordba::Trainer& trainer) { trainer.write_adapter(code, template_file, file); });
}

LORDBA_API int lordba_trainer_pack(lordba_trainer* t, uint32_t index, lordba_scale_code code, lordba_packed* packed) {
  return guarded(t, [&](lordba::Trainer& trainer) { trainer.pack(index, code, packed); });
}
