"""The evaluation of the expert-slicing paper, regenerated: configurations, executors, claims."""
