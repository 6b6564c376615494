/* The way back from the results of transport.h to its arguments. */
#ifndef MULTIALIGN_GRADIENTS_H
#define MULTIALIGN_GRADIENTS_H

#include "transport.h"

/* The way back: of the sum of pairs and transport_cost with these weights, the gradient with
 * respect to all inputs. NULL weighs nothing, or is not wanted. */
typedef struct {
    const double *pairs[MAX_PAIRS], *transport_cost;
    double *cost[MAX_PAIRS], *marginal, *epsilon;
} Weights;

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

/* Add to tables of pairs, whose sum is meant, a number for each atom of each variable. */
static void add_singles(const Problem *problem, const double *singles, double *const *tables)
{
    for (int q = 1; q < problem->count; q++) {
        double *row = tables[pair_of(problem, q - 1, q)];
        for (int i = 0; i < problem->size[q - 1]; i++, row += problem->stride[q])
            for (int j = 0; j < problem->size[q]; j++)
                row[j] += singles[problem->first[q] + j] + (q == 1 ? singles[i] : 0);
    }
}

/* Storage for `sum_weighted`: a table over all variables, or three of pairs. */
static double *make_scratch(const Plan *plan)
{
    const Problem *problem = plan->problem;
    size_t largest = 0;
    for (int p = 0; p < problem->count; p++)
        for (int q = p + 1; q < problem->count; q++) {
            const size_t one = (size_t)problem->stride[p] * problem->stride[q];
            largest = one > largest ? one : largest;
        }
    return malloc((plan->is_triangle ? 3 * largest : entries_of(problem)) * sizeof(double));
}

/* Write the marginals of pairs of the plan T times F, with F the sum of tables of pairs. */
static void sum_weighted(Plan *plan, double *const *weights, double *const *out, double *scratch)
{
    const Problem *problem = plan->problem;
    if (!plan->is_triangle) {
        const size_t entries = entries_of(problem);
        join_pairs(problem, weights, 0, scratch);
        SIMD for (size_t n = 0; n < entries; n++)
            scratch[n] *= plan->entries[n];
        sum_pairs(problem, scratch, out);
        return;
    }
    /* T F = X_01 X_02 X_12 (F_01 + F_02 + F_12): with F_02 in the place of X_02, and so on. */
    const double scale = exp(-3 * plan->raised - plan->log_total);
    size_t largest = 0;
    for (int e = 0; e < 3; e++) {
        const int p = ENDS[e][0], q = ENDS[e][1];
        const size_t entries = table_size(problem, p, q);
        const size_t square = (size_t)problem->stride[p] * problem->stride[q];
        for (size_t n = 0; n < entries; n++) out[e][n] = weights[e][n] * plan->pairs[e][n];
        largest = square > largest ? square : largest;
    }
    double *weighted = scratch, *turned = scratch + largest, *product = turned + largest;
    for (int w = 0; w < 3; w++) {
        const int p = ENDS[w][0], q = ENDS[w][1], width = problem->stride[q];
        double *own = plan->factor[w], *own_turned = plan->turned[w];
        const size_t entries = table_size(problem, p, q);
        for (size_t n = 0; n < entries; n++) weighted[n] = own[n] * weights[w][n];
        transpose(weighted, problem->size[p], problem->size[q], width, turned, problem->stride[p]);
        plan->factor[w] = weighted;
        plan->turned[w] = turned;
        for (int e = 0; e < 3; e++) {
            if (e == w) continue;
            const size_t others = table_size(problem, ENDS[e][0], ENDS[e][1]);
            other_factors(plan, e, NULL, product);
            for (size_t n = 0; n < others; n++)
                out[e][n] += scale * product[n] * plan->factor[e][n];
        }
        plan->factor[w] = own;
        plan->turned[w] = own_turned;
    }
}

/* Read the weights of all results as tables of pairs: <T, F> with F their sum is the weighted sum
 * of the results. 0 where there is no room. */
