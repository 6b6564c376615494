/* Whole small transport problems, from what a user gives to the solution. */
#ifndef MULTIALIGN_TRANSPORT_H
#define MULTIALIGN_TRANSPORT_H

#include "arguments.h"

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

#endif
