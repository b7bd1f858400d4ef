"""What `kernel serve` takes. Imported for its help, so it imports nothing heavy."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  kernel serve -m tiny-chat
  kernel serve -m ./my-checkpoint --host 0.0.0.0 --port 8080 --api-key SECRET --set engine.max_requests=64
  kernel serve --uds /run/kernel/http --api-processes 2 --max-queue 512
  kernel serve --config kernel.toml --ssl-certfile chain.pem --ssl-keyfile key.pem

Every flag of the group "server" is a key of [plugins.openai_server] in the configuration file and overrides it; --set
plugins.openai_server.KEY=VALUE reaches the keys that have no flag. Keys on the command line are seen by other users of this
machine: use the file, or the environment variable KERNEL_API_KEY.

SIGTERM or Ctrl-C: new connections are refused, what runs may end within --drain-seconds; once more: everything stops at once.
"""

#: flags that are keys of the section
FLAGS = (
    *("host", "port", "uds", "root_path", "served_model_name", "api_keys", "ssl_certfile", "ssl_keyfile"),
    *("api_processes", "max_queue", "drain_seconds", "max_restarts"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("-m", dest="model", metavar="NAME", help="short for --model")
    server = parser.add_argument_group("server")
    server.add_argument("--host", metavar="ADDRESS", help="address to serve on (127.0.0.1)")
    server.add_argument("--port", type=int, metavar="N", help="port to serve on; 0: any free one, which is printed (8000)")
    server.add_argument("--uds", metavar="PATH", help="serve on a Unix socket instead")
    server.add_argument(
        "--api-key", action="append", dest="api_keys", metavar="KEY", help="what clients must send; may be repeated"
    )
    server.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="what clients call the model; the first one is shown to them"
    )
    server.add_argument("--root-path", metavar="PATH", help="where a proxy mounts this server, as /llm")
    server.add_argument("--ssl-certfile", metavar="FILE", help="certificate chain in PEM; serves https")
    server.add_argument("--ssl-keyfile", metavar="FILE", help="its private key")
    server.add_argument("--api-processes", type=int, metavar="N", help="processes that speak HTTP (1)")
    server.add_argument("--max-queue", type=int, metavar="N", help="unfinished requests beyond which new ones get 429")
    server.add_argument("--drain-seconds", type=float, metavar="S", help="time for running requests after SIGTERM (30)")
    server.add_argument("--max-restarts", type=int, metavar="N", help="restarts in a row of a process that dies (5)")
