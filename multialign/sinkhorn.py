"""Multi-marginal Sinkhorn divergence between weighted point clouds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from multialign._clouds import (
    Cost,
    Costs,
    Graph,
    check_clouds,
    cost_table,
    cost_tables,
    edges_of,
    epsilon_of,
)
from multialign._samples import Samples, make_samples, pad_rows
from multialign._validation import check_samples, full_precision
from multialign.ops import Backend
from multialign.transport.options import Method, SolverOptions, default_tolerance
from multialign.transport.prepare import Arguments, check_arguments
from multialign.transport.solution import TransportSolution
from multialign.transport.solver import solve

__all__ = ["MultiMarginalSinkhornLoss", "multi_marginal_sinkhorn_loss"]


def multi_marginal_sinkhorn_loss(
    points: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[Tensor | None] | None = None,
    *,
    epsilon: float | None = None,
    graph: Graph = "complete",
    debias: bool = True,
    cost: Cost = "sqeuclidean",
    marginal_relaxation: float | Sequence[float | None] | None = None,
    tolerance: float | None = None,
    max_iterations: int = 2000,
    method: Method = "auto",
    backend: Backend = "auto",
) -> Tensor:
    r"""Compare M weighted point clouds at once by entropic transport between all of them.

    With :math:`\operatorname{MOT}` the value of Eq. 7 for the cost
    :math:`C(k) = \sum_{(i,j) \in \text{graph}} \|x_i^{k_i} - x_j^{k_j}\|^2`,

    .. math::
        S(a_1, \dots, a_M) = \operatorname{MOT}(a_1, \dots, a_M)
            - \frac{1}{M} \sum_{i=1}^{M} \operatorname{MOT}(a_i, \dots, a_i),

    which is 0 where all clouds are equal, and >= 0 where each has as many neighbours in the graph
    ("complete", "cycle"). In a "chain" or a "star" the clouds do not, and near equality it may
    fall below 0 by a part of :math:`\epsilon`. For two clouds at :math:`\epsilon` it is twice the
    Sinkhorn divergence of :cite:t:`feydy:19`, whose cost is :math:`\|x-y\|^2 / 2`, at
    :math:`\epsilon / 2`. A modality left without weight is out: the sum over i and the graph
    run over the modalities that are there.

    Args:
        points: M tensors :math:`(*\text{batch}, N_m, D)`, or one stacked tensor.
        weights: None, or M tensors :math:`(*\text{batch}, N_m)` (or None), boolean or
            non-negative; each is divided by its sum. A point of weight 0 is absent.
        epsilon: > 0, in squared units of the points. None: 0.05 times the standard deviation of
            the costs between the clouds, all edges pooled (each pair of points counts by its
            weights); it carries no gradient and is the same for every term.
        graph: Between which clouds the cost acts: "complete", "chain" (each with the next),
            "star" (the first with every other), "cycle", or a list of pairs (i, j).
        debias: Whether the second term is there. Without it the value may be negative.
        cost: "sqeuclidean", or a function of two tensors of points :math:`(*\text{batch}, N_i, D)`
            and :math:`(*\text{batch}, N_j, D)` that returns their costs
            :math:`(*\text{batch}, N_i, N_j)`.
        marginal_relaxation: As in :func:`multi_marginal_sinkhorn`, for ``debias=False`` only.
            Weights are normalised as ever, and the entropy is taken relative to the product of the
            marginals, :math:`\epsilon \operatorname{KL}(T | \nu_1 \otimes \dots \otimes \nu_M)`,
            as in geomloss, OTT and POT's default: splitting a sample into copies changes nothing.
        tolerance: As in :func:`multi_marginal_sinkhorn`, but None is 1e-6 for any dtype: the
            divergence is a small difference of large values, computed in float64.
        max_iterations: As in :func:`multi_marginal_sinkhorn`.
        method: As in :func:`multi_marginal_sinkhorn`.
        backend: As in :func:`multi_marginal_sinkhorn`.

    Returns:
        A scalar, the mean over the batch, in squared units of the points.

    Raises:
        ValueError: A shape, device, count or option is wrong.
        TypeError: An argument is no floating-point tensor, or dtypes differ.
        MemoryError: The costs between two clouds, over the batch, are more than 2^28 entries.

    Warns:
        ConvergenceWarning: Some problem did not reach the tolerance.

    References:
        :cite:t:`feydy:19` for two clouds; :cite:t:`pass:15`; Eq. 7-8 of :cite:t:`decalign:26`.

    Example:
        >>> import torch
        >>> from multialign import multi_marginal_sinkhorn_loss
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> multi_marginal_sinkhorn_loss([x, x + 1.0, x + 2.0])
        tensor(12.)
    """
    _check_options(epsilon, graph, debias, cost, marginal_relaxation)
    options = SolverOptions(
        tolerance=tolerance, max_iterations=max_iterations, method=method, backend=backend
    )
    if tolerance is None:
        options = replace(options, tolerance=default_tolerance(torch.float64))
    samples = _check_points(points, weights)
    edges = edges_of(graph, len(samples.features))
    dtype = samples.features[0].dtype

    with full_precision(samples.features[0]):
        # In float64 throughout: the divergence is a small difference of large values.
        joint = _joint_problem(samples, edges, epsilon, cost, marginal_relaxation)
        if not debias:
            return solve(joint, options, dtype=torch.float64).value.mean().to(dtype)
        selves, potentials = _self_terms(samples, edges, joint.epsilon, cost, options)
        solution = solve(joint, options, dtype=torch.float64, candidate=potentials)
        return (solution.value - selves).mean().to(dtype)


class MultiMarginalSinkhornLoss(nn.Module):
    r"""Sinkhorn divergence between M weighted point clouds at once.

    .. math::
        S(a_1, \dots, a_M) = \operatorname{MOT}(a_1, \dots, a_M)
            - \frac{1}{M} \sum_{i=1}^{M} \operatorname{MOT}(a_i, \dots, a_i)

    Called ``(points, weights=None)`` with M tensors :math:`(*\text{batch}, N_m, D)`; see
    :func:`multi_marginal_sinkhorn_loss` for the definition, units and errors. :meth:`solve` gives
    the :class:`TransportSolution` of the first term.

    Args:
        epsilon: > 0 in squared units of the points, or None for 0.05 times the standard deviation
            of the costs.
        graph: "complete", "chain", "star", "cycle", or a list of pairs (i, j).
        debias: Whether the second term is there.
        cost: "sqeuclidean", or a function of two tensors of points.
        marginal_relaxation: None for hard constraints, or the weights of their penalties, in
            squared units of the points.
        tolerance: As in :func:`multi_marginal_sinkhorn_loss`; of :meth:`solve`, as in
            :func:`multi_marginal_sinkhorn`.
        max_iterations: As in :func:`multi_marginal_sinkhorn`.
        method: As in :func:`multi_marginal_sinkhorn`.
        backend: As in :func:`multi_marginal_sinkhorn`.

    References:
        :cite:t:`feydy:19` for two clouds; :cite:t:`pass:15`.

    Example:
        >>> import torch
        >>> from multialign import MultiMarginalSinkhornLoss
        >>> loss = MultiMarginalSinkhornLoss(graph="chain")
        >>> clouds = [torch.randn(n, 2) for n in (5, 6, 7)]
        >>> loss(clouds) > 0
        tensor(True)
        >>> loss.solve(clouds).pairwise_marginal(0, 1).shape
        torch.Size([5, 6])
    """

    def __init__(
        self,
        *,
        epsilon: float | None = None,
        graph: Graph = "complete",
        debias: bool = True,
        cost: Cost = "sqeuclidean",
        marginal_relaxation: float | Sequence[float | None] | None = None,
        tolerance: float | None = None,
        max_iterations: int = 2000,
        method: Method = "auto",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _check_options(epsilon, graph, debias, cost, marginal_relaxation)
        self.epsilon = epsilon
        self.graph = graph
        self.debias = debias
        self.cost = cost
        self.marginal_relaxation = marginal_relaxation
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.method = method
        self.backend = backend
        self._solver_options()

    def forward(
        self,
        points: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Return the loss of M point clouds."""
        return multi_marginal_sinkhorn_loss(
            points,
            weights,
            epsilon=self.epsilon,
            graph=self.graph,
            debias=self.debias,
            cost=self.cost,
            marginal_relaxation=self.marginal_relaxation,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            method=self.method,
            backend=self.backend,
        )

    def solve(
        self,
        points: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor | None] | None = None,
    ) -> TransportSolution:
        """Return the solution of the transport problem between the clouds, without debiasing."""
        _check_options(self.epsilon, self.graph, self.debias, self.cost, self.marginal_relaxation)
        samples = _check_points(points, weights)
        edges = edges_of(self.graph, len(samples.features))
        with full_precision(samples.features[0]):
            dtype = samples.features[0].dtype
            joint = _joint_problem(
                samples, edges, self.epsilon, self.cost, self.marginal_relaxation
            )
            return solve(joint, self._solver_options(), dtype=dtype)

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return f"epsilon={self.epsilon}, graph={self.graph!r}, debias={self.debias}"

    def _solver_options(self) -> SolverOptions:
        """Return the options of the solver, checked."""
        return SolverOptions(
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            method=self.method,
            backend=self.backend,
        )


