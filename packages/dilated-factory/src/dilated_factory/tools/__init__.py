"""What the command line measures, plans and draws."""
