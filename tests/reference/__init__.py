"""Oracles: slow, float64, by definition; none of them imports the library."""
