"""The experiment behind `run_experiment` and `train_and_evaluate`: encoder, plan, cells, checkpoints."""
