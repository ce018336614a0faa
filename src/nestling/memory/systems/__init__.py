"""The named systems, a file for each source: each reads as its choices."""

from nestling.memory.systems import atlas, classics, hope, lattice, miras, titans, tnt, trellis

__all__ = ["atlas", "classics", "hope", "lattice", "miras", "titans", "tnt", "trellis"]
