/* The fit of mixtures to all modalities of a batch of problems, and its derivative.
 *
 * mixture/parameters.py and mixture/seeds.py define the units, the seeds and the start.
 */
#ifndef MULTIALIGN_MIXTURE_H
#define MULTIALIGN_MIXTURE_H

#include "em.h"
#include "seeds.h"

/* Of the variance, what components begin with at least. */
#define LEAST_SHARE 1e-3
/* Of the components of a given mixture that samples are only attributed to. */
#define SMALLEST_VARIANCE 1e-10

enum { DIFFERENTIATE_NONE, DIFFERENTIATE_LAST, DIFFERENTIATE_UNROLL };

/* What a fit is given. A tensor has the batch first and is contiguous; `single` says that those of
 * the caller's dtype are float32. */
typedef struct {
    int64_t single, spherical, differentiate, iterations, states, batch, modalities, dim;
    const int64_t *rows, *counts; /* N and K of each modality */
    double regularization, tolerance;
    void *const *features; /* (B, N, D) */
    void *const *masses;   /* (B, N) */
    void *const *origins;  /* (B, 1, D) */
    void *const *starts;   /* weights, means and covariances of each modality; null: from seeds */
    const double *const *paired; /* direction (B, M D) and uniforms (B, K, C); null: not paired */
    const double *const *own;    /* direction (B, D) and uniforms of each modality; null: none */
    void *const *mixtures; /* weights, means and covariances of each modality, or derivatives */
    double *moments;       /* (B, sum K, D + 2): weight, scatter and mean of each component */
    double *report;        /* (B, M, 3): iterations, whether it converged, log-likelihood */
    int64_t *seeds;        /* (B, sum K) */
    double *history;       /* (B, the sum of states * state_size): states of each modality */
} Fit;

/* One modality of one problem in its own units. */
typedef struct {
    Samples samples;
    double *z, *z_by_feature, *mass, *variance, *mean;
    double scale, total; /* total mass */
} Modality;

static double load(const void *x, int64_t single, int64_t i)
{
    return single ? (double)((const float *)x)[i] : ((const double *)x)[i];
}

static void store(void *x, int64_t single, int64_t i, double value)
{
    if (single)
        ((float *)x)[i] = (float)value;
    else
        ((double *)x)[i] = value;
}

/* Standardise modality m of problem b. */
static void standardise(const Fit *f, int64_t b, int64_t m, Modality *q)
{
    const int64_t rows = f->rows[m], dim = f->dim, single = f->single;
    double level = 0;
    q->total = 0;
    memset(q->mean, 0, (size_t)dim * sizeof(double));
    memset(q->variance, 0, (size_t)dim * sizeof(double));
    for (int64_t n = 0; n < rows; n++) {
        double *x = q->z + n * 2 * dim + dim;
        q->mass[n] = load(f->masses[m], single, b * rows + n);
        q->total += q->mass[n];
        SIMD for (int64_t d = 0; d < dim; d++) {
            x[d] = load(f->features[m], single, (b * rows + n) * dim + d)
                   - load(f->origins[m], single, b * dim + d);
            q->mean[d] += q->mass[n] * x[d];
        }
    }
    for (int64_t n = 0; n < rows; n++) {
        const double *x = q->z + n * 2 * dim + dim;
        SIMD for (int64_t d = 0; d < dim; d++)
            q->variance[d] += q->mass[n] * (x[d] - q->mean[d]) * (x[d] - q->mean[d]);
    }
    for (int64_t d = 0; d < dim; d++) level += q->variance[d];
    level /= (double)dim;
    const double constant = level == 0 ? 1 : level;
    q->scale = sqrt(constant);
    SIMD for (int64_t d = 0; d < dim; d++)
        q->variance[d] /= constant;
    for (int64_t n = 0; n < rows; n++) {
        double *square = q->z + n * 2 * dim, *x = square + dim;
        SIMD for (int64_t d = 0; d < dim; d++) {
            x[d] /= q->scale;
            square[d] = -0.5 * x[d] * x[d];
        }
    }
    for (int64_t i = 0; i < 2 * dim; i++)
        for (int64_t n = 0; n < rows; n++) q->z_by_feature[i * rows + n] = q->z[n * 2 * dim + i];
    const double floor =
        f->iterations ? f->regularization * (level == 0 ? 1 : level / constant) : SMALLEST_VARIANCE;
    q->samples = (Samples){rows,  f->counts[m], dim,  (int)f->spherical, q->total == 0,
                           floor, q->mass,      q->z, q->z_by_feature};
}

