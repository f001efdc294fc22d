"""`kvrelay bench compile-gate`: what the compiler makes of the kernels, and the least times of their work."""
