"""What each command does once its command line has been read. The entry points beside this folder
parse first: these files load jax.
"""
