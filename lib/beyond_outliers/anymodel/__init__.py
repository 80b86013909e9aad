"""Models that are not ours: what of them can be rounded, what a pass shows of them, and `probe`.

The core imports these modules when a model needs them; users find their names in `quantizers` and `probe`.
"""
