"""Every row of docs/guides/conversions.rst, with the peer run on the same problem.

A function below returns pairs of a number of the peer's, converted as its row says, and ours.
"""

import functools
import itertools
import re
import warnings
from pathlib import Path

import geomloss
import numpy as np
import ot
import pytest
import torch

from multialign import (
    MultiMarginalSinkhornLoss,
    bures_wasserstein_cost,
    mmd_loss,
    multi_marginal_sinkhorn,
    multi_marginal_sinkhorn_loss,
    squared_euclidean_cost,
)

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "conversions.rst"
EPSILON = 1.3
RHO = 2.0
# geomloss takes one sweep at each of a falling sequence of blurs. These 500 are equal to 1e-9, so
# that it converges.
STEPS = {"scaling": 1 - 1e-12, "backend": "tensorized"}
START = 1 + 5e-10


class Problem:
    """Weighted clouds of different sizes. Weights sum to 1, as the peers want them."""

    def __init__(self, count=2):
        generator = torch.Generator().manual_seed(3)
        sizes = (6, 4, 5)[:count]
        self.points = [torch.randn(n, 3, generator=generator) + 0.4 * n for n in sizes]
        self.weights = [torch.rand(n, generator=generator) + 0.2 for n in sizes]
        self.weights = [w / w.sum() for w in self.weights]
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
        self.costs = {(i, j): squared_euclidean_cost(*self.pair(i, j)) for i, j in pairs}
        self.entropy = -sum((w * w.log()).sum() for w in self.weights)

    def pair(self, i, j):
        return self.points[i], self.points[j]

    def solve(self, epsilon=EPSILON, costs=None):
        costs = costs or self.costs
        return multi_marginal_sinkhorn(costs, self.weights, epsilon, tolerance=1e-11)

    def loss(self, epsilon=EPSILON):
        return multi_marginal_sinkhorn_loss(
            self.points, self.weights, epsilon=epsilon, tolerance=1e-11
        )

    def geomloss(self, kind="sinkhorn", blur=(EPSILON / 2) ** 0.5, **options):
        (x, y), (a, b) = self.points, self.weights
        loss = geomloss.SamplesLoss(kind, blur=blur, diameter=START * blur, **STEPS, **options)
        return loss(a, x, b, y)

    def arrays(self):
        """Weights and costs for POT."""
        return *(w.numpy() for w in self.weights), self.costs[(0, 1)].numpy()


def as_tensor(array):
    return array if isinstance(array, torch.Tensor) else torch.from_numpy(np.array(array))


def centred(potential, weights):
    """The peers leave a constant free that moves from one potential to the other."""
    potential = as_tensor(potential)
    return potential - (weights * potential).sum()


def potential_pairs(problem, theirs, ours):
    for p, (f, g) in enumerate(zip(theirs, ours)):
        yield centred(f, problem.weights[p]), centred(g, problem.weights[p])
    total = sum((w * as_tensor(f)).sum() for w, f in zip(problem.weights, theirs))
    yield total, sum((w * f).sum() for w, f in zip(problem.weights, ours))


def relaxed_solution(problem):
    """Return the solution with penalised marginals."""
    return multi_marginal_sinkhorn(
        problem.costs, problem.weights, EPSILON, marginal_relaxation=RHO, tolerance=1e-11
    )


def relaxed_loss(problem):
    """Return the solution whose value is the loss with penalised marginals."""
    loss = MultiMarginalSinkhornLoss(
        epsilon=EPSILON, debias=False, marginal_relaxation=RHO, tolerance=1e-11
    )
    return loss.solve(problem.points, problem.weights)


# -- geomloss -------------------------------------------------------------------------------------


def geomloss_divergence():
    problem = Problem()
    yield 2 * problem.geomloss(), problem.loss()


def geomloss_transport():
    problem = Problem()
    theirs = 2 * problem.geomloss(debias=False) - EPSILON * problem.entropy
    yield theirs, problem.solve().value


def geomloss_potentials():
    problem = Problem()
    found = problem.geomloss(debias=False, potentials=True)
    theirs = [2 * f.squeeze() + EPSILON * w.log() for f, w in zip(found, problem.weights)]
    yield from potential_pairs(problem, theirs, problem.solve().potentials)


