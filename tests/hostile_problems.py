"""Random hostile problems, each made from a line of text.

A `Recipe` says in a line how a problem is made, so that a failure can be repeated from its print.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

KINDS = ("normal", "duplicates", "equal", "constant feature", "zero feature", "clusters", "line")
WEIGHTS = ("none", "ones", "random", "some zero", "mask", "single", "absent", "extreme")
LAYOUTS = ("contiguous", "transposed", "strided", "expanded")
JUNK = (math.nan, math.inf, -math.inf, 1e30, 0.0)


@dataclass(frozen=True)
class Recipe:
    """How a problem is made."""

    seed: int
    dtype: str
    batch: tuple[int, ...]
    sizes: tuple[int, ...]
    dim: int
    scale: float
    """The unit of everything."""
    offset: float
    """Where the samples lie, in units of `scale`."""
    gap: float
    """How far apart the modalities are, in units of `scale`."""
    kinds: tuple[str, ...]
    weights: tuple[str, ...]
    junk: float
    """What stands in rows of weight 0."""
    layouts: tuple[str, ...]
    wanted: tuple[bool, ...]
    """Which modalities require a gradient."""


def draw_recipe(rng: random.Random) -> Recipe:
    """Draw a recipe: mostly small, sometimes large in one way."""

    def size(limit: int) -> int:
        return rng.choice([1, 2, 3, rng.randint(1, 12), rng.randint(1, limit)])

    count = rng.choice([2, 2, 2, 3, 3, 4, 5, 6])
    # The work of a complete graph is the product of sizes.
    limit = {2: 200, 3: 60, 4: 16, 5: 8, 6: 5}[count]
    sizes = [size(limit) for _ in range(count)]
    if rng.random() < 0.4:
        sizes = [sizes[0]] * count
    dim = rng.choice([1, 2, 3, 8, 65, rng.randint(1, 40), rng.randint(1, 1100)])
    dtype = rng.choice(["float32", "float32", "float64", "float64", "float16", "bfloat16"])
    scale = rng.choice([1.0, 1.0, 10.0 ** rng.randint(-18, 18), 10.0 ** rng.randint(-4, 4)])
    offset = rng.choice([0.0, 0.0, 1.0, 1e3, 1e6])
    if dtype == "float16":
        scale, offset = 10.0 ** rng.randint(-4, 2), rng.choice([0.0, 1.0, 10.0])
    return Recipe(
        seed=rng.randint(0, 2**31),
        dtype=dtype,
        batch=rng.choice([(), (), (), (1,), (2,), (2, 1)]),
        sizes=tuple(sizes),
        dim=dim,
        scale=scale,
        offset=offset,
        gap=rng.choice([0.0, 0.0, 1e-3, 1.0, 30.0]),
        kinds=tuple(rng.choice(KINDS) for _ in sizes),
        weights=tuple(rng.choice(("none", rng.choice(WEIGHTS))) for _ in sizes),
        junk=rng.choice(JUNK),
        layouts=tuple(rng.choice(LAYOUTS) for _ in sizes),
        wanted=tuple(rng.random() < 0.7 for _ in sizes),
    )


@dataclass
class Problem:
    """Features `(*batch, N_m, D)` and weights `(*batch, N_m)` or None, by modality."""

    features: list[torch.Tensor]
    weights: list[torch.Tensor | None]

    def to(self, dtype: torch.dtype) -> "Problem":
        """Return the same numbers in another dtype, as leaves of their own."""
        return Problem(
            [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in self.features],
            [None if w is None else w.detach().to(dtype) for w in self.weights],
        )

    def double(self) -> "Problem":
        """Return the same numbers in float64, as leaves of their own."""
        return self.to(torch.float64)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Problem":
        """Return the problem with a function applied to the features."""
        return replace(self, features=[function(x.detach()) for x in self.features])

    def present(self) -> list[torch.Tensor]:
        """Return which samples are there, `(*batch, N_m)`."""
        return [
            torch.ones(x.shape[:-1], dtype=torch.bool) if w is None else w != 0
            for x, w in zip(self.features, self.weights)
        ]


def build(recipe: Recipe) -> Problem:
    """Make the problem."""
    rng = torch.Generator().manual_seed(recipe.seed)
    dtype = getattr(torch, recipe.dtype)
    features, weights = [], []
    for m, size in enumerate(recipe.sizes):
        x = _samples(recipe.kinds[m], (*recipe.batch, size, recipe.dim), rng)
        x = (recipe.scale * (x + recipe.offset + m * recipe.gap)).to(dtype)
        weight = _weights(recipe.weights[m], (*recipe.batch, size), rng)
        if weight is not None:
            weight = weight if weight.dtype == torch.bool else weight.to(dtype)
            junk = torch.tensor(recipe.junk, dtype=torch.float64).to(dtype)
            x = torch.where(weight.unsqueeze(-1) == 0, junk, x)
        x = _laid_out(x, recipe.layouts[m])
        features.append(x.requires_grad_(recipe.wanted[m]))
        weights.append(weight)
    return Problem(features, weights)


def _samples(kind: str, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    if kind == "duplicates":
        pick = torch.randint(0, (shape[-2] + 2) // 3, shape[-2:-1], generator=rng)
        return x[..., pick, :]
    if kind == "equal":
        return x[..., :1, :].expand(shape).clone()
    if kind == "constant feature":
        x[..., 0] = 1.0
    if kind == "zero feature":
        x[..., -1] = 0.0
    if kind == "clusters":
        x = 1e-3 * x + 100.0 * torch.randint(0, 3, (shape[-2], 1), generator=rng)
    if kind == "line":
        x = x[..., :1] * torch.randn(shape[-1], generator=rng, dtype=torch.float64)
    return x


def _weights(kind: str, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor | None:
    w = torch.rand(shape, generator=rng, dtype=torch.float64) + 0.1
    if kind == "none":
        return None
    if kind == "ones":
        return torch.ones(shape, dtype=torch.float64)
    if kind == "some zero":
        return torch.where(torch.rand(shape, generator=rng) < 0.5, 0.0, w)
    if kind == "mask":
        return torch.rand(shape, generator=rng) < 0.7
    if kind == "single":
        w[..., 1:] = 0.0
    if kind == "absent":
        w[...] = 0.0
    if kind == "extreme":
        # Within what float16 can hold, and with a weight of 0 among them.
        w = 10.0 ** torch.randint(-4, 5, shape, generator=rng)
        w[..., shape[-1] // 2] = 0.0
    return w


def _laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]
    if layout == "expanded" and x.shape[-2] > 1 and bool((x == x[..., :1, :]).all()):
        return x[..., :1, :].expand(x.shape)
    return x


def spread(problem: Problem) -> float:
    """Return the mean squared distance of the samples that are there from their mean."""
    rows = [x.detach()[there] for x, there in zip(problem.features, problem.present())]
    x = torch.cat(rows).double()
    if len(x) == 0:
        return 0.0
    # Distances within a modality and between modalities count alike.
    return float((x - x.mean(0)).square().sum(-1).max())


recipes = st.randoms(use_true_random=False).map(draw_recipe)
