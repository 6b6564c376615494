/* Newton's method for one problem, as transport/newton.py has it: sweeps at falling epsilon lead to
 * where it converges, and from there it follows the solution down in epsilon by its tangent.
 *
 * See that file for the reasons behind the numbers.
 */
#ifndef MULTIALIGN_NEWTON_H
#define MULTIALIGN_NEWTON_H

#include "sweeps.h"

static const double FIRST_LEVELS[2] = {0.25, 0.05};
static const double LARGEST_COST = 25.0;
enum { INNER = 4, SWEEP_PAIRS = 4, PATIENCE = 50 };
static const double LEVEL_FACTOR = 4.0, LEVEL_POWER = 1.5;
static const double LEAST_LEVEL_ERROR = 1e-8, MOST_LEVEL_ERROR = 0.1, LEVEL_RELATIVE_ERROR = 0.5;
static const double FAR = 1e6;
static const double LEAST_DAMPING = 1e-13, MOST_DAMPING = 1e-2;
static const double LONGEST_STEP = 10.0, LONGER_STEP = 4.0;
static const double ARMIJO = 1e-4, SHORTEST_STEP = 1.0 / 1024;
static const double ROUNDING = 50 * 2.220446049250313e-16;
/* Relative to 1 / epsilon. */
static const double QUOTIENT_STEP = 1e-3;

typedef struct {
    const Problem *problem;
    Plan *plan;
    Sweeps sweeps;
    int span; /* the length of vectors */
    double *gradient;
    double *diagonal; /* what a penalty adds to the diagonal of H, in units of nu */
    double total;     /* by which H is multiplied */
    double dual, error;
    double *direction, *origin, *fresh, *right;
    double *matrix;
} Solver;

static int make_solver(Solver *solver, Plan *plan, Arena *arena)
{
    const int span = plan->problem->first[plan->problem->count];
    solver->problem = plan->problem;
    solver->plan = plan;
    solver->span = span;
    if (!make_sweeps(&solver->sweeps, plan, arena)) return 0;
    solver->gradient = take(arena, span);
    solver->diagonal = take(arena, span);
    solver->direction = take(arena, span);
    solver->origin = take(arena, span);
    solver->fresh = take(arena, span);
    solver->right = take(arena, span);
    solver->matrix = take(arena, (size_t)span * span + LANES);
    return solver->matrix != NULL;
}

/* Write the dual, its gradient and the L1 error at x, where the plan has been evaluated. */
static void read_dual(Solver *solver, const double *x, double epsilon)
{
    const Problem *problem = solver->problem;
    const double *nu = problem->nu, *m = solver->plan->marginals;
    double dual = 0, error = 0;
    const double total = problem->is_relaxed ? exp(solver->plan->log_total) : 1;
    for (int p = 0; p < problem->count; p++) {
        const double rate = problem->relaxed[p] ? epsilon / problem->rho[p] : 0;
        for (int n = problem->first[p]; n < problem->first[p + 1]; n++) {
            double wanted = nu[n], value = x[n], diagonal = 0;
            if (rate > 0) {
                value = -expm1(-rate * x[n]) / rate;
                wanted *= exp(-rate * x[n]);
                diagonal = rate * exp(-rate * x[n]) / total;
            }
            solver->gradient[n] = wanted - total * m[n];
            solver->diagonal[n] = diagonal;
            dual += nu[n] * value;
            error += fabs(solver->gradient[n]);
        }
    }
    solver->total = total;
    solver->dual = dual - (problem->is_relaxed ? total - 1 : solver->plan->log_total);
    solver->error = error;
}

/* Write the scaled Hessian, of full rank, above its diagonal; damping is added. */
static void fill_hessian(Solver *solver, double damping)
{
    const Problem *problem = solver->problem;
    const int n = solver->span;
    const double *inverse = problem->inverse_root, *m = solver->plan->marginals;
    int gauge = 0;
    for (int p = 0; p < problem->count; p++) {
        const int first = problem->first[p];
        /* The first hard marginal keeps the constant. */
        const int fills = !problem->relaxed[p] && gauge++;
        for (int i = 0; i < problem->stride[p]; i++) {
            double *restrict row = solver->matrix + (size_t)(first + i) * n;
            const double own = i < problem->size[p] ? inverse[first + i] : 0;
            if (fills && own > 0) {
                const double root = problem->root[first + i];
                const double *restrict roots = problem->root + first;
                SIMD for (int j = 0; j < problem->stride[p]; j++)
                    row[first + j] = root * roots[j];
            } else {
                memset(row + first, 0, problem->stride[p] * sizeof(double));
            }
            row[first + i] +=
                own > 0 ? m[first + i] * own * own + damping + solver->diagonal[first + i] : 1;
            for (int q = p + 1; q < problem->count; q++) {
                double *restrict out = row + problem->first[q];
                if (own > 0) {
                    const double *restrict table = solver->plan->pairs[pair_of(problem, p, q)]
                                                   + (size_t)i * problem->stride[q];
                    const double *restrict others = inverse + problem->first[q];
                    SIMD for (int j = 0; j < problem->stride[q]; j++)
                        out[j] = own * table[j] * others[j];
                } else {
                    memset(out, 0, problem->stride[q] * sizeof(double));
                }
            }
        }
    }
}

