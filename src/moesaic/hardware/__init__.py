"""What the machine is: for now, what `moesaic doctor` finds."""
