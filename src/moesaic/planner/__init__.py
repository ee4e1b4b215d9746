"""The planner: what a deployment will do, before the cluster is rented."""