/* Factor H + damping; 0 where even more damping leaves no factor. */
static int factor_hessian(Solver *solver, double damping)
{
    for (; damping < 1; damping *= 100) {
        fill_hessian(solver, damping);
        if (factor(solver->matrix, solver->span, solver->problem->stride[0])) return 1;
    }
    return 0;
}

/* Solve H out = right with the factor. */
static void apply_inverse(const Solver *solver, const double *right, double *out)
{
    const double *inverse = solver->problem->inverse_root;
    for (int n = 0; n < solver->span; n++) out[n] = right[n] * inverse[n] / solver->total;
    solve_factored(solver->matrix, solver->span, out);
    for (int n = 0; n < solver->span; n++) out[n] *= inverse[n];
}

/* Divide the plan by its sum, and give all variables the same mean potential. */
static void balance(const Solver *solver, double *x)
{
    const Problem *problem = solver->problem;
    double means[MAX_VARIABLES], common = -solver->plan->log_total / problem->count;
    for (int p = 0; p < problem->count; p++) {
        means[p] = 0;
        for (int n = problem->first[p]; n < problem->first[p + 1]; n++)
            means[p] += x[n] * problem->nu[n];
        common += means[p] / problem->count;
    }
    for (int p = 0; p < problem->count; p++)
        for (int n = problem->first[p]; n < problem->first[p] + problem->size[p]; n++)
            x[n] += common - means[p];
}

/* One sweep from x, in logarithms where the range does not hold it. */
static int sweep_once(Solver *solver, double *x, double epsilon)
{
    begin_sweeps(&solver->sweeps, x, epsilon);
    sweep(&solver->sweeps, INNER);
    if (end_sweeps(&solver->sweeps, solver->fresh)) {
        memcpy(x, solver->fresh, solver->span * sizeof(double));
        return 1;
    }
    if (solver->plan->is_triangle && !make_dense(solver->plan)) return 0;
    sweep_logarithms(solver->plan, x, epsilon);
    return 1;
}

/* Sweep at falling epsilon while it pays; write the potentials and return the last epsilon, or 0
 * where there is no room to go on. */
static double first_sweeps(Solver *solver, double *x, double tolerance)
{
    const Problem *problem = solver->problem;
    Sweeps *sweeps = &solver->sweeps;
    const double target = problem->epsilon;
    const double scale = fmax(problem->deviation, problem->largest / LARGEST_COST);
    const double lower = fmax(target, FIRST_LEVELS[1] * scale);
    double epsilon = fmax(target, FIRST_LEVELS[0] * scale);
    /* The product of the marginals, the plan at epsilon = infinity. */
    for (int n = 0; n < solver->span; n++) x[n] = problem->nu[n] > 0 ? log(problem->nu[n]) : 0;
    begin_sweeps(sweeps, x, epsilon);
    for (int pairs = SWEEP_PAIRS;;) {
        sweep(sweeps, INNER);
        const double first = moved(sweeps);
        sweep(sweeps, INNER);
        const double second = moved(sweeps);
        if (!end_sweeps(sweeps, solver->fresh) || !(second < INFINITY)) {
            if (solver->plan->is_triangle && !make_dense(solver->plan)) return 0;
            sweep_logarithms(solver->plan, x, epsilon);
            sweep_logarithms(solver->plan, x, epsilon);
            return epsilon;
        }
        memcpy(x, solver->fresh, solver->span * sizeof(double));
        const int halved = second <= first / 2;
        if (halved && lower < epsilon) {
            /* What the cost has added is, in units of the cost, what stays the same. */
            for (int n = 0; n < solver->span; n++) {
                if (!(problem->nu[n] > 0)) continue;
                const double product = log(problem->nu[n]);
                x[n] = product + (x[n] - product) * (epsilon / lower);
            }
            epsilon = lower;
            begin_sweeps(sweeps, x, epsilon);
            continue;
        }
        pairs--;
        const int solved = second * second <= first * tolerance / 2;
        if (!halved || solved || pairs <= 0) return epsilon;
    }
}

