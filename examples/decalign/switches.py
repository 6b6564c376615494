"""The switches of Table 2: what each removes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Switches"]


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Parts of DecAlign. False removes one, its computation and not only its weight.

    Args:
        mfd: Decoupling. Without it there is no common encoder and no Eq. 1: one encoder a
            modality serves the heterogeneous and the homogeneous branch alike.
        hete: Prototype alignment of the unique features, Eq. 2-9. The transformers stay: they are
            part of the fusion (Sec. 3.4).
        homo: Everything of Sec. 3.3: the distribution encoder, Eq. 10 and Eq. 11-12. The head
            reads the common features as they are.
        proto_ot: The transport term of Eq. 9, whose weight becomes 0; its sample-to-prototype term
            stays.
        sem: Moment matching, Eq. 10.
        mmd: Distribution matching, Eq. 11-12, with the distribution encoder it compares.
        ct: Contrastive training. Off by default: the table has a column for it, Eq. 13 no term, and
            the paper no formula. Here it is the supervised contrastive loss (Khosla et al., 2020)
            of the common features of all modalities, in the categories of the task.
    """

    mfd: bool = True
    hete: bool = True
    homo: bool = True
    proto_ot: bool = True
    sem: bool = True
    mmd: bool = True
    ct: bool = False
