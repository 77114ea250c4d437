"""Kernels for CPUs: what torch does in many passes over the maps, in few.

They are C++, compiled for the machine when they are first used; without a compiler torch's own operators do the same,
more slowly. ``problem()`` says why where there are none.
"""

from iaml.kernels.functions import attend, batch_norm, mirror, moments, normalise, similarity, to_image, usable
from iaml.kernels.library import problem

__all__ = ["attend", "batch_norm", "mirror", "moments", "normalise", "problem", "similarity", "to_image", "usable"]
