"""Adapters that put moesaic into what people already use; each is imported by its own name."""
