"""Symbolic tensor networks: derived, simplified, planned; torch only to evaluate them."""
