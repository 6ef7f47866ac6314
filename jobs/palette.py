"""The colour of each class, the same in all pictures and figures, and safe for readers who see two hues less.

The first are Okabe and Ito's (Color Universal Design, 2008). Each further one is the colour of a grid that lies
farthest from all before it, by the least distance that normal, protan and deutan eyes see (OKLab; Machado, Oliveira and
Fernandes, 2009). So the colour of a class depends on its number alone. From about a dozen classes on no palette keeps
all apart: names, signs and line styles must do the rest.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]
"""red, green, blue of 0 to 255"""

FIRST: tuple[Colour, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
)
MOST = 256
"""colours that differ; class 256 has that of class 0 again"""
RIGHT, WRONG = (0, 158, 115), (213, 94, 0)
FALSE_POSITIVE, FALSE_NEGATIVE, OTHER_CLASS, IGNORED = (255, 130, 0), (0, 170, 255), (255, 240, 80), (128, 128, 128)
"""of voxels: labelled where nothing is, missed, given another class, left out of loss and counts"""
DASHES = ("-", "--", "-.", ":")

_GRID = 14
_DARKEST, _LIGHTEST = 0.40, 0.80  # seen on white and on grey pictures
_EYES = np.array(
    [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ]
)
"""normal, protan, deutan: matrices on linear red, green, blue"""


def class_colour(number: int) -> Colour:
    """Of a class number (of a label value: 0 is the background, which pictures leave bare)."""
    red, green, blue = _colours()[number % MOST].tolist()
    return red, green, blue


def shade(number: int) -> tuple[float, float, float]:
    """The class's colour as matplotlib takes it, parts of 1."""
    red, green, blue = class_colour(number)
    return red / 255, green / 255, blue / 255


def dash(number: int) -> str:
    """The class's line style: a second sign beside the colour."""
    return DASHES[number // len(FIRST) % len(DASHES)]


def seen(colours: NDArray[np.floating]) -> NDArray[np.float64]:
    """(N, 3) of 0 to 255 -> (N, 3 eyes, 3) in OKLab, where the Euclidean distance is the difference one sees."""
    share = np.asarray(colours, np.float64) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    eyes = np.clip(np.einsum("eij,nj->nei", _EYES, linear), 0, 1)
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.asarray(np.cbrt(eyes @ cones.T) @ lab.T)


@cache
def _colours() -> NDArray[np.int64]:
    """(MOST, 3)."""
    axis = np.linspace(0, 255, _GRID).round()
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    places = seen(grid)
    fits = (places[:, 0, 0] > _DARKEST) & (places[:, 0, 0] < _LIGHTEST)
    grid, places = grid[fits], places[fits]
    chosen = [np.array(colour, np.float64) for colour in FIRST]
    nearest = np.full(len(grid), np.inf)
    for number in range(MOST):
        if number >= len(FIRST):
            chosen.append(grid[int(nearest.argmax())])
        apart = np.linalg.norm(places - seen(chosen[number][None]), axis=2).min(axis=1)
        nearest = np.minimum(nearest, apart)
    return np.array(chosen).astype(np.int64)
