/* EM for one mixture of axis-aligned Gaussians, by moments, and its derivative.
 *
 * The log-density of component k is linear in z(x) = (-x^2 / 2, x): see mixture/em_moments.py,
 * which defines what is computed here. A state is K weights and then the K moments E z(x), each of
 * 2 D numbers.
 */
#ifndef MULTIALIGN_EM_H
#define MULTIALIGN_EM_H

#include "core.h"
#include "exp.h"
#include "log.h"
#include "product.h"

/* Mass that each component has at its own moments, so that one without samples keeps them. */
#define INERTIA 1e-30

typedef struct {
    int64_t rows, count, dim; /* N, K, D */
    int spherical;
    int absent;                 /* whether there is no sample */
    double floor;               /* of the variances */
    const double *mass;         /* N */
    const double *z;            /* N x 2 D */
    const double *z_by_feature; /* 2 D x N */
} Samples;

typedef struct {
    double *by_totals;    /* K x 2 D */
    double *slopes;       /* K x 2 D, after by_totals: a_k */
    double *joint;        /* K x N: masses times posteriors */
    double *by_log_joint; /* K x N, after joint */
    double *posteriors;   /* K x N */
    double *offsets;      /* K */
    double *tops;         /* N */
    double *totals;       /* N */
    double *change;       /* K x 2 D */
} Scratch;

static int64_t state_size(int64_t count, int64_t dim)
{
    return count * (1 + 2 * dim);
}

/* Put the variances of component moments (2 D) in `out`; rounding may take one below the floor. */
static void variances_of(const Samples *s, const double *moments, double *out)
{
    const double *mean = moments + s->dim;
    const double floor = s->floor;
    double sum = 0;
    SIMD_SUM(sum) for (int64_t d = 0; d < s->dim; d++) {
        out[d] = floor - 2 * moments[d] - mean[d] * mean[d];
        sum += out[d];
    }
    const double average = sum / (double)s->dim;
    SIMD for (int64_t d = 0; d < s->dim; d++) {
        const double variance = s->spherical ? average : out[d];
        out[d] = variance < floor ? floor : variance;
    }
}

/* Compute a_k and c_k. */
static void coefficients(const Samples *s, const double *state, const Scratch *w)
{
    const int64_t dim = s->dim;
    for (int64_t k = 0; k < s->count; k++) {
        const double *moments = state + s->count + 2 * dim * k, *mean = moments + dim;
        double *precision = w->slopes + 2 * dim * k, *linear = precision + dim;
        double norm = 0;
        variances_of(s, moments, precision);
        SIMD_SUM(norm) for (int64_t d = 0; d < dim; d++) {
            norm += log_of(precision[d]);
            precision[d] = 1 / precision[d];
            linear[d] = mean[d] * precision[d];
            norm += mean[d] * linear[d];
        }
        w->offsets[k] = log_of(state[k]) - 0.5 * norm;
    }
}

/* Compute the posteriors under a state; return the mean of c_k + a_k z(x) over the samples. */
static double expect(const Samples *s, const double *state, const Scratch *w)
{
    const int64_t rows = s->rows, count = s->count;
    double *tops = w->tops, *totals = w->totals, likelihood = 0;
    coefficients(s, state, w);
    for (int64_t k = 0; k < count; k++)
        for (int64_t n = 0; n < rows; n++) w->posteriors[k * rows + n] = w->offsets[k];
    add_product(w->slopes, 2 * s->dim, 1, s->z_by_feature, rows, w->posteriors, rows, count,
                2 * s->dim, rows);
    for (int64_t n = 0; n < rows; n++) tops[n] = -INFINITY, totals[n] = 0;
    for (int64_t k = 0; k < count; k++) {
        const double *row = w->posteriors + k * rows;
        SIMD for (int64_t n = 0; n < rows; n++)
            tops[n] = row[n] > tops[n] ? row[n] : tops[n];
    }
    for (int64_t k = 0; k < count; k++) {
        double *row = w->posteriors + k * rows;
        SIMD for (int64_t n = 0; n < rows; n++) {
            row[n] = exp_of(row[n] - tops[n]);
            totals[n] += row[n];
        }
    }
    SIMD_SUM(likelihood) for (int64_t n = 0; n < rows; n++) {
        likelihood += s->mass[n] * (tops[n] + log_of(totals[n]));
        totals[n] = 1 / totals[n];
    }
    for (int64_t k = 0; k < count; k++) {
        double *row = w->posteriors + k * rows, *joint = w->joint + k * rows;
        SIMD for (int64_t n = 0; n < rows; n++) {
            row[n] *= totals[n];
            joint[n] = s->mass[n] * row[n];
        }
    }
    return likelihood;
}