Relaxation = float | Sequence[float | None] | None


def _check_points(points: object, weights: object) -> Samples:
    """Return the clouds, each of at least one row."""
    return pad_rows(make_samples(*check_samples(points, weights, name="points")), 1)


def _joint_problem(
    samples: Samples,
    edges: Sequence[tuple[int, int]],
    epsilon: float | None,
    cost: Cost,
    relaxation: Relaxation,
) -> Arguments:
    """Return the transport problem between the clouds."""
    costs = cost_tables(samples, edges, cost)
    masses = [mass.double() for mass in samples.masses]
    level = epsilon_of(epsilon, samples, costs)
    if relaxation is not None:
        costs = _relative_to_product(costs, masses, level)
    return check_arguments(costs, masses, level, relaxation)


def _relative_to_product(
    costs: Costs, masses: Sequence[Tensor], epsilon: Tensor
) -> dict[tuple[int, int], Tensor]:
    """Return costs C - epsilon sum_i log nu_i over the atoms that are there.

    With them the entropy is relative to the product of the marginals.
    """
    shifted = dict(costs)
    for p, mass in enumerate(masses):
        edge = next((edge for edge in shifted if p in edge), None)
        if edge is None:  # no cost depends on this variable
            edge = (0, max(p, 1))
            sizes = [masses[q].shape[-1] for q in edge]
            shifted[edge] = mass.new_zeros(*mass.shape[:-1], *sizes)
        shift = epsilon.unsqueeze(-1) * mass.log().masked_fill(mass == 0, 0.0)
        shifted[edge] = shifted[edge] - shift.unsqueeze(-1 if edge[0] == p else -2)
    return shifted


