/* What every part of the core shares.
 *
 * The core is one translation unit, core.c, compiled once for each instruction set. An exported
 * function has the set in its name, and library.py takes those that the machine can run.
 */
#ifndef MULTIALIGN_CORE_H
#define MULTIALIGN_CORE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef MULTIALIGN_SET
#define MULTIALIGN_SET baseline
#endif
#define MULTIALIGN_JOIN_(name, set) multialign_##name##_##set
#define MULTIALIGN_JOIN(name, set) MULTIALIGN_JOIN_(name, set)

#ifdef _WIN32
#define EXPORTED(type, name) __declspec(dllexport) type MULTIALIGN_JOIN(name, MULTIALIGN_SET)
#else
#define EXPORTED(type, name)                                                                       \
    __attribute__((visibility("default"))) type MULTIALIGN_JOIN(name, MULTIALIGN_SET)
#endif

/* A function whose inner loops of constant length are worth being written out. */
#if defined(__GNUC__) && !defined(__clang__)
#define UNROLLED __attribute__((optimize("O3")))
#else
#define UNROLLED
#endif

/* A loop whose iterations do not depend on each other, or only by sums, whose order is free. */
#if defined(_MSC_VER) && !defined(__clang__)
#define PRAGMA(text) __pragma(text)
#define SIMD_MAX(largest) /* its OpenMP has no such reduction */
#else
#define PRAGMA(text) _Pragma(#text)
#define SIMD_MAX(largest) PRAGMA(omp simd reduction(max : largest))
#endif
#define SIMD PRAGMA(omp simd)
#define SIMD_SUM(total) PRAGMA(omp simd reduction(+ : total))

#endif
