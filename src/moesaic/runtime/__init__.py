"""What runs beside the hot path: slices and their policies, plans, executors."""
