"""The single reasons for which a packet can be lost: each looks whether it holds where the packet was last seen.

A reason returns its cause, or None where it does not hold.
"""
