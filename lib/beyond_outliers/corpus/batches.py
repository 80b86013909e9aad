"""Training batches of token ids that depend on (seed, step) alone."""

import numpy as np


class Batches:
    """Training batches that depend on (seed, step) alone: no state to save, nothing to replay on a resume.

    Every epoch cuts the tokens into windows of `context` + 1 from a random offset and visits them in a random order.
    The global batch of a step is the same for any number of workers; a worker takes its slice of it.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch_size: int, seed: int):
        if len(tokens) < 2 * context + 1:
            raise ValueError(f"{len(tokens)} tokens are too few for windows of {context} tokens")
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        self.windows = (len(tokens) - 1) // context - 1  # an epoch; one window less leaves room for the offset
        self._epochs: dict[int, np.ndarray] = {}

    def _starts(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            starts = rng.permutation(self.windows) * self.context + rng.integers(self.context)
            self._epochs = {e: s for e, s in self._epochs.items() if e == epoch - 1} | {epoch: starts}
        return self._epochs[epoch]

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(ids, targets) of worker `rank`, each (batch_size / world, context) int64, targets one token ahead."""
        if self.batch_size % world:
            raise ValueError(f"batch_size {self.batch_size} does not divide among {world} workers")
        share = self.batch_size // world
        first = step * self.batch_size + rank * share
        positions = range(first, first + share)
        starts = np.array([self._starts(p // self.windows)[p % self.windows] for p in positions])
        window = self.tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)
        return window[:, :-1], window[:, 1:]
