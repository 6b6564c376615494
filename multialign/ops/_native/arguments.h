/* The arguments of a call, and one problem of a batch read from them: the atoms that have mass,
 * marginals divided by their sums, costs centred. */
#ifndef MULTIALIGN_ARGUMENTS_H
#define MULTIALIGN_ARGUMENTS_H

#include "newton.h"

/* BLANK is added where a marginal has no mass: its costs count nothing. */
enum { SOLVED = 0, STOPPED = 1, LEFT = 2, BLANK = 4 };

/* The arguments of a call; library.py has the same fields. Tensors are contiguous, the batch first;
 * costs and marginals are double or, if `single`, float. */
typedef struct {
    int64_t batch, count;
    int64_t size[MAX_VARIABLES];
    const void *cost[MAX_PAIRS]; /* by pair; NULL where no cost acts */
    const void *full;            /* or one over all variables */
    const void *marginal[MAX_VARIABLES];
    const double *epsilon;
    const double *rho[MAX_VARIABLES]; /* NULL for a hard constraint */
    int64_t single;
    int64_t prepared;  /* marginals are normalised and costs centred; infinity forbids */
    int64_t by_sweeps; /* plain sweeps, no Newton steps */
    int64_t symmetric; /* one symmetric table is the cost of every pair */
    int64_t max_iterations;
    double tolerance;
    /* Results; those that are not wanted are NULL. */
    double *potentials, *offsets; /* all blocks one after another */
    double *value, *transport_cost, *error;
    int64_t *iterations, *status;
    double *marginal_gradient; /* of value */
    double *pairs[MAX_PAIRS];
    const double *candidate; /* potentials in cost units, taken where better; or NULL */
} Call;

typedef struct {
    Problem problem;
    Arena arena;
    void *storage;
    int *present[MAX_VARIABLES]; /* the places of atoms that have mass */
    int is_out[MAX_VARIABLES];   /* whether a marginal has no mass at all */
    double mass[MAX_VARIABLES];
    double *offset;                   /* of costs, by atom */
    size_t begins[MAX_VARIABLES + 1]; /* where each block begins among all atoms */
} Loaded;

static double read_number(const void *numbers, int single, size_t n)
{
    return single ? ((const float *)numbers)[n] : ((const double *)numbers)[n];
}

static size_t storage_for(const Call *call)
{
    size_t span = 0, tables = 0, largest = 0, atoms = 0;
    for (int p = 0; p < call->count; p++) {
        span += padded(call->size[p]);
        atoms += call->size[p];
        for (int q = p + 1; q < call->count; q++) {
            const size_t one = (size_t)padded(call->size[p]) * padded(call->size[q]);
            tables += one + LANES;
            largest = one > largest ? one : largest;
        }
    }
    size_t total = span * span + 32 * (span + LANES) + 8 * tables + 8 * (largest + LANES) + atoms;
    if (call->full) {
        size_t full = padded(call->size[call->count - 1]);
        for (int p = 0; p < call->count - 1; p++) full *= call->size[p];
        total += full + LANES;
    }
    return total * sizeof(double) + 64 * 256;
}

/* Read marginals; 0 where one is not finite or negative. */
static int load_marginals(Loaded *loaded, const Call *call, size_t b)
{
    Problem *problem = &loaded->problem;
    problem->count = (int)call->count;
    problem->is_relaxed = 0;
    problem->least = 1;
    double heaviest = 0;
    for (int p = 0; p < problem->count; p++) {
        const size_t size = call->size[p];
        loaded->begins[p + 1] = loaded->begins[p] + size;
        int kept = 0;
        double total = 0;
        for (size_t k = 0; k < size; k++) {
            const double mass = read_number(call->marginal[p], call->single, b * size + k);
            if (!(mass >= 0) || !(mass < INFINITY)) return 0;
            if (mass > 0) loaded->present[p][kept++] = (int)k;
            total += mass;
        }
        if (!(total < INFINITY)) return 0;
        loaded->is_out[p] = !kept;
        if (!kept) loaded->present[p][kept++] = 0;
        problem->size[p] = kept;
        problem->stride[p] = padded(kept);
        problem->first[p + 1] = problem->first[p] + problem->stride[p];
        loaded->mass[p] = total;
        heaviest = fmax(heaviest, total);
        problem->relaxed[p] = call->rho[p] != NULL;
        problem->rho[p] = call->rho[p] ? call->rho[p][b] : INFINITY;
        problem->is_relaxed |= problem->relaxed[p];
    }
    const int span = problem->first[problem->count];
    problem->nu = take(&loaded->arena, span);
    problem->root = take(&loaded->arena, span);
    problem->inverse_root = take(&loaded->arena, span);
    loaded->offset = take(&loaded->arena, span);
    memset(problem->nu, 0, span * sizeof(double));
    memset(problem->root, 0, span * sizeof(double));
    memset(problem->inverse_root, 0, span * sizeof(double));
    memset(loaded->offset, 0, span * sizeof(double));
    for (int p = 0; p < problem->count; p++) {
        /* With a penalty marginals are taken as given; else each is divided by its sum. */
        const double total = call->prepared || problem->is_relaxed ? 1 : loaded->mass[p];
        for (int k = 0; k < problem->size[p]; k++) {
            const size_t from = b * call->size[p] + loaded->present[p][k];
            const double mass = loaded->is_out[p]
                                    ? (problem->is_relaxed ? heaviest : 1)
                                    : read_number(call->marginal[p], call->single, from) / total;
            const int n = problem->first[p] + k;
            problem->nu[n] = mass;
            problem->root[n] = sqrt(mass);
            problem->inverse_root[n] = 1 / problem->root[n];
            problem->least = fmin(problem->least, mass);
        }
    }
    return 1;
}

