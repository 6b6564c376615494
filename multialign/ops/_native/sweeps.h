/* Sweeps: each potential in turn is set so that its marginal is the one wanted. */
#ifndef MULTIALIGN_SWEEPS_H
#define MULTIALIGN_SWEEPS_H

#include "plan.h"

typedef struct {
    Plan *plan;
    double epsilon;
    double constant; /* by which the plan in its factors is multiplied */
    double *start;   /* the potentials at which the plan's entries or factors stand */
    double *ratio;   /* exp(x - start) of what has been set since */
    double *before;  /* ratios before a sweep */
    double *table;   /* the plan's marginal of two variables, but for their ratios */
} Sweeps;

static int make_sweeps(Sweeps *sweeps, Plan *plan, Arena *arena)
{
    const Problem *problem = plan->problem;
    const int span = problem->first[problem->count];
    size_t largest = 0;
    for (int p = 0; p < problem->count; p++)
        for (int q = p + 1; q < problem->count; q++) {
            const size_t one = table_size(problem, p, q);
            largest = one > largest ? one : largest;
        }
    sweeps->plan = plan;
    sweeps->start = take(arena, span);
    sweeps->ratio = take(arena, span);
    sweeps->before = take(arena, span);
    sweeps->table = take(arena, largest);
    return sweeps->table != NULL;
}

/* Begin at potentials x and an epsilon. */
static void begin_sweeps(Sweeps *sweeps, const double *x, double epsilon)
{
    Plan *plan = sweeps->plan;
    const Problem *problem = plan->problem;
    const int span = problem->first[problem->count];
    sweeps->epsilon = epsilon;
    sweeps->constant = plan->is_triangle ? exp(3 * plan->raised) : 1;
    memcpy(sweeps->start, x, span * sizeof(double));
    for (int n = 0; n < span; n++) sweeps->ratio[n] = 1;
    if (plan->is_triangle) {
        fill_factors(plan, x, epsilon);
    } else {
        const double top = fill_entries(plan, x, epsilon);
        const size_t entries = entries_of(problem);
        const double shift = top < LOG_MAX / 2 ? 0 : top;
        /* A plan that has grown out of range by its constant alone is brought back. */
        double *restrict entry = plan->entries;
        SIMD for (size_t n = 0; n < entries; n++)
            entry[n] = exp_of(entry[n] - shift);
        for (int n = 0; n < problem->stride[0]; n++) sweeps->start[n] -= shift;
    }
}

/* Sum the plan over all variables but p < q; their own ratios are left out. */
static void sum_others(Sweeps *sweeps, int p, int q)
{
    Plan *plan = sweeps->plan;
    const Problem *problem = plan->problem;
    const double *ratio = sweeps->ratio;
    double *restrict table = sweeps->table;
    if (plan->is_triangle) {
        const int e = pair_of(problem, p, q), middle = 3 - p - q;
        other_factors(plan, e, ratio + problem->first[middle], table);
        const double *restrict own = plan->factor[e];
        const size_t entries = table_size(problem, p, q);
        SIMD for (size_t n = 0; n < entries; n++)
            table[n] *= own[n];
        return;
    }
    const int last = problem->count - 1, width = problem->stride[last];
    if (problem->count == 2) {
        memcpy(table, plan->entries, table_size(problem, p, q) * sizeof(double));
        return;
    }
    memset(table, 0, table_size(problem, p, q) * sizeof(double));
    const double *restrict across = ratio + problem->first[last];
    const size_t rows = rows_of(problem);
    int atoms[MAX_VARIABLES] = {0};
    for (size_t r = 0; r < rows; r++, next_row(problem, atoms)) {
        const double *restrict row = plan->entries + r * width;
        double weight = 1;
        for (int o = 0; o < last; o++)
            if (o != p && o != q) weight *= ratio[problem->first[o] + atoms[o]];
        if (q == last) {
            double *restrict out = table + (size_t)atoms[p] * width;
            SIMD for (int j = 0; j < width; j++)
                out[j] += weight * row[j];
        } else {
            double sum = 0;
            SIMD_SUM(sum) for (int j = 0; j < width; j++)
                sum += row[j] * across[j];
            table[atoms[p] * problem->stride[q] + atoms[q]] += weight * sum;
        }
    }
}

