"""A fault campaign: every program is killed, interrupted, run out of disk and given damaged files; `python -m tests.faults` runs it whole.

A try runs the text of a program, unchanged, in a folder of its own, with one fault; then, where the fault is not in the files, the same
command again. Allowed are a refusal (one line that names the file), or what an undisturbed run gives, bit for bit.
"""
