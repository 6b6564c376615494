"""The switches of Table 2."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Switches"]


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Parts of DecAlign. False removes a part: its computation, not only its weight.

    Args:
        mfd: Decoupling. Without it there is no common encoder and no Eq. 1; both the heterogeneous
            and the homogeneous branch use the unique encoder of each modality.
        hete: Prototype alignment of the unique features, Eq. 2-9. The transformers are part of the
            fusion (Sec. 3.4) and stay.
        homo: Everything of Sec. 3.3: the distribution encoder, Eq. 10 and Eq. 11-12. Without it,
            the head uses the common features directly.
        proto_ot: The transport term of Eq. 9. Without it, its weight is 0; the sample-to-prototype
            term stays.
        sem: Moment matching, Eq. 10.
        mmd: Distribution matching, Eq. 11-12, with the distribution encoder.
        ct: Contrastive training, off by default. Table 2 has a column for it, but Eq. 13 has no
            term and the paper no formula. Here it is the supervised contrastive loss (Khosla et
            al., 2020) of the common features of all modalities, with the categories of the task.
    """

    mfd: bool = True
    hete: bool = True
    homo: bool = True
    proto_ot: bool = True
    sem: bool = True
    mmd: bool = True
    ct: bool = False
