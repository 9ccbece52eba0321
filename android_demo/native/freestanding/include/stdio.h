/* What we use of it, as Android declares it. */
#pragma once
#include <stddef.h>
typedef struct __sFILE FILE;
extern FILE* stderr;
int fprintf(FILE*, const char*, ...) __attribute__((format(printf, 2, 3)));
int snprintf(char*, size_t, const char*, ...) __attribute__((format(printf, 3, 4)));
int sscanf(const char*, const char*, ...) __attribute__((format(scanf, 2, 3)));
