"""Engine-core process: who is compacted when, and which blocks that takes. No CUDA, no tensors."""
