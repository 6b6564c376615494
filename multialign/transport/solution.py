"""The solution of a transport problem, with exact gradients by implicit differentiation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multialign._validation import check_entries
from multialign.transport.convergence import warn_unless_converged
from multialign.transport.forms.choose import FormName
from multialign.transport.implicit import attach, dual_value, read_marginals
from multialign.transport.problem import Problem
from multialign.transport.sinkhorn import Iterate

__all__ = ["TransportSolution"]


class TransportSolution:
    r"""Solution of a multi-marginal entropic transport problem.

    Everything is read from the potentials :math:`f_p`; the plan over all M variables,

    .. math:: T(k) = \exp\Big(\frac{\sum_p f_p(k_p) - C(k)}{\epsilon}\Big),

    is built by :meth:`plan` alone. All floating-point results are differentiable in costs,
    marginals and :math:`\epsilon` by implicit differentiation; `potentials`, `transport_cost`, the
    marginals and the plan take one linear solve with a matrix over all atoms. `value` has exact
    second derivatives too; those of all other results raise.

    Returned by :func:`multi_marginal_sinkhorn`; not built by hand.

    Attributes:
        value: :math:`\langle T, C \rangle + \epsilon \sum T \log T`, :math:`(*\text{batch})`, in
            cost units. It may be negative: the entropy term is.
        iterations: Newton steps, without the sweeps before them, or with "sinkhorn" sweeps,
            :math:`(*\text{batch})`.
        error: Sum over p of the L1 distance of the plan's marginal from :math:`\nu_p`, or with
            `marginal_relaxation` from :math:`\nu_p \exp(-f_p / \rho_p)`, :math:`(*\text{batch})`.
        converged: Whether `error` is at most the tolerance, :math:`(*\text{batch})`. On an
            accelerator the :class:`ConvergenceWarning` comes when this is first read.

    References:
        Eq. 7-8 of :cite:t:`decalign:26`; :cite:t:`luise:18` and :cite:t:`eisenberger:22` for the
        gradients.

    Example:
        >>> import torch
        >>> from multialign import multi_marginal_sinkhorn
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> half = torch.tensor([0.5, 0.5])
        >>> solution = multi_marginal_sinkhorn({(0, 1): cost}, [half, half], epsilon=0.5)
        >>> solution.plan()
        tensor([[0.4404, 0.0596],
                [0.0596, 0.4404]])
        >>> solution.transport_cost
        tensor(0.1192)
    """

    value: Tensor
    iterations: Tensor
    error: Tensor

    # The tolerance, while nobody was told whether it was reached; on the CPU the solver tells.
    _untold: float = 0.0

    def __init__(
        self, problem: Problem, iterate: Iterate, tolerance: float, form: FormName = "auto"
    ) -> None:
        self._problem, self._form = problem, form
        self._fixed = iterate.potentials
        self._attached: Tensor | None = None
        self.iterations = problem.unflatten(iterate.iterations)
        self.error = problem.unflatten(iterate.error)
        self._converged = problem.unflatten(iterate.error <= tolerance)
        self._untold = tolerance if self.error.device.type != "cpu" else 0.0
        self.value = problem.unflatten(self._dual_value())

    def __repr__(self) -> str:
        return (
            f"TransportSolution(value={self.value}, iterations={self.iterations}, "
            f"error={self.error}, converged={self.converged})"
        )

    @property
    def converged(self) -> Tensor:
        """Whether `error` is at most the tolerance, `(*batch)`; warns once if not all is.

        On the CPU the solver has warned before.
        """
        tolerance, self._untold = self._untold, 0.0
        if tolerance:
            stopped = ~self._converged & self.error.isfinite()
            warn_unless_converged(stopped, self.error, self.iterations, tolerance)
        return self._converged

    def detach(self) -> TransportSolution:
        """Return the same solution without gradient."""
        return self._with(self._problem.detach(), Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> TransportSolution:
        """Return the solution on another device or in another dtype, as :meth:`torch.Tensor.to`.

        Inside it stays in float64.
        """
        value = self.value.to(*args, **kwargs)
        problem = self._problem.to(value.device, value.dtype)
        return self._with(
            problem, lambda x: x.to(value.device, value.dtype if x.is_floating_point() else x.dtype)
        )

    def _with(self, problem: Problem, function: Callable[[Tensor], Tensor]) -> TransportSolution:
        """Return the solution of an equal problem, with a function of each result."""
        return self._fill(copy.copy(self), problem, function)

    def _fill(
        self, other: TransportSolution, problem: Problem, function: Callable[[Tensor], Tensor]
    ) -> TransportSolution:
        other._problem, other._attached = problem, None
        other._fixed = self._fixed.to(problem.epsilon.device)
        for name in ("value", "iterations", "error", "_converged"):
            setattr(other, name, function(getattr(self, name)))
        return other

    @property
    def potentials(self) -> list[Tensor]:
        r"""M tensors :math:`(*\text{batch}, K_p)` in cost units, -inf at atoms of mass 0.

        Constants may be moved between them; here each has the same mean under its marginal, but
        for problems with a `marginal_relaxation`, where potentials are determined.
        """
        problem = self._problem
        scaled = problem.epsilon.unsqueeze(-1) * self._potentials()
        blocks = scaled.split(problem.sizes, -1)
        full = [f + offset for f, offset in zip(blocks, problem.offsets, strict=True)]
        if problem.relaxed:
            return [
                problem.unflatten(torch.where(nu == 0, -torch.inf, f))
                for nu, f in zip(problem.marginals, full, strict=True)
            ]
        means = [
            (nu * f).sum(-1, keepdim=True) for nu, f in zip(problem.marginals, full, strict=True)
        ]
        common = torch.stack(means).mean(0)
        return [
            problem.unflatten(torch.where(nu == 0, -torch.inf, f - mean + common))
            for nu, f, mean in zip(problem.marginals, full, means, strict=True)
        ]

    @property
    def transport_cost(self) -> Tensor:
        r""":math:`\langle T, C \rangle`, :math:`(*\text{batch})`, in cost units."""
        problem = self._problem
        count = len(problem.marginals)
        singles = [(p,) for p in range(count)]
        tables = self._probabilities([*problem.edges, *singles])
        total = torch.zeros_like(problem.epsilon)
        for scope, table in zip(problem.edges, tables, strict=False):
            total = total + (table * problem.costs[scope]).flatten(1).sum(-1)
        for offset, marginal in zip(problem.offsets, tables[-count:], strict=True):
            total = total + (offset * marginal).sum(-1)
        return problem.unflatten(total)

    def marginal(self, i: int) -> Tensor:
        r"""Return the marginal of the plan in variable i, :math:`(*\text{batch}, K_i)`."""
        self._check_index("i", i)
        return self._problem.unflatten(self._probabilities([(i,)])[0])

    def pairwise_marginal(self, i: int, j: int) -> Tensor:
        r"""Return the marginal in variables i and j, :math:`(*\text{batch}, K_i, K_j)`.

        Raises:
            MemoryError: It has more than 2^28 entries (2 GiB).
        """
        self._check_index("i", i)
        self._check_index("j", j)
        if i == j:
            raise ValueError(f"i and j must differ; got {i} and {j}")
        problem = self._problem
        entries = problem.sizes[i] * problem.sizes[j] * problem.epsilon.numel()
        check_entries(entries, "solve for fewer problems at once, or with smaller marginals")
        table = self._probabilities([(min(i, j), max(i, j))])[0]
        return self._problem.unflatten(table if i < j else table.mT)

    def apply(self, i: int, j: int, values: Tensor) -> Tensor:
        r"""Return the sum of values at the atoms of j, weighted by the plan of i and j.

        .. math:: \text{result}(k) = \sum_l T_{ij}(k, l)\, \text{values}(l)

        Divided by :meth:`marginal` of i, it is the mean of what each atom of i is sent to: its
        barycentric image, where `values` are points.

        Args:
            i: A variable.
            j: Another one, adjacent in the cost graph or not, in either order.
            values: :math:`(*\text{batch}, K_j, D)`.

        Returns:
            :math:`(*\text{batch}, K_i, D)`, in the units of `values`.

        Raises:
            ValueError: i, j or the shape of `values` is wrong.
            MemoryError: :math:`T_{ij}` has more than 2^28 entries (2 GiB).

        References:
            :cite:t:`ferradans:14` for barycentric images.
        """
        table = self.pairwise_marginal(i, j)
        expected = (*table.shape[:-2], table.shape[-1])
        if not isinstance(values, Tensor) or values.shape[:-1] != expected:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"values must have shape {(*expected, 'D')}; got {got}")
        return table @ values.to(table.dtype)

    def plan(self) -> Tensor:
        r"""Return the dense plan, :math:`(*\text{batch}, K_1, \dots, K_M)`.

        Raises:
            MemoryError: It has more than 2^28 entries (2 GiB).
        """
        everything = tuple(range(len(self._problem.marginals)))
        return self._problem.unflatten(self._probabilities([everything])[0])

    def _dual_value(self) -> Tensor:
        problem = self._problem
        wanted = torch.cat(problem.marginals, -1)
        dual = dual_value(problem, self._fixed, self._form)
        return dual + (torch.cat(problem.offsets, -1) * wanted).sum(-1)

    def _is_recorded(self) -> bool:
        """Return whether gradients are recorded."""
        inputs = [*self._problem.costs.values(), *self._problem.marginals, self._problem.epsilon]
        return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)

    def _potentials(self) -> Tensor:
        """Return the potentials in units of epsilon, with their gradient where one is recorded."""
        if not self._is_recorded():
            return self._fixed
        if self._attached is None:
            self._attached = attach(self._problem, self._fixed, self._form)
        return self._attached

    def _probabilities(self, scopes: list[Any]) -> list[Tensor]:
        return read_marginals(self._problem, self._potentials(), scopes, self._form)

    def _check_index(self, name: str, index: int) -> None:
        count = len(self._problem.marginals)
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            raise ValueError(f"{name} must be an integer in 0..{count - 1}; got {index!r}")