static int load_all_weights(Loaded *loaded, const Call *call, const Weights *weights, size_t b,
                            double **tables)
{
    const Problem *problem = &loaded->problem;
    const double of_cost = weights->transport_cost ? weights->transport_cost[b] : 0;
    for (int p = 0; p < problem->count; p++)
        for (int q = p + 1; q < problem->count; q++) {
            const int e = pair_of(problem, p, q);
            const size_t entries = table_size(problem, p, q);
            tables[e] = take(&loaded->arena, entries);
            if (!tables[e]) return 0;
            load_weights(loaded, call, weights->pairs[e], b, p, q, tables[e]);
            const double *cost = problem->cost[e];
            if (!cost) continue;
            for (size_t n = 0; n < entries; n++)
                if (cost[n] < INFINITY) tables[e][n] += of_cost * cost[n];
        }
    double *offset = take(&loaded->arena, problem->first[problem->count]);
    if (!offset) return 0;
    for (int n = 0; n < problem->first[problem->count]; n++)
        offset[n] = of_cost * loaded->offset[n];
    add_singles(problem, offset, tables);
    return 1;
}

/* Write the gradients of weighted results at x.
 *
 * With F the sum of weights, L = <T, F> and H dx = d nu + [T d(C / epsilon)] (marginals in square
 * brackets), dL = <l, d nu> + <T (sum_p l_p - F), d(C / epsilon)> for H l = [T F]. The weight of
 * transport_cost stands before dC as well.
 */
static int write_gradients(Loaded *loaded, const Call *call, const Weights *weights, size_t b,
                           Solver *solver, double *scratch)
{
    const Problem *problem = &loaded->problem;
    Plan *plan = solver->plan;
    const int count = problem->count;
    const double epsilon = problem->epsilon;
    const double of_cost = weights->transport_cost ? weights->transport_cost[b] : 0;
    double *tables[MAX_PAIRS], *sums[MAX_PAIRS], *multipliers = solver->direction;
    if (!load_all_weights(loaded, call, weights, b, tables)) return 0;
    for (int p = 0; p < count; p++)
        for (int q = p + 1; q < count; q++) {
            sums[pair_of(problem, p, q)] = take(&loaded->arena, table_size(problem, p, q));
            if (!sums[pair_of(problem, p, q)]) return 0;
        }
    sum_weighted(plan, tables, sums, scratch);
    read_singles(problem, sums, solver->right);
    if (!factor_hessian(solver, LEAST_DAMPING)) return 0;
    apply_inverse(solver, solver->right, multipliers);
    for (int p = 0; p < count; p++)
        for (int q = p + 1; q < count; q++) {
            double *table = tables[pair_of(problem, p, q)];
            const size_t entries = table_size(problem, p, q);
            for (size_t n = 0; n < entries; n++) table[n] = -table[n];
        }
    add_singles(problem, multipliers, tables);
    sum_weighted(plan, tables, sums, scratch);
    double by_epsilon = 0;
    for (int p = 0; p < count; p++)
        for (int q = p + 1; q < count; q++) {
            const int e = pair_of(problem, p, q);
            const double *cost = problem->cost[e];
            if (!cost) continue;
            const size_t entries = table_size(problem, p, q);
            for (size_t n = 0; n < entries; n++) {
                if (cost[n] < INFINITY) by_epsilon -= sums[e][n] * cost[n];
                sums[e][n] = sums[e][n] / epsilon + of_cost * plan->pairs[e][n];
            }
            if (loaded->is_out[p] || loaded->is_out[q])
                memset(sums[e], 0, entries * sizeof(double));
            if (weights->cost[e]) write_table(loaded, call, b, p, q, sums[e], weights->cost[e]);
        }
    if (weights->epsilon) weights->epsilon[b] = by_epsilon / (epsilon * epsilon);
    if (weights->marginal) write_through_sums(loaded, b, multipliers, weights->marginal);
    return 1;
}

/* Evaluate a problem where `transport` ended, and go back from there. */
static int go_back(Loaded *loaded, const Call *call, const Weights *weights, size_t b)
{
    const Problem *problem = &loaded->problem;
    Plan plan;
    Solver solver;
    double *x = take(&loaded->arena, problem->first[problem->count]), *scratch = NULL;
    int done = make_plan(&plan, problem, is_triangle(problem), &loaded->arena)
               && make_solver(&solver, &plan, &loaded->arena);
    if (done) {
        read_atoms(loaded, b, call->potentials, x);
        read_atoms(loaded, b, call->offsets, loaded->offset);
        done = look(&solver, x, problem->epsilon) && (scratch = make_scratch(&plan))
               && write_gradients(loaded, call, weights, b, &solver, scratch);
    }
    free(scratch);
    free_plan(&plan);
    return done ? SOLVED : LEFT;
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
        if (status == SOLVED) status = go_back(&loaded, call, weights, b);
        call->status[b] = status;
        worst = status > worst ? status : worst;
    }
    free(loaded.storage);
    return worst;
}

#endif
