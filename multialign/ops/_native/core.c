/* The compiled core: see core.h. Each header holds static functions and those it exports. */
#include "core.h"
#include "exp.h"
#include "gradients.h"
#include "log.h"
#include "mixture.h"
#include "prototypes.h"

/* exp of n numbers, for the tests. */
EXPORTED(void, exp)(const double *x, double *out, int64_t n)
{
    SIMD for (int64_t i = 0; i < n; i++)
        out[i] = exp_of(x[i]);
}

/* log of n numbers, for the tests. */
EXPORTED(void, log)(const double *x, double *out, int64_t n)
{
    SIMD for (int64_t i = 0; i < n; i++)
        out[i] = log_of(x[i]);
}
