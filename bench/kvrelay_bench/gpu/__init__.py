"""`kvrelay bench gpu`: kernels and engine against the limits of the GPU they run on."""
