/* Costs between the components of all pairs of mixtures, the mean squared distances of samples from
 * the others' prototypes, and their derivatives. */
#ifndef MULTIALIGN_PROTOTYPES_H
#define MULTIALIGN_PROTOTYPES_H

#include "core.h"
#include "mixture.h"

/* A tensor has the batch first and is contiguous; `single` says that those of the caller's dtype
 * are float32. Pairs i < j are in the order (0, 1), (0, 2), ..., (1, 2), ... */
typedef struct {
    int64_t single, batch, modalities, dim;
    const int64_t *counts;
    double scale;           /* of all squared distances */
    void *const *means;     /* (B, K, D) of each modality */
    void *const *variances; /* (B, K, D) of each modality */
    const double *moments;  /* (B, sum K, D + 2): see mixture.h */
    const double *present;  /* (B, M): 1 or 0 */
    void *const *costs;     /* (B, K_i, K_j) of each pair, or derivatives */
    double *term;           /* (B), or a derivative; null where numbers of components differ */
} Pairs;

/* Return the square root of a variance, and the derivative: 0 at 0. */
static double deviation_of(double variance, double *slope)
{
    const double root = sqrt(variance);
    *slope = variance == 0 ? 0 : 0.5 / root;
    return root;
}

/* Write the means, deviations and slopes of mixture m of problem b, each K x D. */
static void read_mixture(const Pairs *p, int64_t b, int64_t m, double *out)
{
    const int64_t size = p->counts[m] * p->dim;
    for (int64_t i = 0; i < size; i++) {
        out[i] = load(p->means[m], p->single, b * size + i);
        out[size + i] =
            deviation_of(load(p->variances[m], p->single, b * size + i), out + 2 * size + i);
    }
}

static double squared_distance(const double *x, const double *y, int64_t dim)
{
    double sum = 0;
    SIMD_SUM(sum) for (int64_t d = 0; d < dim; d++)
        sum += (x[d] - y[d]) * (x[d] - y[d]);
    return sum;
}

/* Add the derivative `by` of a squared distance to those of its ends. */
static void distance_back(double by, const double *x, const double *y, int64_t dim, double *by_x,
                          double *by_y)
{
    SIMD for (int64_t d = 0; d < dim; d++) {
        const double change = 2 * by * (x[d] - y[d]);
        by_x[d] += change;
        by_y[d] -= change;
    }
}

/* Return memory for three tables of each mixture and `more` for each, and where they begin. */
static double *mixtures_memory(const Pairs *p, int64_t more, double **begin)
{
    int64_t total = 0;
    for (int64_t m = 0; m < p->modalities; m++) total += p->counts[m];
    double *memory = malloc((size_t)(total * p->dim * (3 + more)) * sizeof(double));
    double *next = memory;
    for (int64_t m = 0; memory && m < p->modalities; m++) {
        begin[m] = next;
        next += p->counts[m] * p->dim * (3 + more);
    }
    return memory;
}

/* Return whether there was memory. */
EXPORTED(int, pairs)(const Pairs *p)
{
    const int64_t parts = p->modalities, dim = p->dim;
    double **mixtures = calloc((size_t)parts, sizeof(double *));
    double *memory = mixtures ? mixtures_memory(p, 0, mixtures) : NULL;
    const int made = memory != NULL;
    const double share = p->scale / (double)(parts * (parts - 1));
    int64_t row = 0;
    for (int64_t b = 0; made && b < p->batch; b++) {
        for (int64_t m = 0; m < parts; m++) read_mixture(p, b, m, mixtures[m]);
        for (int64_t i = 0, pair = 0; i < parts; i++)
            for (int64_t j = i + 1; j < parts; j++, pair++)
                for (int64_t k = 0; k < p->counts[i]; k++)
                    for (int64_t l = 0; l < p->counts[j]; l++) {
                        const double *x = mixtures[i] + k * dim, *y = mixtures[j] + l * dim;
                        const double cost =
                            squared_distance(x, y, dim)
                            + squared_distance(x + p->counts[i] * dim, y + p->counts[j] * dim, dim);
                        store(p->costs[pair], p->single, (b * p->counts[i] + k) * p->counts[j] + l,
                              p->scale * cost);
                    }
        double sum = 0;
        for (int64_t i = 0; p->term && i < parts; i++)
            for (int64_t k = 0; k < p->counts[i]; k++, row++)
                for (int64_t j = 0; j < parts; j++) {
                    if (i == j) continue;
                    const double *own = p->moments + row * (dim + 2);
                    const double distance = squared_distance(own + 2, mixtures[j] + k * dim, dim);
                    sum += p->present[b * parts + i] * p->present[b * parts + j]
                           * (own[1] + own[0] * distance);
                }
        if (p->term) p->term[b] = share * sum;
    }
    free(mixtures);
    free(memory);
    return made;
}

