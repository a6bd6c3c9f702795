"""Experiments: a paper's table or figure each, `python -m experiments.NAME`.

  python -m experiments.kimi_fig4                              all of it, at the size for two CPU cores
  python -m experiments.kimi_fig4 --only=task=mqar,mixer=kda|mamba2
  python -m experiments.state_tracking --size=paper --seeds=3  the published protocol, for accelerators
  python -m experiments.kimi_fig4 --report                     the report of what has been run so far

A file here names its cells (experiments/cells.py says what a cell is); experiments/harness.py runs them,
experiments/report.py tells of them. Finished runs are never run again and broken ones go on where they were, so an
experiment may take as many sittings as it likes.
"""
