"""What people run in production beside a plain server, each served on two GPUs.

A process per file: several at once share the GPUs, and :func:`.machine.turn` lets one of them load
its server at a time. Each test says with ``seen`` what it saw; :mod:`.records` writes it down.
"""