def geomloss_distance():
    problem = Problem()
    theirs = problem.geomloss(p=1, blur=EPSILON, debias=False) - EPSILON * problem.entropy
    distances = {(0, 1): torch.cdist(*problem.points)}
    yield theirs, problem.solve(costs=distances).value


def geomloss_unbalanced():
    problem = Problem()
    theirs = 2 * problem.geomloss(debias=False, reach=(RHO / 2) ** 0.5)
    yield theirs, relaxed_loss(problem).value


def geomloss_mmd():
    problem = Problem()
    theirs = 2 * problem.geomloss("gaussian", blur=0.7)
    yield theirs, mmd_loss(problem.points, problem.weights, bandwidth=0.7)


# -- POT ------------------------------------------------------------------------------------------


def pot_plan():
    problem = Problem()
    theirs = ot.sinkhorn(*problem.arrays(), EPSILON, stopThr=1e-12)
    yield theirs, problem.solve().pairwise_marginal(0, 1)
    doubled = multi_marginal_sinkhorn(problem.costs, [2 * w for w in problem.weights], EPSILON)
    yield theirs, doubled.pairwise_marginal(0, 1)
    x, y = (p.numpy() for p in problem.points)
    yield ot.dist(x, y), problem.costs[(0, 1)]


def pot_cost():
    problem = Problem()
    theirs = ot.sinkhorn2(*problem.arrays(), EPSILON, stopThr=1e-12)
    yield theirs, problem.solve().transport_cost


def pot_potentials():
    problem = Problem()
    _, log = ot.sinkhorn(*problem.arrays(), EPSILON, stopThr=1e-12, log=True)
    theirs = [EPSILON * np.log(log[name]) for name in ("u", "v")]
    yield from potential_pairs(problem, theirs, problem.solve().potentials)


def pot_solve(**options):
    a, b, cost = Problem().arrays()
    return ot.solve(cost, a, b, reg=EPSILON, tol=1e-12, **options)


def pot_solve_potentials():
    problem = Problem()
    theirs = [EPSILON * f for f in pot_solve().potentials]
    yield from potential_pairs(problem, theirs, problem.solve().potentials)


def pot_kl():
    problem = Problem()
    yield pot_solve().value - EPSILON * problem.entropy, problem.solve().value


def pot_entropy():
    yield pot_solve(reg_type="entropy").value, Problem().solve().value


def pot_linear():
    yield pot_solve().value_linear, Problem().solve().transport_cost


def pot_divergence():
    problem = Problem()
    clouds, (a, b) = [x.numpy() for x in problem.points], [w.numpy() for w in problem.weights]
    theirs = ot.bregman.empirical_sinkhorn_divergence(*clouds, EPSILON, a, b, stopThr=1e-12)
    between = problem.solve().transport_cost
    for x, w in zip(problem.points, problem.weights):
        cost = {(0, 1): squared_euclidean_cost(x, x)}
        own = multi_marginal_sinkhorn(cost, [w, w], EPSILON, tolerance=1e-11)
        between = between - own.transport_cost / 2
    yield theirs, between


def pot_gaussians():
    generator = torch.Generator().manual_seed(0)
    means, roots = (torch.randn(2, 3, *rest, generator=generator) for rest in ((), (3,)))
    covariances = roots @ roots.mT
    arrays = [x.numpy() for x in (*means, *covariances)]
    theirs = ot.gaussian.bures_wasserstein_distance(*arrays) ** 2
    ours = bures_wasserstein_cost(means[:1], covariances[:1], means[1:], covariances[1:])
    yield theirs, ours.squeeze()


# -- OTT ------------------------------------------------------------------------------------------


