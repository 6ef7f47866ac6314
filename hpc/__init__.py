"""The login-node side: experiments, instances, templates, submission, the ledger. Imports no torch, numpy or h5py."""

__version__ = "0.1.0"
