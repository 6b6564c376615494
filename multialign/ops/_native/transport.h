/* Whole small transport problems, from what a user gives to the solution, and the way back. */
#ifndef MULTIALIGN_TRANSPORT_H
#define MULTIALIGN_TRANSPORT_H

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

/* The way back: of the sum of pairs and transport_cost with these weights, the gradient with
 * respect to all inputs. NULL weighs nothing, or is not wanted. */
typedef struct {
    const double *pairs[MAX_PAIRS], *transport_cost;
    double *cost[MAX_PAIRS], *marginal, *epsilon;
} Weights;

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

static int is_triangle(const Problem *problem)
{
    return problem->count == 3 && !problem->full && entries_of(problem) >= TRIANGLE_ENTRIES;
}

/* Write a vector over atoms that are there to its place in a batch; 0 elsewhere. */
static void write_atoms(const Loaded *loaded, size_t b, const double *x, double *out)
{
    const Problem *problem = &loaded->problem;
    const size_t all = loaded->begins[problem->count];
    memset(out + b * all, 0, all * sizeof(double));
    for (int p = 0; p < problem->count; p++)
        for (int k = 0; k < problem->size[p]; k++)
            out[b * all + loaded->begins[p] + loaded->present[p][k]] = x[problem->first[p] + k];
}

static void read_atoms(const Loaded *loaded, size_t b, const double *from, double *x)
{
    const Problem *problem = &loaded->problem;
    const size_t all = loaded->begins[problem->count];
    memset(x, 0, problem->first[problem->count] * sizeof(double));
    for (int p = 0; p < problem->count; p++)
        for (int k = 0; k < problem->size[p]; k++)
            x[problem->first[p] + k] = from[b * all + loaded->begins[p] + loaded->present[p][k]];
}

static void write_table(const Loaded *loaded, const Call *call, size_t b, int p, int q,
                        const double *table, double *out)
{
    const Problem *problem = &loaded->problem;
    const size_t columns = call->size[q], start = b * call->size[p] * columns;
    memset(out + start, 0, call->size[p] * columns * sizeof(double));
    for (int i = 0; i < problem->size[p]; i++)
        for (int j = 0; j < problem->size[q]; j++)
            out[start + loaded->present[p][i] * columns + loaded->present[q][j]] =
                table[(size_t)i * problem->stride[q] + j];
}

/* <T, C> without offsets; a forbidden entry costs nothing. */
static double sum_costs(const Plan *plan)
{
    const Problem *problem = plan->problem;
    double total = 0;
    if (problem->full) {
        const size_t entries = entries_of(problem);
        for (size_t n = 0; n < entries; n++)
            if (problem->full[n] < INFINITY) total += plan->entries[n] * problem->full[n];
        return total;
    }
    for (int p = 0; p < problem->count; p++)
        for (int q = p + 1; q < problem->count; q++) {
            const int e = pair_of(problem, p, q);
            const double *cost = problem->cost[e], *table = plan->pairs[e];
            if (!cost) continue;
            for (int i = 0; i < problem->size[p]; i++)
                for (int j = 0; j < problem->size[q]; j++) {
                    const size_t n = (size_t)i * problem->stride[q] + j;
                    if (cost[n] < INFINITY) total += table[n] * cost[n];
                }
        }
    return total;
}

/* Write results that are all of one value. */
static void write_constant(const Call *call, size_t b, double value)
{
    size_t all = 0;
    for (int p = 0; p < call->count; p++) all += call->size[p];
    for (size_t n = b * all; n < (b + 1) * all; n++) {
        call->potentials[n] = value;
        if (call->offsets) call->offsets[n] = value;
    }
    call->error[b] = value;
    call->iterations[b] = 0;
    if (call->value) call->value[b] = value;
    if (call->transport_cost) call->transport_cost[b] = value;
    if (call->marginal_gradient)
        for (size_t n = b * all; n < (b + 1) * all; n++) call->marginal_gradient[n] = value;
    for (int e = 0, p = 0; p < call->count; p++)
        for (int q = p + 1; q < call->count; q++, e++) {
            const size_t size = call->size[p] * call->size[q];
            if (call->pairs[e])
                for (size_t n = b * size; n < (b + 1) * size; n++) call->pairs[e][n] = value;
        }
}

