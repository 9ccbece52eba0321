#define _POSIX_C_SOURCE 200809L
#include "team.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>

enum { MAX_THREADS = 64, PATIENCE = 1 << 10 };

typedef struct {
  team* team;
  size_t thread;
  void (*work)(void*, team*, size_t);
  void* context;
} member;

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void team_meet(team* team) {
  if (team->threads == 1) return;
  const size_t round = atomic_fetch_add(&team->arrived, 1) / team->threads;
  for (size_t spins = 1; atomic_load(&team->arrived) < (round + 1) * team->threads; ++spins) {
    spins % PATIENCE ? relax() : (void)sched_yield(); /* the others may be waiting for this core */
  }
}

static void* start(void* argument) {
  member* self = argument;
  team_meet(self->team);
  self->work(self->context, self->team, self->thread);
  team_meet(self->team);
  return NULL;
}

double team_run(size_t threads, void (*work)(void*, team*, size_t), void* context) {
  if (threads < 1 || threads > MAX_THREADS) return NAN;
  team team = {.threads = threads};
  member members[MAX_THREADS];
  pthread_t ids[MAX_THREADS];
  for (size_t i = 1; i < threads; ++i) {
    members[i] = (member){&team, i, work, context};
    if (pthread_create(&ids[i], NULL, start, &members[i]) != 0) return NAN; /* the process ends soon: no clean-up */
  }
  team_meet(&team);
  const double begin = now();
  work(context, &team, 0);
  team_meet(&team);
  const double seconds = now() - begin;
  for (size_t i = 1; i < threads; ++i) pthread_join(ids[i], NULL);
  return seconds;
}
