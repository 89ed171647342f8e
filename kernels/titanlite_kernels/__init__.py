"""Fused operations, usable without titanlite: each file holds one operation, its torch reference first."""
