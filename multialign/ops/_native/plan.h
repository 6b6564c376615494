/* The plan exp(sum_p x_p - C / epsilon), divided by its sum Z, and its marginals of one and two
 * variables.
 *
 * Two forms: every entry is held, in logarithms; or, for three marginals with costs of pairs, the
 * plan is a product X_01 X_02 X_12 of tables, and marginals are products of matrices. The second is
 * taken while the exponent range holds what a marginal is made of (see forms/guarded.py).
 */
#ifndef MULTIALIGN_PLAN_H
#define MULTIALIGN_PLAN_H

#include "problem.h"

typedef struct {
    const Problem *problem;
    int is_triangle;
    double *cost;    /* of every entry */
    double *entries; /* of the plan */
    double raised, floor, trusted;
    double *factor[3];        /* X_01, X_02, X_12 */
    double *turned[3];        /* X_01 and X_12 transposed; X_02 is not needed so */
    double *weight;           /* one table */
    double log_total;         /* log Z */
    double *marginals;        /* m, divided by Z */
    double *pairs[MAX_PAIRS]; /* of two variables, divided by Z */
} Plan;

/* What is summed of products of this size may be dropped (see ExponentRange). */
static const double LOSS = 1e-14;
static const double LOG_MAX = 709.0, LOG_MIN = -708.0;
/* The variables of each pair of three. */
static const int ENDS[3][2] = {{0, 1}, {0, 2}, {1, 2}};
/* As many entries may be held. */
static const size_t MOST_ENTRIES = (size_t)1 << 22;

/* Write the sum of tables of pairs (NULL: none) for every entry, and `padding` beyond the last. */
static void join_pairs(const Problem *problem, double *const *tables, double padding, double *out)
{
    const int last = problem->count - 1, width = problem->stride[last];
    const size_t rows = rows_of(problem);
    int atoms[MAX_VARIABLES] = {0};
    for (size_t r = 0; r < rows; r++, next_row(problem, atoms)) {
        double *restrict row = out + r * width;
        double base = 0;
        for (int p = 0; p < last; p++)
            for (int q = p + 1; q < last; q++) {
                const double *table = tables[pair_of(problem, p, q)];
                if (table) base += table[atoms[p] * problem->stride[q] + atoms[q]];
            }
        for (int j = 0; j < width; j++) row[j] = j < problem->size[last] ? base : padding;
        for (int p = 0; p < last; p++) {
            const double *table = tables[pair_of(problem, p, last)];
            if (!table) continue;
            const double *restrict line = table + (size_t)atoms[p] * width;
            SIMD for (int j = 0; j < problem->size[last]; j++)
                row[j] += line[j];
        }
    }
}

/* Prepare the form in which every entry is held; 0 where these are too many. */
static int make_dense(Plan *plan)
{
    const Problem *problem = plan->problem;
    const size_t entries = entries_of(problem);
    plan->is_triangle = 0;
    if (entries > MOST_ENTRIES) return 0;
    plan->cost = malloc(2 * entries * sizeof(double));
    if (!plan->cost) return 0;
    plan->entries = plan->cost + entries;
    if (problem->full)
        memcpy(plan->cost, problem->full, entries * sizeof(double));
    else
        join_pairs(problem, problem->cost, INFINITY, plan->cost);
    return 1;
}

static int make_triangle(Plan *plan, Arena *arena)
{
    const Problem *problem = plan->problem;
    double entries = 0;
    plan->is_triangle = 1;
    size_t largest = 0;
    for (int e = 0; e < 3; e++) {
        const int p = ENDS[e][0], q = ENDS[e][1];
        const size_t one = (size_t)problem->stride[p] * problem->stride[q];
        plan->factor[e] = take(arena, one);
        plan->turned[e] = take(arena, one);
        largest = one > largest ? one : largest;
        entries += (double)problem->size[p] * problem->size[q];
    }
    plan->weight = take(arena, largest);
    plan->raised = (LOG_MAX - log(entries)) / 6;
    plan->floor = LOG_MIN / 2;
    plan->trusted = problem->least * exp(log(LOSS / entries) - plan->floor);
    return plan->weight != NULL;
}

/* Take the storage of results, and of a first form. */
static int make_plan(Plan *plan, const Problem *problem, int triangle, Arena *arena)
{
    memset(plan, 0, sizeof *plan);
    plan->problem = problem;
    for (int p = 0; p < problem->count; p++)
        for (int q = p + 1; q < problem->count; q++)
            plan->pairs[pair_of(problem, p, q)] = take(arena, table_size(problem, p, q));
    plan->marginals = take(arena, problem->first[problem->count]);
    return triangle ? make_triangle(plan, arena) : make_dense(plan);
}

