"""``python -m examples.decalign COMMAND``."""

from examples.benchmarking.cli import console

__all__: list[str] = []

if __name__ == "__main__":
    console()
