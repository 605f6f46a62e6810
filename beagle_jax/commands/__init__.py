"""Implementation of each command.

The entry points beside this folder parse the command line first, because these modules import jax.
"""
