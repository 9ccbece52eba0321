/* What we use of it, as Android declares it. */
#pragma once
double ldexp(double, int);
double pow(double, double);
