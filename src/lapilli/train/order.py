"""Which samples a step reads: a function of seed and step, so resuming needs no kept state."""

import numpy as np
from numpy.typing import NDArray


def draw_indices(num_samples: int, batch_size: int, number: int, *, seed: int) -> NDArray[np.int64]:
    """Samples of batch `number` (counted from 0), int64 [batch_size].

    Every epoch is another permutation; a batch may reach over the end of an epoch into the next.
    """
    places = np.arange(number * batch_size, (number + 1) * batch_size)
    epochs, offsets = np.divmod(places, num_samples)
    out = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, int(epoch), 29]).permutation(num_samples)
        out[epochs == epoch] = order[offsets[epochs == epoch]]
    return out
