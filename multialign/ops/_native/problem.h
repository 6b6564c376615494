/* One transport problem, of the atoms that have mass.
 *
 * A vector over all atoms holds one block a variable, padded to whole vectors: potentials x in
 * units of epsilon, marginals nu. Padding has mass 0. A table over variables p < q has rows of p
 * and padded columns of q.
 */
#ifndef MULTIALIGN_PROBLEM_H
#define MULTIALIGN_PROBLEM_H

#include "exp.h"
#include "linear.h"

enum { MAX_VARIABLES = 8, MAX_PAIRS = MAX_VARIABLES * (MAX_VARIABLES - 1) / 2 };

typedef struct {
    int count;                    /* of variables */
    int size[MAX_VARIABLES];      /* atoms that have mass */
    int stride[MAX_VARIABLES];    /* the same, padded */
    int first[MAX_VARIABLES + 1]; /* where each block begins; at the end the length of all */
    double *nu;                   /* the marginals */
    double *root, *inverse_root;  /* sqrt(nu) and 1 / sqrt(nu), 0 in padding */
    double *cost[MAX_PAIRS];      /* by pair_of; NULL where no cost acts; infinite in padding */
    double *full;                 /* or a table over all variables, the last one padded */
    double epsilon;
    double deviation;           /* of the cost, under independent marginals */
    double largest;             /* absolute value of a cost */
    double least;               /* of the masses */
    int relaxed[MAX_VARIABLES]; /* whether a penalty stands for the constraint */
    double rho[MAX_VARIABLES];  /* its weight */
    int is_relaxed;             /* whether any is */
} Problem;

/* The place of the pair p < q. */
static inline int pair_of(const Problem *problem, int p, int q)
{
    return p * (2 * problem->count - p - 1) / 2 + q - p - 1;
}

static inline int pairs_of(const Problem *problem)
{
    return problem->count * (problem->count - 1) / 2;
}

/* Storage that is given out and never taken back before its end. */
typedef struct {
    char *next, *end;
} Arena;

/* n doubles that begin on a cache line. */
static double *take(Arena *arena, size_t n)
{
    char *start = arena->next;
    arena->next += (n * sizeof(double) + 63) / 64 * 64;
    return arena->next <= arena->end ? (double *)start : NULL;
}

/* A table over p and q. */
static inline size_t table_size(const Problem *problem, int p, int q)
{
    return (size_t)problem->size[p] * problem->stride[q];
}

/* Rows of the plan: the product of all sizes but the last. */
static inline size_t rows_of(const Problem *problem)
{
    size_t rows = 1;
    for (int p = 0; p < problem->count - 1; p++) rows *= problem->size[p];
    return rows;
}

/* Entries of the plan, with padding. */
static inline size_t entries_of(const Problem *problem)
{
    return rows_of(problem) * problem->stride[problem->count - 1];
}

/* Go on to the next row: the atoms of all variables but the last. */
static inline void next_row(const Problem *problem, int *atoms)
{
    for (int p = problem->count - 2; p >= 0; p--) {
        if (++atoms[p] < problem->size[p]) return;
        atoms[p] = 0;
    }
}

#endif
