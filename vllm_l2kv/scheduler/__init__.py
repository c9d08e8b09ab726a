"""Engine-core process: decides when each request is compacted, and which blocks that takes. No CUDA, no tensors."""