/* Read a table of the atoms that are there, in rows of `stride`; return its largest entry, NaN
 * where one is NaN or -inf. */
static double load_table(const Loaded *loaded, const Call *call, const void *from, size_t b, int p,
                         int q, double *out)
{
    const Problem *problem = &loaded->problem;
    const size_t columns = call->size[q], start = b * call->size[p] * columns;
    const int stride = problem->stride[q];
    const int blank = loaded->is_out[p] || loaded->is_out[q];
    double largest = 0;
    for (int i = 0; i < problem->size[p]; i++) {
        const size_t row = start + loaded->present[p][i] * columns;
        for (int j = 0; j < stride; j++) {
            double cost = INFINITY;
            if (j < problem->size[q]) {
                cost = blank ? 0 : read_number(from, call->single, row + loaded->present[q][j]);
                if (!(cost > -INFINITY)) return NAN;
                largest = fmax(largest, fabs(cost));
            }
            out[(size_t)i * stride + j] = cost;
        }
    }
    return largest;
}

/* Read a table over all variables, likewise. */
static double load_full(const Loaded *loaded, const Call *call, size_t b, double *out)
{
    const Problem *problem = &loaded->problem;
    const int last = problem->count - 1, stride = problem->stride[last];
    int blank = 0, atoms[MAX_VARIABLES] = {0};
    size_t entries = 1;
    for (int p = 0; p < problem->count; p++) {
        blank |= loaded->is_out[p];
        entries *= call->size[p];
    }
    double largest = 0;
    for (size_t r = 0; r < rows_of(problem); r++, next_row(problem, atoms)) {
        size_t row = 0;
        for (int p = 0; p < last; p++) row = row * call->size[p] + loaded->present[p][atoms[p]];
        for (int j = 0; j < stride; j++) {
            double cost = INFINITY;
            if (j < problem->size[last]) {
                const size_t n = b * entries + row * call->size[last] + loaded->present[last][j];
                cost = blank ? 0 : read_number(call->full, call->single, n);
                if (!(cost > -INFINITY)) return NAN;
                largest = fmax(largest, fabs(cost));
            }
            out[r * stride + j] = cost;
        }
    }
    return largest;
}

/* Split a table into a part of mean 0 given either variable, and offsets (see prepare.py). */
static void centre_table(Loaded *loaded, int p, int q, double *cost, double *means)
{
    Problem *problem = &loaded->problem;
    const int rows = problem->size[p], columns = problem->size[q], stride = problem->stride[q];
    const double *restrict across = problem->nu + problem->first[q];
    double mean = 0;
    memset(means, 0, stride * sizeof(double));
    for (int i = 0; i < rows; i++) {
        double *restrict row = cost + (size_t)i * stride;
        const double weight = problem->nu[problem->first[p] + i];
        double sum = 0;
        SIMD_SUM(sum) for (int j = 0; j < columns; j++)
            sum += row[j] * across[j];
        SIMD for (int j = 0; j < columns; j++) {
            means[j] += weight * row[j];
            row[j] -= sum;
        }
        mean += weight * sum;
        loaded->offset[problem->first[p] + i] += sum;
    }
    for (int i = 0; i < rows; i++) {
        double *restrict row = cost + (size_t)i * stride;
        SIMD for (int j = 0; j < columns; j++)
            row[j] -= means[j] - mean;
        loaded->offset[problem->first[p] + i] -= mean / 2;
    }
    for (int j = 0; j < columns; j++) loaded->offset[problem->first[q] + j] += means[j] - mean / 2;
}

