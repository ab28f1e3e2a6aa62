"""Other people's quantizers on the same job as ours, each in an environment of its own, and the table that compares.

They make artifacts; what runs artifacts is in quantkit/engines/.
"""