/* Draw the seeds of all modalities of problem b. */
static void seed_all(const Fit *f, int64_t b, const Modality *all, int64_t *chosen,
                     const double **pieces, double *joint)
{
    const int64_t parts = f->modalities, dim = f->dim;
    int64_t most = 0, first = 0;
    double present = 0;
    for (int64_t m = 0; m < parts; m++) most = f->counts[m] > most ? f->counts[m] : most;
    const int64_t uniforms = most * candidates_for(most);
    if (f->paired) {
        /* Modalities are paired: the masses of the complete rows, relative to the largest ones.
         * A modality that is absent altogether does not count. */
        const int64_t rows = f->rows[0];
        for (int64_t n = 0; n < rows; n++) joint[n] = 1;
        for (int64_t m = 0; m < parts; m++) {
            double top = all[m].mass[0];
            pieces[m] = all[m].z + dim;
            for (int64_t n = 0; n < rows; n++) top = all[m].mass[n] > top ? all[m].mass[n] : top;
            for (int64_t n = 0; top != 0 && n < rows; n++) joint[n] *= all[m].mass[n] / top;
        }
        for (int64_t n = 0; n < rows; n++) present += joint[n];
        if (present > 0 || !f->own) {
            double *scratch = joint + rows + most;
            int64_t *drawn = (int64_t *)(joint + rows);
            draw_seeds(pieces, parts, rows, dim, 2 * dim, joint, f->paired[0] + b * parts * dim,
                       f->paired[1] + b * uniforms, most, drawn, scratch);
            for (int64_t m = 0; m < parts; first += f->counts[m++])
                memcpy(chosen + first, drawn, (size_t)f->counts[m] * sizeof(int64_t));
            return;
        }
    }
    for (int64_t m = 0; m < parts; first += f->counts[m++]) {
        const int64_t count = f->paired ? most : f->counts[m];
        double *scratch = joint + count;
        int64_t *drawn = (int64_t *)joint;
        pieces[0] = all[m].z + dim;
        draw_seeds(pieces, 1, f->rows[m], dim, 2 * dim, all[m].mass, f->own[2 * m] + b * dim,
                   f->own[2 * m + 1] + b * count * candidates_for(count), count, drawn, scratch);
        memcpy(chosen + first, drawn, (size_t)f->counts[m] * sizeof(int64_t));
    }
}

/* Write the squared distance of each row from the nearest seed, and how many are as near. */
static void nearest_seed(const Modality *q, const int64_t *seeds, double *nearest, double *ties)
{
    const int64_t dim = q->samples.dim;
    for (int64_t n = 0; n < q->samples.rows; n++) {
        const double *x = q->z + n * 2 * dim + dim;
        nearest[n] = INFINITY;
        ties[n] = 0;
        for (int64_t k = 0; k < q->samples.count; k++) {
            const double *mean = q->z + seeds[k] * 2 * dim + dim;
            double distance = 0;
            SIMD_SUM(distance) for (int64_t d = 0; d < dim; d++)
                distance += (x[d] - mean[d]) * (x[d] - mean[d]);
            ties[n] = distance == nearest[n] ? ties[n] + 1 : (distance < nearest[n] ? 1 : ties[n]);
            nearest[n] = distance < nearest[n] ? distance : nearest[n];
        }
    }
}

