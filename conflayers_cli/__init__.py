"""conflayers: self-speculative decoding with layers left out, found by calibration.

The command line lives in :mod:`conflayers_cli.cli`, the decoding engine in
:mod:`conflayers_cli.engine`, the methods that choose layers in :mod:`conflayers_cli.search`.
"""

__version__ = "0.1.0"
