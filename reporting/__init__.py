"""The analysis behind `analyze_results` and `evaluate_performance`: tables, statistics, figures, report."""
