"""What tests share: worlds of processes, small recipes, and what their workers run."""
