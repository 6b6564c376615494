"""DecAlign, the reference model, assembled from the public names of multialign.

`model` reads like Section 3 of the paper, with the layers of `layers`; `objective` is Eq. 1 to 13;
`data` has the data sets. What trains, compares and draws models is `examples.benchmarking`. In the
repository's root, ``python -m examples.decalign --help`` lists the commands.
"""

__all__: list[str] = []
