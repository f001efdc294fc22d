"""What is said between the processes: control messages, errors, trace context, model references."""
