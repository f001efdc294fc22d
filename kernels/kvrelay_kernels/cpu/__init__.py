"""C++ kernels for CPUs: compiled for this machine at first use, cached, called through ctypes."""
