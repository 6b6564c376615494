"""Naive float64 oracles in numpy and scipy, each written from its equation and nothing of ours.

Equation numbers are those of the DecAlign paper (ICLR 2026).
"""

from itertools import combinations, permutations

import numpy as np
from scipy.linalg import eigh
from scipy.optimize import linprog
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, xlogy
from scipy.stats import multivariate_normal


def normalised(weights, count):
    weights = np.ones(count) if weights is None else np.asarray(weights, float)
    return weights / weights.sum()


# Eq. 1


def cosine_decoupling(unique, common, form="squared", weights=None):
    weights = weights or [None] * len(unique)
    total = 0.0
    for us, vs, w in zip(unique, common, weights):
        for p, u, v in zip(normalised(w, len(us)), us, vs):
            u, v = u.ravel(), v.ravel()
            c = u @ v / (np.linalg.norm(u) * np.linalg.norm(v))
            total += p * {"squared": c * c, "absolute": abs(c), "signed": c}[form]
    return total


# Eq. 10 and Appendix B.6


def moments(x, w=None, eps=1e-6):
    p = normalised(w, len(x))
    mean = np.average(x, axis=0, weights=p)
    covariance = np.cov(x, rowvar=False, bias=True, aweights=p).reshape(x.shape[1], x.shape[1])
    z = (x - mean) / (np.sqrt(np.diag(covariance)) + eps)
    return {"mean": mean, "covariance": covariance, "skewness": np.average(z**3, axis=0, weights=p)}


def gaussian_moment(features, names, reduction="sum", weights=None, eps=1e-6):
    count = len(features)
    weights = weights or [None] * count
    stats = [moments(x, w, eps) for x, w in zip(features, weights)]
    reduce = np.sum if reduction == "sum" else np.mean
    pairs = combinations(stats, 2)
    total = sum(reduce((a[n] - b[n]) ** 2) for a, b in pairs for n in names)
    return total / (count * (count - 1))


# Eq. 11-12


def kernel(x, y, sigmas):
    if sigmas is None:
        return -cdist(x, y)
    return np.mean([np.exp(-cdist(x, y, "sqeuclidean") / (2 * s**2)) for s in sigmas], axis=0)


def median_distance(features):
    points = np.concatenate(features)
    return np.median(cdist(points, points)[np.triu_indices(len(points), 1)])


def mmd(features, sigmas, estimator="biased", weights=None):
    count = len(features)
    weights = weights or [None] * count
    ps = [normalised(w, len(x)) for w, x in zip(weights, features)]

    def within(i):
        pp = np.outer(ps[i], ps[i])
        if estimator == "unbiased":
            np.fill_diagonal(pp, 0)
        return (pp * kernel(features[i], features[i], sigmas)).sum() / pp.sum()

    total = 0.0
    for i, j in combinations(range(count), 2):
        across = ps[i] @ kernel(features[i], features[j], sigmas) @ ps[j]
        total += within(i) + within(j) - 2 * across
    return 2 * total / (count * (count - 1))


# Independence (Gretton et al. 2007; Song et al. 2012, Eq. 5)


def hsic(k, h, w=None, normalize=False):
    p = normalised(w, len(k))
    centre = np.eye(len(k)) - np.outer(np.ones(len(k)), p)
    a, b = (centre @ table @ centre.T for table in (k, h))

    def inner(s, t):
        return np.einsum("n,m,nm,nm", p, p, s, t)

    return inner(a, b) / np.sqrt(inner(a, a) * inner(b, b)) if normalize else inner(a, b)


def unbiased_hsic(k, h, normalize=False):
    n = len(k)
    a, b = (table - np.diag(np.diag(table)) for table in (k, h))

    def estimate(s, t):
        terms = np.trace(s @ t) + s.sum() * t.sum() / ((n - 1) * (n - 2))
        return (terms - 2 / (n - 2) * (s @ t).sum()) / (n * (n - 3))

    if normalize:
        return estimate(a, b) / np.sqrt(estimate(a, a) * estimate(b, b))
    return estimate(a, b)


# The matching gap (Piran et al. 2024)


def matching_gap(features, edges, epsilon, weights=None):
    p = np.ones(len(features[0]))
    for w in weights or []:
        p = p if w is None else p * np.asarray(w, float)
    p = p / p.sum()
    costs = {(i, j): cdist(features[i], features[j], "sqeuclidean") for i, j in edges}
    cost = dense_cost(costs, [len(x) for x in features])
    matched = np.zeros(cost.shape)
    rows = np.arange(len(p))
    matched[(rows,) * len(features)] = p
    best = transport_plan(cost, [p] * len(features), epsilon)
    return transport_value(matched, cost, epsilon) - transport_value(best, cost, epsilon)


