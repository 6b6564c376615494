"""The other systems of Table 1, one file each."""

__all__: list[str] = []
