"""Leaf package: kernels, their launchers and their torch twins; torch and triton only."""