/* Write -dm / d log(1 / epsilon) at constant epsilon x. */
static int read_tangent(Solver *solver, const double *x, double epsilon, double *out)
{
    memcpy(out, solver->plan->marginals, solver->span * sizeof(double));
    for (int n = 0; n < solver->span; n++) solver->fresh[n] = x[n] * (1 + QUOTIENT_STEP);
    if (!evaluate(solver->plan, solver->fresh, epsilon / (1 + QUOTIENT_STEP))) return 0;
    for (int n = 0; n < solver->span; n++)
        out[n] = (out[n] - solver->plan->marginals[n]) / QUOTIENT_STEP;
    return 1;
}

/* How far a step goes: it is halved until it raises the dual enough (Armijo's rule). */
typedef struct {
    double dual, slope, length, longest, shortest;
    int clipped;
} Search;

/* Take the next step as it is. */
static void reset_search(Search *search, double length)
{
    *search = (Search){-INFINITY, 0, length, LONGEST_STEP, 0, 0};
}

/* Whether the last step raised the dual too little. */
static int has_failed(Search *search, double dual)
{
    const double least = search->dual + ARMIJO * search->length * search->slope;
    const int failed = dual < least - ROUNDING * (1 + fabs(dual));
    if (search->clipped) {
        const double factor_of = failed ? 0.5 : LONGER_STEP;
        search->longest = fmax(search->longest * factor_of, LONGEST_STEP);
    }
    return failed;
}

/* Begin in a direction with this slope and largest entry. */
static void begin_search(Search *search, double dual, double slope, double largest)
{
    search->dual = dual;
    search->slope = slope;
    search->clipped = largest > search->longest;
    search->length = search->clipped ? search->longest / largest : 1;
    search->shortest = search->length * SHORTEST_STEP;
}

/* Find a new direction from x, at a lower epsilon where that may fall; return whether the step has
 * to end in a sweep, or -1 where there is no room to go on. */
static int aim(Solver *solver, Search *search, double *x, double *epsilon, double level_error)
{
    const Problem *problem = solver->problem;
    const int span = solver->span;
    const double target = problem->epsilon, dual = solver->dual;
    double worst = 0;
    for (int n = 0; n < span; n++)
        if (problem->nu[n] > 0) worst = fmax(worst, fabs(solver->gradient[n]) / problem->nu[n]);
    const int falls =
        *epsilon > target && solver->error <= level_error && worst <= LEVEL_RELATIVE_ERROR;
    const int found =
        factor_hessian(solver, fmin(fmax(solver->error, LEAST_DAMPING), MOST_DAMPING));
    double *right = solver->right;
    memcpy(right, solver->gradient, span * sizeof(double));
    if (falls) {
        const double lower = fmax(target, *epsilon / LEVEL_FACTOR), ratio = *epsilon / lower;
        if (!problem->is_relaxed) {
            const double log_total = solver->plan->log_total;
            if (!read_tangent(solver, x, *epsilon, solver->origin)) return -1;
            for (int n = 0; n < span; n++) right[n] += (ratio - 1) * solver->origin[n];
            solver->plan->log_total = log_total;
            if (problem->largest / lower > FAR) balance(solver, x);
        }
        for (int n = 0; n < span; n++) x[n] *= ratio;
        *epsilon = lower;
    }
    memcpy(solver->origin, x, span * sizeof(double));
    double slope = 0, largest = INFINITY;
    if (found) {
        apply_inverse(solver, right, solver->direction);
        largest = 0;
        for (int n = 0; n < span; n++) {
            slope += solver->gradient[n] * solver->direction[n];
            largest = fmax(largest, fabs(solver->direction[n]));
        }
    }
    if (!isfinite(largest) || !isfinite(slope)) {
        reset_search(search, 0);
        return 1;
    }
    if (!falls) {
        begin_search(search, dual, slope, largest);
        return 0;
    }
    /* Along what the plan hardly determines, the equation may have any solution. */
    const double bound = problem->largest / *epsilon;
    for (int n = 0; n < span; n++)
        solver->direction[n] = fmax(fmin(solver->direction[n], bound), -bound);
    reset_search(search, 1);
    return 1;
}

/* Evaluate and read the dual. */
static int look(Solver *solver, const double *x, double epsilon)
{
    if (!evaluate(solver->plan, x, epsilon)) return 0;
    read_dual(solver, x, epsilon);
    return 1;
}

