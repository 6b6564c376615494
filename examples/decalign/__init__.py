"""DecAlign, the reference model, assembled from the public names of multialign.

In the repository's root, ``python -m examples.decalign --help`` lists the commands. The modules of
the model, in the order in which data flows, are `data`, `targets`, `text`, `encoders`,
`transformer`, `network`, `model` (and the baselines `mult`, `misa`), `switches`, `objective`,
`metrics`, `task`. `callbacks` and `cli` run one training. `runs`, `baseline`, `report`, `commands`,
`figures` and `draw` run many trainings and show their results. `extract` computes features.
"""
