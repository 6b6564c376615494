"""Transport solved and read in a form that is named, whatever the size of the problem."""

from multialign.transport import hessian
from multialign.transport.forms import base
from multialign.transport.options import SolverOptions
from multialign.transport.prepare import make_problem
from multialign.transport.solver import solve_problem

# The form of the plan by case. The last two are how Newton's equation is solved for many atoms.
FORMS = {
    "vector": "vector",
    "table": "table",
    "pairwise": "pairwise",
    "factored": "pairwise",
    "conjugate gradients": "pairwise",
}


def force_hessian(monkeypatch, case):
    """Solve Newton's equation for few atoms as for many."""
    if case in ("factored", "conjugate gradients"):
        monkeypatch.setattr(base, "_DENSE_ATOMS", 0)
    if case == "factored":
        monkeypatch.setattr(hessian, "_TRIAL_STEPS", 0)
    if case == "conjugate gradients":
        monkeypatch.setattr(hessian, "_FACTORED_ENTRIES", 0)


def solve_in(
    form, costs, marginals, epsilon, *, tolerance=None, max_iterations=2000, method="auto",
    backend="torch",
):  # fmt: skip
    """Return what `multi_marginal_sinkhorn` returns, solved and read in one form."""
    options = SolverOptions(
        tolerance=tolerance, max_iterations=max_iterations, method=method, backend=backend
    )
    return solve_problem(make_problem(costs, marginals, epsilon), options, form=form)
