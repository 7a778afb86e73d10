"""What the sessions of nox are made of."""