def _self_terms(
    samples: Samples,
    edges: Sequence[tuple[int, int]],
    epsilon: Tensor,
    cost: Cost,
    options: SolverOptions,
) -> tuple[Tensor, list[Tensor] | None]:
    """Return the mean over modalities present of MOT(a_i, ..., a_i), `(*batch)`, and potentials.

    In the complete graph the copies of a modality share one potential. In the dual of the first
    term, the potentials of all modalities give at least the mean (docs/math.rst). Taken where the
    solver found less, they keep the divergence from being negative by more than rounding, at any
    tolerance.
    """
    count = len(samples.features)
    sizes = {x.shape[-2] for x in samples.features}
    symmetric = 2 * len(edges) == count * (count - 1) and isinstance(cost, str)
    # Clouds of equal size are solved side by side.
    groups = [list(range(count))] if len(sizes) == 1 else [[i] for i in range(count)]
    batch = samples.present[0].shape
    total = epsilon.new_zeros(batch)
    potentials: list[Tensor] = []
    for group in groups:
        points = torch.stack([samples.features[i] for i in group]).double()
        masses = torch.stack([samples.masses[i] for i in group]).double()
        table = cost_table(cost, points, points)
        # The copy in the place of an absent modality is absent too.
        copies = [masses * samples.present[p].unsqueeze(-1) for p in range(count)]
        alike = check_arguments(dict.fromkeys(edges, table), copies, epsilon.reshape(batch))
        solution = solve(alike, options, dtype=torch.float64, symmetric=symmetric)
        present = torch.stack([samples.present[i] for i in group])  # an index would be copied
        total = total + (solution.value * present).sum(0)
        if symmetric:
            with torch.no_grad():
                found = solution.potentials
            potentials += [found[i][place] for place, i in enumerate(group)]
    mean = total / samples.present.sum(0).clamp_min(1)
    return mean, potentials if symmetric else None


def _check_options(
    epsilon: float | None, graph: Graph, debias: bool, cost: Cost, relaxation: Relaxation
) -> None:
    if relaxation is not None and debias:
        raise ValueError(
            "marginal_relaxation needs debias=False: no debiased form of it is proven to be a "
            f"divergence; got {relaxation!r} with debias=True"
        )
    check_clouds(epsilon, graph, cost)
