"""The forms of a plan: one interface, each form fastest for problems of some shape and size."""
