"""The only room that touches megatron-core.

Importing it prepares the host first: without CUDA, core's few CUDA calls get their CPU meaning before core itself is
imported. Nothing above this room knows which of the two it runs on.
"""

from cpt_mega.engine import host

host.prepare()
