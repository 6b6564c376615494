"""Multi-marginal entropic optimal transport.

Data flows one way: a `Problem` (problem.py) is solved for its potentials without gradient
(iterations.py), and a `TransportSolution` (solution.py) re-attaches the gradients (reading.py). All
of them see the plan through its marginals (plans.py), which elimination.py sums out of the cost
graph; hessian.py says how these change with the potentials.
"""

from multialign.transport.solution import TransportSolution
from multialign.transport.solver import ConvergenceWarning, multi_marginal_sinkhorn

__all__ = ["ConvergenceWarning", "TransportSolution", "multi_marginal_sinkhorn"]
