"""Train, compare and draw any model of named modalities.

A model is a subclass of `model.Model` in a file of its own and one line of `model.MODELS`.
`training`, `metrics` and `text` make one training; `cli` its command line; `commands`, `runs`,
`tables`, `baselines` and `figures` run several trainings and show their results.
"""

__all__: list[str] = []
