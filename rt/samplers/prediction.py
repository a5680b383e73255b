"""From what the network predicts to what a sampler extrapolates: h = p · x + q · m.

For a sample x = α · x_0 + σ · ε, whatever its scale (α = 1 for the samplers of Karras et al., α² + σ² = 1 for
the others), the network's output m is ε, x_0, or the velocity v = (α · ε − σ · x_0) / √(α² + σ²)
(Salimans and Ho, arXiv:2202.00512, appendix D).
"""

from __future__ import annotations

import numpy as np

from rt.samplers.noise_schedule import Floats


def x0_form(prediction_type: str, alpha: Floats | float, sigma: Floats) -> tuple[Floats, Floats]:
    """(p, q) such that p · x + q · m is the predicted clean latent x_0."""
    alpha, sigma = np.broadcast_arrays(alpha, sigma)
    norm = np.hypot(alpha, sigma)
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha / norm**2, -sigma / norm
    return np.zeros_like(alpha), np.ones_like(alpha)


def eps_form(prediction_type: str, alpha: Floats | float, sigma: Floats) -> tuple[Floats, Floats]:
    """(p, q) such that p · x + q · m is the predicted noise ε."""
    alpha, sigma = np.broadcast_arrays(alpha, sigma)
    norm = np.hypot(alpha, sigma)
    if prediction_type == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction_type == "v_prediction":
        return sigma / norm**2, alpha / norm
    return 1 / sigma, -alpha / sigma
