"""DecAlign, the reference model, assembled from the public names of multialign.

From the repository's root, ``python -m examples.decalign --help`` lists the commands. The files, in
the order in which data flows: `data`, `targets`, `text`, `encoders`, `transformer`, `network`,
`model` (and the baselines `mult`, `misa`), `switches`, `objective`, `metrics`, `task`; what runs
one training: `callbacks`, `cli`; what runs many and shows them: `runs`, `baseline`, `report`,
`commands`, `figures`, `draw`; what makes features: `extract`.
"""
