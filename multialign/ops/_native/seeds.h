/* Seeds by greedy k-means++; mixture/seeds.py defines what is computed here. */
#ifndef MULTIALIGN_SEEDS_H
#define MULTIALIGN_SEEDS_H

#include "core.h"

#define SEED_ROUNDING 1e-14 /* of a sum of squares of mean 1, per dimension: a distance of 0 */
#define SEED_TIE 1e-9       /* sums that differ by less, relatively, are equal */

typedef struct {
    double key;
    int64_t row;
} Keyed;

static int by_key(const void *left, const void *right)
{
    const Keyed *a = left, *b = right;
    if (a->key < b->key) return -1;
    if (a->key > b->key) return 1;
    const int order = (a->key != a->key) - (b->key != b->key); /* NaN comes last */
    return order ? order : (a->row > b->row) - (a->row < b->row);
}

/* Return the row drawn by a uniform number from cumulative sums. */
static int64_t pick(const double *cumulative, int64_t rows, double uniform)
{
    const double value = uniform * cumulative[rows - 1];
    int64_t row = 0;
    while (row < rows - 1 && !(cumulative[row] > value)) row++;
    return row;
}

static int64_t candidates_for(int64_t count)
{
    return 2 + (int64_t)log((double)count);
}

static void accumulate(const double *x, int64_t rows, double *sums)
{
    double sum = 0;
    for (int64_t n = 0; n < rows; n++) sums[n] = sum += x[n];
}

/* Draw `count` of the rows, each `parts` pieces of `dim` numbers; a piece's rows are `stride`
 * apart.
 *
 * Rows are ordered along a random direction, so that the draw does not depend on their order. The
 * first is drawn by mass, each other is the best of some drawn by mass times squared distance to
 * the nearest row taken. `scratch` is rows * (parts * dim + 8) doubles.
 */
static void draw_seeds(const double *const *pieces, int64_t parts, int64_t rows, int64_t dim,
                       int64_t stride, const double *mass, const double *direction,
                       const double *uniforms, int64_t count, int64_t *chosen, double *scratch)
{
    const int64_t total = parts * dim, candidates = candidates_for(count);
    double *x = scratch, *weight = x + rows * total, *first = weight + rows;
    double *cumulative = first + rows, *chance = cumulative + rows, *trial = chance + rows;
    double *best = trial + rows;
    Keyed *order = (Keyed *)(best + rows);
    for (int64_t n = 0; n < rows; n++) {
        double key = 0;
        for (int64_t m = 0; m < parts; m++) {
            const double *row = pieces[m] + n * stride, *along = direction + m * dim;
            SIMD_SUM(key) for (int64_t d = 0; d < dim; d++)
                key += row[d] * along[d];
        }
        order[n].key = key;
        order[n].row = n;
    }
    qsort(order, (size_t)rows, sizeof(Keyed), by_key);
    for (int64_t n = 0; n < rows; n++) {
        for (int64_t m = 0; m < parts; m++)
            memcpy(x + n * total + m * dim, pieces[m] + order[n].row * stride,
                   (size_t)dim * sizeof(double));
        weight[n] = mass[order[n].row];
        chance[n] = INFINITY;
    }
    accumulate(weight, rows, first);
    for (int64_t k = 0; k < count; k++) {
        const double *sums = first;
        if (k > 0) {
            for (int64_t n = 0; n < rows; n++)
                if (chance[n] <= SEED_ROUNDING * (double)total) chance[n] = 0;
            accumulate(chance, rows, cumulative);
            if (cumulative[rows - 1] != 0) sums = cumulative; /* else all rows are taken */
        }
        double least = INFINITY;
        for (int64_t c = 0; c < (k > 0 ? candidates : 1); c++) {
            const int64_t row = pick(sums, rows, uniforms[k * candidates + c]);
            double left = 0;
            for (int64_t n = 0; n < rows; n++) {
                double distance = 0;
                SIMD_SUM(distance) for (int64_t d = 0; d < total; d++) {
                    const double difference = x[n * total + d] - x[row * total + d];
                    distance += difference * difference;
                }
                distance *= weight[n];
                trial[n] = distance < chance[n] ? distance : chance[n];
                left += trial[n];
            }
            if (c == 0 || left * (1 + SEED_TIE) < least) {
                double *kept = best;
                best = trial, trial = kept;
                least = left;
                chosen[k] = order[row].row;
            }
        }
        double *kept = chance;
        chance = best, best = kept;
    }
}

#endif
