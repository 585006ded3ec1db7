"""The analysis behind `analyze_results` and `evaluate_performance`: tables, statistics, figures, report."""

import os

if os.environ.get(
    "MPLBACKEND"
):  # figures are drawn without one; but matplotlib is not imported with a wrong one
    try:
        import matplotlib  # noqa: F401
    except ValueError:
        del os.environ["MPLBACKEND"]
