"""Samplers, compiled to tables.

Every sampler in use is linear: the next sample is a sum of a few earlier samples, a few earlier outputs of
the network and fresh noise, with weights that depend on the step and on nothing else. So all the mathematics
of a sampler can be done before the run. What is left is a table, a row for each evaluation of the network:

    in_i    = c_in[i] · x_i                                    goes into the network, with timesteps[i]
    h_i     = p[i] · x_i + q[i] · m_i                          is remembered; m_i is what came out
    x_{i+1} = Σ_k a[i,k] · x_{i−k} + Σ_k b[i,k] · h_{i−k} + n[i] · z_i

h is what the sampler extrapolates: a prediction of the clean latent, of the noise, or the raw output. One
loop over the rows runs Euler, DPM++ 2M and UniPC alike, without a branch, on the last 3 x and 4 h.

Take Euler, from noise level σ to σ', and a network that predicts noise: c_in = 1/√(σ² + 1); p = 1 and q = −σ
make h the clean latent; x' = (σ'/σ) · x + (1 − σ'/σ) · h gives a[0] and b[0]. A sampler that evaluates the
network twice a step has two rows a step; one that adds noise has n.

    scheduler = Scheduler.from_config(scheduler_config, "dpmpp-2m-karras")
    schedule = scheduler.schedule(20)

Each sampler is one file here: its options, and a function that fills the table in the symbols of its paper.
"""

from rt.samplers.names import SAMPLERS
from rt.samplers.scheduler import Scheduler
from rt.samplers.shortcuts import shorten
from rt.samplers.spacing import SPACINGS
from rt.samplers.table import Schedule

__all__ = ["SAMPLERS", "SPACINGS", "Schedule", "Scheduler", "shorten"]
