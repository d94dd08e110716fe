"""Tests of the symbolic core against the definition of a tensor network in oracle.py."""
