"""One op, one module: the torch reference of each, behind one typed function."""