static void free_plan(Plan *plan)
{
    free(plan->cost);
}

static void transpose(const double *restrict a, int rows, int columns, int stride,
                      double *restrict out, int out_stride)
{
    for (int j = 0; j < columns; j++) {
        for (int i = 0; i < rows; i++) out[(size_t)j * out_stride + i] = a[(size_t)i * stride + j];
        for (int i = rows; i < out_stride; i++) out[(size_t)j * out_stride + i] = 0;
    }
}

/* Write X_01, X_02 and X_12, with half of each potential in either table it belongs to. */
static void fill_factors(Plan *plan, const double *x, double epsilon)
{
    const Problem *problem = plan->problem;
    const double rate = 1 / epsilon, floor = plan->floor;
    for (int e = 0; e < 3; e++) {
        const int p = ENDS[e][0], q = ENDS[e][1], width = problem->stride[q];
        const double *cost = problem->cost[e];
        const double *restrict across = x + problem->first[q];
        for (int i = 0; i < problem->size[p]; i++) {
            double *restrict row = plan->factor[e] + (size_t)i * width;
            const double base = plan->raised + 0.5 * x[problem->first[p] + i];
            if (cost) {
                const double *restrict line = cost + (size_t)i * width;
                SIMD for (int j = 0; j < width; j++) {
                    const double exponent = base + 0.5 * across[j] - rate * line[j];
                    row[j] = exponent < floor ? 0 : exp_of(exponent);
                }
            } else {
                SIMD for (int j = 0; j < width; j++) {
                    const double exponent = base + 0.5 * across[j];
                    row[j] = exponent < floor ? 0 : exp_of(exponent);
                }
                for (int j = problem->size[q]; j < width; j++) row[j] = 0;
            }
        }
        if (e != 1)
            transpose(plan->factor[e], problem->size[p], problem->size[q], width, plan->turned[e],
                      problem->stride[p]);
    }
}

/* The product of two factors, summed over the third variable; `scale` multiplies that one or is
 * NULL. For the pair e of variables. */
static void other_factors(Plan *plan, int e, const double *scale, double *out)
{
    const Problem *problem = plan->problem;
    /* Rows, the variable summed, columns; the tables that hold them in this order. */
    static const int through[3][3] = {{0, 2, 1}, {0, 1, 2}, {1, 0, 2}};
    const double *left = e == 0 ? plan->factor[1] : (e == 1 ? plan->factor[0] : plan->turned[0]);
    const double *right = e == 0 ? plan->turned[2] : (e == 1 ? plan->factor[2] : plan->factor[1]);
    const int rows = problem->size[through[e][0]], middle = through[e][1];
    const int inner = problem->size[middle], stride = problem->stride[middle];
    if (scale) {
        const double *restrict factor_of = scale;
        for (int i = 0; i < rows; i++) {
            double *restrict row = plan->weight + (size_t)i * stride;
            const double *restrict from = left + (size_t)i * stride;
            SIMD for (int k = 0; k < stride; k++)
                row[k] = from[k] * factor_of[k];
        }
        left = plan->weight;
    }
    multiply(rows, inner, problem->stride[through[e][2]], left, stride, right, out);
}

/* Write the marginals of single variables, given those of pairs. */
static void read_singles(const Problem *problem, double *const *pairs, double *m)
{
    const int width = problem->stride[1];
    memset(m, 0, problem->first[problem->count] * sizeof(double));
    for (int i = 0; i < problem->size[0]; i++) {
        const double *row = pairs[0] + (size_t)i * width;
        double sum = 0;
        SIMD_SUM(sum) for (int j = 0; j < width; j++)
            sum += row[j];
        m[i] = sum;
    }
    for (int q = 1; q < problem->count; q++) {
        double *restrict out = m + problem->first[q];
        for (int i = 0; i < problem->size[0]; i++) {
            const double *restrict row =
                pairs[pair_of(problem, 0, q)] + (size_t)i * problem->stride[q];
            SIMD for (int j = 0; j < problem->stride[q]; j++)
                out[j] += row[j];
        }
    }
}

static void divide_table(const Problem *problem, int p, int q, double *table, double total)
{
    const size_t entries = table_size(problem, p, q);
    const double share = 1 / total;
    SIMD for (size_t n = 0; n < entries; n++)
        table[n] *= share;
}

/* Divide all marginals of two variables by Z. */
static void divide_pairs(Plan *plan, double total)
{
    const Problem *problem = plan->problem;
    for (int p = 0; p < problem->count; p++)
        for (int q = p + 1; q < problem->count; q++)
            divide_table(problem, p, q, plan->pairs[pair_of(problem, p, q)], total);
}

