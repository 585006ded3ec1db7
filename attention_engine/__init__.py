"""The attention engine behind `attention_kernels.attend`: scores, masks, fast backends."""
