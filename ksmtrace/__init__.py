"""ksmtrace makes Linux KSM (kernel samepage merging) observable."""

__version__ = "0.1.0"
