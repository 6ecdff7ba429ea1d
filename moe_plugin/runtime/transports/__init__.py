"""Transports: who moves tokens between ranks, behind one small protocol."""
