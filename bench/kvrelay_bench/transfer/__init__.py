"""`kvrelay bench transfer`: how fast KV blocks get from one process to another, stage by stage."""
