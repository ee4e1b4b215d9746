"""The executors of the paper's layer, one a file; see `executor.registry`."""
