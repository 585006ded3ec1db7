"""The tasks behind `data_pipeline`: reading, making, tokenizing and batching."""