/* The same of a table over all variables. */
static void centre_full(Loaded *loaded, double *cost, double *means)
{
    Problem *problem = &loaded->problem;
    const int count = problem->count, last = count - 1, stride = problem->stride[last];
    const size_t rows = rows_of(problem);
    int atoms[MAX_VARIABLES] = {0};
    double mean = 0;
    memset(means, 0, problem->first[count] * sizeof(double));
    for (size_t r = 0; r < rows; r++, next_row(problem, atoms)) {
        const double *row = cost + r * stride;
        double weight = 1;
        for (int p = 0; p < last; p++) weight *= problem->nu[problem->first[p] + atoms[p]];
        for (int j = 0; j < problem->size[last]; j++) {
            const double part = weight * problem->nu[problem->first[last] + j] * row[j];
            mean += part;
            means[problem->first[last] + j] += part;
            for (int p = 0; p < last; p++) means[problem->first[p] + atoms[p]] += part;
        }
    }
    const double share = mean * last / count;
    for (int p = 0; p < count; p++)
        for (int n = problem->first[p]; n < problem->first[p] + problem->size[p]; n++) {
            means[n] = means[n] / problem->nu[n] - share;
            loaded->offset[n] += means[n];
        }
    memset(atoms, 0, sizeof atoms);
    for (size_t r = 0; r < rows; r++, next_row(problem, atoms)) {
        double *row = cost + r * stride, base = 0;
        for (int p = 0; p < last; p++) base += means[problem->first[p] + atoms[p]];
        for (int j = 0; j < problem->size[last]; j++)
            row[j] -= base + means[problem->first[last] + j];
    }
}

/* The mean square of a table under independent marginals; a forbidden entry counts nothing. The
 * largest absolute value goes into the problem. */
static double mean_square(Problem *problem, int p, int q, const double *cost)
{
    double total = 0, largest = 0;
    for (int i = 0; i < problem->size[p]; i++) {
        const double *row = cost + (size_t)i * problem->stride[q];
        double sum = 0;
        for (int j = 0; j < problem->size[q]; j++) {
            const double entry = row[j] < INFINITY ? row[j] : 0;
            sum += entry * entry * problem->nu[problem->first[q] + j];
            largest = fmax(largest, fabs(entry));
        }
        total += sum * problem->nu[problem->first[p] + i];
    }
    problem->largest = fmax(problem->largest, largest);
    return total;
}

static double mean_square_full(Problem *problem, const double *cost)
{
    const int last = problem->count - 1, stride = problem->stride[last];
    int atoms[MAX_VARIABLES] = {0};
    double total = 0;
    for (size_t r = 0; r < rows_of(problem); r++, next_row(problem, atoms)) {
        double weight = 1;
        for (int p = 0; p < last; p++) weight *= problem->nu[problem->first[p] + atoms[p]];
        for (int j = 0; j < problem->size[last]; j++) {
            const double entry = cost[r * stride + j] < INFINITY ? cost[r * stride + j] : 0;
            total += weight * entry * entry * problem->nu[problem->first[last] + j];
            problem->largest = fmax(problem->largest, fabs(entry));
        }
    }
    return total;
}

/* Costs up to this many epsilon are centred; larger ones take the digits of others (see
 * absorption.py). */
static const double MOST_COST = 268435456.0;
/* From this many entries products of matrices take less time than the plan itself. */
static const size_t TRIANGLE_ENTRIES = 128;

/* Read a problem of the batch. SOLVED: it can be solved; STOPPED: its result is NaN; LEFT. */
static int load_problem(Loaded *loaded, const Call *call, size_t b)
{
    Problem *problem = &loaded->problem;
    problem->epsilon = call->epsilon[b];
    if (!(problem->epsilon > 0) || !(problem->epsilon < INFINITY)) return STOPPED;
    if (!load_marginals(loaded, call, b)) return STOPPED;
    for (int p = 0; p < problem->count; p++)
        if (problem->relaxed[p] && !(problem->rho[p] > 0)) return STOPPED;
    const int centred = !call->prepared && !problem->is_relaxed;
    const int span = problem->first[problem->count];
    double largest = 0, square = 0;
    problem->largest = 0;
    problem->full = NULL;
    double *means = take(&loaded->arena, 2 * (size_t)span);
    if (call->full) {
        problem->full = take(&loaded->arena, entries_of(problem));
        if (!problem->full) return LEFT;
        largest = load_full(loaded, call, b, problem->full);
        if (isnan(largest)) return STOPPED;
        if (!call->prepared && largest > MOST_COST * problem->epsilon) return LEFT;
        if (centred) centre_full(loaded, problem->full, means);
        square = mean_square_full(problem, problem->full);
    } else {
        int is_left = 0;
        for (int p = 0; p < problem->count; p++)
            for (int q = p + 1; q < problem->count; q++) {
                const int e = pair_of(problem, p, q);
                problem->cost[e] = NULL;
                if (!call->cost[e]) continue;
                problem->cost[e] = take(&loaded->arena, table_size(problem, p, q));
                if (!problem->cost[e]) return LEFT;
                largest = load_table(loaded, call, call->cost[e], b, p, q, problem->cost[e]);
                if (isnan(largest)) return STOPPED;
                if (!call->prepared && largest > MOST_COST * problem->epsilon) is_left = 1;
                if (is_left) continue;
                if (centred) centre_table(loaded, p, q, problem->cost[e], means);
                square += mean_square(problem, p, q, problem->cost[e]);
            }
        if (is_left) return LEFT;
    }
    problem->deviation = sqrt(square);
    return SOLVED;
}

#endif
