/* What we use of it, as Android declares it. */
#pragma once
typedef struct __sFILE FILE;
extern FILE* stderr;
int fprintf(FILE*, const char*, ...) __attribute__((format(printf, 2, 3)));
int sscanf(const char*, const char*, ...) __attribute__((format(scanf, 2, 3)));