/* Write the state after an EM step; return the mean log-density before it, but for a constant. */
static double em_step(const Samples *s, const double *before, double *after, const Scratch *w)
{
    const int64_t rows = s->rows, count = s->count, width = 2 * s->dim;
    const double likelihood = expect(s, before, w);
    const double *old = before + count;
    double *moments = after + count;
    memset(moments, 0, (size_t)(count * width) * sizeof(double));
    add_product(w->joint, rows, 1, s->z, width, moments, width, count, rows, width);
    for (int64_t k = 0; k < count; k++) {
        double share = 0;
        SIMD_SUM(share) for (int64_t n = 0; n < rows; n++)
            share += w->joint[k * rows + n];
        const double inverse = 1 / (share + INERTIA);
        SIMD for (int64_t i = k * width; i < (k + 1) * width; i++)
            moments[i] = (moments[i] + INERTIA * old[i]) * inverse;
        after[k] = share + (s->absent ? before[k] : 0);
    }
    return likelihood;
}

/* Make a derivative by the moments of a component one by those of an average variance. */
static void average_spread(const Samples *s, const double *mean, double *by_moments)
{
    const int64_t dim = s->dim;
    double sum = 0;
    SIMD_SUM(sum) for (int64_t d = 0; d < dim; d++)
        sum += by_moments[d];
    const double average = sum / (double)dim;
    SIMD for (int64_t d = 0; d < dim; d++) {
        by_moments[dim + d] += mean[d] * (average - by_moments[d]);
        by_moments[d] = average;
    }
}

typedef struct {
    double *state; /* K + 2 K D */
    double *z;     /* N x 2 D */
    double *mass;  /* N */
    double floor;
} Derivative;

/* Take a derivative from the state after a step to the one before, adding what samples get. */
static void em_step_back(const Samples *s, const double *before, const double *after,
                         Derivative *by, const Scratch *w)
{
    const int64_t rows = s->rows, count = s->count, dim = s->dim, width = 2 * dim;
    double *by_weights = by->state, *by_moments = by->state + count;
    double *by_totals = w->by_totals, *by_log_joint = w->by_log_joint, *average = w->tops;
    expect(s, before, w);
    /* Through the M-step. */
    for (int64_t k = 0; k < count; k++) {
        const double *moments = after + count + k * width;
        const double inverse = 1 / ((s->absent ? 0 : after[k]) + INERTIA);
        double sum = 0;
        SIMD_SUM(sum) for (int64_t i = 0; i < width; i++) {
            by_totals[k * width + i] = inverse * by_moments[k * width + i];
            sum += by_totals[k * width + i] * moments[i];
        }
        const double by_share = by_weights[k] - sum;
        for (int64_t n = 0; n < rows; n++) by_log_joint[k * rows + n] = by_share;
    }
    /* Through the posteriors. */
    add_product(by_totals, width, 1, s->z_by_feature, rows, by_log_joint, rows, count, width, rows);
    memset(average, 0, (size_t)rows * sizeof(double));
    for (int64_t k = 0; k < count; k++) SIMD
        for (int64_t n = 0; n < rows; n++)
            average[n] += w->posteriors[k * rows + n] * by_log_joint[k * rows + n];
    if (!s->absent) SIMD
        for (int64_t n = 0; n < rows; n++) by->mass[n] += average[n];
    for (int64_t k = 0; k < count; k++) {
        double sum = 0;
        SIMD_SUM(sum) for (int64_t n = 0; n < rows; n++) {
            const int64_t i = k * rows + n;
            by_log_joint[i] = w->joint[i] * (by_log_joint[i] - average[n]);
            sum += by_log_joint[i];
        }
        w->offsets[k] = sum;
    }
    memset(w->change, 0, (size_t)(count * width) * sizeof(double));
    add_product(by_log_joint, rows, 1, s->z, width, w->change, width, count, rows, width);
    /* Two products in one: by_totals with joint, and slopes with by_log_joint. */
    add_product(w->joint, 1, rows, by_totals, width, by->z, width, rows, 2 * count, width);
    /* Through a and c. */
    for (int64_t k = 0; k < count; k++) {
        const double *mean = before + count + k * width + dim, *precision = w->slopes + k * width;
        const double by_offset = w->offsets[k];
        double *change = w->change + k * width, sum = 0;
        SIMD for (int64_t d = 0; d < dim; d++) {
            const double square = 2 * precision[d] * precision[d], mixed = square * mean[d];
            const double half = -0.5 * mixed * mean[d];
            const double by_first = change[d], by_second = change[dim + d];
            change[d] = square * by_first + mixed * by_second + by_offset * (precision[d] + half);
            change[dim + d] = (precision[d] + mixed * mean[d]) * by_second + mixed * by_first
                              + by_offset * half * mean[d];
        }
        if (s->spherical) average_spread(s, mean, change);
        SIMD_SUM(sum) for (int64_t d = 0; d < dim; d++)
            sum += change[d];
        by->floor -= 0.5 * sum;
        SIMD for (int64_t i = 0; i < width; i++)
            by_moments[k * width + i] = change[i] + INERTIA * by_totals[k * width + i];
        by_weights[k] = by_offset / (before[k] < INERTIA ? INERTIA : before[k]);
    }
}

#endif
