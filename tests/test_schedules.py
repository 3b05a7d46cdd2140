"""Learning rates against DINO's schedule written out."""

from cplearn.schedules import lr_at


def test_schedules_are_dinos():
    """Written out for ten epochs of ten steps, two of warm-up."""
    import numpy as np

    warmup = np.linspace(0, 0.1, 20)
    rest = np.array([0.001 + 0.5 * (0.1 - 0.001) * (1 + np.cos(np.pi * i / 80)) for i in range(80)])
    got = [lr_at(s, lr=0.1, min_lr=0.001, warmup_steps=20, total_steps=100) for s in range(100)]
    np.testing.assert_allclose(got, np.concatenate([warmup, rest]))