/* 0 where the exponent range does not hold the plan. */
static int evaluate_triangle(Plan *plan, const double *x, double epsilon)
{
    const Problem *problem = plan->problem;
    fill_factors(plan, x, epsilon);
    double largest = 0, total = 0;
    for (int e = 0; e < 3; e++) {
        double *restrict table = plan->pairs[e];
        const double *restrict own = plan->factor[e];
        other_factors(plan, e, NULL, table);
        const size_t entries = table_size(problem, e == 2, e == 0 ? 1 : 2);
        double top = 0, sum = 0;
        SIMD_MAX(top) for (size_t n = 0; n < entries; n++)
            top = table[n] > top ? table[n] : top;
        SIMD_SUM(sum) for (size_t n = 0; n < entries; n++)
            sum += table[n] *= own[n];
        largest = top > largest ? top : largest;
        if (e == 0) total = sum;
    }
    if (!(largest <= plan->trusted * total && total > 0 && total < INFINITY)) return 0;
    plan->log_total = log(total) - 3 * plan->raised;
    divide_pairs(plan, total);
    read_singles(problem, plan->pairs, plan->marginals);
    return 1;
}

/* Write the plan less its largest exponent, and return that. */
static double fill_entries(Plan *plan, const double *x, double epsilon)
{
    const Problem *problem = plan->problem;
    const int last = problem->count - 1, width = problem->stride[last];
    const size_t rows = rows_of(problem);
    const double rate = 1 / epsilon;
    const double *restrict across = x + problem->first[last];
    double top = -INFINITY;
    int atoms[MAX_VARIABLES] = {0};
    for (size_t r = 0; r < rows; r++, next_row(problem, atoms)) {
        double base = 0;
        for (int p = 0; p < last; p++) base += x[problem->first[p] + atoms[p]];
        const double *restrict cost = plan->cost + r * width;
        double *restrict row = plan->entries + r * width;
        double here = -INFINITY;
        SIMD_MAX(here) for (int j = 0; j < width; j++) {
            const double exponent = base + across[j] - rate * cost[j];
            row[j] = exponent;
            here = exponent > here ? exponent : here;
        }
        top = here > top ? here : top;
    }
    return top;
}

/* Write the marginals of pairs of a table over all variables; return the sum of its entries. */
static double sum_pairs(const Problem *problem, const double *entries, double *const *pairs)
{
    const int last = problem->count - 1, width = problem->stride[last];
    const size_t rows = rows_of(problem);
    int atoms[MAX_VARIABLES] = {0};
    double total = 0;
    for (int p = 0; p < last; p++)
        for (int q = p + 1; q <= last; q++)
            memset(pairs[pair_of(problem, p, q)], 0, table_size(problem, p, q) * sizeof(double));
    for (size_t r = 0; r < rows; r++, next_row(problem, atoms)) {
        const double *restrict row = entries + r * width;
        double sum = 0;
        SIMD_SUM(sum) for (int j = 0; j < width; j++)
            sum += row[j];
        for (int p = 0; p < last; p++) {
            double *restrict out = pairs[pair_of(problem, p, last)] + (size_t)atoms[p] * width;
            SIMD for (int j = 0; j < width; j++)
                out[j] += row[j];
            for (int q = p + 1; q < last; q++)
                pairs[pair_of(problem, p, q)][atoms[p] * problem->stride[q] + atoms[q]] += sum;
        }
        total += sum;
    }
    return total;
}

static int evaluate_dense(Plan *plan, const double *x, double epsilon)
{
    const Problem *problem = plan->problem;
    const size_t entries = entries_of(problem);
    const double top = fill_entries(plan, x, epsilon);
    double *restrict entry = plan->entries;
    SIMD for (size_t n = 0; n < entries; n++)
        entry[n] = exp_of(entry[n] - top);
    const double total = sum_pairs(problem, entry, plan->pairs);
    plan->log_total = log(total) + top;
    const double share = 1 / total;
    SIMD for (size_t n = 0; n < entries; n++)
        entry[n] *= share;
    divide_pairs(plan, total);
    read_singles(problem, plan->pairs, plan->marginals);
    return 1;
}

/* Evaluate at potentials x; from the triangle on to the other form where the range ends. */
static int evaluate(Plan *plan, const double *x, double epsilon)
{
    if (plan->is_triangle) {
        if (evaluate_triangle(plan, x, epsilon)) return 1;
        if (!make_dense(plan)) return 0;
    }
    return evaluate_dense(plan, x, epsilon);
}

#endif
