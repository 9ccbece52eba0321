/* What dispatch.c calls of Apple's systems: for compiling it elsewhere. */
int sysctlbyname(const char* name, void* value, unsigned long* size, void* new_value, unsigned long new_size);
