"""Tests of the public operations against the independent geometry in reference.py."""
