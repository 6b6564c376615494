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
UNROLLED static void multiply(int rows, int inner, int columns, const double *restrict a,
                              int a_stride, const double *restrict b, double *restrict c)
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

/* a[r][l] -= sum over k < inner of u[k][i + r] u[k][j + l], for 4 rows and 2 LANES columns. */
UNROLLED static void subtract_tile(double *a, int n, const double *u, int inner, int i, int j,
                                   int columns)
{
    double s[4][2 * LANES] = {{0}};
    for (int k = 0; k < inner; k++) {
        const double *restrict row = u + (size_t)k * n;
        const double f0 = row[i], f1 = row[i + 1], f2 = row[i + 2], f3 = row[i + 3];
        SIMD for (int l = 0; l < 2 * LANES; l++) {
            s[0][l] += f0 * row[j + l];
            s[1][l] += f1 * row[j + l];
            s[2][l] += f2 * row[j + l];
            s[3][l] += f3 * row[j + l];
        }
    }
    for (int r = 0; r < 4; r++) SIMD
        for (int l = 0; l < columns; l++) a[(size_t)(i + r) * n + j + l] -= s[r][l];
}

/* The upper factor U of a = U^T U, in place of the upper triangle of a, n x n; 0 if there is none.
 *
 * n is a multiple of LANES, and a has LANES doubles more behind it. The first `diagonal` rows and
 * columns, a multiple of LANES, are those of a diagonal matrix.
 */
static int factor(double *restrict a, int n, int diagonal)
{
    for (int i = 0; i < n; i += LANES) {
        if (i >= diagonal)
            for (int j = i; j < n; j += 2 * LANES) {
                const int columns = n - j < 2 * LANES ? LANES : 2 * LANES;
                subtract_tile(a, n, a, i, i, j, columns);
                subtract_tile(a, n, a, i, i + 4, j, columns);
            }
        for (int r = i; r < i + LANES; r++) {
            double *restrict row = a + (size_t)r * n;
            for (int k = i; k < r; k++) {
                const double *restrict u = a + (size_t)k * n;
                const double f = u[r];
                SIMD for (int j = i; j < n; j++)
                    row[j] -= f * u[j];
            }
            if (!(row[r] > 0) || !(row[r] < INFINITY)) return 0;
            const double scale = 1 / sqrt(row[r]);
            SIMD for (int j = i; j < n; j++)
                row[j] *= scale;
        }
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
