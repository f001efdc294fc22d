"""A checkpoint's tensors wherever they are: mapped files of this machine, or ranges of S3 objects."""
