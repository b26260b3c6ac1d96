"""Which checkpoint of the teacher teaches which step of the student; pure but for the run's records.

policies and transition resolve a schedule to a plan (resolve: over a trajectory); plan has that map, and how versions and
decisions change it; adaptive has the rule of decisions; changes and reports keep both on disk; record holds a resumed run to its
teachers.
"""
