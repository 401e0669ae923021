"""cpt_mega: continued pretraining on megatron-core.

The floors, from the bottom: ``config``, ``lineage``, ``errors`` (words and digests); ``data``, ``hf`` (no process
group, no GPU); ``engine`` (the only room that touches megatron-core); ``checkpoint``, ``gates``; ``loop``; and the
entry modules ``train``, ``score`` and ``launch``. A room imports only from the floors below it.
"""

__version__ = "0.1.0"
