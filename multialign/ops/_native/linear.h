/* Products and factors of small matrices, in rows of whole vectors. */
#ifndef MULTIALIGN_LINEAR_H
#define MULTIALIGN_LINEAR_H

#include "core.h"

/* Rows are padded to this many doubles, with zeros or with what adds nothing. */
enum { LANES = 8 };

static inline int padded(int n)
{
    return (n + LANES - 1) / LANES * LANES;
}

/* c = a b for rows x inner and inner x columns; columns is a multiple of LANES. */
static void multiply(int rows, int inner, int columns, const double *restrict a, int a_stride,
                     const double *restrict b, double *restrict c)
{
    int i = 0;
    for (; i + 4 <= rows; i += 4) {
        const double *a0 = a + (size_t)i * a_stride, *a1 = a0 + a_stride, *a2 = a1 + a_stride,
                     *a3 = a2 + a_stride;
        int j = 0;
        for (; j + 2 * LANES <= columns; j += 2 * LANES) {
            double s0[2 * LANES] = {0}, s1[2 * LANES] = {0}, s2[2 * LANES] = {0},
                          s3[2 * LANES] = {0};
            for (int k = 0; k < inner; k++) {
                const double *restrict row = b + (size_t)k * columns + j;
                SIMD for (int l = 0; l < 2 * LANES; l++) {
                    s0[l] += a0[k] * row[l];
                    s1[l] += a1[k] * row[l];
                    s2[l] += a2[k] * row[l];
                    s3[l] += a3[k] * row[l];
                }
            }
            double *out = c + (size_t)i * columns + j;
            memcpy(out, s0, sizeof s0);
            memcpy(out + columns, s1, sizeof s1);
            memcpy(out + 2 * columns, s2, sizeof s2);
            memcpy(out + 3 * columns, s3, sizeof s3);
        }
        for (; j < columns; j += LANES) {
            double s0[LANES] = {0}, s1[LANES] = {0}, s2[LANES] = {0}, s3[LANES] = {0};
            for (int k = 0; k < inner; k++) {
                const double *restrict row = b + (size_t)k * columns + j;
                SIMD for (int l = 0; l < LANES; l++) {
                    s0[l] += a0[k] * row[l];
                    s1[l] += a1[k] * row[l];
                    s2[l] += a2[k] * row[l];
                    s3[l] += a3[k] * row[l];
                }
            }
            double *out = c + (size_t)i * columns + j;
            memcpy(out, s0, sizeof s0);
            memcpy(out + columns, s1, sizeof s1);
            memcpy(out + 2 * columns, s2, sizeof s2);
            memcpy(out + 3 * columns, s3, sizeof s3);
        }
    }
    for (; i < rows; i++)
        for (int j = 0; j < columns; j += LANES) {
            double s[LANES] = {0};
            for (int k = 0; k < inner; k++) {
                const double *restrict row = b + (size_t)k * columns + j;
                SIMD for (int l = 0; l < LANES; l++)
                    s[l] += a[(size_t)i * a_stride + k] * row[l];
            }
            memcpy(c + (size_t)i * columns + j, s, sizeof s);
        }
}

/* The upper factor U of a = U^T U, in place of the upper triangle of a, n x n; 0 if there is none.
 *
 * n is a multiple of LANES. The first `diagonal` rows and columns are those of a diagonal matrix.
 */
static int factor(double *restrict a, int n, int diagonal)
{
    for (int i = 0; i < n; i++) {
        double *restrict row = a + (size_t)i * n;
        const int start = i / LANES * LANES;
        int k = i < diagonal ? i : 0;
        for (; k + 4 <= i; k += 4) {
            const double *restrict u0 = a + (size_t)k * n, *restrict u1 = u0 + n,
                                   *restrict u2 = u1 + n, *restrict u3 = u2 + n;
            const double f0 = u0[i], f1 = u1[i], f2 = u2[i], f3 = u3[i];
            SIMD for (int j = start; j < n; j++)
                row[j] -= f0 * u0[j] + f1 * u1[j] + f2 * u2[j] + f3 * u3[j];
        }
        for (; k < i; k++) {
            const double *restrict u = a + (size_t)k * n;
            const double f = u[i];
            SIMD for (int j = start; j < n; j++)
                row[j] -= f * u[j];
        }
        if (!(row[i] > 0) || !(row[i] < INFINITY)) return 0;
        const double scale = 1 / sqrt(row[i]);
        SIMD for (int j = start; j < n; j++)
            row[j] *= scale;
    }
    return 1;
}

/* Solve U^T U x = x in place. */
static void solve_factored(const double *restrict u, int n, double *restrict x)
{
    for (int k = 0; k < n; k++) {
        const double *restrict row = u + (size_t)k * n;
        const double value = x[k] /= row[k];
        SIMD for (int j = k + 1; j < n; j++)
            x[j] -= value * row[j];
    }
    for (int k = n - 1; k >= 0; k--) {
        const double *restrict row = u + (size_t)k * n;
        double sum = 0;
        SIMD_SUM(sum) for (int j = k + 1; j < n; j++)
            sum += row[j] * x[j];
        x[k] = (x[k] - sum) / row[k];
    }
}

#endif
