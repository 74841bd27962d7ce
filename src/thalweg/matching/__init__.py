"""Who meets whom, and the next layer by least squares."""
