/* exp as a polynomial, in loops that a compiler turns into vector instructions. */
#ifndef MULTIALIGN_EXP_H
#define MULTIALIGN_EXP_H

#include "core.h"

/* exp(x), right to about 1 ulp for every double: 0 at -inf, inf from 709.79, NaN at NaN.
 *
 * x = n log 2 + r with |r| <= log(2) / 2, and exp(x) = 2^n exp(r). Adding 1.5 * 2^52 rounds to the
 * integer n and leaves it in the low bits. 2^n is two factors, since 2^-1074 is no normal number.
 */
static inline double exp_of(double x)
{
    const double magic = 6755399441055744.0;
    const uint64_t magic_bits = 0x4338000000000000;
    const double bounded = x < -746.0 ? -746.0 : (x > 710.0 ? 710.0 : x);
    const double shifted = bounded * 1.4426950408889634074 + magic;
    const double n = shifted - magic;
    const double r = (bounded - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
    /* Taylor's polynomial: the next term is below 2^-57. */
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r * r + r + 1.0;
    union {
        double number;
        uint64_t bits; /* of NaN too, whose difference from the magic number is no int64_t */
    } from, first, second;
    from.number = shifted;
    const uint64_t above = from.bits - magic_bits + 2048;
    const uint64_t half = above >> 1;
    first.bits = (half - 1) << 52;
    second.bits = (above - half - 1) << 52;
    return p * first.number * second.number;
}

#endif
