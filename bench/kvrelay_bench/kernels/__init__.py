"""The CPU kernels one by one, beside what the machine can read and multiply, and beside torch."""
