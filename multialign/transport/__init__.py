"""Multi-marginal entropic optimal transport.

Data flows one way: a `Problem` (problem.py) is solved for its potentials without gradient
(iterations.py), and a `TransportSolution` (solution.py) re-attaches the gradients. All of them
read the plan only through its marginals, which elimination.py sums out of the cost graph.
"""

from multialign.transport.solution import TransportSolution
from multialign.transport.solver import ConvergenceWarning, multi_marginal_sinkhorn

__all__ = ["ConvergenceWarning", "TransportSolution", "multi_marginal_sinkhorn"]
