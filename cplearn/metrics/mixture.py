"""The entropy of representations, by a Gaussian mixture fitted to them (Fig. 6b, 13b and 15 of the paper)."""

import math
import warnings

import numpy as np
from torch import Tensor

IMAGES_PER_COMPONENT = 10  # of a mixture; with fewer, its fit says more of single images than of their distribution


def mixture_entropy(x: np.ndarray, components: int, *, samples: int, seed: int) -> tuple[float | None, str]:
    """Fit a Gaussian mixture with diagonal covariances; return its entropy per dimension (nats), and how the fit went.

    The entropy is a Monte Carlo estimate; None where there is no usable fit. Shape: (n, f).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    if components > len(x):
        return None, f"more components than the {len(x)} images"
    if (x == x[0]).all():
        return None, "all images have the same features"
    model = GaussianMixture(components, covariance_type="diag", random_state=seed, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of the k-means that starts it; `converged_` is read below
        try:
            model.fit(x)
            entropy = -float(model.score_samples(model.sample(samples)[0]).mean()) / x.shape[1]
        except ValueError as error:
            return None, str(error).strip().splitlines()[0]
    if not math.isfinite(entropy):
        return None, "entropy not finite"
    if not model.converged_:
        return entropy, "stopped before it converged"
    per_component = len(x) / components
    return entropy, "ok" if per_component >= IMAGES_PER_COMPONENT else f"only {per_component:.1f} images per component"


def scaled(features: Tensor) -> np.ndarray:
    """Scale to 0..1 by the minimum and maximum of all entries, so that entropies of networks can be compared."""
    low, high = features.min(), features.max()
    return ((features - low) / (high - low).clamp(min=1e-30)).double().numpy()