/* Write the gradient with respect to masses, given that with respect to these divided by their
 * sums; a marginal without mass has none. f is changed. */
static void write_through_sums(const Loaded *loaded, size_t b, double *f, double *out)
{
    const Problem *problem = &loaded->problem;
    for (int p = 0; p < problem->count; p++) {
        double mean = 0;
        for (int n = problem->first[p]; n < problem->first[p + 1]; n++)
            mean += f[n] * problem->nu[n];
        for (int n = problem->first[p]; n < problem->first[p + 1]; n++)
            f[n] = loaded->is_out[p] ? 0 : (f[n] - mean) / loaded->mass[p];
    }
    write_atoms(loaded, b, f, out);
}

/* Write the solution at x, where the plan has been evaluated. */
static void write_solution(Loaded *loaded, const Call *call, size_t b, Solver *solver, double *x)
{
    const Problem *problem = &loaded->problem;
    Plan *plan = solver->plan;
    if (!problem->is_relaxed) {
        const double shift = plan->log_total / problem->count;
        for (int p = 0; p < problem->count; p++)
            for (int k = 0; k < problem->size[p]; k++) x[problem->first[p] + k] -= shift;
        plan->log_total = 0;
    }
    read_dual(solver, x, problem->epsilon);
    write_atoms(loaded, b, x, call->potentials);
    if (call->offsets) write_atoms(loaded, b, loaded->offset, call->offsets);
    call->error[b] = solver->error;
    double of_wanted = 0, of_found = 0;
    for (int n = 0; n < solver->span; n++) {
        of_wanted += loaded->offset[n] * problem->nu[n];
        of_found += loaded->offset[n] * plan->marginals[n];
    }
    /* Balanced plans have the sum 1; tables are divided by that of others. */
    const double total = solver->total;
    if (call->value) call->value[b] = problem->epsilon * solver->dual + of_wanted;
    if (call->transport_cost) call->transport_cost[b] = total * (sum_costs(plan) + of_found);
    for (int p = 0; p < problem->count; p++)
        for (int q = p + 1; q < problem->count; q++) {
            const int e = pair_of(problem, p, q);
            if (!call->pairs[e]) continue;
            if (problem->is_relaxed) divide_table(problem, p, q, plan->pairs[e], 1 / total);
            write_table(loaded, call, b, p, q, plan->pairs[e], call->pairs[e]);
        }
    if (call->marginal_gradient) {
        double *f = solver->right;
        for (int n = 0; n < solver->span; n++) f[n] = problem->epsilon * x[n] + loaded->offset[n];
        write_through_sums(loaded, b, f, call->marginal_gradient);
    }
}

/* Whether all variables have the same marginal. */
static int has_copies(const Problem *problem)
{
    const size_t block = problem->stride[0] * sizeof(double);
    for (int p = 1; p < problem->count; p++)
        if (problem->size[p] != problem->size[0]
            || memcmp(problem->nu, problem->nu + problem->first[p], block) != 0)
            return 0;
    return 1;
}

/* Give copies of a variable the mean of their potentials, whose dual is as large at least, since it
 * is concave. */
static int average(Solver *solver, double *x)
{
    const Problem *problem = solver->problem;
    for (int k = 0; k < problem->size[0]; k++) {
        double mean = 0;
        for (int p = 0; p < problem->count; p++) mean += x[problem->first[p] + k] / problem->count;
        for (int p = 0; p < problem->count; p++) x[problem->first[p] + k] = mean;
    }
    return look(solver, x, problem->epsilon);
}

/* Take the candidate's potentials where their dual is larger; 0 where there is no room. */
static int take_candidate(const Loaded *loaded, const Call *call, size_t b, Solver *solver,
                          double *x)
{
    const Problem *problem = solver->problem;
    const double dual = solver->dual;
    double *own = solver->origin;
    memcpy(own, x, solver->span * sizeof(double));
    read_atoms(loaded, b, call->candidate, x);
    for (int p = 0; p < problem->count; p++)
        for (int n = problem->first[p]; n < problem->first[p] + problem->size[p]; n++)
            x[n] = (x[n] - loaded->offset[n]) / problem->epsilon;
    if (!look(solver, x, problem->epsilon)) return 0;
    if (solver->dual >= dual - ROUNDING * (1 + fabs(dual))) return 1;
    memcpy(x, own, solver->span * sizeof(double));
    return look(solver, x, problem->epsilon);
}

