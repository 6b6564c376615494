/* log as a series, in loops that a compiler turns into vector instructions. */
#ifndef MULTIALIGN_LOG_H
#define MULTIALIGN_LOG_H

#include "core.h"

/* log(x), right to about 2 ulp for every double: -inf at 0, inf at inf, NaN below 0 and at NaN.
 *
 * x = 2^n m with m in [sqrt(1/2), sqrt(2)) and s = (m - 1) / (m + 1), whose square is below 0.03:
 * log m = 2 s (1 + s^2 / 3 + s^4 / 5 + ...).
 */
static inline double log_of(double x)
{
    const double magic = 6755399441055744.0;
    const uint64_t magic_bits = 0x4338000000000000;
    const int tiny = x < 2.2250738585072014e-308;
    union {
        double number;
        uint64_t bits;
    } m, n;
    m.number =
        tiny ? x * 18014398509481984.0 : x; /* 2^54: a subnormal number becomes a normal one */
    /* Exponent and 1023, if numbers from sqrt(1/2) on have the exponent of 1. */
    const uint64_t exponent = (m.bits - 0x3fe6a09e667f3bcd + 0x3ff0000000000000) >> 52;
    m.bits -= (exponent - 1023) << 52;
    n.bits = exponent + magic_bits;
    const double power = n.number - magic - (tiny ? 1077.0 : 1023.0);
    const double f = m.number - 1.0;
    const double s = f / (m.number + 1.0);
    const double z = s * s;
    /* The next term is below 2^-58. */
    double p = 2.0 / 23.0;
    p = p * z + 2.0 / 21.0;
    p = p * z + 2.0 / 19.0;
    p = p * z + 2.0 / 17.0;
    p = p * z + 2.0 / 15.0;
    p = p * z + 2.0 / 13.0;
    p = p * z + 2.0 / 11.0;
    p = p * z + 2.0 / 9.0;
    p = p * z + 2.0 / 7.0;
    p = p * z + 2.0 / 5.0;
    p = p * z + 2.0 / 3.0;
    /* 2 s = f - s f, where f is exact. */
    const double mantissa = f - s * (f - z * p);
    const double result =
        power * 0.693147180369123816490 + (mantissa + power * 1.90821492927058770002e-10);
    const double positive = x <= 1.7976931348623157e308 ? result : x; /* inf and NaN */
    return x > 0 ? positive : (x == 0 ? -INFINITY : x - x + NAN);
}

#endif
