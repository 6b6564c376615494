/* The product of two small matrices. */
#ifndef MULTIALIGN_PRODUCT_H
#define MULTIALIGN_PRODUCT_H

#include "core.h"

#define PRODUCT_BLOCK 256 /* columns whose part of C stays in the first cache */

/* Add to the first `rows` (1 or 2) rows of C the product of A and the first `depth` rows of B. */
static inline void add_rows(const double *a, int64_t row, int64_t step, const double *b,
                            int64_t b_row, double *c, int64_t c_row, int rows, int64_t depth,
                            int64_t columns)
{
    const double *a1 = a + row;
    double *c1 = c + c_row;
    int64_t p = 0;
    /* One load and store of C for four products: stores are what limits such a loop. */
    for (; p + 4 <= depth; p += 4) {
        const double *restrict b0 = b + p * b_row, *restrict b1 = b0 + b_row;
        const double *restrict b2 = b1 + b_row, *restrict b3 = b2 + b_row;
        const double *x = a + p * step;
        const double x0 = x[0], x1 = x[step], x2 = x[2 * step], x3 = x[3 * step];
        if (rows == 2) {
            const double *y = a1 + p * step;
            const double y0 = y[0], y1 = y[step], y2 = y[2 * step], y3 = y[3 * step];
            SIMD for (int64_t j = 0; j < columns; j++) {
                c[j] += x0 * b0[j] + x1 * b1[j] + x2 * b2[j] + x3 * b3[j];
                c1[j] += y0 * b0[j] + y1 * b1[j] + y2 * b2[j] + y3 * b3[j];
            }
        } else {
            SIMD for (int64_t j = 0; j < columns; j++)
                c[j] += x0 * b0[j] + x1 * b1[j] + x2 * b2[j] + x3 * b3[j];
        }
    }
    for (; p < depth; p++)
        for (int r = 0; r < rows; r++) {
            const double x = a[r * row + p * step];
            const double *restrict b0 = b + p * b_row;
            double *restrict out = c + r * c_row;
            SIMD for (int64_t j = 0; j < columns; j++)
                out[j] += x * b0[j];
        }
}

/* C += A B: C is rows x columns, entry (i, p) of A is a[i row + p step], and rows of B and C are
 * b_row and c_row apart. The order of a sum depends on the sizes alone. */
static void add_product(const double *a, int64_t row, int64_t step, const double *b, int64_t b_row,
                        double *c, int64_t c_row, int64_t rows, int64_t depth, int64_t columns)
{
    for (int64_t start = 0; start < columns; start += PRODUCT_BLOCK) {
        const int64_t width = columns - start < PRODUCT_BLOCK ? columns - start : PRODUCT_BLOCK;
        int64_t i = 0;
        for (; i + 2 <= rows; i += 2)
            add_rows(a + i * row, row, step, b + start, b_row, c + i * c_row + start, c_row, 2,
                     depth, width);
        if (i < rows)
            add_rows(a + i * row, row, step, b + start, b_row, c + i * c_row + start, c_row, 1,
                     depth, width);
    }
}

#endif