# Eq. 6


def matrix_sqrt(matrix):
    values, vectors = eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def bures_wasserstein(mean_a, cov_a, mean_b, cov_b):
    root = matrix_sqrt(cov_a)
    cross = matrix_sqrt(root @ cov_b @ root)
    return np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * cross)


# Eq. 7-8, on the dense tensor


def dense_cost(costs, sizes):
    total = np.zeros(sizes)
    for (i, j), cost in costs.items():
        shape = [1] * len(sizes)
        shape[i], shape[j] = cost.shape
        total = total + cost.reshape(shape)
    return total


def transport_plan(cost, marginals, epsilon, iterations=100_000, tolerance=1e-12):
    """Sinkhorn on the K^M tensor, to a tolerance far below those tested."""
    count = cost.ndim
    log_plan = -cost / epsilon
    others = [tuple(q for q in range(count) if q != p) for p in range(count)]
    for _ in range(iterations):
        for p in range(count):
            step = np.log(marginals[p]) - logsumexp(log_plan, axis=others[p])
            log_plan = log_plan + step.reshape([-1 if q == p else 1 for q in range(count)])
        plan = np.exp(log_plan)
        error = sum(abs(plan.sum(others[p]) - marginals[p]).sum() for p in range(count))
        if error < tolerance:
            return plan
    raise AssertionError(f"the oracle did not converge: {error}")


def transport_value(plan, cost, epsilon):
    return (plan * cost).sum() + epsilon * xlogy(plan, plan).sum()


def exact_transport(cost, marginals):
    """The linear program of unregularised multi-marginal transport."""
    rows, right = [], []
    for p, marginal in enumerate(marginals):
        for k in range(len(marginal)):
            mask = np.zeros(cost.shape)
            mask[tuple(k if q == p else slice(None) for q in range(cost.ndim))] = 1
            rows.append(mask.ravel())
            right.append(marginal[k])
    result = linprog(cost.ravel(), A_eq=np.array(rows), b_eq=np.array(right), method="highs")
    assert result.success
    return result.fun


def sinkhorn_divergence(clouds, weights, edges, epsilon):
    weights = [normalised(w, len(x)) for w, x in zip(weights, clouds)]

    def value(points, marginals):
        costs = {(i, j): cdist(points[i], points[j], "sqeuclidean") for i, j in edges}
        cost = dense_cost(costs, [len(x) for x in points])
        return transport_value(transport_plan(cost, marginals, epsilon), cost, epsilon)

    count = len(clouds)
    own = [value([x] * count, [w] * count) for x, w in zip(clouds, weights)]
    return value(clouds, weights) - np.mean(own)


# Eq. 3-4 and 9


def posterior(x, weights, means, covariances):
    joint = np.stack(
        [
            np.log(w) + multivariate_normal(m, c).logpdf(x).reshape(len(x))
            for w, m, c in zip(weights, means, covariances)
        ],
        1,
    )
    return np.exp(joint - logsumexp(joint, axis=1, keepdims=True))


def prototype_alignment(
    features, mixtures, epsilon, objective, matching, scale=1.0, transport=1.0, prototype=1.0
):
    """Eq. 9 for mixtures given as (weights, means, full covariances)."""
    count = len(features)
    costs = {
        (i, j): scale
        * np.array(
            [
                [bures_wasserstein(ma, ca, mb, cb) for mb, cb in zip(*mixtures[j][1:])]
                for ma, ca in zip(*mixtures[i][1:])
            ]
        )
        for i, j in combinations(range(count), 2)
    }
    marginals = [w for w, _, _ in mixtures]
    cost = dense_cost(costs, [len(w) for w in marginals])
    plan = transport_plan(cost, marginals, epsilon)
    if objective == "regularized":
        first = transport_value(plan, cost, epsilon)
    else:
        first = (plan * cost).sum()

    second = 0.0
    for i, j in permutations(range(count), 2):
        targets = mixtures[j][1]
        if matching == "plan":
            table = plan.sum(tuple(q for q in range(count) if q not in (i, j)))
            table = table if i < j else table.T
            targets = (table / table.sum(1, keepdims=True)) @ targets
        w = posterior(features[i], *mixtures[i])
        second += (w * cdist(features[i], targets, "sqeuclidean")).sum() / len(features[i])
    return transport * first + prototype * scale * second / (count * (count - 1))
