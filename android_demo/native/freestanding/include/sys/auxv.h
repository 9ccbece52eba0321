/* What we use of it, as Android declares it. */
#pragma once
#define AT_HWCAP2 26
unsigned long getauxval(unsigned long);
