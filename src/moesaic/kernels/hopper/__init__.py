"""Gluon kernels for Hopper (sm_90): wgmma, TMA, warp specialisation; bf16 and fp16 forward."""
