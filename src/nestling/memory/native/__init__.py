"""The chunk engine in C for the most used memories, one memory after the other in a core's cache; see `tile.h`, `lattice.h`."""

from nestling.memory.native.choose import Declined, only, scan, serves
from nestling.memory.native.scan import Cell, makes
from nestling.memory.native.self_modifying import cells
from nestling.memory.native.self_modifying import scan as scan_self_modifying
from nestling.memory.native.slots import scan as scan_slots

__all__ = ["Cell", "Declined", "cells", "makes", "only", "scan", "scan_self_modifying", "scan_slots", "serves"]