/* Return the part of the variance that is left around the seeds, and the two that it is made of. */
static double left_share(const Modality *q, const double *nearest, double *left, double *total)
{
    *left = *total = 0;
    for (int64_t n = 0; n < q->samples.rows; n++) *left += q->mass[n] * nearest[n];
    for (int64_t d = 0; d < q->samples.dim; d++) *total += q->variance[d];
    return *left / (*total == 0 ? 1 : *total);
}

static double clamp_share(double share)
{
    return share < LEAST_SHARE ? LEAST_SHARE : (share > 1 ? 1 : share);
}

/* Write the state of equal weights whose means are the seeds. */
static void start_from_seeds(const Modality *q, const int64_t *seeds, double *state,
                             double *scratch)
{
    const int64_t dim = q->samples.dim, count = q->samples.count;
    double share = 1, average = 0, left, total;
    if (count > 1) {
        nearest_seed(q, seeds, scratch, scratch + q->samples.rows);
        share = clamp_share(left_share(q, scratch, &left, &total));
    }
    for (int64_t d = 0; d < dim; d++) average += share * q->variance[d] / (double)dim;
    for (int64_t k = 0; k < count; k++) {
        double *moments = state + count + k * 2 * dim;
        const double *mean = q->z + seeds[k] * 2 * dim + dim;
        state[k] = 1 / (double)count;
        for (int64_t d = 0; d < dim; d++) {
            const double variance = q->samples.spherical ? average : share * q->variance[d];
            moments[d] = -0.5 * (variance + mean[d] * mean[d]);
            moments[dim + d] = mean[d];
        }
    }
}

/* Add what the rows, masses and variances get from `by_state`, derivatives by the start. */
static void start_from_seeds_back(const Modality *q, const int64_t *seeds, const double *by_state,
                                  double *by_x, double *by_mass, double *by_variance,
                                  double *scratch)
{
    const int64_t rows = q->samples.rows, dim = q->samples.dim, count = q->samples.count;
    double *nearest = scratch, *ties = nearest + rows, *by_spread = ties + rows;
    double share = 1, left = 0, total = 0, by_share = 0, average = 0;
    memset(by_spread, 0, (size_t)dim * sizeof(double));
    for (int64_t k = 0; k < count; k++) {
        const double *by_first = by_state + count + k * 2 * dim;
        const double *mean = q->z + seeds[k] * 2 * dim + dim;
        double *by_row = by_x + seeds[k] * dim;
        for (int64_t d = 0; d < dim; d++) {
            by_spread[d] -= 0.5 * by_first[d];
            by_row[d] += by_first[dim + d] - mean[d] * by_first[d];
        }
    }
    for (int64_t d = 0; d < dim; d++) average += by_spread[d] / (double)dim;
    if (q->samples.spherical)
        for (int64_t d = 0; d < dim; d++) by_spread[d] = average;
    for (int64_t d = 0; d < dim; d++) by_share += by_spread[d] * q->variance[d];
    if (count > 1) {
        nearest_seed(q, seeds, nearest, ties);
        share = left_share(q, nearest, &left, &total);
        by_share = share >= LEAST_SHARE && share <= 1 ? by_share : 0;
    }
    const double used = clamp_share(share), divisor = total == 0 ? 1 : total;
    const double by_left = by_share / divisor;
    for (int64_t d = 0; d < dim; d++)
        by_variance[d] += used * by_spread[d] - (total == 0 ? 0 : by_left * left / divisor);
    if (count == 1) return;
    for (int64_t n = 0; n < rows; n++) {
        const double *x = q->z + n * 2 * dim + dim;
        const double factor = 2 * by_left * q->mass[n] / ties[n];
        by_mass[n] += by_left * nearest[n];
        for (int64_t k = 0; k < count; k++) {
            const double *mean = q->z + seeds[k] * 2 * dim + dim;
            double distance = 0;
            SIMD_SUM(distance) for (int64_t d = 0; d < dim; d++)
                distance += (x[d] - mean[d]) * (x[d] - mean[d]);
            if (distance != nearest[n]) continue;
            for (int64_t d = 0; d < dim; d++) {
                by_x[n * dim + d] += factor * (x[d] - mean[d]);
                by_x[seeds[k] * dim + d] -= factor * (x[d] - mean[d]);
            }
        }
    }
}

