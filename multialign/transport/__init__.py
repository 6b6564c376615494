"""Multi-marginal entropic optimal transport.

Data flows one way. A `Problem` (problem.py) is solved for its potentials without gradient
(sinkhorn.py, newton.py), and a `TransportSolution` (solution.py) attaches the gradients
(implicit.py). The iterations see the plan through its sum and marginals, in one of several forms
(forms/), most of which sum variables out of the cost graph (elimination.py). hessian.py says how
the marginals change with the potentials.
"""

from multialign.transport.solution import TransportSolution
from multialign.transport.solver import ConvergenceWarning, multi_marginal_sinkhorn

__all__ = ["ConvergenceWarning", "TransportSolution", "multi_marginal_sinkhorn"]