/* Storage for a problem of the batch; 0 where there is none. */
static int make_loaded(Loaded *loaded, const Call *call)
{
    const size_t bytes = storage_for(call);
    size_t atoms = 0;
    for (int p = 0; p < call->count; p++) atoms += call->size[p];
    memset(loaded, 0, sizeof *loaded);
    loaded->storage = malloc(bytes + atoms * sizeof(int) + 64);
    if (!loaded->storage) return 0;
    char *start = loaded->storage;
    start += (64 - (uintptr_t)start % 64) % 64;
    loaded->arena = (Arena){start, start + bytes};
    int *places = (int *)(start + bytes);
    for (int p = 0; p < call->count; p++) {
        loaded->present[p] = places;
        places += call->size[p];
    }
    return 1;
}

static int is_blank(const Loaded *loaded)
{
    for (int p = 0; p < loaded->problem.count; p++)
        if (loaded->is_out[p]) return 1;
    return 0;
}

/* Solve problems begin <= b < end of the batch; return the largest status. */
EXPORTED(int, transport)(const Call *call, int64_t begin, int64_t end)
{
    Loaded loaded;
    if (!make_loaded(&loaded, call)) {
        for (int64_t b = begin; b < end; b++) call->status[b] = LEFT;
        return LEFT;
    }
    const Arena empty = loaded.arena;
    int worst = SOLVED;
    for (int64_t b = begin; b < end; b++) {
        loaded.arena = empty;
        int status = load_problem(&loaded, call, b);
        if (status == SOLVED) {
            const Problem *problem = &loaded.problem;
            Plan plan;
            Solver solver;
            double *x = take(&loaded.arena, problem->first[problem->count]);
            int done = make_plan(&plan, problem, is_triangle(problem), &loaded.arena)
                       && make_solver(&solver, &plan, &loaded.arena);
            if (done)
                done = (call->by_sweeps ? sinkhorn : newton)(
                    &solver, x, call->tolerance, call->max_iterations, &call->iterations[b]);
            if (done && call->symmetric && has_copies(problem)) {
                done = average(&solver, x);
                if (done && solver.error > call->tolerance && !call->by_sweeps)
                    done = descend(&solver, x, problem->epsilon, call->tolerance,
                                   call->max_iterations, &call->iterations[b])
                           && average(&solver, x);
            }
            if (done && call->candidate) done = take_candidate(&loaded, call, b, &solver, x);
            if (done) {
                write_solution(&loaded, call, b, &solver, x);
                status = solver.error <= call->tolerance ? SOLVED : STOPPED;
            } else {
                status = LEFT;
            }
            free_plan(&plan);
        } else if (status == STOPPED) {
            write_constant(call, b, NAN);
        }
        status |= status != LEFT && is_blank(&loaded) ? BLANK : 0;
        call->status[b] = status;
        worst = status > worst ? status : worst;
    }
    free(loaded.storage);
    return worst;
}

/* Read a table of weights of the atoms that are there; padding is 0. */
static void load_weights(const Loaded *loaded, const Call *call, const double *from, size_t b,
                         int p, int q, double *out)
{
    const Problem *problem = &loaded->problem;
    const size_t columns = call->size[q], start = b * call->size[p] * columns;
    memset(out, 0, table_size(problem, p, q) * sizeof(double));
    if (!from) return;
    for (int i = 0; i < problem->size[p]; i++)
        for (int j = 0; j < problem->size[q]; j++)
            out[(size_t)i * problem->stride[q] + j] =
                from[start + loaded->present[p][i] * columns + loaded->present[q][j]];
}

