"""The life of a request: types, the pure state machine, placement, and the shell that runs them."""