/* Write the state of a given mixture. */
static void start_from_mixture(const Fit *f, int64_t b, int64_t m, const Modality *q, double *state)
{
    const int64_t dim = f->dim, count = f->counts[m], single = f->single;
    void *const *start = f->starts + 3 * m;
    for (int64_t k = 0; k < count; k++) {
        double *moments = state + count + k * 2 * dim;
        const int64_t at = b * count + k;
        state[k] = load(start[0], single, at);
        for (int64_t d = 0; d < dim; d++) {
            const double variance = load(start[2], single, f->spherical ? at : at * dim + d);
            const double mean =
                (load(start[1], single, at * dim + d) - load(f->origins[m], single, b * dim + d))
                / q->scale;
            moments[d] = -0.5 * (variance / (q->scale * q->scale) - q->samples.floor + mean * mean);
            moments[dim + d] = mean;
        }
    }
}

/* Run EM in modality m of problem b from the first of the states; write what comes out. */
static void fit_modality(const Fit *f, int64_t b, int64_t m, const Modality *q, double *states,
                         double *moments, const Scratch *w)
{
    const int64_t dim = f->dim, count = f->counts[m], single = f->single;
    const int64_t size = state_size(count, dim), last = f->differentiate == DIFFERENTIATE_LAST;
    int64_t steps = f->iterations - last, converged = 0;
    double previous = 0, *report = f->report + (b * f->modalities + m) * 3;
#define STATE(t) (states + ((t) % f->states) * size)
    for (int64_t t = 0; t < steps; t++) {
        const double likelihood = em_step(&q->samples, STATE(t), STATE(t + 1), w);
        const double change = fabs(likelihood - previous);
        /* NaN never converges: stop, the result shows it. */
        if (f->tolerance > 0 && t > 0 && !(change >= f->tolerance)) {
            steps = t + 1;
            converged = 1;
        }
        previous = likelihood;
    }
    if (last) {
        em_step(&q->samples, STATE(steps), STATE(steps + 1), w);
        steps++;
    }
    const double *state = STATE(steps), *found = STATE(steps + 1);
    const double constant = 0.5 * (double)dim * log(2 * 3.14159265358979323846);
    report[0] = (double)steps;
    report[1] = (double)converged;
    report[2] = em_step(&q->samples, state, STATE(steps + 1), w) - constant * q->total
                - (double)dim * log(q->scale);
    void *const *mixture = f->mixtures + 3 * m;
    const double square = q->scale * q->scale;
    for (int64_t k = 0; k < count; k++) {
        const double *own = state + count + k * 2 * dim, *seen = found + count + k * 2 * dim;
        const int64_t at = b * count + k;
        double *out = moments + k * (dim + 2), *variances = w->change, spread = 0;
        variances_of(&q->samples, own, variances);
        store(mixture[0], single, at, state[k]);
        if (f->spherical) store(mixture[2], single, at, square * variances[0]);
        for (int64_t d = 0; d < dim; d++) {
            const double origin = load(f->origins[m], single, b * dim + d);
            store(mixture[1], single, at * dim + d, origin + q->scale * own[dim + d]);
            if (!f->spherical) store(mixture[2], single, at * dim + d, square * variances[d]);
            out[2 + d] = origin + q->scale * seen[dim + d];
            spread += -2 * seen[d] - seen[dim + d] * seen[dim + d];
        }
        out[0] = found[k];
        out[1] = square * found[k] * (spread < 0 ? 0 : spread);
    }
#undef STATE
}

/* Turn a derivative by the state before a step into one by that after it, as if means and variances
 * were the same: moments E x^2 of the same variance have another derivative by the mean. */
