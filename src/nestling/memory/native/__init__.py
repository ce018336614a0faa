"""The chunk engine in C for the most used memories, one memory after the other in a core's cache; see `scan.c`."""

from nestling.memory.native.scan import LONGEST, Cell, anchored, scan, serves

__all__ = ["LONGEST", "Cell", "anchored", "scan", "serves"]
