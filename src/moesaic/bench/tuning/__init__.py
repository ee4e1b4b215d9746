"""`moesaic tune`: candidates, their times on this GPU, and the table of the fastest."""