static void same_variances(const Samples *s, const double *before, const double *after,
                           double *by_state)
{
    const int64_t dim = s->dim;
    for (int64_t k = 0; k < s->count; k++) {
        const int64_t row = s->count + k * 2 * dim;
        for (int64_t d = row; d < row + dim; d++)
            by_state[dim + d] += (after[dim + d] - before[dim + d]) * by_state[d];
    }
}

/* Take derivatives by the mixture and the moments of modality m of problem b back to its samples
 * and the start; `longest` is the largest number of iterations in the batch. */
static void fit_modality_back(const Fit *f, int64_t b, int64_t m, const Modality *q,
                              const double *states, const double *by_moments, int64_t longest,
                              const int64_t *seeds, Derivative *by, void *by_features,
                              void *by_masses, void *const *by_starts, double *scratch,
                              const Scratch *w)
{
    const int64_t dim = f->dim, count = f->counts[m], rows = f->rows[m], single = f->single;
    const int64_t size = state_size(count, dim), width = 2 * dim;
    const double *report = f->report + (b * f->modalities + m) * 3;
    const int64_t steps = (int64_t)report[0], drawn = f->starts == NULL;
    const double scale = q->scale, square = scale * scale;
    void *const *by_mixture = f->mixtures + 3 * m;
    double *by_x = scratch, *by_variance = by_x + rows * dim, *by_row = by->state + count;
    double *whole = by_variance + dim;
    scratch = whole + count;
#define STATE(t) (states + ((t) % f->states) * size)
    const double *state = STATE(steps), *found = STATE(steps + 1);
    memset(by->z, 0, (size_t)(rows * width) * sizeof(double));
    memset(by->mass, 0, (size_t)rows * sizeof(double));
    memset(by_variance, 0, (size_t)dim * sizeof(double));
    for (int64_t k = 0; k < count; k++) {
        const double *seen = found + count + k * width, *given = by_moments + k * (dim + 2);
        const double by_spread = -2 * found[k] * square * given[1];
        double spread = 0;
        for (int64_t d = 0; d < dim; d++) {
            spread += -2 * seen[d] - seen[dim + d] * seen[dim + d];
            by_row[k * width + d] = by_spread;
            by_row[k * width + dim + d] = scale * given[2 + d] + seen[dim + d] * by_spread;
        }
        by->state[k] = whole[k] = given[0] + square * given[1] * spread;
    }
    em_step_back(&q->samples, state, found, by, w);
    if (f->differentiate == DIFFERENTIATE_NONE) {
        by->floor = 0;
    } else {
        for (int64_t k = 0; k < count; k++) {
            const int64_t at = b * count + k;
            const double *mean = state + count + k * width + dim;
            const double by_weight = load(by_mixture[0], single, at);
            by->state[k] += by_weight;
            whole[k] += by_weight;
            for (int64_t d = 0; d < dim; d++) {
                const double by_covariance =
                    square
                    * (f->spherical ? load(by_mixture[2], single, at) / (double)dim
                                    : load(by_mixture[2], single, at * dim + d));
                by_row[k * width + d] -= 2 * by_covariance;
                by_row[k * width + dim + d] +=
                    scale * load(by_mixture[1], single, at * dim + d) - 2 * mean[d] * by_covariance;
                by->floor += by_covariance;
            }
        }
        /* At a fixed point the derivative is a series, each term one step further back. */
        const int64_t last = f->differentiate == DIFFERENTIATE_LAST;
        const int64_t back = last ? 1 + (report[1] != 0 ? longest - 1 : 0) : steps;
        for (int64_t i = 0; i < back; i++) {
            const int64_t t = last ? steps : steps - i;
            if (last && i > 0) same_variances(&q->samples, STATE(t - 1), STATE(t), by->state);
            em_step_back(&q->samples, STATE(t - 1), STATE(t), by, w);
        }
        if (last || !drawn) /* the variances that it ends at do not depend on the floor */
            for (int64_t k = 0; k < count; k++)
                for (int64_t d = 0; d < dim; d++) by->floor += 0.5 * by_row[k * width + d];
    }
#undef STATE
    for (int64_t n = 0; n < rows; n++) {
        const double *x = q->z + n * width + dim, *by_z = by->z + n * width;
        SIMD for (int64_t d = 0; d < dim; d++)
            by_x[n * dim + d] = by_z[dim + d] - x[d] * by_z[d];
    }
    if (f->differentiate == DIFFERENTIATE_UNROLL && drawn)
        start_from_seeds_back(q, seeds, by->state, by_x, by->mass, by_variance, scratch);
    /* Scale and origin are constants; the variance is not. */
    double level = 0;
    for (int64_t d = 0; d < dim; d++) level += q->variance[d];
    const double by_level = f->iterations && level != 0 ? by->floor * f->regularization : 0;
    for (int64_t d = 0; d < dim; d++)
        by_variance[d] = (by_variance[d] + by_level / (double)dim) / square;
    for (int64_t n = 0; n < rows; n++) {
        const double *x = q->z + n * width + dim;
        double by_mass = by->mass[n];
        for (int64_t d = 0; d < dim; d++) {
            const double deviation = x[d] * scale - q->mean[d];
            by_mass += by_variance[d] * deviation * deviation;
            store(by_features, single, (b * rows + n) * dim + d,
                  by_x[n * dim + d] / scale + 2 * q->mass[n] * deviation * by_variance[d]);
        }
        store(by_masses, single, b * rows + n, by_mass);
    }
    if (drawn) return;
    const int64_t reaches = f->differentiate == DIFFERENTIATE_UNROLL;
    const double *start = states; /* the first of all states where derivatives reach it */
    for (int64_t k = 0; k < count; k++) {
        const int64_t at = b * count + k;
        const double *mean = start + count + k * width + dim;
        double by_covariance = 0;
        store(by_starts[0], single, at,
              reaches ? (q->samples.absent ? whole[k] : by->state[k]) : 0);
        for (int64_t d = 0; d < dim; d++) {
            const double by_first = by_row[k * width + d];
            const double by_mean = by_row[k * width + dim + d] - mean[d] * by_first;
            by_covariance += -0.5 * by_first / square;
            store(by_starts[1], single, at * dim + d, reaches ? by_mean / scale : 0);
            if (f->spherical) continue;
            store(by_starts[2], single, at * dim + d, reaches ? by_covariance : 0);
            by_covariance = 0;
        }
        if (f->spherical) store(by_starts[2], single, at, reaches ? by_covariance : 0);
    }
}