/* Write the marginals of pairs of the plan T times F, with F the sum of tables of pairs. */
static void sum_weighted(Plan *plan, double *const *weights, double *const *out, double *storage)
{
    const Problem *problem = plan->problem;
    if (!plan->is_triangle) {
        const size_t entries = entries_of(problem);
        double *kept = plan->entries, *restrict weighted = storage;
        double *kept_pairs[MAX_PAIRS];
        join_pairs(problem, weights, 0, storage);
        for (size_t n = 0; n < entries; n++) weighted[n] *= kept[n];
        memcpy(kept_pairs, plan->pairs, sizeof kept_pairs);
        memcpy(plan->pairs, out, pairs_of(problem) * sizeof *out);
        plan->entries = storage;
        sum_pairs(plan);
        plan->entries = kept;
        memcpy(plan->pairs, kept_pairs, sizeof kept_pairs);
        return;
    }
    /* T F = X_01 X_02 X_12 (F_01 + F_02 + F_12): with F_02 in X_02, and so on. */
    static const int ends[3][2] = {{0, 1}, {0, 2}, {1, 2}};
    const double scale = exp(-3 * plan->raised - plan->log_total);
    for (int e = 0; e < 3; e++) {
        const size_t entries = table_size(problem, ends[e][0], ends[e][1]);
        for (size_t n = 0; n < entries; n++) out[e][n] = weights[e][n] * plan->pairs[e][n];
    }
    for (int weighted = 0; weighted < 3; weighted++) {
        const int p = ends[weighted][0], q = ends[weighted][1], width = problem->stride[q];
        double *factor_of = plan->factor[weighted];
        const size_t entries = table_size(problem, p, q);
        double *kept = storage, *product = storage + (size_t)problem->stride[p] * width;
        memcpy(kept, factor_of, entries * sizeof(double));
        for (int turn = 0; turn < 2; turn++) {
            if (!turn)
                for (size_t n = 0; n < entries; n++) factor_of[n] *= weights[weighted][n];
            else
                memcpy(factor_of, kept, entries * sizeof(double));
            if (weighted != 1)
                transpose(factor_of, problem->size[p], problem->size[q], width,
                          plan->turned[weighted], problem->stride[p]);
            for (int e = 0; e < 3 && !turn; e++) {
                if (e == weighted) continue;
                const size_t own = table_size(problem, ends[e][0], ends[e][1]);
                other_factors(plan, e, NULL, product);
                for (size_t n = 0; n < own; n++)
                    out[e][n] += scale * product[n] * plan->factor[e][n];
            }
        }
    }
}

/* The gradients of weighted results, from potentials and offsets that `transport` wrote.
 *
 * With F the sum of weights, L = <T, F> and H dx = d nu + [T d(C / epsilon)] (marginals in square
 * brackets), dL = <l, d nu> + <T (sum_p l_p - F), d(C / epsilon)> for H l = [T F].
 */
