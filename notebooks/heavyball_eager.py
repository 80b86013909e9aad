"""heavyball's KL-Shampoo without torch.compile, which on a CPU compiles for longer than a small run trains.

    make compare SCALE=pocket OPTIMIZER=notebooks.heavyball_eager:KLShampoo HYPER="roles = ['matrix'], rest_lr = 1e-2"

A file of your own for `make compare` is like this one: it holds a class, or a function that makes a torch optimizer.
"""

import heavyball
import heavyball.utils

heavyball.utils.compile_mode = None  # heavyball looks at it when one of its functions is first called

KLShampoo = heavyball.KLShampoo
