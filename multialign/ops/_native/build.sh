#!/bin/sh
# Temporary: until the package's own build does it.
cd "$(dirname "$0")"
F="-std=c11 -O3 -ffp-contract=fast -fopenmp-simd -fPIC -fvisibility=hidden -Wall -Wextra"
gcc $F -c detect.c -o /tmp/$$detect.o
gcc $F -c core.c -DMULTIALIGN_SET=baseline -o /tmp/$$0.o
gcc $F -c core.c -DMULTIALIGN_SET=avx2 -mavx2 -mfma -o /tmp/$$1.o
gcc $F -c core.c -DMULTIALIGN_SET=avx512 -march=x86-64-v4 -mprefer-vector-width=512 -o /tmp/$$2.o
gcc -shared -o core.so /tmp/$$detect.o /tmp/$$0.o /tmp/$$1.o /tmp/$$2.o -lm -s