/* What the calls below work in. */
typedef struct {
    Modality *all;
    const double **pieces;
    double *rest;
    Scratch scratch;
    Derivative by;
    void *memory;
} Workspace;

static double *take_doubles(double **memory, int64_t count)
{
    double *taken = *memory;
    *memory += count;
    return taken;
}

/* Return whether there is memory for a problem with all its modalities. */
static int make_workspace(const Fit *f, Workspace *w)
{
    const int64_t parts = f->modalities, width = 2 * f->dim;
    int64_t rows = 0, count = 0, total = 0;
    for (int64_t m = 0; m < parts; m++) {
        rows = f->rows[m] > rows ? f->rows[m] : rows;
        count = f->counts[m] > count ? f->counts[m] : count;
        total += (2 * width + 1) * f->rows[m] + width;
    }
    const int64_t rest = (rows + 2) * f->dim * parts + 16 * rows + 2 * count;
    total += 3 * count * width + 3 * count * rows + (width + 3) * rows + state_size(count, f->dim)
             + count + rest;
    w->memory = malloc((size_t)total * sizeof(double)
                       + (size_t)parts * (sizeof(Modality) + sizeof(double *)));
    if (!w->memory) return 0;
    w->all = w->memory;
    w->pieces = (const double **)(w->all + parts);
    double *memory = (double *)(w->pieces + parts);
    for (int64_t m = 0; m < parts; m++) {
        w->all[m].z = take_doubles(&memory, width * f->rows[m]);
        w->all[m].z_by_feature = take_doubles(&memory, width * f->rows[m]);
        w->all[m].mass = take_doubles(&memory, f->rows[m]);
        w->all[m].variance = take_doubles(&memory, f->dim);
        w->all[m].mean = take_doubles(&memory, f->dim);
    }
    w->scratch.by_totals = take_doubles(&memory, 2 * count * width);
    w->scratch.joint = take_doubles(&memory, 2 * count * rows);
    w->scratch.posteriors = take_doubles(&memory, count * rows);
    w->scratch.offsets = take_doubles(&memory, count);
    w->scratch.tops = take_doubles(&memory, rows);
    w->scratch.totals = take_doubles(&memory, rows);
    w->scratch.change = take_doubles(&memory, count * width);
    w->by.state = take_doubles(&memory, state_size(count, f->dim));
    w->by.z = take_doubles(&memory, width * rows);
    w->by.mass = take_doubles(&memory, rows);
    w->rest = memory;
    return 1;
}

