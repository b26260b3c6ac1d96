"""The service as its clients see it, without its database: http is the API, and says once that it is away and back again.

changes is a run's line to it, made of registration, sender and listener; lease is what replicas hold and students read.
"""
