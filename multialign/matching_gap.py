"""Multi-marginal matching gap: a contrastive loss for any number of views at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from multialign._clouds import Cost, Graph, check_clouds, cost_tables, edges_of, epsilon_of
from multialign._distributed import GroupModule, ProcessGroup, Ranks
from multialign._samples import make_samples, pad_rows
from multialign._validation import check_samples, full_precision
from multialign.ops import Backend
from multialign.transport.options import Method, SolverOptions, default_tolerance
from multialign.transport.prepare import check_arguments
from multialign.transport.solver import solve

__all__ = ["MatchingGapLoss", "matching_gap_loss"]


def matching_gap_loss(
    features: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[Tensor | None] | None = None,
    *,
    epsilon: float | None = None,
    graph: Graph = "complete",
    cost: Cost = "sqeuclidean",
    tolerance: float | None = None,
    max_iterations: int = 2000,
    method: Method = "auto",
    backend: Backend = "auto",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Contrast the known matching of M views with the best one that transport finds.

    Row n of every view is the same sample. With the cost
    :math:`C(k) = \sum_{(i,j) \in \text{graph}} \|x_i^{k_i} - x_j^{k_j}\|^2`, the loss is the
    objective of Eq. 7 at the known matching, minus its optimum,

    .. math::
        L = \frac{1}{N} \sum_n C(n, \dots, n) - \epsilon \log N
            - \min_T \Big( \langle T, C \rangle + \epsilon \sum_k T(k) \log T(k) \Big),

    over plans T whose M marginals are all 1/N. It is never negative. Its gradient is that of the
    matched costs minus that of the optimum, and needs no linear solve.

    It is a contrastive loss as InfoNCE is, with all other tuples of rows as negatives. For two
    views, InfoNCE is the same gap where the plan has to meet one marginal only: in units of
    epsilon the gap is at most InfoNCE of the scores :math:`-C / \epsilon`, in either direction.
    For rows of norm 1, where :math:`C = 2 - 2 \cos`, these are cosines at the temperature
    :math:`\tau = \epsilon / 2`: a temperature of 0.1 is an epsilon of 0.2, and
    :math:`L / \epsilon` has the scale of InfoNCE. Of rows that are not normalised, the default
    epsilon follows the scale, and shrinking all features makes the loss small: normalise them, or
    give epsilon.

    Args:
        features: M views :math:`(*\text{batch}, N, D)` of the same N samples, or one stacked
            tensor.
        weights: None, or M tensors :math:`(*\text{batch}, N)` (or None), boolean or non-negative.
            The weight of row n is the product over views, divided by the sum over n, and the
            marginal of every view: a row absent in one view is out in all, and without any row the
            loss is 0. With weights w, 1/N becomes :math:`w_n`, and :math:`-\log N` becomes
            :math:`\sum_n w_n \log w_n`.
        epsilon: > 0, in squared units of the features. None: 0.05 times the standard deviation of
            the costs between the views, as in :func:`multi_marginal_sinkhorn_loss`.
        graph: Between which views the cost acts: "complete", "chain", "star", "cycle", or a list of
            pairs (i, j).
        cost: "sqeuclidean", or a function of two tensors, as in
            :func:`multi_marginal_sinkhorn_loss`.
        tolerance: As in :func:`multi_marginal_sinkhorn`. The gap is computed in float64, and a
            solver that stops early makes it larger, never negative. Where it is to be read at a
            small part of epsilon, give 1e-6.
        max_iterations: As in :func:`multi_marginal_sinkhorn`.
        method: As in :func:`multi_marginal_sinkhorn`.
        backend: As in :func:`multi_marginal_sinkhorn`.
        process_group: Given one, the rows of all ranks are one batch: each row is contrasted with
            the rows of all of them.

    Returns:
        A scalar >= 0, the mean over the batch, in squared units of the features.

    Raises:
        ValueError: A shape, device, count or option is wrong, or N differs between views.
        TypeError: An argument is no floating-point tensor, or dtypes differ.
        MemoryError: The costs between two views, over the batch, are more than 2^28 entries.

    Warns:
        ConvergenceWarning: Some problem did not reach the tolerance.

    References:
        :cite:t:`piran:24`; :cite:t:`shi:23` for two views; :cite:t:`oord:18` for InfoNCE.

    Example:
        >>> import torch
        >>> from multialign import matching_gap_loss
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> matching_gap_loss([x, x + 0.1, x.flip(0)], epsilon=0.1)
        tensor(5.3333)
    """
    check_clouds(epsilon, graph, cost)
    options = SolverOptions(
        tolerance=tolerance, max_iterations=max_iterations, method=method, backend=backend
    )
    tensors, checked = check_samples(features, weights)
    _check_counts(tensors)
    tensors, checked = Ranks(process_group).gather(tensors, checked)
    if tolerance is None:
        options = replace(options, tolerance=default_tolerance(tensors[0].dtype))
    edges = edges_of(graph, len(tensors))

    with full_precision(tensors[0]):
        # A view has the weights of the rows that are there in all.
        samples = pad_rows(make_samples(tensors, [_product(checked)] * len(tensors)), 1)
        mass = samples.masses[0].double()
        costs = cost_tables(samples, edges, cost)
        level = epsilon_of(epsilon, samples, costs)
        # In float64 throughout: the gap is a small difference of large values.
        problem = check_arguments(costs, [mass] * len(tensors), level)
        matched = mass * sum(c.diagonal(dim1=-2, dim2=-1) for c in costs.values())
        entropy = mass * torch.where(mass == 0, 1.0, mass).log()
        optimum = solve(problem, options, dtype=torch.float64).value
        gap = matched.sum(-1) + level * entropy.sum(-1) - optimum
        return gap.mean().to(tensors[0].dtype)


