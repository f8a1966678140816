"""What the GPU kernels do on the card at hand: `python -m benchmarks.gpu`."""
