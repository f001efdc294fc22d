"""`kvrelay bench router`: what the router adds to a request and what a streamed token costs it."""
