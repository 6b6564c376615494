"""The compiled core for CPU tensors, in C; torch defines what it computes."""
