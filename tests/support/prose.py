"""Made-up sentences over a small vocabulary, for the tests that need texts."""

import numpy as np

VOCABULARY = (
    "the a value key name list of resource project service instance that is was returned created deleted updated when "
    "if not set default region bucket table cluster policy user role access token request response error state time "
    "number string boolean identifier for in on with by and or to from request must can cannot contain specify optional"
)

WORDS = VOCABULARY.split()


def sentences(n, length=50, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(length // 2, length))) + "." for _ in range(n)]
