"""The chunk engine in C for the most used memories, one memory after the other in a core's cache; see `tile.h`."""

from nestling.memory.native.call import Given
from nestling.memory.native.lanes import Ends, Stand
from nestling.memory.native.runs import Runs, runs
from nestling.memory.native.scan import Cell, Scan, anchored, log, serves
from nestling.memory.native.self_modifying import Scan as SelfModifyingScan
from nestling.memory.native.self_modifying import cells

__all__ = ["Cell", "Ends", "Given", "Runs", "Scan", "SelfModifyingScan", "Stand", "anchored", "cells", "log", "runs", "serves"]