/* Find the rows of by_totals and slopes, and of joint and by_log_joint, for modality m. */
static Scratch *scratch_for(const Fit *f, int64_t m, Workspace *w)
{
    w->scratch.slopes = w->scratch.by_totals + f->counts[m] * 2 * f->dim;
    w->scratch.by_log_joint = w->scratch.joint + f->counts[m] * f->rows[m];
    return &w->scratch;
}

/* Fit all problems of a batch; return whether there was memory for it. */
EXPORTED(int, fit)(const Fit *f)
{
    Workspace w;
    int64_t chosen = 0, state = 0;
    const int made = make_workspace(f, &w);
    for (int64_t b = 0; made && b < f->batch; b++) {
        int64_t *seeds = f->seeds + chosen;
        for (int64_t m = 0; m < f->modalities; m++) standardise(f, b, m, w.all + m);
        if (!f->starts) seed_all(f, b, w.all, seeds, w.pieces, w.rest);
        for (int64_t m = 0; m < f->modalities; m++) {
            double *states = f->history + state;
            if (f->starts)
                start_from_mixture(f, b, m, w.all + m, states);
            else
                start_from_seeds(w.all + m, f->seeds + chosen, states, w.rest);
            fit_modality(f, b, m, w.all + m, states, f->moments + chosen * (f->dim + 2),
                         scratch_for(f, m, &w));
            chosen += f->counts[m];
            state += f->states * state_size(f->counts[m], f->dim);
        }
    }
    free(w.memory);
    return made;
}

/* The derivative: `mixtures` and `moments` of the fit are derivatives by them, and those by the
 * samples and the starts are written to the other arguments. */
EXPORTED(int, fit_back)(const Fit *f, void *const *by_features, void *const *by_masses,
                        void *const *by_starts)
{
    Workspace w;
    int64_t chosen = 0, state = 0;
    double longest = 0;
    const int made = make_workspace(f, &w);
    for (int64_t i = 0; i < f->batch * f->modalities; i++)
        longest = f->report[3 * i] > longest ? f->report[3 * i] : longest;
    for (int64_t b = 0; made && b < f->batch; b++)
        for (int64_t m = 0; m < f->modalities; m++) {
            standardise(f, b, m, w.all + m);
            w.by.floor = 0;
            fit_modality_back(f, b, m, w.all + m, f->history + state,
                              f->moments + chosen * (f->dim + 2), (int64_t)longest,
                              f->seeds + chosen, &w.by, by_features[m], by_masses[m],
                              by_starts ? by_starts + 3 * m : NULL, w.rest, scratch_for(f, m, &w));
            chosen += f->counts[m];
            state += f->states * state_size(f->counts[m], f->dim);
        }
    free(w.memory);
    return made;
}

#endif
