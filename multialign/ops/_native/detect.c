/* Which of the compiled instruction sets this machine runs. */
#ifdef _WIN32
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

#if defined(MULTIALIGN_X86_64) && defined(_MSC_VER) && !defined(__clang__)
#include <immintrin.h>
#include <intrin.h>

/* The bits of cpuid and of xgetbv: "Intel 64 and IA-32 Architectures Software Developer's Manual",
 * volume 2, CPUID, and volume 1, 13.3 and 14.3. */
static int bits(unsigned value, unsigned mask)
{
    return (value & mask) == mask;
}

static const char *best_of_x86_64(void)
{
    int leaf[4];
    __cpuid(leaf, 0);
    if (leaf[0] < 7) return "baseline";
    __cpuid(leaf, 1);
    const unsigned fma_osxsave_avx = 1u << 12 | 1u << 27 | 1u << 28;
    if (!bits((unsigned)leaf[2], fma_osxsave_avx)) return "baseline";
    const unsigned saved = (unsigned)_xgetbv(0); /* registers that the system saves */
    __cpuidex(leaf, 7, 0);
    const unsigned avx2 = 1u << 5;
    const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    if (!bits(saved, 0x06) || !bits((unsigned)leaf[1], avx2)) return "baseline";
    return bits(saved, 0xe6) && bits((unsigned)leaf[1], avx512) ? "avx512" : "avx2";
}
#elif defined(MULTIALIGN_X86_64)
static const char *best_of_x86_64(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return "baseline";
    const int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
                       && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    return avx512 ? "avx512" : "avx2";
}
#endif

EXPORTED const char *multialign_instruction_set(void)
{
#ifdef MULTIALIGN_X86_64
    return best_of_x86_64();
#else
    return "baseline";
#endif
}
