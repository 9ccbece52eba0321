/* What we use of it, as Android declares it. */
#pragma once
#include <stddef.h>
char* getenv(const char*);
void* malloc(size_t);
void free(void*);
