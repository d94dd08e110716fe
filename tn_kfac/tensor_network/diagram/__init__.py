"""The geometry of tensor-network diagrams; `draw` puts it on paper."""
