"""What students and a served teacher say to each other, how it travels, and how a teacher says no.

A call's bytes: messages; what they hold: requests and calls; refusals, secrets. shared_memory: where answers lie on one host.
"""
