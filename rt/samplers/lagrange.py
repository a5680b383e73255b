"""Lagrange polynomials, for the samplers that integrate an interpolation of their history."""

from __future__ import annotations

import numpy as np
from numpy.polynomial import Polynomial

from rt.samplers.noise_schedule import Floats


def lagrange_basis(nodes: Floats) -> list[Polynomial]:
    """The polynomials that are 1 at one of the nodes and 0 at the others, in the order of the nodes.

    Where two nodes are the same, coefficients are not finite.
    """
    basis = []
    for i, node in enumerate(nodes):
        polynomial = Polynomial([1.0])
        for other in np.delete(nodes, i):
            polynomial *= Polynomial(np.array([-other, 1.0]) / (node - other))
        basis.append(polynomial)
    return basis
