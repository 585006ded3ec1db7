"""The analysis behind `analyze_results` and `evaluate_performance`: tables, statistics, figures, report."""

import contextlib
import os

if wanted := os.environ.pop("MPLBACKEND", None):
    import matplotlib  # which ends with a traceback where it finds a wrong backend there

    os.environ["MPLBACKEND"] = wanted
    with contextlib.suppress(ValueError):  # figures are drawn without one
        matplotlib.rcParams["backend"] = wanted
