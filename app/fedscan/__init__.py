"""fedscan: federated training of medical-imaging models with patient-level differential privacy.

The map of the house, for a first reading of ten minutes:

    fedscan/__init__.py            here: the Python API; `cli` is the command line
    fedscan_client/app.py          how a site answers a server: permit, reserve, train, settle, check, reply
    fedscan_client/dp/engine.py    one patient's gradient, clipped; dp/noise.py and dp/ledger.py beside it
    fedscan_server/app.py          the round loop
    fedscan_core/wire.py           everything that travels between the two

>>> import fedscan
>>> summary = fedscan.simulate("configs/quickstart.toml", out="runs/quickstart")  # doctest: +SKIP

`simulate` and `resume` are those of `fedscan.simulation`; importing this module loads neither torch nor Flower.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedscan.simulation import resume, simulate

__all__ = ["resume", "simulate"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from fedscan import simulation

        return getattr(simulation, name)
    raise AttributeError(f"module 'fedscan' has no attribute '{name}'")
