"""Experiments: grids of runs by methods and seeds, and what they say together."""

from megapd.experiments.spec import Cell as Cell
from megapd.experiments.spec import Sweep as Sweep
from megapd.experiments.spec import load_sweep as load_sweep