@pytest.fixture
def jax_in_float64():
    """JAX has float32 alone unless it is told otherwise."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("ott")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def pot_unbalanced():
    problem = Problem()
    a, b, cost = problem.arrays()
    options = {"numItermax": 100_000, "stopThr": 1e-14}
    for kind, solve in (("entropy", relaxed_solution), ("kl", relaxed_loss)):
        ours = solve(problem)
        theirs = ot.unbalanced.sinkhorn_unbalanced(
            a, b, cost, EPSILON, RHO, reg_type=kind, **options
        )
        yield theirs, ours.pairwise_marginal(0, 1)


def ott_points(problem):
    from jax import numpy as jnp

    return [[jnp.asarray(x.numpy()) for x in part] for part in (problem.points, problem.weights)]


@functools.cache
def ott_sinkhorn(**options):
    from ott.geometry.pointcloud import PointCloud
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    points, weights = ott_points(Problem())
    geometry = PointCloud(*points, **options)
    return Sinkhorn(threshold=1e-10)(LinearProblem(geometry, *weights))


def ott_unbalanced():
    from ott.geometry.pointcloud import PointCloud
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    problem, tau = Problem(), RHO / (RHO + EPSILON)
    points, weights = ott_points(problem)
    task = LinearProblem(PointCloud(*points, epsilon=EPSILON), *weights, tau_a=tau, tau_b=tau)
    output = Sinkhorn(threshold=1e-10)(task)
    yield output.matrix, relaxed_solution(problem).pairwise_marginal(0, 1)


def ott_plan():
    problem = Problem()
    yield ott_sinkhorn(epsilon=EPSILON).matrix, problem.solve().pairwise_marginal(0, 1)


def ott_potentials():
    problem = Problem()
    output = ott_sinkhorn(epsilon=EPSILON)
    yield from potential_pairs(problem, [output.f, output.g], problem.solve().potentials)


def ott_kl():
    problem = Problem()
    output = ott_sinkhorn(epsilon=EPSILON)
    ours = problem.solve().value
    yield float(output.reg_ot_cost) - EPSILON * problem.entropy, ours
    yield float(output.kl_reg_cost) - EPSILON * problem.entropy, ours


def ott_entropy():
    problem = Problem()
    output = ott_sinkhorn(epsilon=EPSILON)
    ours = problem.solve().value
    yield output.ent_reg_cost, ours
    yield output.dual_cost, ours


def ott_cost():
    problem = Problem()
    yield ott_sinkhorn(epsilon=EPSILON).primal_cost, problem.solve().transport_cost


def ott_default():
    problem = Problem()
    epsilon = float(ott_sinkhorn().geom.epsilon)
    yield epsilon, 0.05 * problem.costs[(0, 1)].std(correction=0)
    ours = multi_marginal_sinkhorn_loss(problem.points, tolerance=1e-11)
    named = multi_marginal_sinkhorn_loss(problem.points, epsilon=epsilon, tolerance=1e-11)
    yield named, ours
    # With weights, ours is the standard deviation under them.
    masses, cost = problem.weights[0][:, None] * problem.weights[1], problem.costs[(0, 1)]
    weighted = 0.05 * float((masses * (cost - (masses * cost).sum()).square()).sum().sqrt())
    ours = multi_marginal_sinkhorn_loss(problem.points, problem.weights, tolerance=1e-11)
    yield problem.loss(weighted), ours


def ott_relative():
    problem = Problem()
    cost = problem.costs[(0, 1)]
    for kind, unit in (("mean", cost.mean()), ("std", cost.std(correction=0))):
        output = ott_sinkhorn(epsilon=0.3, relative_epsilon=kind)
        yield output.geom.epsilon, 0.3 * unit
        yield output.ent_reg_cost, problem.solve(0.3 * float(unit)).value


def ott_scaled():
    problem = Problem()
    unit = float(problem.costs[(0, 1)].mean())
    output = ott_sinkhorn(epsilon=0.3, scale_cost="mean")
    solution = problem.solve(0.3 * unit)
    yield unit * float(output.ent_reg_cost), solution.value
    theirs = [unit * np.array(f) for f in (output.f, output.g)]
    yield from potential_pairs(problem, theirs, solution.potentials)


def ott_divergence():
    from ott.geometry.pointcloud import PointCloud
    from ott.tools.sinkhorn_divergence import sinkhorn_divergence

    problem = Problem()
    points, (a, b) = ott_points(problem)
    theirs, _ = sinkhorn_divergence(
        PointCloud, *points, a=a, b=b, epsilon=EPSILON,
        solve_kwargs={"threshold": 1e-10},
    )  # fmt: skip
    yield theirs, problem.loss()


def ott_several(**options):
    from ott.experimental.mmsinkhorn import MMSinkhorn

    points, weights = ott_points(Problem(3))
    solver = MMSinkhorn(threshold=1e-10)
    return solver(tuple(points), tuple(weights), **options)


def ott_several_value():
    output, problem = ott_several(epsilon=EPSILON), Problem(3)
    solution = problem.solve()
    yield output.ent_reg_cost, solution.value
    yield output.tensor, solution.plan()
    yield from potential_pairs(problem, output.potentials, solution.potentials)


def ott_several_default():
    output, problem = ott_several(), Problem(3)
    costs = problem.costs
    tensor = costs[0, 1][:, :, None] + costs[0, 2][:, None] + costs[1, 2]
    yield output.epsilon, 0.05 * tensor.std(correction=0)
    pooled = torch.cat([cost.flatten() for cost in costs.values()])
    epsilon = 0.05 * float(pooled.std(correction=0))
    assert abs(float(output.epsilon) / epsilon - 1) > 0.1  # the rules differ
    ours = multi_marginal_sinkhorn_loss(problem.points)
    yield multi_marginal_sinkhorn_loss(problem.points, epsilon=epsilon), ours


ROWS = {
    "geomloss, divergence": geomloss_divergence,
    "geomloss, value": geomloss_transport,
    "geomloss, potentials": geomloss_potentials,
    "geomloss, distances": geomloss_distance,
    "geomloss, unbalanced": geomloss_unbalanced,
    "geomloss, MMD": geomloss_mmd,
    "POT, plan": pot_plan,
    "POT, transport cost": pot_cost,
    "POT, scalings": pot_potentials,
    "POT, potentials": pot_solve_potentials,
    "POT, KL value": pot_kl,
    "POT, entropy value": pot_entropy,
    "POT, linear value": pot_linear,
    "POT, divergence": pot_divergence,
    "POT, unbalanced": pot_unbalanced,
    "POT, Gaussians": pot_gaussians,
    "OTT, plan": ott_plan,
    "OTT, potentials": ott_potentials,
    "OTT, KL value": ott_kl,
    "OTT, entropy value": ott_entropy,
    "OTT, transport cost": ott_cost,
    "OTT, divergence": ott_divergence,
    "OTT, unbalanced": ott_unbalanced,
    "OTT, default epsilon": ott_default,
    "OTT, relative epsilon": ott_relative,
    "OTT, scaled cost": ott_scaled,
    "OTT, several marginals": ott_several_value,
    "OTT, several, default epsilon": ott_several_default,
}


@pytest.mark.parametrize("title", ROWS)
def test_row(title, request):
    if title.startswith("OTT"):
        request.getfixturevalue("jax_in_float64")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the peers'
        warnings.filterwarnings("ignore", "If reg_type = entropy", UserWarning)  # POT's
        pairs = list(ROWS[title]())
    assert pairs
    for theirs, ours in pairs:
        torch.testing.assert_close(as_tensor(theirs), as_tensor(ours), rtol=1e-6, atol=1e-6)


def test_every_row_of_the_page_is_here():
    titles = re.findall(r"^   \* - ((?:geomloss|POT|OTT), .*)$", PAGE.read_text("utf-8"), re.M)
    assert titles == list(ROWS)


@pytest.mark.parametrize(("scaling", "least", "most"), [(0.5, 0.006, 0.17), (0.99, 0.0, 0.004)])
def test_geomloss_is_below_the_converged_divergence_by_what_the_page_says(scaling, least, most):
    for seed, relative in itertools.product(range(4), (0.05, 0.01, 0.001)):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(50, 3, generator=generator)
        y = torch.randn(40, 3, generator=generator) + 0.3 * seed
        epsilon = relative * float(squared_euclidean_cost(x, y).std(correction=0))
        blur = (epsilon / 2) ** 0.5
        theirs = geomloss.SamplesLoss("sinkhorn", blur=blur, scaling=scaling, backend="tensorized")
        gap = 1 - 2 * theirs(x, y) / multi_marginal_sinkhorn_loss([x, y], epsilon=epsilon)
        assert least < gap < most