class MatchingGapLoss(GroupModule):
    r"""Contrastive loss of M views: the cost of the known matching minus that of the best one.

    .. math::
        L = \frac{1}{N} \sum_n C(n, \dots, n) - \epsilon \log N
            - \min_T \Big( \langle T, C \rangle + \epsilon \sum_k T(k) \log T(k) \Big)

    Called ``(features, weights=None)`` with M views :math:`(*\text{batch}, N, D)` of the same N
    samples; see :func:`matching_gap_loss` for the definition, temperatures, units and errors.

    Args:
        epsilon: > 0 in squared units of the features, or None for 0.05 times the standard deviation
            of the costs.
        graph: "complete", "chain", "star", "cycle", or a list of pairs (i, j).
        cost: "sqeuclidean", or a function of two tensors of features.
        tolerance: As in :func:`matching_gap_loss`.
        max_iterations: As in :func:`multi_marginal_sinkhorn`.
        method: As in :func:`multi_marginal_sinkhorn`.
        backend: As in :func:`multi_marginal_sinkhorn`.
        process_group: Given one, the rows of all ranks are one batch.

    References:
        :cite:t:`piran:24`.

    Example:
        >>> import torch
        >>> from multialign import MatchingGapLoss
        >>> loss = MatchingGapLoss(epsilon=0.2)
        >>> views = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
        >>> loss(torch.nn.functional.normalize(views, dim=-1))
        tensor(2.1083)
    """

    def __init__(
        self,
        *,
        epsilon: float | None = None,
        graph: Graph = "complete",
        cost: Cost = "sqeuclidean",
        tolerance: float | None = None,
        max_iterations: int = 2000,
        method: Method = "auto",
        backend: Backend = "auto",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_clouds(epsilon, graph, cost)
        SolverOptions(
            tolerance=tolerance, max_iterations=max_iterations, method=method, backend=backend
        )
        self.epsilon = epsilon
        self.graph = graph
        self.cost = cost
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.method = method
        self.backend = backend
        self.process_group = process_group

    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Return the loss of M views."""
        return matching_gap_loss(
            features,
            weights,
            epsilon=self.epsilon,
            graph=self.graph,
            cost=self.cost,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            method=self.method,
            backend=self.backend,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return f"epsilon={self.epsilon}, graph={self.graph!r}"


def _product(weights: Sequence[Tensor | None]) -> Tensor | None:
    """Return the product of the weights that are given, in float64, where it has the range."""
    given = [weight.double() for weight in weights if weight is not None]
    return reduce(torch.mul, given) if given else None


def _check_counts(views: Sequence[Tensor]) -> None:
    for m, x in enumerate(views):
        if x.shape[-2] != views[0].shape[-2]:
            raise ValueError(
                f"features[{m}] must have N = {views[0].shape[-2]} as features[0], since row n of "
                f"every view is the same sample; got N = {x.shape[-2]}"
            )
