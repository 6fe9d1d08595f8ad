"""How far generated images are from real ones, as numbers: a table of metrics and one way to measure them.

`evaluate(sampler, real, names)` gives `{name: value}`; an `Evaluator` keeps what belongs to the real images for
further samplers and gives spread, details and caveats too. Nothing is ever downloaded. A number is called FID only
where the user brings the Inception weights it is defined by.
"""

from gpkernels.metrics.distances import frechet_distance, gaussian_frechet, kid, precision_recall
from gpkernels.metrics.evaluator import Evaluator, evaluate
from gpkernels.metrics.reconstruction import minimum_reconstruction_error
from gpkernels.metrics.sliced import pyramid_wasserstein, sliced_wasserstein
from gpkernels.metrics.table import METRICS, Metric, Result

__all__ = [
    "METRICS",
    "Evaluator",
    "Metric",
    "Result",
    "evaluate",
    "frechet_distance",
    "gaussian_frechet",
    "kid",
    "minimum_reconstruction_error",
    "precision_recall",
    "pyramid_wasserstein",
    "sliced_wasserstein",
]
