"""Fast kernels of the ops, one file each; `register.py` has the table. Importing the package registers them."""

from .register import extension as extension
