"""Point clouds sampled from triangle meshes that are made in code.

    points, labels = clouds(1000, points=256, seed=0)        float32 [1000, 3, 256], int64 [1000]

Points fall uniformly on the surface of one of ten solids, which is stretched, turned about its upright axis and
perturbed, then moved into the unit ball, as is the custom with ModelNet (PointNet, arXiv 1612.00593).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Triangles = NDArray[np.float64]  # [n, 3 corners, 3 coordinates]

_FINE = 24  # cells along each side of a curved surface


def clouds(count: int, points: int, seed: int) -> tuple[Tensor, Tensor]:
    """Coordinates float32 [count, 3, points] in the unit ball, labels int64 [count]."""
    generator = np.random.default_rng([seed, 1])
    labels = generator.permutation(np.arange(count) % len(SOLIDS))
    made = np.stack([_cloud(_MESHES[label], points, generator) for label in labels])
    return torch.tensor(made.transpose(0, 2, 1), dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)


def sample_surface(triangles: Triangles, points: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """[points, 3], uniform by area: a triangle by its share of it, a place in it by folded barycentric coordinates."""
    first, second = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    area = np.linalg.norm(np.cross(first, second), axis=1)
    chosen = generator.choice(len(triangles), points, p=area / area.sum())
    u, v = generator.random((2, points, 1))
    outside = u + v > 1
    u, v = np.where(outside, 1 - u, u), np.where(outside, 1 - v, v)
    return triangles[chosen, 0] + u * first[chosen] + v * second[chosen]


def _cloud(triangles: Triangles, points: int, generator: np.random.Generator) -> NDArray[np.float64]:
    cloud = sample_surface(triangles, points, generator) * generator.uniform(0.7, 1.3, 3)
    angle = generator.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    cloud = cloud @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    cloud += generator.normal(0, 0.02, cloud.shape)
    cloud -= cloud.mean(0)
    return cloud / np.linalg.norm(cloud, axis=1).max()


def _hull(corners: list[tuple[float, float, float]]) -> Triangles:
    """The convex solid with these corners."""
    from scipy.spatial import ConvexHull

    vertices = np.array(corners, dtype=float)
    return vertices[ConvexHull(vertices).simplices]


def _box(x: float, y: float, z: float, at: tuple[float, float, float] = (0, 0, 0)) -> Triangles:
    return _hull([(i * x, j * y, k * z) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)]) + np.array(at)


def _bent(place: Callable[[NDArray[np.float64], NDArray[np.float64]], tuple]) -> Triangles:
    """The unit square as a grid of triangles, bent by place(u, v) -> x, y, z."""
    u, v = np.meshgrid(*[np.linspace(0, 1, _FINE + 1)] * 2, indexing="ij")
    grid = np.stack(np.broadcast_arrays(*place(u, v)), -1)
    a, b, c, d = grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]
    return np.concatenate([np.stack(corners, 2).reshape(-1, 3, 3) for corners in ((a, b, c), (a, c, d))])


def _turned(profile: list[tuple[float, float]]) -> Triangles:
    """The surface that a line of (radius, height) sweeps about the upright axis."""
    along = np.linspace(0, 1, len(profile))
    radius, height = np.array(profile, dtype=float).T

    def place(u: NDArray[np.float64], v: NDArray[np.float64]) -> tuple:
        r = np.interp(u, along, radius)
        return r * np.cos(2 * np.pi * v), r * np.sin(2 * np.pi * v), np.interp(u, along, height)

    return _bent(place)


def _torus(u: NDArray[np.float64], v: NDArray[np.float64]) -> tuple:
    ring = 1 + 0.35 * np.cos(2 * np.pi * v)
    return ring * np.cos(2 * np.pi * u), ring * np.sin(2 * np.pi * u), 0.35 * np.sin(2 * np.pi * v)


def _spring(u: NDArray[np.float64], v: NDArray[np.float64]) -> tuple:
    ring = 0.8 + 0.15 * np.cos(2 * np.pi * v)
    return ring * np.cos(5 * np.pi * u), ring * np.sin(5 * np.pi * u), 2 * u - 1 + 0.15 * np.sin(2 * np.pi * v)


def _saddle(u: NDArray[np.float64], v: NDArray[np.float64]) -> tuple:
    x, y = 2 * u - 1, 2 * v - 1
    return x, y, 0.8 * (x**2 - y**2)


def _table() -> Triangles:
    legs = [_box(0.1, 0.1, 0.5, (i * 0.8, j * 0.8, -0.5)) for i in (-1, 1) for j in (-1, 1)]
    return np.concatenate([_box(1, 1, 0.08), *legs])


_ARC = np.linspace(0, np.pi, _FINE + 1)
_MESHES: tuple[Triangles, ...] = (
    _turned([(np.sin(a), -np.cos(a)) for a in _ARC]),
    _box(0.8, 0.8, 0.8),
    _turned([(0, -1), (0.7, -1), (0.7, 1), (0, 1)]),
    _turned([(0, -1), (0.9, -1), (0, 1)]),
    _bent(_torus),
    _hull([(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]),
    _bent(_spring),
    _bent(_saddle),
    _table(),
    _turned([(0.9, 1), (0.15, 0.1), (0.1, -0.9), (0.6, -1), (0, -1)]),
)
SOLIDS = ("ball", "box", "cylinder", "cone", "torus", "tetrahedron", "spring", "saddle", "table", "goblet")
