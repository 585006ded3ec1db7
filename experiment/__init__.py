"""The experiment above the trainer and below `run_experiment`: models, plan, cells, executors."""
