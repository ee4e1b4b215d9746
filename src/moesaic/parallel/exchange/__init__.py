"""How token rows get to the ranks of their experts, and the experts' rows back."""
