/* Threads that work on one call after another: no pool, only a barrier that spins, so that waking costs little. */
#ifndef LORDBA_KERNELS_TEAM_H
#define LORDBA_KERNELS_TEAM_H

#include <stdatomic.h>
#include <stddef.h>

typedef struct {
  size_t threads;
  atomic_size_t arrived;
} team;

/* Returns when every thread of the team has called it as often as this one. */
void team_meet(team* team);

/* Runs `work` on `threads` threads, this one among them, from a common start; seconds until all are done, or NaN if a
 * thread cannot be made. */
double team_run(size_t threads, void (*work)(void* context, team* team, size_t thread), void* context);

#endif
