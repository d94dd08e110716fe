"""Training a deep autoencoder on drawn curves; `python -m benchmarks.curves`."""
