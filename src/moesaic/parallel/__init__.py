"""Experts spread over ranks: where each one lives, and how tokens get there and back."""