/* The derivative, given those by costs and term. */
EXPORTED(int, pairs_back)(const Pairs *p, void *const *by_means, void *const *by_variances,
                          double *by_moments)
{
    const int64_t parts = p->modalities, dim = p->dim;
    double **mixtures = calloc((size_t)parts, sizeof(double *));
    double *memory = mixtures ? mixtures_memory(p, 2, mixtures) : NULL;
    const int made = memory != NULL;
    const double share = p->scale / (double)(parts * (parts - 1));
    int64_t row = 0;
    for (int64_t b = 0; made && b < p->batch; b++) {
        for (int64_t m = 0; m < parts; m++) {
            const int64_t size = p->counts[m] * dim;
            read_mixture(p, b, m, mixtures[m]);
            memset(mixtures[m] + 3 * size, 0, (size_t)(2 * size) * sizeof(double));
        }
        for (int64_t i = 0, pair = 0; i < parts; i++)
            for (int64_t j = i + 1; j < parts; j++, pair++)
                for (int64_t k = 0; k < p->counts[i]; k++)
                    for (int64_t l = 0; l < p->counts[j]; l++) {
                        double *x = mixtures[i] + k * dim, *y = mixtures[j] + l * dim;
                        const int64_t of_x = p->counts[i] * dim, of_y = p->counts[j] * dim;
                        const double by = p->scale
                                          * load(p->costs[pair], p->single,
                                                 (b * p->counts[i] + k) * p->counts[j] + l);
                        distance_back(by, x, y, dim, x + 3 * of_x, y + 3 * of_y);
                        distance_back(by, x + of_x, y + of_y, dim, x + 4 * of_x, y + 4 * of_y);
                    }
        for (int64_t i = 0; p->term && i < parts; i++)
            for (int64_t k = 0; k < p->counts[i]; k++, row++) {
                const double *own = p->moments + row * (dim + 2);
                double *by_own = by_moments + row * (dim + 2);
                memset(by_own, 0, (size_t)(dim + 2) * sizeof(double));
                for (int64_t j = 0; j < parts; j++) {
                    if (i == j) continue;
                    double *mean = mixtures[j] + k * dim, *by_mean = mean + 3 * p->counts[j] * dim;
                    const double by =
                        share * p->term[b] * p->present[b * parts + i] * p->present[b * parts + j];
                    by_own[0] += by * squared_distance(own + 2, mean, dim);
                    by_own[1] += by;
                    distance_back(by * own[0], own + 2, mean, dim, by_own + 2, by_mean);
                }
            }
        for (int64_t m = 0; m < parts; m++) {
            const int64_t size = p->counts[m] * dim;
            const double *slope = mixtures[m] + 2 * size, *by_mean = slope + size;
            const double *by_deviation = by_mean + size;
            for (int64_t i = 0; i < size; i++) {
                store(by_means[m], p->single, b * size + i, by_mean[i]);
                store(by_variances[m], p->single, b * size + i, slope[i] * by_deviation[i]);
            }
        }
    }
    free(mixtures);
    free(memory);
    return made;
}

#endif
