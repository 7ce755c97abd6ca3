"""``make bench-gpu``: builds, checks every op on the GPU against float64, then times it beside what people use instead.

``__main__.py`` is the command line and ``runner.py`` runs the parts, each in a process of its own, because a kernel that
reads where it must not takes the whole CUDA context with it. ``machine.py`` is all that touches the GPU, and has a stand-in on the
CPU for rehearsals; ``bars.py`` knows what must be reached and draws the table. The other modules are one part each.
"""