static int write_gradients(Loaded *loaded, const Call *call, const Weights *weights, size_t b)
{
    const Problem *problem = &loaded->problem;
    const int count = problem->count;
    const double epsilon = problem->epsilon;
    const double of_cost = weights->transport_cost ? weights->transport_cost[b] : 0;
    Plan plan;
    Solver solver;
    double *x = take(&loaded->arena, problem->first[count]);
    double *of_marginals = take(&loaded->arena, problem->first[count]);
    double *table[MAX_PAIRS], *sums[MAX_PAIRS];
    size_t largest = 0;
    if (!make_plan(&plan, problem, is_triangle(problem), &loaded->arena)
        || !make_solver(&solver, &plan, &loaded->arena))
        goto left;
    read_atoms(loaded, b, call->potentials, x);
    read_atoms(loaded, b, call->offsets, loaded->offset);
    if (!look(&solver, x, epsilon)) goto left;
    for (int p = 0; p < count; p++)
        for (int q = p + 1; q < count; q++) {
            const int e = pair_of(problem, p, q);
            const size_t entries = table_size(problem, p, q);
            const size_t square = (size_t)problem->stride[p] * problem->stride[q];
            largest = square > largest ? square : largest;
            table[e] = take(&loaded->arena, entries);
            sums[e] = take(&loaded->arena, entries);
            if (!sums[e]) goto left;
            load_weights(loaded, call, weights->pairs[e], b, p, q, table[e]);
            for (int i = 0; i < problem->size[p]; i++)
                for (int j = 0; j < problem->size[q]; j++) {
                    const size_t n = (size_t)i * problem->stride[q] + j;
                    if (problem->cost[e]) table[e][n] += of_cost * problem->cost[e][n];
                    /* The offset of each variable, once. */
                    if (q == p + 1) table[e][n] += of_cost * loaded->offset[problem->first[q] + j];
                    if (e == 0) table[e][n] += of_cost * loaded->offset[i];
                }
        }
    double *storage = plan.is_triangle ? take(&loaded->arena, 2 * largest) : NULL;
    double *own = NULL;
    if (!plan.is_triangle) storage = own = malloc(entries_of(problem) * sizeof(double));
    if (!storage) goto left;
    sum_weighted(&plan, table, sums, storage);
    double *kept[MAX_PAIRS];
    memcpy(kept, plan.pairs, sizeof kept);
    memcpy(of_marginals, plan.marginals, problem->first[count] * sizeof(double));
    memcpy(plan.pairs, sums, pairs_of(problem) * sizeof *sums);
    read_singles(&plan);
    memcpy(solver.right, plan.marginals, problem->first[count] * sizeof(double));
    memcpy(plan.marginals, of_marginals, problem->first[count] * sizeof(double));
    memcpy(plan.pairs, kept, sizeof kept);
    double *multiplier = solver.direction;
    if (!factor_hessian(&solver, LEAST_DAMPING)) {
        free(own);
        goto left;
    }
    apply_inverse(&solver, solver.right, multiplier);
    for (int p = 0; p < count; p++)
        for (int q = p + 1; q < count; q++) {
            double *weight = table[pair_of(problem, p, q)];
            for (int i = 0; i < problem->size[p]; i++)
                for (int j = 0; j < problem->size[q]; j++, weight++) {
                    *weight = -*weight;
                    if (q == p + 1) *weight += multiplier[problem->first[q] + j];
                    if (p == 0 && q == 1) *weight += multiplier[i];
                    if (j == problem->size[q] - 1) weight += problem->stride[q] - problem->size[q];
                }
        }
    sum_weighted(&plan, table, sums, storage);
    free(own);
    double by_epsilon = 0;
    for (int p = 0; p < count; p++)
        for (int q = p + 1; q < count; q++) {
            const int e = pair_of(problem, p, q);
            if (!problem->cost[e]) continue;
            const size_t entries = table_size(problem, p, q);
            for (size_t n = 0; n < entries; n++) {
                if (problem->cost[e][n] < INFINITY) by_epsilon -= sums[e][n] * problem->cost[e][n];
                sums[e][n] = sums[e][n] / epsilon + of_cost * plan.pairs[e][n];
            }
            if (loaded->is_out[p] || loaded->is_out[q])
                memset(sums[e], 0, entries * sizeof(double));
            if (weights->cost[e]) write_table(loaded, call, b, p, q, sums[e], weights->cost[e]);
        }
    if (weights->epsilon) weights->epsilon[b] = by_epsilon / (epsilon * epsilon);
    if (weights->marginal) write_through_sums(loaded, b, multiplier, weights->marginal);
    free_plan(&plan);
    return SOLVED;
left:
    free_plan(&plan);
    return LEFT;
}

/* The way back of problems begin <= b < end that `transport` has solved; return the largest status.
 */
EXPORTED(int, transport_backward)(const Call *call, const Weights *weights, int64_t begin,
                                  int64_t end)
{
    Loaded loaded;
    if (!make_loaded(&loaded, call)) {
        for (int64_t b = begin; b < end; b++) call->status[b] = LEFT;
        return LEFT;
    }
    const Arena empty = loaded.arena;
    int worst = SOLVED;
    for (int64_t b = begin; b < end; b++) {
        loaded.arena = empty;
        int status = load_problem(&loaded, call, b);
        if (status == SOLVED) status = write_gradients(&loaded, call, weights, b);
        call->status[b] = status;
        worst = status > worst ? status : worst;
    }
    free(loaded.storage);
    return worst;
}

#endif