/* Take steps from x at an epsilon; count them, and leave the plan evaluated where they end. 0 where
 * this problem is none for this solver. */
static int descend(Solver *solver, double *x, double epsilon, double tolerance, int64_t budget,
                   int64_t *iterations)
{
    const Problem *problem = solver->problem;
    const size_t bytes = solver->span * sizeof(double);
    const double target = problem->epsilon;
    const double depth = pow(target / fmax(target, problem->deviation), LEVEL_POWER);
    const double level_error = fmin(fmax(depth, LEAST_LEVEL_ERROR), MOST_LEVEL_ERROR);
    double best = INFINITY, highest = -INFINITY;
    int stalled = 0;
    Search search;
    reset_search(&search, 1);
    for (;; ++*iterations) {
        if (!look(solver, x, epsilon)) return 0;
        const double error = solver->error, dual = solver->dual;
        const int failed = has_failed(&search, dual), arrived = epsilon <= target;
        if (arrived) {
            /* Where parts of the plan tie, the dual can rise for long before the error falls. */
            const int rises = dual > highest + ROUNDING * (1 + fabs(dual));
            stalled = error < best || rises ? 0 : stalled + 1;
            best = fmin(best, error);
            highest = fmax(highest, dual);
        }
        if (arrived && error <= tolerance) return 1;
        if (stalled >= PATIENCE || *iterations >= budget || !isfinite(error)) {
            if (failed) memcpy(x, solver->origin, bytes);
            for (int n = 0; n < solver->span; n++) x[n] *= epsilon / target;
            return look(solver, x, target);
        }
        int sweeps = 0;
        if (!failed) {
            sweeps = aim(solver, &search, x, &epsilon, level_error);
            if (sweeps < 0) return 0;
        } else if ((search.length /= 2) < search.shortest) {
            reset_search(&search, 0);
            sweeps = 1;
        }
        memcpy(x, solver->origin, bytes);
        if (search.length > 0)
            for (int n = 0; n < solver->span; n++) x[n] += search.length * solver->direction[n];
        if (sweeps && !sweep_once(solver, x, epsilon)) return 0;
    }
}

static int newton(Solver *solver, double *x, double tolerance, int64_t budget, int64_t *iterations)
{
    const double epsilon = first_sweeps(solver, x, tolerance);
    *iterations = 0;
    return epsilon > 0 && descend(solver, x, epsilon, tolerance, budget, iterations);
}

static const double FIRST_EPSILON = 2.0, SINKHORN_LEVEL_ERROR = 1e-2;
enum { SINKHORN_LEVEL_SWEEPS = 50, CHECKED_EACH = 4, CHECK_EVERY = 10 };

/* Plain sweeps with epsilon falling by halves, as transport/sinkhorn.py has them. */
static int sinkhorn(Solver *solver, double *x, double tolerance, int64_t budget,
                    int64_t *iterations)
{
    const Problem *problem = solver->problem;
    const double target = problem->epsilon;
    double epsilon = fmax(target, FIRST_EPSILON * problem->deviation);
    int64_t count = 0, at_level = 0;
    memset(x, 0, solver->span * sizeof(double));
    while (count < budget) {
        int64_t times = count < CHECKED_EACH ? 1 : CHECK_EVERY;
        times = times < budget - count ? times : budget - count;
        count += times, at_level += times;
        begin_sweeps(&solver->sweeps, x, epsilon);
        for (int64_t n = 0; n < times; n++) sweep(&solver->sweeps, 0);
        if (end_sweeps(&solver->sweeps, solver->fresh)) {
            memcpy(x, solver->fresh, solver->span * sizeof(double));
        } else {
            if (solver->plan->is_triangle && !make_dense(solver->plan)) return 0;
            for (int64_t n = 0; n < times; n++) sweep_logarithms(solver->plan, x, epsilon);
        }
        if (!look(solver, x, epsilon)) return 0;
        const int arrived = epsilon <= target;
        *iterations = count;
        if (!isfinite(solver->error) || (arrived && solver->error <= tolerance)) break;
        if (arrived || (solver->error > SINKHORN_LEVEL_ERROR && at_level < SINKHORN_LEVEL_SWEEPS))
            continue;
        at_level = 0;
        if (!problem->is_relaxed) balance(solver, x);
        const double lower = fmax(target, epsilon / 2);
        for (int n = 0; n < solver->span; n++) x[n] *= epsilon / lower;
        epsilon = lower;
    }
    for (int n = 0; n < solver->span; n++) x[n] *= epsilon / target;
    return look(solver, x, target);
}

#endif