/* Set the ratios of one of the two variables of a table, given the other's. */
static void match(Sweeps *sweeps, int p, int q, int variable)
{
    const Problem *problem = sweeps->plan->problem;
    const double *restrict table = sweeps->table;
    const int rows = problem->size[p], width = problem->stride[q];
    const int here = problem->first[variable], size = problem->size[variable];
    double *restrict out = sweeps->ratio + here;
    const double *restrict nu = problem->nu + here;
    if (variable == p) {
        const double *restrict given = sweeps->ratio + problem->first[q];
        for (int i = 0; i < rows; i++) {
            const double *restrict row = table + (size_t)i * width;
            double sum = 0;
            SIMD_SUM(sum) for (int j = 0; j < width; j++)
                sum += row[j] * given[j];
            out[i] = sum;
        }
    } else {
        const double *restrict given = sweeps->ratio + problem->first[p];
        SIMD for (int j = 0; j < width; j++)
            out[j] = 0;
        for (int i = 0; i < rows; i++) {
            const double *restrict row = table + (size_t)i * width;
            const double factor_of = given[i];
            SIMD for (int j = 0; j < width; j++)
                out[j] += row[j] * factor_of;
        }
    }
    for (int n = 0; n < size; n++) out[n] = sweeps->constant * nu[n] / out[n];
    for (int n = size; n < problem->stride[variable]; n++) out[n] = 1;
    if (problem->relaxed[variable]) {
        /* nu exp(-x epsilon / rho) is then the marginal. */
        const double rho = problem->rho[variable];
        const double shrinkage = rho / (rho + sweeps->epsilon);
        const double *start = sweeps->start + here;
        for (int n = 0; n < size; n++) {
            const double x = shrinkage * (start[n] + log(out[n]));
            out[n] = exp(x - start[n]);
        }
    }
}

/* How far the last sweep moved potentials: the sum of |dx| nu. */
static double moved(const Sweeps *sweeps)
{
    const Problem *problem = sweeps->plan->problem;
    double total = 0;
    for (int n = 0; n < problem->first[problem->count]; n++)
        if (problem->nu[n] > 0)
            total += problem->nu[n] * fabs(log(sweeps->ratio[n] / sweeps->before[n]));
    return total;
}

/* One sweep; each pair of variables in turn is set `inner` further times. */
static void sweep(Sweeps *sweeps, int inner)
{
    const Problem *problem = sweeps->plan->problem;
    memcpy(sweeps->before, sweeps->ratio, problem->first[problem->count] * sizeof(double));
    for (int v = 0; v < problem->count; v++) {
        const int other = v ? v - 1 : problem->count - 1;
        const int p = v < other ? v : other, q = v < other ? other : v;
        sum_others(sweeps, p, q);
        match(sweeps, p, q, v);
        for (int n = 0; n < inner; n++) {
            match(sweeps, p, q, other);
            match(sweeps, p, q, v);
        }
    }
}

/* Write the potentials that were reached; 0 where the exponent range did not hold them. */
static int end_sweeps(const Sweeps *sweeps, double *x)
{
    const Problem *problem = sweeps->plan->problem;
    int finite = 1;
    for (int n = 0; n < problem->first[problem->count]; n++) {
        x[n] = problem->nu[n] > 0 ? sweeps->start[n] + log(sweeps->ratio[n]) : 0;
        finite &= isfinite(x[n]) != 0;
    }
    return finite;
}

/* Sweeps in logarithms, whatever the range: x at the entries that are held. */
static void sweep_logarithms(Plan *plan, double *x, double epsilon)
{
    const Problem *problem = plan->problem;
    const int last = problem->count - 1, width = problem->stride[last];
    const size_t rows = rows_of(problem);
    double top[LANES * 256], sum[LANES * 256];
    for (int v = 0; v < problem->count; v++) {
        const int here = problem->first[v], size = problem->size[v];
        fill_entries(plan, x, epsilon);
        for (int n = 0; n < size; n++) top[n] = -INFINITY, sum[n] = 0;
        for (int pass = 0; pass < 2; pass++) {
            int atoms[MAX_VARIABLES] = {0};
            for (size_t r = 0; r < rows; r++, next_row(problem, atoms)) {
                const double *row = plan->entries + r * width;
                for (int j = 0; j < problem->size[last]; j++) {
                    const int n = v == last ? j : atoms[v];
                    if (pass) {
                        if (row[j] > -INFINITY) sum[n] += exp(row[j] - top[n]);
                    } else if (row[j] > top[n]) {
                        top[n] = row[j];
                    }
                }
            }
        }
        const double shrinkage =
            problem->relaxed[v] ? problem->rho[v] / (problem->rho[v] + epsilon) : 1;
        for (int n = 0; n < size; n++) {
            const double matched = x[here + n] + log(problem->nu[here + n]) - top[n] - log(sum[n]);
            x[here + n] = shrinkage * matched;
        }
    }
}

#endif
