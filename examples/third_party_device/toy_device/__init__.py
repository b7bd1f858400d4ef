"""The light side of the toy device: what it is called, whether it can run here, and where its parts are."""

from kernel_core.api import Manifest, hookimpl

manifest = Manifest(name="toy", summary="A device in under 200 lines: its own KV layout, attention and two ops")


@hookimpl
def probe_device(section):
    return None  # plain torch runs everywhere; otherwise: the reason why not, in one line


@hookimpl
def make_device(context, rank, world_size):
    from toy_device.device import ToyDevice

    return ToyDevice()


@hookimpl
def make_attention(context):
    from toy_device.attention import ToyAttention

    return [ToyAttention()]


@hookimpl
def register_ops(context, ops):
    from toy_device import kernels

    kernels.register(ops)
