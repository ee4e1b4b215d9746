"""The parts of `examples/train_moe_lm.py`: text, n-gram baseline, trainable experts, report."""
