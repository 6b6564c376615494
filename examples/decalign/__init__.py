"""DecAlign, the reference model, assembled from the public names of multialign.

From the repository's root, ``python -m examples.decalign --help`` lists the commands. The files,
in the order in which data flows: `data`, `encoders`, `transformer`, `model`, `objective`, `task`;
then what runs them: `cli`, `table`, `baseline`, `figures`.
"""
