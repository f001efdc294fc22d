"""`kvrelay simulate`: a fleet on a virtual clock, under the real scaler policy and placement.

`loads` and `kvrelay_bench.serve.traces` say what arrives, `workers` how fast it is worked off,
`simulation` moves the clock, `policies` says who decides, `oracle` what could have been had.
"""
